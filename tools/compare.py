"""Finished runs side by side: a table, and a figure of their curves."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.aggregate import Runs, Spread, finished_runs, spread
from utils.errors import UserError, did_you_mean
from utils.plots import FIGURES, curves_of, plot_curves, protocol
from utils.results import is_number
from utils.tables import Form, Table, with_std

COMMAND = "compare"
HELP = "table and figure of finished runs side by side"
METRICS = ("last_acc", "avg_acc", "forgetting", "last_acc_task_il")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="a result folder, or one of its seeds")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), metavar="NAME",
                        help=f"numbers of result.json, such as seconds.total; default {' '.join(METRICS)}")  # fmt: skip
    parser.add_argument("--figure", type=Path, metavar="FILE", help="curves: .pdf, .svg, .png (with both beside it)")
    parser.add_argument("--title", help="of the figure and the table; default: the protocol")
    form = parser.add_mutually_exclusive_group()
    for name in ("latex", "csv", "markdown"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print {name}")
    parser.set_defaults(form="text")


def main(options: argparse.Namespace) -> int:
    if options.figure is not None and options.figure.suffix.lower() not in FIGURES:
        raise UserError(f"'{options.figure}': a figure is written as {', '.join(FIGURES)}")
    named = labelled(options.runs)
    runs = {label: finished_runs(folder) for label, folder in named.items()}
    refuse(runs)
    print(comparison(runs, options.metrics, options.title, options.form), end="")
    if options.figure is not None:
        curves = [curves_of(label, found.curves, found.first) for label, found in runs.items()]
        plot_curves(curves, options.title or described(next(iter(runs.values()))), options.figure)
    return 0


def labelled(texts: Sequence[str]) -> dict[str, Path]:
    """["a=runs/x", "runs/y"] -> {"a": runs/x, "y": runs/y}. A folder whose own name holds "=" is taken as it is.

    Raises UserError for a label that stands twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        label, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            label, folder = _name(Path(text)), text
        if label in found:
            raise UserError(f'two runs are called "{label}": give them labels, LABEL=RUN')
        found[label] = Path(folder)
    return found


def _name(folder: Path) -> str:
    """runs/raa/cars -> "raa/cars": without what all folders of results begin with."""
    parts = folder.parts
    return "/".join(parts[parts.index("runs") + 1 :] if "runs" in parts[:-1] else parts[-2:])


def refuse(runs: Mapping[str, Runs]) -> None:
    """Raises UserError for every run that cannot stand beside the first one."""
    (first, reference), *others = runs.items()
    faults = []
    for label, found in others:
        ours, theirs = found.first, reference.first
        for what, a, b in (
            ("data", ours["data"]["hash"][:12], theirs["data"]["hash"][:12]),
            ("split", ours["data"]["split"], theirs["data"]["split"]),
            ("number of tasks", ours["tasks"], theirs["tasks"]),
            ("sizes of the tasks", ours["task_sizes"], theirs["task_sizes"]),
            ("order of the domains", ours["domains"], theirs["domains"]),
        ):
            if a != b:
                faults.append(f'"{label}" differs from "{first}" in the {what}: {_shown(a)}, not {_shown(b)}')
                break
        else:
            faults += _other_orders(label, found, first, reference)
    if faults:
        raise UserError("these runs cannot be compared:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _other_orders(label: str, found: Runs, first: str, reference: Runs) -> list[str]:
    orders = {result["config"]["seed"]: result["class_order"] for result in reference.results}
    for result in found.results:
        seed = result["config"]["seed"]
        if seed in orders and orders[seed] != result["class_order"]:
            return [f'"{label}" differs from "{first}" in the class order under seed {seed}']
    return []


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def comparison(runs: Mapping[str, Runs], metrics: Sequence[str], title: str | None, form: Form) -> str:
    """The table as text. Raises UserError for a metric that no run has."""
    rows = []
    for label, found in runs.items():
        cells = [_spread(found, metric) for metric in metrics]
        rows.append([label, str(len(found.results)), *(_cell(cell, form) for cell in cells)])
    for column, metric in enumerate(metrics, 2):
        if not any(row[column] for row in rows):
            known = sorted(_numbers(next(iter(runs.values())).first))
            raise UserError(f'no run has a "{metric}"{did_you_mean(metric, known) or "."} Known: {", ".join(known)}')
    caption = title or described(next(iter(runs.values())))
    notes = ["mean ± standard deviation over n seeds"] if any(len(found.results) > 1 for found in runs.values()) else []
    seeds = {label: found.seeds for label, found in runs.items()}
    if len({tuple(value) for value in seeds.values()}) > 1:
        told = "; ".join(f"{label} {', '.join(map(str, value))}" for label, value in seeds.items())
        notes.append(f"seeds differ: {told}")
    return Table(caption, ["run", "n", *metrics], rows, frozenset(range(1, 2 + len(metrics))), notes).render(form)


def _spread(runs: Runs, metric: str) -> Spread | None:
    values = [value for result in runs.results if (value := _numbers(result).get(metric)) is not None]
    return spread(values) if values else None


def _cell(value: Spread | None, form: Form) -> str:
    """For programs at full precision, the mean alone."""
    if value is None:
        return ""
    return str(value.mean) if form == "csv" else with_std(value.mean, value.std)


def _numbers(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a result; those of objects inside as "seconds.total"."""
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, Mapping) and key in ("seconds", "parameters", "data"):
            found |= _numbers(value, f"{key}.")
        elif is_number(value):
            found[f"{prefix}{key}"] = float(value)
    return found


def described(runs: Runs) -> str:
    """Data and protocol, which all compared runs share."""
    return f"{runs.first['data']['name']}: {protocol(runs.first, seed=len(runs.results) == 1)}"
