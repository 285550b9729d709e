"""Accuracy matrix -> the numbers of a paper.

correct (R, T): correct[t, i] = images of task i's test set that are right after task t; count (T,) = images of each.
acc[t, i] = 100 * correct[t, i] / count[i] in percent, NaN where task i was not evaluated after task t: above the
diagonal, unless all domains of a stream are evaluated each time. Nothing is rounded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def accuracy_matrix(correct: np.ndarray, count: np.ndarray) -> np.ndarray:
    """correct (R, T), count (T,) -> acc (R, T) in percent."""
    return 100.0 * correct / count


def pooled_curve(correct: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(R,): accuracy after each task over all test images evaluated then, those of the tasks seen (the usual
    class-incremental curve)."""
    return 100.0 * np.nansum(correct, axis=1) / np.where(np.isnan(correct), 0, count).sum(axis=1)


def task_mean_curve(acc: np.ndarray) -> np.ndarray:
    """(R,): mean over tasks of the task accuracies (RanPAC's convention); equals the pooled curve
    only when all tasks have equally many test images."""
    return np.nanmean(acc, axis=1)


def forgetting(acc: np.ndarray, include_last: bool = False) -> float | None:
    """mean over i < T-1 of  max_t acc[t, i] - acc[T-1, i],  t <= T-2;  None for one task.

    The maximum runs over the rows before the last, so the value may be negative (a task that got better).
    include_last lets it run over the last row too, which clips every term at 0 (PILOT, mammoth).
    """
    if len(acc) < 2:
        return None
    rows = acc if include_last else acc[:-1]
    return float(np.mean(np.nanmax(rows[:, :-1], axis=0) - acc[-1, :-1]))


def backward_transfer(acc: np.ndarray) -> float | None:
    """mean over i < T-1 of  acc[T-1, i] - acc[i, i];  None for one task."""
    if len(acc) < 2:
        return None
    return float(np.mean(acc[-1, :-1] - np.diag(acc)[:-1]))


def summarise(correct: np.ndarray, correct_task_il: np.ndarray, count: np.ndarray) -> dict[str, Any]:
    """All metrics of a run, under the names that `result.json` uses."""
    acc, acc_task_il = accuracy_matrix(correct, count), accuracy_matrix(correct_task_il, count)
    curve, curve_task_il = pooled_curve(correct, count), pooled_curve(correct_task_il, count)
    task_mean = task_mean_curve(acc)
    learned = np.where(np.tri(*acc.shape) > 0, acc, np.nan)[:, : len(acc)]  # nothing is forgotten beforehand
    return {
        "last_acc": float(curve[-1]),
        "avg_acc": float(curve.mean()),
        "last_acc_task_il": float(curve_task_il[-1]),
        "avg_acc_task_il": float(curve_task_il.mean()),
        "last_acc_task_mean": float(task_mean[-1]),
        "avg_acc_task_mean": float(task_mean.mean()),
        "forgetting": forgetting(learned),
        "forgetting_clipped": forgetting(learned, include_last=True),
        "bwt": backward_transfer(learned),
        "curve": curve.tolist(),
        "curve_task_il": curve_task_il.tolist(),
        "curve_task_mean": task_mean.tolist(),
        "acc": nested(acc),
        "acc_task_il": nested(acc_task_il),
    }


def summarise_scores(names: Sequence[str], correct: np.ndarray, count: np.ndarray, classes: int) -> dict[str, Any]:
    """Of every score: the main one's numbers under their own names, those of the others with "_<name>" behind them.

    correct (S, 3, R, T): right among all classes, with the task known, among the five best. classes: seen so far; up to
    five, everything is among the five best, and the two numbers are left out.
    """
    found: dict[str, Any] = {"scores": list(names)}
    for number, (name, (class_il, task_il, top5)) in enumerate(zip(names, correct, strict=True)):
        curve = pooled_curve(top5, count)
        numbers = summarise(class_il, task_il, count)
        if classes > 5:
            numbers |= {"last_acc_top5": float(curve[-1]), "avg_acc_top5": float(curve.mean())}
        found |= {f"{key}_{name}" if number else key: value for key, value in numbers.items()}
    return found


def accuracy_by_class(right: np.ndarray, count: np.ndarray) -> list[float | None]:
    """right (C,), count (C,) test images of each class -> percent, null where a class has none."""
    return [None if n == 0 else float(100.0 * r / n) for r, n in zip(right, count, strict=True)]


def summarise_probe(kind: str | None, correct: np.ndarray, count: np.ndarray) -> dict[str, Any]:
    """What a run's probe adds to `result.json`; nothing without one. correct (T, T) as in `summarise`."""
    if kind is None:
        return {}
    curve = pooled_curve(correct, count)
    acc = nested(accuracy_matrix(correct, count))
    return {
        "last_probe": float(curve[-1]),
        "avg_probe": float(curve.mean()),
        "probe": {"kind": kind, "curve": curve.tolist(), "acc": acc},
    }


def forward_transfer(acc: np.ndarray, untrained: np.ndarray) -> float | None:
    """mean over i > 0 of  acc[i-1, i] - untrained[i]  (GEM, Lopez-Paz & Ranzato, 2017);  None for one task.

    acc[i-1, i]: accuracy on a task before it was learnt; untrained (T,): of a network that learnt nothing.
    """
    if len(acc) < 2:
        return None
    return float(np.mean(np.diag(acc, k=1) - untrained[1:]))


def nested(matrix: np.ndarray) -> list[list[float | None]]:
    """(R, T) -> nested lists with null where nothing was evaluated."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in matrix]


def grouped_accuracy(
    predicted: np.ndarray, labels: np.ndarray, known_classes: int, width: int = 10
) -> dict[str, float]:
    """Accuracy in percent in all, in groups of `width` class ids, and of old and new classes, as PyCIL-style toolboxes
    print it; predicted, labels (N,).

    The groups run over range(0, largest label, width), so a last class whose id is a multiple of `width` has none;
    old or new classes without images count as 0.
    """
    right = predicted == labels
    accuracy = {"total": 100.0 * right.mean()}
    for first in range(0, int(labels.max()), width):
        within = (labels >= first) & (labels < first + width)
        accuracy[f"{first:02d}-{first + width - 1:02d}"] = 100.0 * right[within].mean()
    for name, chosen in (("old", labels < known_classes), ("new", labels >= known_classes)):
        accuracy[name] = 100.0 * right[chosen].mean() if chosen.any() else 0.0
    return {name: float(value) for name, value in accuracy.items()}


def top_k_accuracy(best: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of labels (N,) among the first k columns of best (N, at least k), best prediction first."""
    return float(100.0 * (best[:, :k] == labels[:, None]).any(axis=1).mean())
