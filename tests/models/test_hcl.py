"""HCL: one stage of each variant against the reference, step by step, and our own rules."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models.parts.loop as loop
from models.parts.inversion import Taps
from models.parts.loop import evaluate, fit
from models.parts.losses import distillation
from tests.conftest import TINY_VIT, build_tiny, reference
from tests.models.hcl_nets import stored_network, weights_of
from tests.models.test_contract import learn
from utils.data_manager import Batch, Task

TINY_CNN = {"name": "resnet18", "weights": "random"}
ARCHITECTURES = {
    "cnn": "small_lenet",
    "resnet": {"name": "resnet10t", "weights": "random"},
    "convnext": {
        "name": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2, "weights": "random",
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


@dataclass
class StoredBatches:
    """Stands for a task's images: batches in stored order, not pixels."""

    images: torch.Tensor  # (steps * B, 3 or 6, s, s)
    labels: np.ndarray
    cheap, on_device, image_bytes = True, False, 0  # what the loader asks of a view

    def __len__(self) -> int:
        return len(self.labels)

    def view(self, mode: str, beside: str | None = None) -> "StoredBatches":
        return self

    def __getitems__(self, batch):
        return self.images[batch.rows], torch.from_numpy(self.labels[batch.rows])


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
        learner.runtime.to_device = lambda images, targets: (images, targets)
        monkeypatch.setattr(loop, "training_batches", _in_order)
        learner.network = stored_network(arrays, "student0")
        images = torch.from_numpy(arrays["x"])
        if "raw" in arrays:
            images = torch.cat([images, torch.from_numpy(arrays["raw"]).double()], dim=2)
        view = StoredBatches(images.flatten(0, 1), arrays["y"].flatten())
        old = int(arrays["y"].min())
        self.task = learner.task = Task(1, 2, old, classes, range(old, classes), None, view, view, view)
        self.terms: list[dict[str, float]] = []
        terms = learner.terms

        def noted(*arguments):
            found = terms(*arguments)
            self.terms.append({key: float(value.detach()) for key, value in found.items()})
            return found

        learner.terms = noted

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


def _in_order(count, batch_size, seed, epoch, rank=0, world=1, start=0):
    return [Batch(np.arange(first, min(first + batch_size, count))) for first in range(0, count, batch_size)]


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
    learner.stored = lambda images: images.float()  # the stored raw images are no bytes
    mean, std = float(arrays["aug_mean"]), float(arrays["aug_std"])
    learner.replay_view = lambda images: (images.double() - mean) / std
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


@pytest.mark.smoke
@pytest.mark.parametrize("variant", ["distil", "distilbuf", "qdi"])
@pytest.mark.parametrize("student", ARCHITECTURES)
@pytest.mark.parametrize("teacher", ARCHITECTURES)
def test_any_two_architectures_as_teacher_and_student(teacher, student, variant, tmp_path):
    keys = QUICK if variant == "qdi" else {"memory_size": 10} if variant == "distilbuf" else {}
    manager, learner = build_tiny(
        tmp_path, "hcl", variant=variant, stream=[ARCHITECTURES[teacher], ARCHITECTURES[student]], increment=3,
        epochs=1, image_size=16, validation=0.2, **keys,
    )  # fmt: skip
    seen = []
    learner.synthetic.inversion.run = _listening(learner.synthetic.inversion.run, seen)
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).shape == (2, 2)
    assert np.isfinite(learner.results()["forward_acc"]).all()
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
