"""Results of several experiments side by side: a table, and a figure of their curves (mean and range over seeds).

    python -m benchmarks.compare --title digits --figure docs/figures/digits.png \\
        finetune=runs/finetune/digits simplecil=runs/simplecil/digits joint=runs/joint/digits
"""

import argparse
from pathlib import Path

from utils.folders import read_result
from utils.plots import plot_curves
from utils.results import summarise_seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a result folder, above its seeds")
    parser.add_argument("--title", default="")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    options = parser.parse_args()
    curves = {}
    print("| | last | average | forgetting | task known | n |\n|---|---|---|---|---|---|")
    for run in options.runs:
        label, _, folder = run.partition("=")
        found = [read_result(path) for path in sorted(Path(folder).glob("seed*"))]
        results = [result for result in found if result is not None and result["finished"]]
        if not results:
            parser.error(f"no finished seed in '{folder}'")
        summary = summarise_seeds(results)
        cells = [_cell(summary, metric) for metric in ("last_acc", "avg_acc", "forgetting", "last_acc_task_il")]
        print(f"| {label} | {' | '.join(cells)} | {len(results)} |")
        curves[label] = [result["curve"] for result in results]
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(curves, options.title, options.figure)


def _cell(summary: dict, metric: str) -> str:
    entry = summary.get(metric)
    if entry is None:
        return ""
    return f"{entry['mean']:.2f}" + ("" if entry["std"] is None else f" ± {entry['std']:.2f}")


if __name__ == "__main__":
    main()
