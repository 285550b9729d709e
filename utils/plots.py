"""Figures of runs: curve and matrix of one, curves and differences of several, confusions.

One style: the colours of Okabe and Ito, which colour-blind people tell apart, with a marker and a dash for each line;
axes that fit the values; the legend outside. The object interface of matplotlib with a canvas of its own: no list of
global figures, no display, whatever MPLBACKEND says.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
FIGURES = (".png", ".pdf", ".svg")
MOST_TICKS = 12
MOST_NUMBERS = 20  # tasks up to which a matrix has its values written in
SIZE = (6.4, 4.6)  # inches, whatever is drawn


@dataclass(frozen=True)
class Curves:
    """Of one method. values (seeds, tasks). sizes: classes of each task; None: not of a class-incremental stream."""

    label: str
    values: np.ndarray
    sizes: Sequence[int] | None = None


def curves_of(label: str, values: np.ndarray, result: Mapping[str, Any]) -> Curves:
    """values (seeds, tasks). result: of one of the seeds."""
    return Curves(label, values, None if result["domains"] else result["task_sizes"])


def new_figure(width: float = SIZE[0], height: float = SIZE[1], dpi: int = 120) -> Any:
    """An empty figure that draws itself into files."""
    named = os.environ.pop("MPLBACKEND", None)  # a name that is no backend stops the import
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, vectors: bool = True) -> None:
    """By its suffix; a PNG gets the same as vectors, PDF and SVG, beside it, which takes three times as long."""
    import matplotlib

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # which tells each glyph that it puts into a PDF
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = vectors and path.suffix.lower() == ".png"
    beside = [path.with_suffix(suffix) for suffix in FIGURES[1:]] if vectors else []
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):  # text stays text
        for file in (path, *beside):
            figure.savefig(file)


def plot_run(result: Mapping[str, Any], folder: Path) -> None:
    """curve and matrix of one seed."""
    title = title_of(result)
    figure, axes = _axes(title, "accuracy (percent)")
    lines = [("all classes seen", result["curve"]), ("with the task known", result["curve_task_il"])]
    if "probe" in result:
        lines.append((f"probe ({result['probe']['kind']})", result["probe"]["curve"]))
    for name in result.get("scores", ())[1:]:
        lines.append((f"by the score {name}", result[f"curve_{name}"]))
    for number, (label, values) in enumerate(lines):
        axes.plot(_tasks(values), values, label=label, **_style(number))
    _finish(figure, axes, [np.array(values) for _, values in lines], _seen(result))
    save(figure, folder / "curve.png", vectors=False)
    plot_matrix(result["acc"], title, folder / "matrix.png")


def plot_seeds(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per seed, and their mean."""
    figure, axes = _axes(title_of(results[0], seed=False), "accuracy (percent)")
    curves = np.array([result["curve"] for result in results])
    for number, result in enumerate(results):
        style = _style(number) | {"lw": 1, "alpha": 0.7}
        axes.plot(_tasks(result["curve"]), result["curve"], label=f"seed {result['config']['seed']}", **style)
    mean = curves.mean(axis=0)
    axes.plot(_tasks(mean), mean, color="black", lw=2.5, label=f"mean of {len(results)} seeds")
    _finish(figure, axes, [curves], _seen(results[0]))
    save(figure, path, vectors=False)


def plot_curves(curves: Sequence[Curves], title: str, path: Path, ylabel: str = "accuracy (percent)") -> None:
    """A line per method, the mean of its seeds, with the standard deviation over seeds as a band."""
    figure, axes = _axes(title, ylabel)
    edges = []
    for number, entry in enumerate(curves):
        mean = entry.values.mean(axis=0)
        style = _style(number)
        axes.plot(_tasks(mean), mean, label=f"{entry.label} ({mean[-1]:.1f})", **style)
        edges.append(mean)
        if len(entry.values) > 1:
            std = entry.values.std(axis=0, ddof=1)
            edges += [mean - std, mean + std]
            axes.fill_between(_tasks(mean), mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
    sizes = {tuple(entry.sizes) if entry.sizes is not None else None for entry in curves}
    same = sizes.pop() if len(sizes) == 1 else None
    several = any(len(entry.values) > 1 for entry in curves)
    words = "mean ± standard deviation over seeds (last value)" if several else "one seed (last value)"
    _finish(figure, axes, edges, np.cumsum(same) if same is not None else None, words)
    save(figure, path)


@dataclass(frozen=True)
class Sweep:
    """Of one row over one key: points (value, accuracy in percent), by value. chosen: the value that a finished sweep
    chose, where it lies on this line."""

    key: str
    label: str
    points: Sequence[tuple[float, float]]
    chosen: float | None = None


def plot_sweeps(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """A panel per key, a line per row, the chosen point filled; values that span a decade on a log scale, with a linear
    piece around a zero."""
    keys = list(dict.fromkeys(sweep.key for sweep in sweeps))
    styles = {label: _style(number) for number, label in enumerate(dict.fromkeys(sweep.label for sweep in sweeps))}
    figure = new_figure(SIZE[0] * (1 if len(keys) == 1 else 0.8 * len(keys)), SIZE[1] + 0.11 * len(styles))
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for key, axes in zip(keys, panels, strict=True):
        lines = [sweep for sweep in sweeps if sweep.key == key]
        for sweep in lines:
            axes.plot(*zip(*sweep.points, strict=True), mfc="white", **styles[sweep.label])
            for value, accuracy in sweep.points:
                if value == sweep.chosen:
                    axes.plot(value, accuracy, **styles[sweep.label] | {"ms": 8})
        values = [value for sweep in lines for value, _ in sweep.points]
        sizes = [abs(value) for value in values if value]
        if sizes and max(sizes) >= 10 * min(sizes):
            if min(values) > 0:
                axes.set_xscale("log")
            else:
                axes.set_xscale("symlog", linthresh=min(sizes))
        axes.set_xlabel(key)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("last accuracy (percent)")
    figure.suptitle(_wrapped(title, 70 if len(keys) == 1 else 56 * len(keys)), fontsize=10)
    figure.legend(
        [panels[0].plot([], [], mfc="white", **style)[0] for style in styles.values()], styles, ncols=2, fontsize=8,
        loc="outside lower center", title="on the validation part; filled: the chosen point", title_fontsize=8,
    )  # fmt: skip
    save(figure, path)


def plot_differences(
    bars: Sequence[tuple[str, float | None, float | None, str]], what: str, title: str, path: Path
) -> None:
    """(row, ours less theirs, its standard error, verdict) each: bars, in their order."""
    figure = new_figure(SIZE[0], max(SIZE[1], 1.6 + 0.28 * len(bars)))
    axes = figure.add_subplot()
    places = np.arange(len(bars))
    heights = np.array([value or 0.0 for _, value, _, _ in bars])
    errors = np.array([error or 0.0 for _, _, error, _ in bars])
    meaning = {"within": COLOURS[0], "below": COLOURS[1], "above": COLOURS[2]}
    hatches = {"below": "//", "above": "\\\\"}
    for place, (_, _, error, verdict) in zip(places, bars, strict=True):
        axes.barh(place, heights[place], color=meaning.get(verdict, "#999999"), hatch=hatches.get(verdict),
                  edgecolor="white", xerr=error, ecolor="black", capsize=3)  # fmt: skip
    axes.axvline(0, color="black", lw=1)
    axes.set(title=_wrapped(title), yticks=places, xlabel=f"{what}: ours less published (points, ± standard error)")
    axes.set_yticklabels([f"{_cut(name, 34)}  {verdict}" for name, _, _, verdict in bars], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    reach = max(1.0, float((np.abs(heights) + errors).max()) * 1.1)
    axes.set_xlim(-reach, reach)
    save(figure, path)


def plot_matrix(acc: Sequence[Sequence[float | None]], title: str, path: Path) -> None:
    """acc[t][i]: after task t, on task i, in percent; None where nothing was evaluated."""
    values = np.array(acc, dtype=float)
    count = len(values)
    figure = new_figure(SIZE[0], 5.6)
    axes = figure.add_subplot()
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    image = axes.imshow(values, vmin=low, vmax=max(high, low + 1), cmap="viridis", interpolation="nearest")
    if count <= MOST_NUMBERS:
        size = min(9.0, 84 / count)
        for (t, i), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if image.norm(value) < 0.6 else "black"
                axes.text(i, t, percent(value, short=count > 12), ha="center", va="center", color=colour, fontsize=size)
    rows, columns = ticks(count), ticks(values.shape[1])
    axes.set(xlabel="evaluated on task", ylabel="after task", xticks=columns - 1, yticks=rows - 1)
    axes.set_title(_wrapped(title), fontsize=10)
    axes.set_xticklabels(columns)
    axes.set_yticklabels(rows)
    figure.colorbar(image, ax=axes, label="accuracy (percent)")
    save(figure, path, vectors=False)


def plot_confusion(counts: np.ndarray, what: str, title: str, path: Path, borders: Sequence[int] = ()) -> None:
    """counts (C, C): [true, predicted]. Each row in percent of its images; the colours are spread by the square root,
    so that a few percent can be seen. what: "class" or "task". borders: where tasks begin, drawn as lines."""
    from matplotlib.colors import PowerNorm

    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100.0 * counts, total, out=np.zeros(counts.shape), where=total > 0)
    figure = new_figure(7.2, 6.4, dpi=180)
    axes = figure.add_subplot()
    image = axes.imshow(shares, norm=PowerNorm(0.5, 0, 100), cmap="viridis", interpolation="nearest")
    count, first = len(counts), 0 if what == "class" else 1
    if count <= MOST_NUMBERS:
        for (t, i), value in np.ndenumerate(shares):
            if value > 0:
                colour = "white" if image.norm(value) < 0.6 else "black"
                axes.text(i, t, percent(value, short=count > 12), ha="center", va="center", color=colour,
                          fontsize=min(9.0, 90 / count))  # fmt: skip
    for border in borders:
        axes.axhline(border - 0.5, color="white", lw=0.5, alpha=0.7)
        axes.axvline(border - 0.5, color="white", lw=0.5, alpha=0.7)
    marks = np.arange(0, count, _step(count)) if first == 0 else ticks(count)
    axes.set(xlabel=f"predicted {what}", ylabel=f"true {what}", xticks=marks - first, yticks=marks - first)
    axes.set_title(_wrapped(title), fontsize=10)
    axes.set_xticklabels(marks)
    axes.set_yticklabels(marks)
    figure.colorbar(image, ax=axes, label=f"percent of the images of a {what}")
    save(figure, path, vectors=False)


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


def title_of(result: Mapping[str, Any], seed: bool = True) -> str:
    """Learner, data, protocol, backbone: what a figure has to say to stand alone."""
    config = result["config"]
    return f"{config['model_name']} on {_data(config['dataset'])}\n{protocol(result, seed)}\n{backbone(result)}"


def protocol(result: Mapping[str, Any], seed: bool = True) -> str:
    """ "10 tasks of 10 classes, class order by seed 1993"."""
    config, sizes = result["config"], result["task_sizes"]
    if result["domains"]:
        return f"{len(sizes)} domains of {sizes[0]} classes"
    if not config.get("shuffle", True):
        order = "natural class order"
    elif config.get("class_order_seed") is not None:
        order = f"class order by seed {config['class_order_seed']}"
    else:
        order = f"class order by seed {config['seed']}" if seed else "class order by seed"
    return f"{len(sizes)} tasks of {_sizes(sizes)} classes, {order}"


def backbone(result: Mapping[str, Any]) -> str:
    """Network and where its weights come from."""
    named = result["config"]["backbone"]
    name = named if isinstance(named, str) else named["name"]
    weights = Path(str(result.get("weights", {}).get("name") or "")).name
    return f"{name}, {weights}" if weights and weights != name else name


def ticks(count: int, most: int = MOST_TICKS) -> np.ndarray:
    """Numbers from 1 to count, at most `most` and evenly apart."""
    step = _step(count, most)
    return np.unique([1, *range(step, count + 1, step)])


def _step(count: int, most: int = MOST_TICKS) -> int:
    """A round number that leaves at most `most` of `count` places."""
    least = max(1, math.ceil(count / most))
    return next((nice for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000) if nice >= least), least)


def percent(value: float, short: bool = False) -> str:
    """One decimal, or none; 100 for 100 alone, which what is rounded to it is not."""
    if value == 100:
        return "100"
    digits = 0 if short else 1
    return f"{min(value, 99.0 if short else 99.9):.{digits}f}"


def _axes(title: str, ylabel: str) -> tuple[Any, Any]:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.set(xlabel="tasks learned", ylabel=ylabel)
    axes.set_title(_wrapped(title), fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "ls": DASHES[number // len(COLOURS) % len(DASHES)],
        "ms": 4.5,
        "lw": 1.6,
    }


def _finish(figure: Any, axes: Any, values: Sequence[np.ndarray], seen: np.ndarray | None, words: str = "") -> None:
    """Axes that fit the values, classes seen on a second one, the legend below."""
    everything = np.concatenate([np.ravel(np.asarray(part, dtype=float)) for part in values])
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    margin = max(0.06 * (high - low), 0.5)
    axes.set_ylim(max(low - margin, -1.0), min(high + margin, 101.0))
    count = max(np.shape(part)[-1] for part in values)
    marks = ticks(count)
    axes.set_xticks(marks)
    axes.set_xlim(1 - 0.03 * max(count - 1, 1), count + 0.03 * max(count - 1, 1))
    for line in axes.lines:
        line.set_markevery(max(1, count // 25))
    if seen is not None:
        above = axes.secondary_xaxis("top")
        above.set_xticks(marks)
        above.set_xticklabels([str(seen[mark - 1]) for mark in marks], fontsize=8)
        above.set_xlabel("classes seen", fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 1 if longest > 50 else 2 if longest > 24 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=8,
                  title=words or None, title_fontsize=8)  # fmt: skip
    rows = -(-len(labels) // columns)
    if rows > 4:  # room for the legend, none taken from the curves
        figure.set_size_inches(SIZE[0], SIZE[1] + 0.18 * (rows - 4))


def _tasks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def _seen(result: Mapping[str, Any]) -> np.ndarray | None:
    """Classes after each task; None where domains bring the same ones again."""
    return None if result["domains"] else np.cumsum(result["task_sizes"])


def _data(name: str) -> str:
    """A data set as people call it: a file by its own name."""
    return Path(name.partition(":")[2]).name if name.startswith(("npz:", "folder:")) else name


def _sizes(sizes: Sequence[int]) -> str:
    """ "10" for equal tasks, "50, then 10" for a larger first one; the last may be short."""
    if len(set(sizes)) == 1:
        return str(sizes[0])
    later = set(sizes[1:-1]) or set(sizes[1:])
    if len(later) == 1 and sizes[-1] <= max(later):
        step = later.pop()
        first = str(sizes[0]) if sizes[0] == step else f"{sizes[0]}, then {step}"
        return first if sizes[-1] == step else f"{first} (last {sizes[-1]})"
    return f"{min(sizes)} to {max(sizes)}"


def _wrapped(title: str, width: int = 70) -> str:
    import textwrap

    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, width) or [""])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
