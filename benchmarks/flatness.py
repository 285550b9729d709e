"""Flatness beside accuracy: what `landscape` measured after the last task of several runs, as a table and a figure.

    python -m benchmarks.flatness --title digits --figure docs/figures/flatness.png \\
        "single adapter=runs/raa/digits_single" "RAA=runs/raa/digits"

Draw the landscapes first: python main.py landscape runs/raa/digits_single.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.folders import read_result

Numbers = Mapping[str, Any]
COLUMNS: Mapping[str, Callable[[Numbers], float]] = {
    "last accuracy": lambda n: n["last_acc"],
    "loss": lambda n: n["loss"],
    "sphere, 10 steps": lambda n: n["sharpness_10"],
    "noise": lambda n: n["noise_increase"]["mean"],
    "top eigenvalue": lambda n: n["top_eigenvalue"],
    "trace": lambda n: n["trace"]["mean"],
}
SHOWN = ("sphere, 10 steps", "top eigenvalue")


def read(folder: Path) -> list[Numbers]:
    """The last task's landscape of each finished seed of a run."""
    found = []
    for seed in sorted(folder.glob("seed*")):
        result = read_result(seed)
        if result is None or not result["finished"]:
            continue
        path = seed / "landscape" / f"task{result['tasks']}.json"
        if not path.is_file():
            raise SystemExit(f"'{path}' is missing: python main.py landscape {folder}")
        found.append(json.loads(path.read_text()))
    if not found:
        raise SystemExit(f"no finished seed in '{folder}'")
    return found


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else f"{values[0]:.3g}"


def plot(streams: Mapping[str, Mapping[str, list[Numbers]]], title: str, path: Path) -> None:
    """A row per stream, a panel per measure, a point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5 * len(streams) + 0.8), layout="constrained", dpi=120)
    rows = figure.subplots(len(streams), len(SHOWN), sharey="row", squeeze=False)
    colours: dict[str, str] = {}
    for panels, (stream, runs) in zip(rows, streams.items(), strict=True):
        for panel, name in zip(panels, SHOWN, strict=True):
            for label, seeds in runs.items():
                flatness = [COLUMNS[name](numbers) for numbers in seeds]
                colour = colours.setdefault(label, f"C{len(colours)}")
                panel.plot(flatness, [numbers["last_acc"] for numbers in seeds], "o", color=colour, label=label)
            panel.set_xlabel(f"{name} (flatter to the left)")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"{stream}: last accuracy (%)")
    handles = {line.get_label(): line for panel in rows.flat for line in panel.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a result folder, above its seeds")
    parser.add_argument("--title", default="")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    options = parser.parse_args()
    streams: dict[str, dict[str, list[Numbers]]] = {}
    print(f"| stream | | {' | '.join(COLUMNS)} | n |\n|{'---|' * (len(COLUMNS) + 3)}")
    for label, _, folder in (run.partition("=") for run in options.runs):
        seeds = read(Path(folder))
        streams.setdefault(seeds[0]["dataset"], {})[label] = seeds
        cells = [cell([column(numbers) for numbers in seeds]) for column in COLUMNS.values()]
        print(f"| {seeds[0]['dataset']} | {label} | {' | '.join(cells)} | {len(seeds)} |")
    if options.figure:
        plot(streams, options.title, options.figure)


if __name__ == "__main__":
    main()
