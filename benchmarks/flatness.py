"""Flatness beside accuracy: what --landscape measured after the last task of several runs, as a table and a figure.

    python -m benchmarks.flatness --title digits --figure docs/figures/flatness.png \\
        "single adapter=runs/raa/digits_single" "RAA=runs/raa/digits"

Draw the landscapes first: python main.py --landscape runs/raa/digits_single.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.results import read_result

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
            raise SystemExit(f"'{path}' is missing: python main.py --landscape {folder}")
        found.append(json.loads(path.read_text()))
    if not found:
        raise SystemExit(f"no finished seed in '{folder}'")
    return found


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else f"{values[0]:.3g}"


def plot(runs: Mapping[str, list[Numbers]], title: str, path: Path) -> None:
    """A panel per measure; a point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for panel, name in zip(panels, SHOWN, strict=True):
        for label, seeds in runs.items():
            flatness = [COLUMNS[name](numbers) for numbers in seeds]
            panel.plot(flatness, [numbers["last_acc"] for numbers in seeds], "o", label=label)
        panel.set_xlabel(f"{name} (flatter to the left)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("last accuracy (%)")
    panels[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a result folder, above its seeds")
    parser.add_argument("--title", default="")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    options = parser.parse_args()
    runs = {label: read(Path(folder)) for label, _, folder in (run.partition("=") for run in options.runs)}
    print(f"| | {' | '.join(COLUMNS)} | n |\n|{'---|' * (len(COLUMNS) + 2)}")
    for label, seeds in runs.items():
        cells = [cell([column(numbers) for numbers in seeds]) for column in COLUMNS.values()]
        print(f"| {label} | {' | '.join(cells)} | {len(seeds)} |")
    if options.figure:
        plot(runs, options.title, options.figure)


if __name__ == "__main__":
    main()
