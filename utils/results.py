"""The result folder: config.json, result.json, epochs.jsonl, train.log; summary.{json,md} above the seeds.

Files hold full precision; rounding happens when printing.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.storage import put_aside, replace_file

METRICS = (
    "last_acc", "avg_acc", "last_acc_task_il", "avg_acc_task_il", "forgetting", "bwt", "last_probe", "avg_probe",
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def is_number(value: Any) -> bool:
    """Of what JSON holds: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_folder(folder: Path) -> None:
    """Create a folder, or say why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to '{folder}' ({error.strerror}). Choose another folder with --output DIR"
        ) from None


class EpochLog:
    """epochs.jsonl: one object per line. lines: those that the checkpoint knows, from which a run goes on; what was
    written behind them is dropped, and what was cut or damaged is written again."""

    def __init__(self, path: Path, lines: Sequence[str]):
        self.path, self.lines = path, list(lines)
        known = "".join(f"{line}\n" for line in lines).encode()
        found = path.read_bytes() if path.is_file() else b""
        if found == known:
            return
        if not known.startswith(found) and not found.startswith(known):
            put_aside(path, "its lines are not those of the checkpoint")
        if known or found:
            replace_file(path, lambda file: file.write(known))

    def append(self, values: Mapping[str, Any]) -> None:
        """JSON knows no NaN: what is not finite is null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps(finite, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines.append(line)


class run_log:  # noqa: N801 - used as a context manager, like contextlib.suppress
    """Send the log to train.log of one seed's folder while the block runs; only the main process writes."""

    def __init__(self, folder: Path, is_main: bool):
        path = folder / "train.log"
        self._handler = logging.FileHandler(path, encoding="utf-8") if is_main else logging.NullHandler()
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self._handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def summarise_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{metric: {"mean", "std", "n", "values"}}: sample standard deviation, null for one seed."""
    summary: dict[str, Any] = {"seeds": [result["config"]["seed"] for result in results]}
    others = [f"{metric}_{name}" for name in results[0].get("scores", ())[1:] for metric in METRICS[:2]]
    for metric in (*METRICS, *others):
        values = [result[metric] for result in results if result.get(metric) is not None]
        if values:
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            summary[metric] = {"mean": float(np.mean(values)), "std": std, "n": len(values), "values": values}
    return summary


MEANINGS = {
    "last_acc": "accuracy after the last task",
    "avg_acc": "mean of the accuracies after each task",
    "last_acc_task_il": "after the last task, with the task known",
    "avg_acc_task_il": "mean over the tasks, with the task known",
    "forgetting": "forgetting: best accuracy on a task less its last",
    "bwt": "backward transfer: last accuracy on a task less its first",
    "last_probe": "probe after the last task",
    "avg_probe": "mean of the probe over the tasks",
}


def summary_text(results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """summary.md: what was run, in words, and the numbers as a table. results: of the seeds."""
    first = results[0]
    config, sizes, data = first["config"], first["task_sizes"], first["data"]["name"]
    backbone = config["backbone"] if isinstance(config["backbone"], str) else config["backbone"]["name"]
    tasks = f"{len(sizes)} domains" if first["domains"] else f"{len(sizes)} tasks of {_sizes(sizes)} classes"
    seeds = ", ".join(map(str, summary["seeds"]))
    return (
        f"# {config['model_name']} on {data}\n\n{tasks}; backbone {backbone} ({first['weights']['name']}); "
        f"class order by seed; seeds {seeds}. Accuracies in percent, over the test images of all classes seen.\n\n"
        f"{summary_table(summary)}"
    )


def _sizes(sizes: Sequence[int]) -> str:
    """ "10" for equal tasks, "50, then 10" for a larger first one, else all."""
    later = set(sizes[1:])
    if len(later) <= 1:
        return str(sizes[0]) if not later or later == {sizes[0]} else f"{sizes[0]}, then {sizes[1]}"
    return ", ".join(map(str, sizes))


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = ["| metric | mean | std | n | meaning |", "|---|---|---|---|---|"]
    for metric, entry in summary.items():
        if isinstance(entry, Mapping):
            std = "" if entry["std"] is None else f"{entry['std']:.2f}"
            score = next((m for m in MEANINGS if metric.startswith(m) and metric != m), None)
            meaning = MEANINGS.get(metric) or (f"the same by the score {metric[len(score) + 1 :]}" if score else "")
            rows.append(f"| {metric} | {entry['mean']:.2f} | {std} | {entry['n']} | {meaning} |")
    return "\n".join(rows) + "\n"


def curve_text(result: Mapping[str, Any]) -> str:
    """The accuracy after each task as bars, for the end of a run."""
    lines = ["accuracy over the classes seen so far, after each task (percent)"]
    for task, accuracy in enumerate(result["curve"], 1):
        lines.append(f"  task {task:>2}  {accuracy:6.2f}  {'#' * round(accuracy / 2)}")
    lines.append(f"  last {result['last_acc']:.2f}   average {result['avg_acc']:.2f}")
    if result["forgetting"] is not None:
        lines[-1] += f"   forgetting {result['forgetting']:.2f}   with the task known {result['last_acc_task_il']:.2f}"
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """As people write it: 2h05m, 3m20s, 45s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
