"""The command: read the table, run what is missing, print and write what there is."""

import argparse
import json
import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.table.jobs import (
    FINISHED,
    STOPPED,
    Job,
    Outcome,
    Told,
    executor,
    gpus,
    job_of,
    missing,
    run_local,
    run_submitted,
)
from tools.table.rows import collect, data_fault, settle
from tools.table.sharing import behind, divide
from tools.table.show import as_table, csv_table
from tools.table.spec import Row, TableFile, read_table
from utils.checking import parse_set
from utils.errors import Interrupted, UserError
from utils.plots import Sweep
from utils.results import is_number, make_folder, write_text
from utils.tables import SUFFIXES, Table

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """0; 1 where a job failed or has no data, 3 when it was stopped while jobs ran. Raises UserError."""
    figures = [path for path in (options.figure, options.sweeps, options.differences) if path is not None]
    check_outputs(options.write, figures)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    flags = {"device": options.device, "data_root": options.data_root}
    given = parse_set(options.set) | {key: value for key, value in flags.items() if value is not None}
    if "seed" in given:
        raise UserError("--set seed: give --seeds, which every row takes")
    table = read_table(options.file, options.output, given, options.rows, options.seeds)
    if options.sweeps is not None and not any(map(swept_numbers, table.rows)):
        raise UserError(f"--sweeps {options.sweeps}: no row has a grid with two numbers or more for a key")
    failed: list[Outcome] = []
    if options.run:
        make_folder(options.output)
    try:
        failed += launch(sweep_jobs(table), options) if options.run else []
        table = settle(table, options.output)
        failed += launch(row_jobs(table), options) if options.run else []
    except Interrupted as signalled:
        log.error("stopped by %s: what was begun is saved, and the same command goes on with it", signalled)
        return STOPPED
    skipped = without_data(table) if options.run else {}
    shown = collect(table)
    for path in options.write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, rendered(table, shown, SUFFIXES[path.suffix.lower()]))
    print(rendered(table, shown, options.format), end="")
    for outcome in failed:
        log.error("failed: %s (status %s): %s", outcome.job.name, outcome.status, outcome.job.last_line())
    for name, reason in skipped.items():
        log.error("not run: %s: %s", name, reason)
    draw(table, shown, options.figure, options.sweeps, options.differences)
    return 1 if failed or skipped else 0


def without_data(table: TableFile) -> dict[str, str]:
    """Rows that cannot be run here, and why."""
    faults = {row.name: data_fault(row.experiment) for row in table.rows if row.experiment is not None}
    return {name: fault for name, fault in faults.items() if fault}


def rendered(table: TableFile, shown: Sequence[Any], form: Any) -> str:
    made: Table = csv_table(table, shown) if form == "csv" else as_table(table, shown)
    return made.render(form)


def check_outputs(tables: Sequence[Path], figures: Sequence[Path]) -> None:
    """Before anything is run: a name that says no form is an error, not a lost hour."""
    from utils.plots import FIGURES

    for path in tables:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"'{path}': a table is written as {', '.join(SUFFIXES)}")
    for figure in figures:
        if figure.suffix.lower() not in FIGURES:
            raise UserError(f"'{figure}': a figure is written as {', '.join(FIGURES)}")
    outputs = [*tables, *figures]
    for path in outputs:
        if outputs.count(path) > 1:
            raise UserError(f"'{path}' is named twice: each output needs a file of its own")
        if path.is_dir():
            raise UserError(f"'{path}' is a folder: name a file")


def draw(
    table: TableFile, shown: Sequence[Any], figure: Path | None, sweeps: Path | None, differences: Path | None
) -> None:
    """What there is; then UserError with each figure that has nothing to draw."""
    from utils.plots import curves_of, plot_curves, plot_differences, plot_sweeps

    caption = f"{table.spec.title}\n{table.spec.protocol}"
    empty = []
    if figure is not None:
        curves = [curves_of(row.row.name, row.runs.curves, row.runs.first) for row in shown if row.runs is not None]
        if curves:
            plot_curves(curves, caption, figure)
        else:
            empty.append(f"--figure {figure}: no row has a finished seed, so there is no curve to draw")
    if sweeps is not None:
        lines = sweep_lines(table)
        if lines:
            plot_sweeps(lines, caption, sweeps)
        else:
            empty.append(f"--sweeps {sweeps}: no row has a finished point of a sweep over a number")
    if differences is not None:
        metric = table.spec.metrics[0]
        bars = [(entry.row.name, verdict.difference, verdict.error, verdict.word) for entry in shown
                if (verdict := entry.verdicts[metric]).difference is not None]  # fmt: skip
        if bars:
            plot_differences(bars, metric, caption, differences)
        else:
            empty.append(f"--differences {differences}: no row has ours and theirs, so there is nothing to draw")
    if empty:
        raise UserError("\n".join(empty))


def sweep_lines(table: TableFile) -> list[Sweep]:
    """A line per row and number that it sweeps; where it sweeps several keys, one for each choice of the others. The
    point that a finished sweep chose is its line's."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    chosen: dict[tuple[str, str], float] = {}
    for row in table.rows:
        best = max(row.swept, key=lambda entry: entry[1], default=None) if not row.grid else None
        for key in swept_numbers(row):
            for entry in row.swept:
                point, last = entry
                others = ", ".join(f"{name} {json.dumps(value)}" for name, value in point.items() if name != key)
                if is_number(point[key]):
                    line = key, f"{row.name} ({others})" if others else row.name
                    found.setdefault(line, []).append((point[key], last))
                    if entry is best:
                        chosen[line] = point[key]
    return [Sweep(*line, points=sorted(points), chosen=chosen.get(line)) for line, points in found.items()]


def swept_numbers(row: Row) -> list[str]:
    """Keys of a row's grid with two numbers or more."""
    return [key for key, values in row.spec.grid.items() if sum(map(is_number, values)) > 1]


def sweep_jobs(table: TableFile) -> list[Job]:
    """Points of every grid, on the row's first seed and the validation part."""
    return [
        job_of(f"{row.name} {', '.join(f'{key} {value}' for key, value in point.items())}", experiment, row.seeds[0])
        for row in table.rows
        for point, experiment in row.grid
        if not data_fault(experiment)
    ]


def row_jobs(table: TableFile) -> list[Job]:
    """Seeds of every row whose data are there; one whose sweep is not finished waits."""
    return [
        job_of(row.name, row.experiment, seed)
        for row in table.rows
        if row.experiment is not None and not row.grid and not data_fault(row.experiment)
        for seed in row.seeds
    ]


def launch(jobs: Sequence[Job], options: argparse.Namespace) -> list[Outcome]:
    """Run what is missing; the outcomes of those that failed."""
    todo = missing(jobs)
    if len(todo) < len({job.folder for job in jobs}):
        log.info("%d of %d seeds are finished already", len({job.folder for job in jobs}) - len(todo), len(jobs))
    if not todo:
        return []
    with tqdm(total=len(todo), disable=None, unit="seed") as bar:

        def told(what: Outcome | Job) -> None:
            if isinstance(what, Outcome):
                bar.update()
                tqdm.write(ended(what))
            else:
                tqdm.write(f"{'resumed' if (what.folder / 'checkpoint').is_dir() else 'started':<8} {what.name}")

        run_all = launcher(options)
        at_once, waiting = divide(jobs, todo)
        outcomes = run_all(at_once, told)
        if waiting:
            outcomes += run_all([behind(job, leader) for job, leader in waiting], told)
    return [outcome for outcome in outcomes if outcome.status != FINISHED]


def launcher(options: argparse.Namespace) -> Callable[[Sequence[Job], Told], list[Outcome]]:
    """What runs jobs, as --launcher says. Raises UserError where submitit is missing."""
    if options.launcher == "local":
        devices = [] if options.device is not None else gpus()
        return partial(run_local, at_once=options.jobs or max(1, len(devices)), devices=devices)
    cluster = "slurm" if options.launcher == "slurm" else "local"
    parameters = parse_set(options.slurm)
    if options.jobs and cluster == "slurm":
        parameters.setdefault("slurm_array_parallelism", options.jobs)
    at_once = None if cluster == "slurm" else options.jobs or 1
    return partial(run_submitted, made=executor(cluster, options.output / "submitit", parameters), at_once=at_once)


def ended(outcome: Outcome) -> str:
    """The progress line of a job that ended."""
    job, minutes = outcome.job, outcome.seconds / 60
    took = f"{minutes:.1f} min" if minutes >= 1 else f"{outcome.seconds:.0f} s"
    if outcome.status == FINISHED:
        result = job.result or {}
        numbers = f"last {result['last_acc']:.2f}, average {result['avg_acc']:.2f}" if result else ""
        return f"finished {job.name}: {numbers} ({took})"
    if outcome.status == -signal.SIGTERM:  # before it could save: there was nothing yet
        return f"stopped  {job.name}: before it began ({took})"
    word = "stopped " if outcome.status == STOPPED else "failed  "
    return f"{word} {job.name}: {job.last_line()} ({took})"
