"""One figure of a landscape, and its numbers in words."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.plots import new_figure

Arrays = Mapping[str, np.ndarray]
Numbers = Mapping[str, Any]


def plot_landscape(arrays: Arrays, numbers: Numbers, path: Path) -> None:
    """Two surfaces and their slices; the path from the task before, the branches, the numbers."""
    settings = numbers["settings"]
    figure = new_figure(16, 9.6, dpi=110)
    figure.suptitle(
        f"{numbers['learner']} on {numbers['dataset']}, seed {numbers['seed']}: training loss around the weights w "
        f"after task {numbers['task']} of {numbers['tasks']}  ({numbers['images']} images of the task; fp32, eval mode)"
    )
    middle = "branches" if "branch_lines" in arrays else "numbers"
    axes = figure.subplot_mosaic([["relative", "absolute", "slices"], ["path", middle, "numbers"]])
    grid, zeros = arrays["grid"], numbers["share_in_zero_rows"]
    fixed = f"{settings['radius']:g}"
    _surface(axes["relative"], arrays["surface_filter"], grid, "L(w + a d1 + b d2), steps relative to w")
    stay = f"\n{100 * zeros:.0f} % of the weights are in rows of zeros and stay" if zeros else ""
    axes["relative"].set(xlabel=f"a: at 1 each row of w has moved by its own length{stay}", ylabel="b")
    _surface(axes["absolute"], arrays["surface_radius"], grid, "L(w + a d1 + b d2), steps of one length")
    axes["absolute"].set(xlabel=f"a: at 1 each row of w has moved by {fixed}", ylabel="b")
    for name in ("relative", "absolute"):
        axes[name].plot(0, 0, marker="+", color="red", ms=10, mew=1.5)
    _slices(axes["slices"], arrays)
    _path(axes["path"], arrays, numbers)
    if "branches" in axes:
        _branches(axes["branches"], arrays, numbers)
    text = axes["numbers"]
    text.axis("off")
    lines = describe(numbers)
    size = 8.5 * min(1, 54 / max(map(len, lines)))  # the panel holds 54 characters
    text.text(-0.05, 0.98, "\n".join(lines), va="top", family="monospace", fontsize=size).set_in_layout(False)
    figure.savefig(path)


def describe(numbers: Numbers) -> list[str]:
    """The numbers as lines, rounded."""
    settings, noise, trace = numbers["settings"], numbers["noise_increase"], numbers["trace"]
    varied, before = numbers["varied"], numbers["task"] - 1
    sphere, percent = f"{settings['rho']:g}", f"{100 * settings['noise']:g}"
    rows = [
        ("varied", f"{sum(varied.values()):,} weights, |w| {numbers['weights_norm']:.4g}"),
        *(("", f"{count:,} in {name}") for name, count in varied.items()),
        ("loss L(w)", f"{numbers['loss']:.4g}, gradient {numbers['gradient_norm']:.3g}"),
        (f"max increase, |e| = {sphere}", f"{numbers['sharpness_1']:.4g} by 1 gradient step"),
        ("", f"{numbers['sharpness_10']:.4g} by 10"),
        (f"mean increase, {percent} % noise", f"{noise['mean']:.4g} ± {noise['error']:.2g}"),
        ("top Hessian eigenvalue", f"{numbers['top_eigenvalue']:.4g} (off by {_residual(numbers)} %)"),
        ("trace of the Hessian", f"{trace['mean']:.4g} ± {trace['error']:.2g}"),
    ]
    if "barrier" in numbers:
        rows.append((f"barrier of {numbers['branches']} branches", f"{numbers['barrier']:.4g}"))
    if "path" in numbers:
        ends = numbers["path"]
        rows += [
            (f"loss of task {before} after it", f"{ends['start']:.4g}"),
            (f"  after task {before + 1}", f"{ends['end']:.4g}"),
            ("  with the old head", f"{ends['end_without_head']:.4g}"),
        ]
    rows.append(("last accuracy of the run", f"{numbers['last_acc']:.2f} %"))
    title = f"task {numbers['task']} of {numbers['tasks']}, {numbers['images']} images"
    return [title, *(f"  {name:<27} {value}" for name, value in rows)]


def _residual(numbers: Numbers) -> str:
    return f"{100 * numbers['top_eigenvalue_residual']:.2g}"


def _surface(axes: Any, losses: np.ndarray, grid: np.ndarray, title: str) -> None:
    low, high = float(losses.min()), float(losses.max())
    # Rings of a quadratic bowl would stand at equal distances.
    levels = low + max(high - low, 1e-12) * np.linspace(0, 1, 13) ** 2
    image = axes.contourf(grid, grid, losses, levels=levels, cmap="viridis")
    rings = axes.contour(grid, grid, losses, levels=levels[1:-1], colors="white", linewidths=0.5)
    axes.clabel(rings, fmt="%.3g", fontsize=7)
    axes.figure.colorbar(image, ax=axes, label="loss", format="%.3g")
    axes.set(title=title, xticks=_ticks(grid), yticks=_ticks(grid), aspect="equal")


def _slices(axes: Any, arrays: Arrays) -> None:
    grid, centre = arrays["grid"], len(arrays["grid"]) // 2
    for name, style, label in (("filter", "-", "relative"), ("radius", "--", "of one length")):
        losses = arrays[f"surface_{name}"]
        axes.plot(grid, losses[centre], style, color="tab:blue", label=f"along d1, {label}")
        axes.plot(grid, losses[:, centre], style, color="tab:orange", label=f"along d2, {label}")
    axes.set(title="slices through the middle of the surfaces", xlabel="a or b", ylabel="loss")
    axes.set_xticks(_ticks(grid))
    axes.grid(alpha=0.3)
    axes.legend(title="steps")


def _path(axes: Any, arrays: Arrays, numbers: Numbers) -> None:
    task = numbers["task"]
    if "path" not in arrays:
        axes.set(title="session path", xticks=[], yticks=[])
        sentence = textwrap.fill(f"not drawn: {numbers['no_path']}", 44)
        axes.text(0.5, 0.5, sentence, ha="center", va="center", transform=axes.transAxes)
        return
    both = np.concatenate([arrays["path"], arrays["path_backbone"]])
    lowest, highest = float(both.min()), float(both.max())
    axes.plot(arrays["path_grid"], arrays["path"], marker=".", label="the whole network moves")
    axes.plot(arrays["path_grid"], arrays["path_backbone"], marker=".", ls="--", label="all but the head moves")
    axes.set(
        title=f"session path: loss of task {task - 1} while task {task} is learned", ylabel=f"loss of task {task - 1}",
        xlabel=f"0: weights after task {task - 1}, 1: after task {task}",
        ylim=(min(0.0, 1.1 * lowest), 1.1 * highest),  # from zero: a level path shall look level
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()


def _branches(axes: Any, arrays: Arrays, numbers: Numbers) -> None:
    barrier = f"{numbers['barrier']:.3g}"
    if "branch_plane" in arrays:
        _surface(axes, arrays["branch_plane"], arrays["plane_grid"], f"plane of branches 0, 1, 2; barrier {barrier}")
        axes.plot([0, 1, 0, 0], [0, 0, 1, 0], color="red", marker="o", lw=1)
        axes.set(xlabel="a: 0 = branch 0, 1 = branch 1", ylabel="b: 1 = branch 2")
        return
    grid, losses = arrays["branch_grid"], arrays["branch_lines"][0]
    axes.plot(grid, losses, marker=".")
    for end in (0, 1):
        axes.axvline(end, color="red", lw=1, ls=":")
    axes.set(
        title=f"line through branches 0 and 1; barrier {barrier}", xlabel="a: 0 = branch 0, 1 = branch 1", ylabel="loss"
    )
    axes.grid(alpha=0.3)


def _ticks(grid: np.ndarray) -> np.ndarray:
    return np.arange(grid[0], grid[-1] + 0.1, 0.5)
