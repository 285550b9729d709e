"""Whole small runs of the references through the real learners: every batch, loss, weight, exemplar and prediction."""

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import data.loading
from convs.backbones import Backbone, BackboneInfo
from convs.heads import CosineHead
from convs.weights import RANDOM
from data.loading import Batch
from data.stream import DataManager
from models.base import LEARNERS
from models.factory import config_from
from models.parts.loop import learn
from tests.conftest import reference, tiny_values
from utils.runtime import Runtime


class Layer(nn.Module):
    """tanh(W flatten(x) + b), with a BatchNorm behind it in some runs."""

    def __init__(self, weight: np.ndarray, norm: bool):
        super().__init__()
        self.a = nn.Linear(weight.shape[1], weight.shape[0])
        self.norm = nn.BatchNorm1d(weight.shape[0]) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.a(x.flatten(1))))


class TwoLayers(nn.Module):
    """What MEMO splits."""

    def __init__(self, shared: Layer, special: Layer):
        super().__init__()
        self.shared, self.special = shared, special

    def split(self) -> tuple[nn.Module, nn.Module]:
        return self.shared, self.special


# The fixtures' names of parameters -> ours.
RENAMED = [
    (r"^student\.backbones\.0\.", "backbone.model."),
    (r"^student\.", ""),
    (r"^backbones\.(\d+)\.", r"backbone.model.branches.\1."),
    (r"^backbone\.", "backbone.model."),
    (r"^shared\.", "backbone.model.shared."),
    (r"^special\.(\d+)\.", r"backbone.model.branches.\1."),
    (r"^fe_head\.", "aux_head."),
    (r"^bias\.(\d+)\.(alpha|beta)$", r"head.correction.layers.\1.\2"),
    (r"^head\.sigma$", "head.scale"),
]


def given_learner(arrays, values: dict[str, Any], make_backbone, tmp_path):
    """A learner over the fixture's images, on the backbone that `make_backbone` gives, and its tasks."""
    halves = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "given.npz", **{key: arrays[key] for key in halves})
    config = config_from(values | {"dataset": f"npz:{tmp_path / 'given.npz'}"}, source="test")
    manager = DataManager(config, image_size=arrays["x_train"].shape[1])
    learner = LEARNERS[config.model_name](config, Runtime("cpu", "fp32", num_workers=0), manager[0].info)
    learner.build(make_backbone)
    return learner, manager


class WholeRun:
    """One fixture: its learner, built as the reference's settings say, and what is compared while it learns."""

    def __init__(self, name: str, model_name: str, tmp_path, keys):
        """keys: settings -> the learner's own keys."""
        self.arrays = arrays = reference(name)
        self.settings = {k[9:]: v.tolist() for k, v in arrays.items() if k.startswith("settings/")}
        self.batch_norm = any("/running/" in key for key in arrays)
        self.atol, self.logit_atol = (1e-5, 3e-5) if self.batch_norm else (3e-6, 1e-5)
        self.images = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2).float() / 255
        values = self.values(tmp_path, model_name, keys(self.settings))
        self.learner, self.manager = given_learner(arrays, values, self.make_backbone, tmp_path)
        self.rows: dict[str, np.ndarray] = {}
        self.step = 0
        self.watch()

    # -- building

    def values(self, tmp_path, model_name: str, keys: dict[str, Any]) -> dict[str, Any]:
        return tiny_values(
            tmp_path, model_name, increment=None, shuffle=False, normalize="none", optimizer="sgd", upstream=True,
            task_sizes=self.arrays["increments"].tolist(), image_size=self.arrays["x_train"].shape[1],
            batch_size=self.settings["batch_size"], **keys,
        )  # fmt: skip

    def make_backbone(self) -> Backbone:
        start = "t0/train/start/"
        weights = {key[len(start) :]: value for key, value in self.arrays.items() if key.startswith(start)}
        if "shared.a.weight" in weights:
            names = ("shared.a.weight", "special.0.a.weight")
            model: nn.Module = TwoLayers(*(Layer(weights[name], self.batch_norm) for name in names))
            width = len(weights["special.0.a.weight"])
        else:
            name = next(name for name in weights if name.startswith("backbone"))
            model, width = Layer(weights[name], self.batch_norm), len(weights[name])
        info = BackboneInfo("given", width, self.arrays["x_train"].shape[1], (0.0,) * 3, (1.0,) * 3, RANDOM)
        return Backbone(model, info)

    # -- names

    def module(self, name: str) -> nn.Module:
        return self.learner.student if name.startswith("student.") else self.learner.network

    def named(self, name: str) -> tuple[nn.Module, str]:
        """Module and our name of one of the fixture's tensors."""
        pattern, replacement = next((pair for pair in RENAMED if re.match(pair[0], name)), ("", ""))
        return self.module(name), re.sub(pattern, replacement, name)

    def get(self, name: str) -> Tensor:
        module, ours = self.named(name)
        if isinstance(head := module.head, CosineHead) and ours == "head.weight":
            return head.weight.detach()
        return module.state_dict()[ours]

    def load(self, name: str, value: np.ndarray) -> None:
        module, ours = self.named(name)
        if isinstance(head := module.head, CosineHead) and ours == "head.weight":
            head.set_stacked(torch.from_numpy(value))
        else:
            module.state_dict()[ours].copy_(torch.from_numpy(value).view_as(module.state_dict()[ours]))

    def keys(self, prefix: str) -> dict[str, np.ndarray]:
        return {key[len(prefix) :]: value for key, value in self.arrays.items() if key.startswith(prefix)}

    # -- watching

    def watch(self) -> None:
        """The learner's own hooks, with a look before or after them."""
        learner = self.learner
        for hook in ("train_data", "make_optimizer", "after_step", "after_stage"):
            setattr(learner, hook, partial(getattr(self, hook), getattr(learner, hook)))
        self.learner.loss = partial(self.loss, learner.loss)

    @property
    def prefix(self) -> str:
        """Of the stage at hand; a first stage has the reference's name, whatever ours."""
        task, name = self.learner.task.index, self.learner.stage.name
        return f"t{task}/{name}/" if f"t{task}/{name}/batches" in self.arrays else f"t{task}/train/"

    def train_data(self, hook, task):
        view = hook(task)
        self.rows["view"], name = view._rows, "val_rows" if self.prefix.endswith("correct/") else "train_rows"
        expected = self.arrays[f"t{task.index}/{name}"]
        plain = view._rows.tolist() == task.train.rows.tolist()  # new images alone, in their own order
        assert (sorted(view._rows) if plain or name == "val_rows" else view._rows.tolist()) == (
            sorted(expected) if plain or name == "val_rows" else expected.tolist()
        )
        return view

    def batches(self, count, batch_size, seed, epoch, rank=0, world=1, start=0, drop_last=False, joined=False):
        """`training_batches` of the reference."""
        given = self.arrays[self.prefix + "batches"]
        per_epoch = -(-count // batch_size)
        assert count == len(self.rows["view"]) and len(given) == per_epoch * self.learner.stage.epochs
        position = {row: i for i, row in enumerate(self.rows["view"].tolist())}
        chosen = given[epoch * per_epoch + start : (epoch + 1) * per_epoch]
        return [Batch(np.array([position[row] for row in rows[rows >= 0].tolist()])) for rows in chosen]

    def make_optimizer(self, hook):
        """What does not start at random stands there already; then the rest is loaded."""
        self.step = 0
        start = self.keys(self.prefix + "start/")
        for name, value in start.items():
            if (known := self.known(name, start)) is None:
                continue
            ours = self.get(name).view(value.shape)
            for region in known:
                np.testing.assert_allclose(ours[region], value[region], atol=self.atol, err_msg=f"{self.prefix}{name}")
        for name, value in start.items():
            if self.exists(name):
                self.load(name, value)
        self.loaded()
        return hook()

    def loaded(self) -> None:
        """For what a learner does to fresh weights."""

    def exists(self, name: str) -> bool:
        """Auxiliary heads come and go: theirs are there before anybody needs them."""
        module, ours = self.named(name)
        temporary = re.match(r"(student\.)?(aux|fe|old)_head", name)
        return not temporary or (ours in module.state_dict() and module.state_dict()[ours].numel() > 0)

    def known(self, name: str, start: dict[str, np.ndarray]):
        """Regions of a tensor that were there before the stage; None: nothing was."""
        task = self.learner.task
        first = self.learner.stage == self.learner.stages(task)[0]
        if not self.exists(name):
            return None
        everything = [np.s_[...]]
        if name == "student.head.weight":
            return [np.s_[: task.known_classes]]
        if not first:
            return everything
        if task.index == 0 or name.startswith(("aux_head", "fe_head")):
            return None
        if name == "head.weight" and "head.sigma" not in start:
            branch = next((start[key].shape[1] for key in ("aux_head.weight", "fe_head.weight") if key in start), 0)
            return [np.s_[: task.known_classes, : start[name].shape[1] - branch]]
        return everything

    def loss(self, hook, net, inputs, targets):
        value = hook(net, inputs, targets)
        expected = self.arrays[self.prefix + "losses"][self.step]
        np.testing.assert_allclose(value.item(), expected, atol=self.atol, err_msg=f"{self.prefix}{self.step}")
        return value

    def after_step(self, hook, images, targets):
        hook(images, targets)
        self.compare_step()
        self.step += 1

    def compare_step(self) -> None:
        for name, steps in self.keys(self.prefix + "step/").items():
            ours = self.get(name).view(steps[self.step].shape)
            message = f"{self.prefix}{name}, step {self.step}"
            np.testing.assert_allclose(ours, steps[self.step], atol=self.atol, rtol=0, err_msg=message)

    def after_stage(self, hook, task):
        assert self.step == len(self.arrays[self.prefix + "batches"])
        for name, value in self.keys(self.prefix + "running/").items():
            np.testing.assert_allclose(self.get(name), value, atol=self.atol, err_msg=f"{self.prefix}{name}")
        hook(task)

    # -- the end of a task

    def run(self, monkeypatch) -> None:
        monkeypatch.setattr(data.loading, "training_batches", self.batches)
        for task in self.manager:
            learn(self.learner, task)
            self.compare_end(task)

    def compare_end(self, task) -> None:
        prefix = f"t{task.index}/"
        for name, value in (self.keys(prefix + "end/") | self.keys(prefix + "running/")).items():
            if "fe_head" not in name and "aux_head" not in name and self.exists(name):
                ours = self.get(name).view(value.shape)
                np.testing.assert_allclose(ours, value, atol=self.atol, err_msg=f"{prefix}end {name}")
        if (memory := getattr(self.learner, "exemplars", None)) is not None:
            assert memory.rows.tolist() == self.arrays[prefix + "memory_rows"].tolist()
            assert memory.labels.tolist() == self.arrays[prefix + "memory_labels"].tolist()
            np.testing.assert_allclose(memory.means, self.arrays[prefix + "class_means"], atol=self.atol)
        self.compare_predictions(task, prefix)

    def compare_predictions(self, task, prefix: str) -> None:
        self.learner.eval()
        with torch.inference_mode():
            shown = self.images[self.arrays["y_test"] < task.total_classes]
            scores = self.learner.predict(shown, {})
            scores = scores if isinstance(scores, dict) else {"logits": scores}
            main = scores["teacher" if "teacher" in scores else "logits"]
            found = {"test_logits": main, "test_features": self.learner.features(shown)}
            if f"{prefix}student_logits" in self.arrays:
                found["student_logits"] = scores["student"]
            for name, value in found.items():
                np.testing.assert_allclose(value, self.arrays[prefix + name], atol=self.logit_atol, err_msg=name)
            ordered = self.learner.predict(self.images[self.arrays[prefix + "test_rows"]], {})
            ordered = ordered if isinstance(ordered, dict) else {"logits": ordered}
        pairs = {"cnn_pred": "teacher" if "teacher" in ordered else "logits", "nme_pred": "nme"}
        for name, score in pairs.items():
            if prefix + name in self.arrays:
                assert ordered[score].topk(2).indices.tolist() == self.arrays[prefix + name].tolist(), name


def schedule(settings: dict[str, Any], first: bool = True) -> dict[str, Any]:
    """Keys of PyCIL's schedules; first: the first task has its own."""
    keys = {name: settings[name] for name in ("epochs", "lrate", "weight_decay", "lrate_decay")}
    keys |= {"scheduler": "multistep", "milestones": tuple(settings["milestones"])}
    if first:
        own = ("init_epoch", "init_lr", "init_weight_decay", "init_lr_decay")
        keys |= {name: settings[name] for name in own} | {"init_milestones": tuple(settings["init_milestones"])}
    return keys


def budget(settings: dict[str, Any]) -> dict[str, Any]:
    fixed = settings["fixed_memory"]
    return {"exemplars": {"per_class": settings["memory_per_class"]} if fixed else {"total": settings["memory_size"]}}
