"""A compiled network: one compilation a stage, whatever grows, and the numbers of a plain one."""

from functools import partial

import pytest
import torch

from models.factory import learner_class
from models.parts.loop import Observer, learn
from tests.conftest import TINY_VIT, build_tiny, write_stream
from utils.config import TrainConfig

pytestmark = [pytest.mark.smoke, pytest.mark.slow]

SAM = {"rho": 0.05, "damping": 25.0}
RESNET = {"backbone": "small_resnet18", "image_size": 32}
ONE_BLOCK = TINY_VIT | {"depth": 1}  # tracing is what these tests cost


class Compilations(Observer):
    """How often each stage compiled something; the compiler itself runs what it is given."""

    def __init__(self, monkeypatch):
        self.done, self.of_stages = 0, []
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=self._compile))

    def _compile(self, graph, inputs):
        self.done += 1
        return graph.forward

    def stage_started(self, number):
        self.before = self.done

    def stage_done(self, number):
        self.of_stages.append(self.done - self.before)


def trained(tmp_path, name, observer=None, tasks=2, **keys):
    manager, learner = build_tiny(tmp_path, name, **{"epochs": 2, "optimizer": "sgd", "lrate": 0.02} | keys)
    learner.runtime._compile = observer is not None
    for task in manager[:tasks]:
        learn(learner, task, observer)
    return {name: value.detach() for name, value in learner.named_parameters()}


def check(tmp_path, monkeypatch, name, **keys):
    plain = trained(tmp_path, name, **keys)
    counted = Compilations(monkeypatch)
    compiled = trained(tmp_path, name, counted, **keys)
    assert counted.of_stages and set(counted.of_stages) == {1}, counted.of_stages
    for parameter, value in plain.items():
        if value.numel():
            error, scale = float((compiled[parameter] - value).abs().max()), max(0.01, float(value.abs().max()))
            assert error <= 1e-4 * scale, f"{parameter}: off by {error:.1e} of {scale:.1e}"


def test_every_learner_compiles_once_a_stage(learner_name, tmp_path, monkeypatch):
    """14 images in batches of 4: the last ones are smaller."""
    learner = learner_class(learner_name)
    if not issubclass(learner.Config, TrainConfig):
        pytest.skip("trains nothing")
    keys = {}
    if "class" not in learner.streams:
        keys = {"dataset": write_stream(tmp_path / "d.npz", domains=2), "shuffle": False, "increment": None}
    check(tmp_path, monkeypatch, learner_name, **keys)


# Learners whose step calls the network several times, with slices of a batch and with draws from elsewhere; rows that
# mix.
CALLS = [
    ("hcl", {"variant": "distilbuf", "backbone": ONE_BLOCK}),
    ("hcl", {"variant": "qdi", "synthetic_size": 3, "inversion_steps": 2, "backbone": ONE_BLOCK}),
    ("derpp", {"upstream": True, "backbone": ONE_BLOCK}),
    ("dualprompt", {"upstream": True}),
]


@pytest.mark.parametrize(("name", "keys"), CALLS)
def test_whatever_the_network_is_called_with_it_is_compiled_once(name, keys, tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, name, **keys)


@pytest.mark.parametrize(
    "keys", [{"sam": SAM}, {"sam": SAM, **RESNET}, {"accumulate": 3}], ids=["vit", "norms", "parts"]
)
def test_passes_and_parts_share_one_compilation(keys, tmp_path, monkeypatch):
    """SAM's second pass leaves BatchNorm's statistics as they were."""
    if "backbone" in keys:
        keys = keys | {"dataset": write_stream(tmp_path / "d.npz", size=32)}
    check(tmp_path, monkeypatch, "finetune", **{"backbone": ONE_BLOCK, "tasks": 1} | keys)


def test_a_long_stream_compiles_every_task(tmp_path, monkeypatch):
    """torch falls back to plain execution behind eight compilations of one function."""
    counted = Compilations(monkeypatch)
    dataset = write_stream(tmp_path / "d.npz", classes=9, train=4, size=16)
    keys = {"dataset": dataset, "increment": 1, "mask": "seen", "backbone": ONE_BLOCK}
    trained(tmp_path, "finetune", counted, tasks=9, epochs=1, **keys)
    assert counted.of_stages == [1] * 9


def test_a_batch_of_one_is_not_compiled_for(tmp_path, monkeypatch):
    """Five images in batches of four."""
    counted = Compilations(monkeypatch)
    dataset = write_stream(tmp_path / "d.npz", classes=2, train=5, size=16)
    keys = {"dataset": dataset, "increment": 1, "mask": "seen", "backbone": ONE_BLOCK}
    trained(tmp_path, "finetune", counted, tasks=1, **keys)
    assert counted.of_stages == [1]
