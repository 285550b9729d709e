"""Every learner on a pretended CUDA device: nothing on two devices, no wait for the device inside a step, few outside.

What a learner declares in `waits` is let pass: {"path:of the project" or operator: reason}.
"""

import io
import pickle
from collections import Counter

import pytest
import torch

from data.stream import DataManager
from models.base import LEARNERS
from models.factory import build_learner, config_from, learner_class
from models.parts.blocks import Blocks
from models.parts.evaluation import evaluate
from models.parts.loop import Observer, Position, begin, fit, learn
from models.parts.probe import probe
from models.parts.state import learner_state, restore
from tests.conftest import TINY_VIT, tiny_values, write_stream
from tests.pretend_cuda import CUDA, DeviceTensor, Refused, pretended
from utils.runtime import Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:Converting a tensor with requires_grad"),
]
PER_EPOCH, PER_STAGE = 2, 12  # waits outside of steps: an epoch's loss; drawing, loading, making optimisers
PER_EVALUATION = 2  # right predictions; drift
SAM = {"rho": 0.05, "damping": 25.0}
QDI = {"variant": "qdi", "synthetic_size": 4, "inversion_steps": 2}
# Code of its own beside what the examples of the learners run through.
VARIANTS = {
    "sam": ("finetune", {"sam": SAM, "optimizer": "sgd"}),
    "clipped parts": ("finetune", {"accumulate": 2, "clip_norm": 0.1, "sam": SAM}),
    "on device": ("finetune", {"augment_on": "device", "train_transform": "crop_flip_bicubic_jitter"}),
    "colour on device": ("finetune", {"augment_on": "device", "train_transform": "pad4_crop_flip_colour"}),
    "light": ("slcapp", {"cov_storage": "low_rank", "lora_mlp": True}),
    "shared covariances": ("slca", {"cov_storage": "shared", "upstream": True}),
    "ca": ("inflora", {"ca_epochs": 1, "subspace": "gpm"}),
    "factors on the host": ("slca", {"cov_device": "host"}),
    "directions on the host": ("raa", {"cov_device": "host", "cov_storage": "low_rank", "cov_rank": 3}),
    "ca from the host": ("inflora", {"ca_epochs": 1, "cov_device": "host"}),
    "mos from the host": ("mos", {"cov_device": "host"}),
    "plain lora": ("inflora", {"subspace": "none"}),
    "parameters": ("raa", {"amalgam": "parameter", "branches": 3, "margin": 0.1, "margin_kind": "arcface"}),
    "ssiat": ("raa", {"branches": 1, "sam": None}),
    "qdi": ("hcl", QDI),
    "qdi from noise": ("hcl", QDI | {"statistics_source": "current", "inversion_start": "noise"}),
    "ssf": ("aper", {"petl": "ssf", "bottleneck": None}),
    "vpt": ("ranpac", {"petl": "vpt_deep", "bottleneck": None, "head": "cosine"}),
    "finetune": ("aper", {"petl": "finetune", "bottleneck": None}),
    "no projection": ("ranpac", {"projection": 0, "ridge_slack": 0.01}),
    "rows": ("fecam", {"shrink": None, "upstream": "pilot"}),
    "plain subspace": ("ease", {"use_init_ptm": True, "beta": 1.0, "recalc_sim": False}),
    "merge in every pass": ("mos", {"upstream": True}),
    "variances": ("mos", {"covariance": "diag", "ensemble": False}),
    "lae's adapter": ("lae", {"pet": "adapter", "upstream": "pilot"}),
    "lae's lora": ("lae", {"pet": "lora"}),
    "buffer": ("hcl", {"variant": "distilbuf", "memory_size": 5}),
}
VARIANTS = {variant: case for variant, case in VARIANTS.items() if case[0] in LEARNERS}


class Steps(Observer):
    """The waits of each training step, and of each epoch beside them."""

    def __init__(self, recorder):
        self.recorder, self.steps, self.epochs = recorder, [], []
        self.last: Counter = Counter()

    def _new(self) -> Counter:
        now = self.recorder.waits()
        new, self.last = now - self.last, now
        return new

    def stage_started(self, number):
        self._new()

    def epoch_started(self, batches, done):
        self.epochs.append(sum(self._new().values()))

    def step_done(self, state):
        self.steps.append(self._new())

    def epoch_done(self, state, numbers):
        self.epochs.append(sum(self._new().values()))


def build(tmp_path, name, keys):
    values = tiny_values(tmp_path, name, epochs=2) | keys  # None takes a key away
    config = config_from({key: value for key, value in values.items() if value is not None}, source="test")
    runtime = Runtime("cpu", "bf16", num_workers=0)
    runtime.device = CUDA
    return config, runtime


def on_host(learner):
    """What lies there; blocks that may are to be there, all of them."""
    meant = [block for m in learner.modules() if isinstance(m, Blocks) and m.on_host for block in m.all()]
    assert not any(isinstance(block, DeviceTensor) for block in meant)
    named = [*learner.named_parameters(), *learner.named_buffers()]
    return [
        name
        for name, value in named
        if not isinstance(value, DeviceTensor) and not any(value is block for block in meant)
    ]


def undeclared(waits: Counter, declared: dict[str, str]) -> set:
    return {event for event in waits if not any(word in event[1] or word in event[2] for word in declared)}


def check(tmp_path, name, keys, domains):
    streams = learner_class(name).streams
    if ("domain" if domains else "class") not in streams:
        pytest.skip(f"takes {' and '.join(sorted(streams))}-incremental streams")
    if domains:
        dataset = write_stream(tmp_path / "domains.npz", classes=3, domains=2)
        keys = keys | {"dataset": dataset, "shuffle": False, "increment": None}
    config, runtime = build(tmp_path, name, keys)
    with pretended() as recorder:
        manager = DataManager(config, image_size=16)
        torch.manual_seed(0)
        learner = build_learner(config, runtime, manager[0].info)
        for task in manager[:2]:
            steps = Steps(recorder)
            learn(learner, task, steps)
            steps._new()
            found = evaluate(learner, manager[: task.index + 1])
            of_parts = {event: count for event, count in steps._new().items() if event[2].startswith("models/parts/")}
            assert sum(of_parts.values()) <= PER_EVALUATION, of_parts
            assert not on_host(learner)
            for waits in steps.steps[1:]:  # the first one uploads what stays ("augment_on": "device")
                wrong = undeclared(waits, learner.waits)
                assert not wrong, f"the host waits in a training step: {wrong}"
            assert all(count <= PER_STAGE for count in steps.epochs[:1])
            assert all(count <= PER_EPOCH for count in steps.epochs[1:]), steps.epochs
        file = io.BytesIO()
        torch.save(learner_state(learner), file)
        file.seek(0)
        other = build_learner(config, runtime, manager[1].info)
        restore(other, torch.load(file, map_location="cpu", weights_only=True))
        assert not on_host(other)
        assert (evaluate(other, manager[:2]).correct == found.correct).all()
        other.data = manager[1]
        if stages := other.stages(manager[1]):
            other.stage = stages[0]
            fit(other, manager[1])  # parts that came from the CPU take part in a step


@pytest.mark.parametrize("domains", [0, 2], ids=["classes", "domains"])
def test_a_stream_stays_on_the_device(learner_name, domains, tmp_path):
    check(tmp_path, learner_name, {}, domains)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_stays_on_the_device(variant, tmp_path):
    check(tmp_path, *VARIANTS[variant], 0)


class AlikeProcesses:
    """Stands for torch.distributed: each of two processes holds what this one does. Objects travel by pickle."""

    def is_initialized(self):
        return True

    def all_reduce(self, values):
        values.mul_(2)

    def all_gather(self, found, values):
        for copy in found:
            copy.copy_(values)

    def all_gather_object(self, found, value):
        found[:] = [pickle.loads(pickle.dumps(value)) for _ in found]

    def barrier(self):
        pass


def as_two_processes(monkeypatch, runtime):
    monkeypatch.setattr("utils.runtime.dist", AlikeProcesses())
    monkeypatch.setattr(runtime, "wrap", lambda network: network)
    runtime.world = 2


@pytest.mark.parametrize("name", [*LEARNERS, *(variant for variant in VARIANTS if VARIANTS[variant][0] == "hcl")])
def test_no_tensor_of_the_device_is_pickled_for_another_process(name, tmp_path, monkeypatch):
    """Unpickled, it would open a context on the card of the process that sent it."""
    config, runtime = build(tmp_path, *VARIANTS.get(name, (name, {})))
    as_two_processes(monkeypatch, runtime)
    with pretended() as recorder:
        manager = DataManager(config, image_size=16)
        learner = build_learner(config, runtime, manager[0].info)
        for task in manager[:2]:
            learn(learner, task)
            evaluate(learner, manager[: task.index + 1])
    assert not [event for event in recorder.events if event[1] == "pickle"]


class Stop(Exception):  # noqa: N818 - no error
    pass


def test_a_learner_resumed_inside_a_task_stays_on_the_device(learner_name, tmp_path):
    """A state saved in the middle of the second task's training, loaded on the host and put on the device."""
    config, runtime = build(tmp_path, learner_name, {})
    saved = {}

    class Cut(Observer):
        def step_done(self, state):
            if state.epoch == 1 and state.step == 1:
                file = io.BytesIO()
                torch.save({"learner": learner_state(learner), "fit": state.state_dict()}, file)
                file.seek(0)
                saved.update(torch.load(file, map_location="cpu", weights_only=True))
                raise Stop

    with pretended():
        manager = DataManager(config, image_size=16)
        learner = build_learner(config, runtime, manager[0].info)
        learn(learner, manager[0])
        if not learner.stages(manager[1]):
            pytest.skip("trains nothing in its second task")
        with pytest.raises(Stop):
            learn(learner, manager[1], Cut())
        other = build_learner(config, runtime, manager[1].info)
        restore(other, saved["learner"])
        learn(other, manager[1], position=Position("fit", 0, saved["fit"]))
        assert evaluate(other, manager[:2]).main.shape == (3, 2)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_a_probe_stays_on_the_device(kind, tmp_path):
    config, runtime = build(tmp_path, "finetune", {})
    with pretended():
        manager = DataManager(config, image_size=16)
        learner = build_learner(config, runtime, manager[0].info)
        begin(learner, manager[0])
        assert probe(learner, manager[0], kind, None).shape == (1,)


def test_a_predictor_and_a_landscape_stay_on_the_device(tmp_path, monkeypatch):
    import json

    import main
    import utils.runtime
    from predictor import Predictor

    (tmp_path / "run.json").write_text(json.dumps(tiny_values(tmp_path, epochs=1, precision="fp32")))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(utils.runtime, "_find_device", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pretended():
        found = Predictor(tmp_path / "out")([torch.rand(3, 16, 16)])
        assert found.scores.shape == (1, 6)
        command = ["landscape", str(tmp_path / "out"), "--grid", "3", "--images", "4"]
        assert main.main(command) == 0


WRONG = {
    "operands on two devices": lambda x: x + torch.ones(3),
    "parts on two devices": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "indices into the host": lambda x: torch.ones(3)[x[0].long()],
    "generator of the host": lambda x: x.normal_(generator=torch.Generator()),
    "generator of the device": lambda x: torch.randperm(3, generator=torch.Generator(CUDA)),
    "a number where none is taken": lambda x: torch.cat([x[0, :1], torch.ones(()).reshape(())[None]]),
}
WAITING = {
    "float": lambda x: float(x.sum()),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0.5],
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "upload": lambda x: torch.ones(3).to(CUDA),
    "host indices": lambda x: x[torch.tensor([0])],
    "one_hot": lambda x: torch.nn.functional.one_hot((x[0] > 2).long()),
    "pickle": lambda x: torch.save(x, io.BytesIO()),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cuda_refuses_is_refused(fault):
    with pretended(), pytest.raises(Refused):
        WRONG[fault](torch.rand(3, 3, device=CUDA))


@pytest.mark.parametrize("wait", WAITING)
def test_what_makes_the_host_wait_is_recorded(wait):
    with pretended() as recorder:
        x = torch.rand(3, 3, device=CUDA)
        assert not recorder.waits()
        WAITING[wait](x)
        assert recorder.waits()


def test_what_cuda_allows_is_allowed():
    with pretended() as recorder:
        x = torch.rand(3, 3, device=CUDA)
        assert (x + torch.tensor(1.0)).device.type == "cuda", "a number without dimensions is fine"
        torch.ones(3).to(CUDA, non_blocking=True) + x
        assert not recorder.waits()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    assert TINY_VIT["depth"] == 2
