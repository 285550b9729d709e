"""What was predicted: per task a file of every test image, its label, the prediction and all scores.

    frame = pandas.DataFrame({name: list(values) for name, values in numpy.load("task1.npz").items()})

Labels and predictions are columns of the scores; `class_names` in result.json names them.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.stream import Task, TaskData
from utils.folders import draw
from utils.plots import plot_confusion, title_of
from utils.runtime import Runtime
from utils.storage import replace_file

Keep = Callable[[TaskData, np.ndarray, Mapping[str, Tensor]], None]


class Predictions:
    """Collects what an evaluation sees; `add` is a `Keep`. Letters: N images, C classes seen."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._scores: dict[str, list[np.ndarray]] = {}
        self._data: TaskData | None = None

    def add(self, data: TaskData, positions: np.ndarray, scores: Mapping[str, Tensor]) -> None:
        """A batch: scores (B, C) by name. The host waits for them."""
        self._data = data
        self._rows.append(data.rows[positions])
        self._labels.append(data.labels[positions])
        for name, values in scores.items():
            self._scores.setdefault(name, []).append(values.float().cpu().numpy())

    def arrays(self, runtime: Runtime) -> dict[str, np.ndarray]:
        """{"file" (N,), "label" (N,), "prediction" (N,), "scores" (N, C)}, and "scores_<name>" of further scores; of
        all processes, in the order of the data set."""
        mine: tuple[Any, ...] = (self._rows, self._labels, self._scores)
        parts = [part for part in runtime.gather(mine) if part[0]]
        rows = np.concatenate([batch for part in parts for batch in part[0]])
        order = np.argsort(rows, kind="stable")
        label = np.concatenate([batch for part in parts for batch in part[1]])[order]
        names = list(parts[0][2])
        scores = [np.concatenate([batch for part in parts for batch in part[2][name]])[order] for name in names]
        found = {"file": self._files(rows[order]), "label": label, "prediction": scores[0].argmax(axis=1)}
        further = {f"scores_{name}": values for name, values in zip(names[1:], scores[1:], strict=True)}
        return found | {"scores": scores[0]} | further

    def write(self, runtime: Runtime, tasks: Sequence[Task], result: Mapping[str, Any], folder: Path) -> None:
        """predictions/taskN.npz below a seed's folder; after the last task also who is taken for whom, as figures."""
        arrays = self.arrays(runtime)
        if runtime.is_main:
            write_predictions(arrays, folder / "predictions" / f"task{tasks[-1].index + 1}.npz")
            if result["finished"]:
                draw(draw_confusions, arrays, tasks, result, folder / "plots")

    def _files(self, rows: np.ndarray) -> np.ndarray:
        """Where each image lies; of images that lie in no files, their numbers."""
        assert self._data is not None
        split = self._data.split
        return np.array([str(split.images[row]) for row in rows]) if split.in_files else rows.astype(str)


def write_predictions(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """In one step: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, partial(_savez, arrays))


def _savez(arrays: Mapping[str, np.ndarray], file: Any) -> None:
    """As numpy.savez_compressed, which has no room for an array called "file"."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def draw_confusions(
    arrays: Mapping[str, np.ndarray], tasks: Sequence[Task], result: Mapping[str, Any], folder: Path
) -> None:
    """confusion.png over the classes seen, and confusion_tasks.png where classes belong to tasks."""
    classes = tasks[-1].total_classes
    counts = confusion(arrays["label"], arrays["prediction"], classes)
    begins = [task.classes.start for task in tasks[1:]] if tasks[0].domain is None else []
    title = title_of(result)
    plot_confusion(counts, "class", f"{title}: confusion of classes", folder / "confusion.png", begins)
    if tasks[0].domain is None and len(tasks) > 1:
        owner = np.searchsorted(begins, np.arange(classes), side="right")
        both = confusion(owner[arrays["label"]], owner[arrays["prediction"]], len(tasks))
        plot_confusion(both, "task", f"{title}: confusion of tasks", folder / "confusion_tasks.png")


def confusion(true: np.ndarray, predicted: np.ndarray, size: int) -> np.ndarray:
    """(N,), (N,) -> (size, size): [true, predicted] counts."""
    return np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
