"""HCL: one stage of each variant against the reference, step by step, and our own rules."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main
import trainer
from convs.backbones import BackboneMaker, make_backbone
from data.loading import View
from models.factory import config_from
from models.hcl.inversion import Taps
from models.parts.evaluation import evaluate
from models.parts.loop import begin, fit, learn
from models.parts.losses import distillation
from tests.conftest import TINY_VIT, build_tiny, reference, tiny_values, write_stream
from tests.models.hcl.nets import stored_network, weights_of
from tests.stages import ExactRuntime, Given, in_stored_order, stored_task
from tests.test_resume import Killed, kill_after, run, start
from utils import checkpoint
from utils.errors import ConfigError

TINY_RESNET = {"name": "resnet10t", "channels": [8, 8, 16, 16], "stem_width": 8}
ARCHITECTURES = {
    "cnn": "small_lenet",
    "resnet": TINY_RESNET,
    "convnext": {
        "name": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 1, "weights": "random",
    },
    "swin": {
        "name": "swin_tiny_patch4_window7_224", "img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16,
        "depths": [1, 1], "num_heads": [2, 2],
    },
    "vit": TINY_VIT,
}  # fmt: skip
QUICK = {"synthetic_size": 12, "inversion_steps": 6, "inversion_warmup": 2}


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parity
def test_label_smoothed_cross_entropy_and_distillation():
    arrays = {key: torch.from_numpy(np.array(value)) for key, value in reference("hcl/losses").items()}

    def check(name: str, loss: torch.Tensor, **inputs: torch.Tensor) -> None:
        loss.backward()
        assert relative(loss.detach(), arrays[f"{name}_loss"]) <= 1e-12
        for suffix, tensor in inputs.items():
            assert relative(tensor.grad, arrays[f"{name}_{suffix}"]) <= 1e-12

    student = arrays["student"].clone().requires_grad_()
    smoothed = F.cross_entropy(student, arrays["target"], label_smoothing=float(arrays["smoothing"]))
    check("ls", smoothed, grad=student)
    for name in {key.split("_")[1] for key in arrays if key.startswith("kd_")}:
        student, teacher = (arrays[key].clone().requires_grad_() for key in ("student", "teacher"))
        check(f"kd_{name}", distillation(student, teacher, float(name[1:])), grad_student=student, grad_teacher=teacher)


class Stage:
    """A stored stage: `fit` over its batches, by the learner, with the stored networks."""

    def __init__(self, name: str, tmp_path, monkeypatch, **keys):
        self.arrays = arrays = reference(f"hcl/{name}")
        steps, size = arrays["y"].shape
        _, self.learner = build_tiny(
            tmp_path, "hcl", variant=name.removesuffix("_task"), upstream=True, select="last", epochs=1,
            batch_size=size, lrate=float(arrays["lr"]), alpha=float(arrays["alpha"]), normalize="none",
            smoothing=float(arrays["smoothing"]), optimizer="sgd", **keys,
        )  # fmt: skip
        learner, classes = self.learner, len(arrays["student0.fc.bias"])
        learner.runtime = ExactRuntime("cpu", "fp32", num_workers=0)
        in_stored_order(monkeypatch)
        learner.network = stored_network(arrays, "student0")
        images = torch.from_numpy(arrays["x"])
        if "raw" in arrays:
            images = torch.cat([images, torch.from_numpy(arrays["raw"]).double()], dim=2)
        old = int(arrays["y"].min())
        self.task = stored_task(1, [old, classes - old], Given(images, arrays["y"]))
        learner.task = self.task.info
        learner.stage = learner.stages(self.task)[0]
        self.terms: list[dict[str, float]] = []
        terms = learner._terms

        def noted(*arguments):
            found = terms(*arguments)
            self.terms.append({key: float(value.detach()) for key, value in found.items()})
            return found

        learner._terms = noted

    def teach(self, prefix: str) -> None:
        teacher = self.learner.teacher
        teacher.network = stored_network(self.arrays, prefix).train(teacher.training).requires_grad_(False)

    def train(self) -> None:
        fit(self.learner, self.task)
        assert len(self.terms) == len(self.arrays["x"])

    def check_losses(self, key: str = "loss") -> None:
        assert relative([sum(terms.values()) for terms in self.terms], self.arrays[key]) <= 1e-11

    def check_network(self, network, prefix: str) -> None:
        own = network.state_dict()
        for name, value in weights_of(self.arrays, prefix).items():
            assert relative(own[name], value) <= 1e-11, name


@pytest.mark.parity
def test_a_stage_of_distil(tmp_path, monkeypatch):
    stage = Stage("distil_task", tmp_path, monkeypatch)
    stage.teach("teacher")
    stage.train()
    stage.check_losses()
    assert relative([terms["distil"] for terms in stage.terms], stage.arrays["penalty"]) <= 1e-11
    stage.check_network(stage.learner.network, "student1")


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["upstream", "eval"])
def test_a_stage_of_qdi(mode, tmp_path, monkeypatch):
    """Also the teacher's running statistics, although it looks at the synthetic images once."""
    stage = Stage("qdi_task", tmp_path, monkeypatch, teacher_mode="train" if mode == "upstream" else "eval")
    stage.teach("teacher0")
    learner, passes = stage.learner, []
    learner.synthetic.targets.ask(learner.teacher, torch.from_numpy(stage.arrays["image_syn"]))
    learner.teacher.network.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    stage.train()
    assert passes == [stage.arrays["y"].shape[1]] * len(stage.arrays["y"]), "one pass a step, over the batch alone"
    stage.check_losses(f"loss_{mode}")
    penalty = np.array([terms["distil"] for terms in stage.terms]) / float(stage.arrays["alpha"])
    assert relative(penalty, stage.arrays[f"penalty_{mode}"]) <= 1e-11
    stage.check_network(learner.network, f"student1_{mode}")
    stage.check_network(learner.teacher.network, f"teacher1_{mode}")


@pytest.mark.parity
def test_a_stage_of_distilbuf(tmp_path, monkeypatch):
    arrays = reference("hcl/distilbuf_task")
    size, weight = int(arrays["buffer_size"]), float(arrays["buffer_weight"])
    stage = Stage("distilbuf_task", tmp_path, monkeypatch, memory_size=size, buffer_weight=weight)
    stage.teach("teacher")
    learner, memory = stage.learner, stage.learner.memory
    draws = iter(zip(arrays["reservoir_seen"].tolist(), arrays["reservoir_draw"].tolist(), strict=True))
    choices = iter(arrays["choice"])

    def draw(number: int) -> int:
        seen, drawn = next(draws)
        assert seen == number, "the reference counts the same"
        return drawn

    memory._draw, memory._choice = draw, lambda count: torch.from_numpy(next(choices)[:count])
    learner._as_bytes = lambda images: images.float()  # the stored raw images are no bytes
    mean, std = float(arrays["aug_mean"]), float(arrays["aug_std"])
    learner._replay_view = lambda images: (images.double() - mean) / std
    for images, labels in zip(arrays["prefill"], arrays["prefill_y"], strict=True):
        memory.insert(torch.from_numpy(images), torch.from_numpy(labels))
    stage.train()
    stage.check_losses()
    assert relative([terms["replay"] for terms in stage.terms], arrays["buffer_penalty"]) <= 1e-11
    stage.check_network(learner.network, "student1")
    assert np.array_equal(memory.images.numpy(), arrays["buffer_examples"])
    assert np.array_equal(memory.labels.numpy(), arrays["buffer_labels"])
    assert memory.seen == int(arrays["buffer_seen"])
    assert next(draws, None) is None and next(choices, None) is None, "every recorded draw was used"


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("variant", ["distil", "distilbuf", "qdi"])
@pytest.mark.parametrize("student", ARCHITECTURES)
@pytest.mark.parametrize("teacher", ARCHITECTURES)
def test_any_two_architectures_as_teacher_and_student(teacher, student, variant, tmp_path):
    keys = QUICK if variant == "qdi" else {"memory_size": 10} if variant == "distilbuf" else {}
    manager, learner = build_tiny(
        tmp_path, "hcl", variant=variant, networks=[ARCHITECTURES[teacher], ARCHITECTURES[student]], increment=3,
        epochs=1, image_size=16, validation=0.2, **keys,
    )  # fmt: skip
    seen = []
    if variant == "qdi":
        learner.synthetic.inversion.run = _listening(learner.synthetic.inversion.run, seen)
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).main.shape == (3, 2)
    assert np.isfinite(learner.report().numbers["forward_acc"]).all()
    if variant == "qdi":
        assert len(seen) == QUICK["inversion_steps"] and all(terms["feature"] > 0 for terms in seen)
        layers = Taps(learner.teacher.network, "auto").layers.values()
        assert all(isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.Conv2d) for layer in layers) and layers
        made = learner.synthetic.targets.images
        assert made.shape == (12, 3, 16, 16) and made.isfinite().all()


def _listening(run, seen: list):
    def wrapped(*arguments, watch=lambda step, terms: None, **keys):
        return run(*arguments, watch=lambda step, terms: seen.append(terms), **keys)

    return wrapped


def test_upstream_sets_every_value_that_is_not_given(tmp_path):
    values = tiny_values(tmp_path, "hcl", variant="qdi", upstream=True, select="last")
    config = config_from(values, source="test")
    expected = {
        "shuffle": False, "momentum": 0.0, "weight_decay": 0.0, "scheduler": "constant", "statistics": "bn_or_conv",
        "statistics_source": "current", "inversion_start": "current", "select": "last", "select_on": "test",
        "carry": "last", "reuse": "same_arch", "kd_classes": "all", "mask_unseen": False, "teacher_mode": "train",
        "validation": 0.0,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert config_from(values | {"variant": "distil"}, source="test").teacher_mode == "eval"
    own = config_from(tiny_values(tmp_path, "hcl"), source="test")
    assert (own.select, own.select_on, own.validation, own.carry, own.shuffle) == ("best", "val", 0.1, "selected", True)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"inversion_steps": 3}, '"inversion_steps" has no effect unless "variant" is "qdi"'),
        ({"variant": "qdi", "memory_size": 3}, '"memory_size" has no effect unless "variant" is "distilbuf"'),
        ({"slack": 0.1}, '"slack" has no effect unless "select" is "slack"'),
        ({"validation": 0.0}, '"validation" is 0, but epochs are chosen on it'),
        ({"networks": [{"nam": "x"}]}, 'entry 0 needs "name".*did you mean "nam"'),
        ({"networks": [{"name": "x", "weights_entry": "ema"}]}, 'entry 0: "weights_entry" has no effect without'),
        ({"networks": [{"name": "x", "weights": "a", "resample_patch": 1}]}, '"resample_patch" must be true or false'),
        ({"networks": [{"name": "small_lenet", "optimizer": "adamv"}]}, '"optimizer" must be one of sgd, adam, adamw'),
        ({"networks": [{"name": "small_lenet", "lrate": "fast"}]}, '"lrate" must be a number'),
        ({"networks": 3}, '"networks" must be'),
        ({"variant": "distilbuf", "memory_transform": "crop"}, '"crop" is unknown'),
        ({"alfa": 3}, 'did you mean "alpha"'),
    ],
)
def test_wrong_keys_get_a_sentence(keys, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        config_from(tiny_values(tmp_path, "hcl", **keys), source="test")


def test_a_stream_hands_on_weights_only_where_the_architecture_stays(tmp_path):
    stream = ["small_lenet", {"name": "small_lenet", "lrate": 0.5, "optimizer": "adamw"}, TINY_VIT]
    manager, learner = build_tiny(tmp_path, "hcl", networks=stream, image_size=16, optimizer="sgd", select="last")
    learn(learner, manager[0])
    first = {key: value.clone() for key, value in learner.network.state_dict().items()}
    begin(learner, manager[1])
    assert all(torch.equal(learner.network.state_dict()[key], value) for key, value in first.items())
    optimizer, _ = learner.make_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 0.5
    learner.after_task(manager[1])
    begin(learner, manager[2])
    assert learner.network.feature_dim == 16 and learner.network.head.num_classes == 6
    assert learner.teacher.network.feature_dim == 84
    optimizer, _ = learner.make_optimizer()
    assert isinstance(optimizer, torch.optim.SGD) and learner.stage.lrate == 0.005


def test_reuse_none_starts_afresh_and_matching_takes_what_fits(tmp_path):
    for reuse, same in (("none", False), ("matching", True)):
        manager, learner = build_tiny(
            tmp_path, "hcl", networks=["small_lenet", "small_lenet"], image_size=16, select="last", reuse=reuse
        )
        learn(learner, manager[0])
        before = learner.network.backbone.model.conv1.weight.clone()
        begin(learner, manager[1])
        assert torch.equal(learner.network.backbone.model.conv1.weight, before) == same


@pytest.mark.parametrize("carry", ["last", "selected"])
def test_the_teacher_is_the_chosen_network_and_the_student_goes_on_as_asked(carry, tmp_path):
    manager, learner = build_tiny(tmp_path, "hcl", carry=carry, select_on="test")
    begin(learner, manager[0])
    kept = []
    offer = learner.choice.offer

    def one_then_none(epoch, score, network):
        taken = offer(epoch, 100.0 - epoch, network)
        kept.append(network.head.weight.detach().clone())
        return taken

    learner.choice.offer = one_then_none
    fit(learner, manager[0])
    learner.after_task(manager[0])
    assert torch.equal(learner.network.head.weight, kept[0]), "evaluated with the first epoch, the best"
    begin(learner, manager[1])
    assert torch.equal(learner.teacher.network.head.weight, kept[0])
    assert torch.equal(learner.network.head.weight, kept[-1] if carry == "last" else kept[0])


def test_classes_to_come_are_no_prediction_unless_asked(tmp_path):
    for mask, columns in ((True, 2), (False, 6)):
        manager, learner = build_tiny(tmp_path, "hcl", mask_unseen=mask)
        begin(learner, manager[0])
        assert learner.eval().predict(torch.rand(2, 3, 16, 16), {}).shape == (2, columns)
        assert learner.network.head.num_classes == 6, "the head is whole from the start"


def test_a_validation_part_is_kept_out_of_training(tmp_path):
    manager, _ = build_tiny(tmp_path, "hcl", validation=0.3)
    for task in manager:
        assert len(task.val) == 4 and len(task.train) == 10, "2 of 7 images of each of two classes"
        assert not set(task.val.rows) & set(task.train.rows) and not set(task.val.rows) & set(task.train_so_far.rows)
    again, _ = build_tiny(tmp_path, "hcl", validation=0.3)
    other, _ = build_tiny(tmp_path, "hcl", validation=0.3, seed=7, class_order_seed=1993)
    assert np.array_equal(again[1].val.rows, manager[1].val.rows)
    assert not np.array_equal(other[1].val.rows, manager[1].val.rows)
    reported, _ = build_tiny(tmp_path, "hcl", validation=0.3, evaluate_on="val")
    assert np.array_equal(reported[1].test.rows, reported[1].val.rows)


def test_the_pool_views_only_what_is_read(tmp_path, monkeypatch):
    """The reference views every image of the task three times."""
    dataset = write_stream(tmp_path / "large.npz", classes=4, train=120)
    manager, learner = build_tiny(
        tmp_path, "hcl", variant="qdi", dataset=dataset, epochs=1, networks=[TINY_RESNET], image_size=16,
        select="last", synthetic_size=4, inversion_steps=1,
    )  # fmt: skip
    learn(learner, manager[0])
    read = []
    original = View.__getitems__
    monkeypatch.setattr(View, "__getitems__", lambda self, batch: read.append(len(batch.rows)) or original(self, batch))
    learner.task = manager[1].info
    learner.synthetic.make(_updated(learner.teacher), manager[1], False)
    assert sum(read) == 4


def _updated(teacher):
    teacher.update()
    return teacher


def test_noise_is_where_deepinversion_starts(tmp_path):
    manager, learner = build_tiny(tmp_path, "hcl", variant="qdi", epochs=1, inversion_start="noise", **QUICK)
    learn(learner, manager[0])
    begin(learner, manager[1])
    start = learner.network.normalise(learner.report().pictures["inversion_task2_start"])
    assert abs(float(start.mean())) < 0.15 and abs(float(start.std()) - 1) < 0.1


def test_the_student_says_what_the_teacher_says(tmp_path):
    """On new images, and the more so the larger alpha is."""
    distance = []
    for alpha in (0.0, 30.0):
        manager, learner = build_tiny(tmp_path, "hcl", reuse="none", alpha=alpha, epochs=12, select="last")
        for task in manager[:2]:
            learn(learner, task)
        images = torch.stack([image for image, _ in manager[1].train.view("test")]).float() / 255
        with torch.no_grad():
            distance.append(float(distillation(learner.eval().network(images), learner.teacher(images))))
    assert distance[1] < 0.2 * distance[0]


def test_random_teachers_are_refused(tmp_path):
    manager, learner = build_tiny(
        tmp_path, "hcl", backbone=TINY_VIT | {"drop_path_rate": 0.2}, teacher_mode="train", epochs=1
    )
    learn(learner, manager[0])
    with pytest.raises(ConfigError, match="drop_path"):
        learner.before_task(manager[1])


HETEROGENEOUS = {
    "networks": ["small_lenet", TINY_RESNET, None], "image_size": 16, "epochs": 2,
    "train_transform": "pad_crop",
}  # fmt: skip
# Each run is cut at the end of the n-th call of a method of the trainer.
# 12 images a task in batches of 4: 6 safe points in the training of a task, 6 in an inversion.
CUTS = {
    "first inversion": ("qdi", "save_if_due", 9),
    "second inversion": ("qdi", "save_if_due", 21),
    "fit of the second student": ("qdi", "save_if_due", 15),
    "fit of the third student": ("qdi", "save_if_due", 27),
    "fit with a memory": ("distilbuf", "save_if_due", 8),
    "after a task": ("distil", "save", 16),
}


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("cut", CUTS)
def test_a_heterogeneous_run_resumes_to_the_same_digits(cut, tmp_path, monkeypatch):
    variant, method, calls = CUTS[cut]
    keys = QUICK if variant == "qdi" else {"memory_size": 10} if variant == "distilbuf" else {}
    path = tmp_path / "run.json"
    values = tiny_values(
        tmp_path, "hcl", variant=variant, checkpoint_minutes=1e-9, validation=0.15, **HETEROGENEOUS, **keys
    )
    path.write_text(json.dumps(values))
    whole = run(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, trainer.SeedRun, method, calls)
        with pytest.raises(Killed):
            main.main(["--config", str(path), "--output", str(tmp_path / "cut")])
    _, saved = checkpoint.load(tmp_path / "cut" / "seed1993" / "checkpoint" / "last.pt")
    if "inversion" in cut:
        assert (
            saved["record"]["phase"] == "start" and 0 < saved["learner"]["parts"]["synthetic"]["inversion"]["step"] < 6
        ), "in the middle"
    resumed = run(path, tmp_path / "cut", "--resume")
    assert resumed == whole and len(whole["forward_acc"]) == 2
    files = {str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*.png")}
    if variant == "qdi":
        made = {f"seed1993/plots/inversion_task{t}_{end}.png" for t in (2, 3) for end in ("start", "made")}
        assert made <= files


def test_nothing_is_written_outside_the_run_folder(tmp_path, monkeypatch):
    path = tmp_path / "in" / "run.json"
    path.parent.mkdir()
    (tmp_path / "cwd").mkdir()
    values = tiny_values(path.parent, "hcl", variant="qdi", epochs=1, **QUICK)
    path.write_text(json.dumps(values))
    before = {p for p in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path / "cwd")
    run(path, tmp_path / "out")
    written = {p for p in tmp_path.rglob("*")} - before
    assert written and all(p.is_relative_to(tmp_path / "out") for p in written)


@pytest.mark.slow
def test_a_signal_in_the_inversion_saves_and_exits_with_3(tmp_path):
    path = tmp_path / "run.json"
    values = tiny_values(tmp_path, "hcl", variant="qdi", epochs=1, **QUICK | {"inversion_steps": 600})
    path.write_text(json.dumps(values))
    whole = run(path, tmp_path / "whole")
    process = start(path, tmp_path / "cut")
    log = tmp_path / "cut" / "seed1993" / "train.log"
    deadline = time.monotonic() + 60
    while "inversion step 100" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    _, saved = checkpoint.load(tmp_path / "cut" / "seed1993" / "checkpoint" / "last.pt")
    assert saved["record"]["phase"] == "start" and saved["learner"]["parts"]["synthetic"]["inversion"]["step"] > 100
    assert run(path, tmp_path / "cut", "--resume") == whole


def test_an_entry_reads_its_weight_file_as_its_keys_say(tmp_path):
    from models.hcl.networks import NetworkEntry

    states = [make_backbone(TINY_VIT, "random", None).model.state_dict() for _ in range(2)]
    torch.save({"model": states[0], "model_ema": states[1]}, tmp_path / "a.pth")
    value = TINY_VIT | {"weights": str(tmp_path / "a.pth")}
    maker = BackboneMaker(TINY_VIT, "random", None)
    for entry, state in (({}, states[0]), ({"weights_entry": "model_ema"}, states[1])):
        backbone, _ = NetworkEntry.read(value | entry).make(maker, 16)
        assert torch.equal(backbone.model.cls_token, state["cls_token"])
