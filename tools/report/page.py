"""Results of all seeds below a folder -> one HTML page with style, script and data inside."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import WRITTEN
from utils.errors import UserError
from utils.plots import backbone, protocol
from utils.results import write_text

HERE = Path(__file__).resolve().parent
MIB = 2**20
MARK = '<table id="runs">'  # in every page: what is written anew, and what is somebody's


@dataclass(frozen=True)
class Column:
    """name: in the data of the page. number: sorted by value, aligned to the right."""

    name: str
    title: str
    number: bool = False
    digits: int = 2


COLUMNS = (
    Column("run", "run"), Column("learner", "learner"), Column("data", "data"),
    Column("seed", "seed", True, 0), Column("state", "state"), Column("last_acc", "last", True),
    Column("avg_acc", "average", True), Column("forgetting", "forgetting", True),
    Column("last_acc_task_il", "task known", True), Column("total", "seconds", True, 0),
    Column("train", "training s", True, 0), Column("eval", "evaluation s", True, 0),
    Column("memory", "memory MiB", True, 0), Column("stored", "stored MiB", True, 1),
    Column("speed", "images/s", True, 0), Column("protocol", "protocol"),
    Column("precision", "precision"), Column("date", "date"),
)  # fmt: skip


def write_report(folder: Path, output: Path, title: str) -> tuple[int, list[str]]:
    """(runs on the page, sentences on results that could not be read).

    Raises UserError where there is no run, or where the page cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: '{folder}'")
    if output.is_file() and MARK not in output.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"'{output}' is there already, and no page of this command: choose another name")
    runs, faults = collect(folder)
    if not runs:
        raise UserError(f"'{folder}' holds no run" + "".join(f"\n  - {fault}" for fault in faults))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page(runs, title, faults))
    except OSError as error:
        raise UserError(f"cannot write '{output}' ({error.strerror})") from None
    return len(runs), faults


def collect(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every seed below a folder, sorted by place; a result that cannot be read is a sentence, the others are shown."""
    runs, faults = [], []
    for path in sorted(folder.rglob("config.json")):
        place = path.parent
        name = str(place.relative_to(folder)) if place != folder else place.name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            file = place / "result.json"
            result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            runs.append(entry(name, config, result))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{place}: cannot be read ({type(error).__name__}: {error})")
    return runs, faults


def entry(name: str, config: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page holds of one seed. Rounded: it is for people; the files hold every digit."""
    keys = {key: value for key, value in config.items() if key not in (WRITTEN, "about")}
    shown: dict[str, Any] = {
        "run": name, "learner": config["model_name"], "data": Path(str(config["dataset"])).name,
        "seed": config["seed"], "config": keys, "state": "no task done", "protocol": "",
    }  # fmt: skip
    if result is None:
        return shown
    seconds, stored = result.get("seconds", {}), result.get("parameters", {}).get("stored_bytes_per_task") or [None]
    done = len(result["curve"])
    return shown | {
        "state": "finished" if result.get("finished") else f"{done} of {result['tasks']} tasks",
        "protocol": protocol(result), "backbone": backbone(result), "sizes": result["task_sizes"],
        **{key: _rounded(result.get(key)) for key in ("last_acc", "avg_acc", "forgetting", "last_acc_task_il")},
        "curve": [_rounded(value) for value in result["curve"]],
        "acc": [[_rounded(value) for value in row] for row in result["acc"]],
        "phases": {phase: round(value, 1) for phase, value in seconds.items()},
        **{phase: _rounded(seconds.get(phase), 1) for phase in ("total", "train", "eval")},
        "memory": _rounded(result.get("peak_memory_mib"), 0),
        "stored": None if stored[-1] is None else round(stored[-1] / MIB, 2),
        "speed": _rounded(result.get("images_per_second"), 1),
        "precision": result.get("environment", {}).get("precision", ""), "date": (result.get("date") or "")[:10],
    }  # fmt: skip


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def page(runs: Sequence[Mapping[str, Any]], title: str, faults: Sequence[str]) -> str:
    """The table stands in the page itself, so that it can be read without its script."""
    said = "".join(f"<li>{html.escape(fault)}</li>" for fault in faults)
    parts = {
        "title": html.escape(title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "faults": f'<section aria-label="faults"><ul class="faults">{said}</ul></section>' if faults else "",
        "head": "".join(_header(column) for column in COLUMNS),
        "body": "\n".join(_row(number, run) for number, run in enumerate(runs)),
        "count": str(len(runs)),
        "data": json.dumps({"runs": runs}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: a run may be called {{data}}.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (HERE / "page.html").read_text(encoding="utf-8"))


def _header(column: Column) -> str:
    kind = ' class="number"' if column.number else ""
    return (
        f'<th scope="col"{kind} aria-sort="none"><button type="button" data-column="{column.name}">'
        f"{html.escape(column.title)}</button></th>"
    )


def _row(number: int, run: Mapping[str, Any]) -> str:
    name = html.escape(str(run["run"]))
    box = f'<td><input type="checkbox" data-run="{number}" aria-label="show {name}"></td>'
    cells = []
    for column in COLUMNS:
        value = run.get(column.name)
        text = "" if value is None else f"{value:.{column.digits}f}" if column.number else html.escape(str(value))
        if column.name == "run":
            cells.append(f'<th scope="row">{text}</th>')
        else:
            cells.append(f'<td class="number">{text}</td>' if column.number else f"<td>{text}</td>")
    return f'<tr data-run="{number}">{box}{"".join(cells)}</tr>'
