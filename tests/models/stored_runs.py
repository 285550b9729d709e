"""Whole runs of a reference: the real learner in its starting state, fed its images in its order, step by step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data.loading as loading
from data.loading import Batch, num_batches
from data.stream import DataManager, Task
from models.base import LEARNERS
from models.factory import build_learner, config_from
from models.parts.loop import learn
from tests.conftest import reference, tiny_values, write_stream
from tests.convs.vits import group
from utils.runtime import Runtime


class Given:
    """Images as they are, under any transform, in their order."""

    cheap, on_device, image_bytes = True, False, 0

    def __init__(self, images: Tensor, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.images[batch.rows], torch.from_numpy(self.labels[batch.rows])

    def view(self, mode: str) -> "Given":
        return self

    def take(self, positions: np.ndarray) -> "Given":
        return Given(self.images[positions], self.labels[positions])


class ExactRuntime(Runtime):
    """Hands float64 images through."""

    def to_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return images, targets


def in_order(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    drop_last: bool = False,
    joined: bool = False,
) -> list[Batch]:
    """`training_batches` without the shuffling."""
    steps = range(start, num_batches(count, batch_size, drop_last, joined))
    ends = [*((step + 1) * batch_size for step in steps[:-1]), count]
    if drop_last and steps:
        ends[-1] = min(count, (steps[-1] + 1) * batch_size)
    return [Batch(np.arange(step * batch_size, end)) for step, end in zip(steps, ends, strict=False)]


class StoredRun:
    """name: "method/file". keys: of the config beside those that the arrays name; start: fills what the reference drew,
    called with (task index) behind `before_task`."""

    def __init__(self, name: str, learner: str, tmp_path: Any, monkeypatch: Any, **keys: Any):
        self.arrays = arrays = reference(name)
        self.monkeypatch = monkeypatch
        size, patch, width, depth, heads = arrays["arch"].tolist()
        sizes = arrays["sizes"].tolist()
        stream = write_stream(tmp_path / "s.npz", classes=sum(sizes), size=size)
        backbone = {"name": "vit", "img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth,
                    "num_heads": heads}  # fmt: skip
        plain = dict.fromkeys(LEARNERS[learner].example)
        common = plain | {
            "dataset": stream, "backbone": backbone, "task_sizes": sizes, "increment": None, "shuffle": False,
            "image_size": size, "normalize": "none", "epochs": int(arrays["epochs"]),
            "batch_size": int(arrays["batch"]), "lrate": arrays["lr"].item(), "optimizer": None,
        }  # fmt: skip
        if "decay" in arrays and learner != "lae":
            common |= {"weight_decay": arrays["decay"].item(), "min_lr": arrays["floor"].item()}
        config = config_from(tiny_values(tmp_path, learner, **(common | keys)), source="test")
        manager = DataManager(config, image_size=size)
        self.learner = build_learner(config, ExactRuntime("cpu", "fp32", num_workers=0), manager[0].info).double()
        self.model = self.learner.network.backbone.model
        for backbone in (self.learner.network.backbone, getattr(self.learner.network, "original", None)):
            if backbone is not None:
                _, unexpected = backbone.model.load_state_dict(group(arrays, "vit/"), strict=False)
                assert not unexpected
        self.position = np.argsort(arrays["class_order"])
        self.tasks = [replace(task, train=self._train(task)) for task in manager]
        self.losses: list[float] = []
        monkeypatch.setattr(loading, "training_batches", in_order)
        loss = self.learner.loss

        def watched(*args: Any) -> Tensor:
            value = loss(*args)
            self.losses.append(value.item())
            return value

        self.learner.loss = watched

    def _train(self, task: Task) -> Given:
        arrays = self.arrays
        labels = self.position[arrays["y_train"]]
        key = f"order/{task.index}"
        rows = arrays[key] if key in arrays else np.flatnonzero(np.isin(labels, list(task.classes)))
        return Given(pixels(arrays["x_train"][rows]), labels[rows])

    def test_images(self, task: Task) -> Tensor:
        arrays = self.arrays
        key = f"test_rows/{task.index}"
        seen = self.position[arrays["y_test"]] < task.total_classes
        return pixels(arrays["x_test"][arrays[key] if key in arrays else np.flatnonzero(seen)])

    def learn(self, task: Task, start: Callable[[int], None] | None = None) -> list[float]:
        """One task; the losses of its steps. start: called with the task's index behind `before_task`."""
        before = type(self.learner).before_task

        def begun(task: Task) -> None:
            before(self.learner, task)
            if start is not None:
                start(task.index)

        self.learner.before_task = begun
        self.losses.clear()
        learn(self.learner, task)
        return list(self.losses)

    @torch.no_grad()
    def predict(self, task: Task) -> Tensor:
        self.learner.eval()
        images = self.test_images(task)
        return self.learner.predict(images, self.learner.frozen(images, self.learner.frozen_names))


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float64 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255


def near(ours: Any, stored: Any, tolerance: float, name: str = "") -> None:
    """Largest absolute error over the largest value."""
    ours, stored = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (detached(ours), stored))
    assert ours.numel() == stored.numel(), name
    if stored.numel():
        error = (ours.reshape(stored.shape) - stored).abs().max()
        assert error <= tolerance * stored.abs().max(), (name, error.item())


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def all_near(ours: Mapping[str, Tensor], stored: Mapping[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == stored.keys()
    for name, value in ours.items():
        near(value, stored[name], tolerance, name)
