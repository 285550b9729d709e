"""What a table shows: finished seeds of each row, its best published numbers, a verdict for each metric."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data.checks import Findings
from data.layouts import find_place
from data.rows import ROWS
from data.sources import default_root
from tools.index import KINDS
from tools.table.spec import Experiment, Published, Row, RowSpec, TableFile, resolve
from tools.table.verdict import Verdict, judge, obstacles, parting
from utils.aggregate import Runs, differences, runs_of, spread
from utils.errors import UserError
from utils.folders import read_result, seed_folder
from utils.results import is_number
from utils.storage import expanded


@dataclass(frozen=True)
class Shown:
    """published, verdicts: by metric. parting: first task at which our curve and theirs part ways. seeds: finished of
    those asked for."""

    row: Row
    runs: Runs | None
    published: Mapping[str, Published | None]
    verdicts: Mapping[str, Verdict]
    parting: int | None = None


def settle(table: TableFile, root: Path) -> TableFile:
    """Rows with a grid take the best point of those that are finished, by the validation part.

    A row whose sweep is not finished keeps the experiment without a point, and `unsettled` says so.
    """
    return replace(table, rows=tuple(_settled(row, root) for row in table.rows))


def _settled(row: Row, root: Path) -> Row:
    if not row.grid or row.experiment is None:
        return row
    found = [(point, _sweep(row, experiment)) for point, experiment in row.grid]
    swept = tuple((point, spread([one["last_acc"] for one in results]).mean) for point, results in found if results)
    if len(swept) < len(row.grid):
        return replace(row, swept=swept)
    point, best = max(swept, key=lambda entry: entry[1])
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in point.items())
    chosen = f"{told} of {len(swept)} points, by {best:.2f} on the validation part"
    if at_edge := [key for key, value in point.items() if _is_edge(value, row.spec.grid[key])]:
        chosen += f", at the edge of the sweep over {' and '.join(at_edge)}"
    experiment = resolve(row.experiment.file, {**row.experiment.set, **point}, root)
    return replace(row, experiment=experiment, grid=(), chosen=chosen, swept=swept)


def _is_edge(value: Any, values: Sequence[Any]) -> bool:
    """Of several numbers the smallest or the largest: beyond it may lie a better one."""
    numbers = {other for other in values if is_number(other)}
    return len(numbers) > 1 and is_number(value) and value in (min(numbers), max(numbers))


def unsettled(row: Row) -> str:
    """Why the best point of a row that `settle` has seen is not known yet; empty where it is, or without a grid."""
    return f"the sweep is at {len(row.swept)} of {len(row.grid)} points" if row.grid else ""


def _sweep(row: Row, point: Experiment) -> list[Mapping[str, Any]]:
    return finished(point, row.seeds[:1])


def finished(experiment: Experiment, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    """result.json of the finished seeds that ran this config.

    Raises UserError where a folder holds another config or cannot be read: it would be counted as what it is not.
    """
    found: list[Mapping[str, Any]] = []
    for seed in seeds:
        folder = seed_folder(experiment.folder, seed)
        try:
            result = read_result(folder)
        except ValueError as error:
            raise UserError(f"'{folder / 'result.json'}' cannot be read ({error})") from None
        if result is None or not result.get("finished"):
            continue
        if keys := experiment.config.same_run(result["config"]):
            raise UserError(f"'{folder}' holds another config ({', '.join(keys[:5])} differ)")
        found.append(result)
    return found


def collect(table: TableFile) -> list[Shown]:
    return [_shown(row, table.spec.metrics, table.spec.tolerance) for row in table.rows]


def _shown(row: Row, metrics: Sequence[str], tolerance: float) -> Shown:
    published = {metric: best(row.spec, metric) for metric in metrics}
    if row.experiment is None:
        return Shown(row, None, published, dict.fromkeys(metrics, Verdict("theirs only")))
    runs, missing = _runs(row, row.experiment)
    verdicts = {metric: judge(runs, published[metric], metric, tolerance, missing) for metric in metrics}
    curve = next((entry for entry in by_worth(row.spec) if entry.curve is not None), None)
    apart = None
    if runs is not None and curve is not None and curve.curve is not None and not obstacles(runs, curve):
        apart = parting(runs.curves, curve.curve, tolerance)
    return Shown(row, runs, published, verdicts, apart)


def _runs(row: Row, experiment: Experiment) -> tuple[Runs | None, str]:
    """(finished seeds, or None; why they cannot be compared)."""
    if reason := unsettled(row):
        return None, reason
    try:
        results = finished(experiment, row.seeds)
    except UserError as error:
        return None, str(error)
    if not results:
        return None, data_fault(experiment)
    if faults := differences(results):
        return None, f"its seeds are not one experiment ({'; '.join(faults)})"
    return runs_of(experiment.folder, results), ""


def by_worth(spec: RowSpec) -> list[Published]:
    """Best kind first; of one kind in the order of the file."""
    return sorted(spec.published, key=lambda entry: KINDS.index(entry.kind))


def best(spec: RowSpec, metric: str) -> Published | None:
    return next((entry for entry in by_worth(spec) if entry.value(metric) is not None), None)


def data_fault(experiment: Experiment) -> str:
    """Why a row cannot be run here for want of data; empty where it can."""
    config = experiment.config
    return _data_fault(config.dataset, config.data_root)


@cache
def _data_fault(dataset: str, data_root: str | None) -> str:
    """Looks for folder or file alone: to read a large data set for a table of finished runs would take minutes."""
    kind, colon, place = dataset.partition(":")
    if colon and kind in ("npz", "folder"):
        return "" if expanded(place).exists() else f"data missing: '{place}' not found"
    row = ROWS.get(dataset)
    if row is None or row.layout == "cifar":  # bundled, or downloaded by the run itself
        return ""
    root, findings = default_root(data_root), Findings(dataset, False)
    if find_place(row, root, findings) is not None:
        return ""
    return f"data missing: folder '{root / row.folders[0]}' not found"
