"""Plots of a run: accuracy curve and accuracy matrix; curves of all seeds with their mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_run(result: Mapping[str, Any], folder: Path) -> None:
    """curve.png and matrix.png of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    _curve([result], folder / "curve.png")
    _matrix(result, folder / "matrix.png")


def plot_seeds(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per seed, and their mean."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _curve(results, path)


def plot_curves(curves: Mapping[str, Sequence[Sequence[float]]], title: str, path: Path) -> None:
    """{label: curves of its seeds} -> one line per label, the mean, with the range over seeds as a band."""
    figure, axes = _axes(title)
    for label, seeds in curves.items():
        values = np.array(seeds)
        tasks = np.arange(1, values.shape[1] + 1)
        (line,) = axes.plot(tasks, values.mean(axis=0), marker="o", label=f"{label} ({values.mean(axis=0)[-1]:.1f})")
        axes.fill_between(tasks, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
    axes.set_xticks(tasks)
    axes.legend(title="mean of seeds (last accuracy)", loc="lower left")
    figure.savefig(path)


def plot_images(images: np.ndarray, path: Path, columns: int = 20) -> None:
    """(N, 3, h, w) in [0, 1] -> one picture, row by row, cut to the range."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    count, _, height, width = images.shape
    rows = -(-count // columns)
    grid = np.ones((rows * columns, 3, height, width))
    grid[:count] = images.clip(0, 1)
    grid = grid.reshape(rows, columns, 3, height, width).transpose(0, 3, 1, 4, 2)  # rows, h, columns, w, 3
    pixels = (255 * grid.reshape(rows * height, columns * width, 3)).round().astype(np.uint8)
    Image.fromarray(pixels).save(path)


def _curve(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    config = results[0]["config"]
    figure, axes = _axes(f"{config['model_name']} on {Path(config['dataset']).name}")
    tasks = np.arange(1, len(results[0]["curve"]) + 1)
    for result in results:
        alone = len(results) == 1
        label = "all classes seen" if alone else f"seed {result['config']['seed']}"
        axes.plot(tasks, result["curve"], marker="o", lw=2 if alone else 1, alpha=1 if alone else 0.6, label=label)
        if alone:
            axes.plot(tasks, result["curve_task_il"], marker="s", ls="--", lw=1, label="with the task known")
            if "probe" in result:
                probe = result["probe"]
                axes.plot(tasks, probe["curve"], marker="^", ls=":", lw=1, label=f"probe ({probe['kind']})")
    if len(results) > 1:
        mean = np.mean([result["curve"] for result in results], axis=0)
        axes.plot(tasks, mean, color="black", lw=2.5, marker="o", label=f"mean of {len(results)} seeds")
    axes.set_xticks(tasks)
    axes.legend(loc="lower left")
    figure.savefig(path)


def _matrix(result: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    acc = np.array(result["acc"], dtype=float)
    count = len(acc)
    side = max(4.0, 0.45 * count + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    image = axes.imshow(acc, vmin=0, vmax=100, cmap="viridis")
    if count <= 20:
        for (t, i), value in np.ndenumerate(acc):
            if not np.isnan(value):
                colour = "white" if value < 60 else "black"
                axes.text(i, t, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    ticks = np.arange(count) if count <= 20 else np.arange(0, count, -(-count // 20))
    axes.set(
        xlabel="evaluated on task", ylabel="after task", xticks=ticks, yticks=ticks, xticklabels=ticks + 1,
        yticklabels=ticks + 1, title=f"{result['config']['model_name']}: accuracy per task",
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label="accuracy (percent)")
    figure.savefig(path)


def _axes(title: str):
    # The object interface: no global figure list, no display, safe beside a user's own matplotlib state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="tasks learned", ylabel="accuracy (percent)", ylim=(0, 102))
    axes.grid(alpha=0.3)
    return figure, axes
