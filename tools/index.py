"""README.md and schema/ of a folder of experiments, written from the files themselves."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.factory import LEARNERS
from utils.keys import json_schema

COMMAND = "index"
HELP = "write DIR/README.md and DIR/schema/ of the experiments in DIR"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")


def main(options: argparse.Namespace) -> int:
    write_index(options.folder)
    return 0


def write_index(folder: Path) -> None:
    """schema/<learner>.json for each learner (a config names it with "$schema"), and README.md, the experiments as
    tables."""
    (folder / "schema").mkdir(parents=True, exist_ok=True)
    for name in LEARNERS:
        text = json.dumps(json_schema(LEARNERS[name].Config, name), indent=1)
        (folder / "schema" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(experiment_tables(folder), encoding="utf-8")


NOT_EXPERIMENTS = frozenset({"schema", "tables"})  # folders of other JSON files below exps/


def experiments(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.json")) if path.parent.name not in NOT_EXPERIMENTS]


def experiment_tables(folder: Path) -> str:
    """One Markdown table per folder of experiments, from their `about`; values that nobody measured stay empty."""
    lines = [
        "# Experiments",
        "",
        "`python main.py --config exps/FILE`. Written by `make index` from the files themselves. Accuracies in "
        "percent, last / average; *published*: the best kind of number that there is, with its kind, or the source "
        "that the file's `about` names; *ours*: measured here, blank where it was not run. Whole tables of papers: "
        "`python main.py table exps/tables/FILE` ([docs/tables.md](../docs/tables.md)).",
    ]
    family, published = None, published_in_tables(folder / "tables")
    for path in experiments(folder):
        if path.parent != family:
            family = path.parent
            title = str(family.relative_to(folder))
            lines += ["", f"## {title if title != '.' else 'start here'}", ""]
            lines += ["| file | data | backbone | what | published | ours |", "|---|---|---|---|---|---|"]
        lines.append(_row(path, published.get(path.resolve(), "")))
    return "\n".join([*lines, *_tables(folder / "tables")]) + "\n"


# What a number is worth, best first (docs/tables.md).
KINDS = (
    "shipped log", "repo csv", "official code rerun", "reproduction", "third-party log", "paper table",
    "paper figure", "repo figure", "paper number quoted", "secondary text", "reproduction target", "test target",
)  # fmt: skip


def published_in_tables(folder: Path) -> dict[Path, str]:
    """Experiment -> the best published numbers that a table has for it as it is: "91.5 / 94.1 (shipped log)"."""
    found: dict[Path, tuple[int, str]] = {}
    for table in sorted(folder.glob("*.json")):
        for row in json.loads(table.read_text(encoding="utf-8"))["rows"]:
            if row.get("config") is None or row.get("set"):
                continue
            config = (table.parent / row["config"]).resolve()
            for entry in row.get("published", ()):
                worth, text = KINDS.index(entry["kind"]), _published(entry)
                if text and worth < found.get(config, (len(KINDS), ""))[0]:
                    found[config] = (worth, text)
    return {config: text for config, (_, text) in found.items()}


def _published(entry: Mapping[str, Any]) -> str:
    if "last_acc_task_mean" in entry:
        return f"{entry['last_acc_task_mean']['mean']:g} ({entry['kind']}, mean of tasks)"
    numbers = _figures(entry)
    return f"{numbers} ({entry['kind']})" if numbers else ""


def _tables(folder: Path) -> list[str]:
    """The tables themselves, a line each."""
    lines = ["", "## tables", "", "| file | what | protocol | rows | of them here |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        here = sum(row.get("config") is not None for row in table["rows"])
        lines.append(f"| {path.name} | {table['title']} | {table['protocol']} | {len(table['rows'])} | {here} |")
    return lines if len(lines) > 5 else []


def _row(path: Path, published: str) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    about, backbone = values.get("about", {}), values["backbone"]
    what = [str(about[key]) for key in ("paper", "row", "shows", "purpose", "note") if key in about]
    sizes = values.get("task_sizes") or [values[key] for key in ("init_cls", "increment") if key in values]
    protocol = f", {' + '.join(map(str, sizes))} a task" if sizes else ", by domain"
    data = values["dataset"].partition(":")[0] if values["dataset"].startswith("npz:") else values["dataset"]
    network = backbone if isinstance(backbone, str) else backbone["name"]
    cells = [
        path.name,
        data + protocol,
        network,
        "; ".join(what),
        published or _reported(about, "reference run" if path.parent.name == "reference" else "the paper"),
        _figures(about.get("ours")),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _reported(about: Mapping[str, Any], otherwise: str) -> str:
    """What the file's own `about` says, with the kind of source that it names; otherwise: where it names none."""
    reported = about.get("reported")
    numbers = _figures(reported)
    if not numbers or not isinstance(reported, dict):
        return ""
    entries = [reported, *(entry for entry in reported.values() if isinstance(entry, dict))]
    said = " ".join(str(entry.get(key, "")) for entry in entries for key in ("source", "reading")).lower()
    kinds = {"log": "log", "figure": "figure", "curve": "figure", "plot": "figure", "note": "secondary text",
             "later": "secondary text", "table": "table"}  # fmt: skip
    kind = next((kind for word, kind in kinds.items() if word in said), otherwise)
    return f"{numbers} ({kind})"


def _figures(numbers: object) -> str:
    """{"last_acc": 91.5 or {"mean": 91.5, ...}, "avg_acc": ...} -> "91.5 / 94.1"; "91.5" without an average."""
    if not isinstance(numbers, dict):
        return ""
    found = [numbers.get(key) for key in ("last_acc", "avg_acc")]
    last, average = (entry.get("mean") if isinstance(entry, dict) else entry for entry in found)
    if average is None:
        return "" if last is None else f"{last:g}"
    return f"{'?' if last is None else format(last, 'g')} / {average:g}"
