"""README.md and schema/ of a folder of experiments, written from the files themselves."""

import argparse
import json
from pathlib import Path

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
        "percent, last / average; *reported*: by the source that the file's `about` names; *ours*: measured here.",
    ]
    family = None
    for path in experiments(folder):
        if path.parent != family:
            family = path.parent
            title = str(family.relative_to(folder))
            lines += ["", f"## {title if title != '.' else 'start here'}", ""]
            lines += ["| file | data | backbone | what | reported | ours |", "|---|---|---|---|---|---|"]
        lines.append(_row(path))
    return "\n".join(lines) + "\n"


def _row(path: Path) -> str:
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
        _figures(about.get("reported")),
        _figures(about.get("ours")),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figures(numbers: object) -> str:
    """{"last_acc": 91.5 or {"mean": 91.5, ...}, "avg_acc": ...} -> "91.5 / 94.1"."""
    if not isinstance(numbers, dict):
        return ""
    found = [numbers.get(key) for key in ("last_acc", "avg_acc")]
    means = [entry.get("mean") if isinstance(entry, dict) else entry for entry in found]
    return " / ".join("" if mean is None else f"{mean:g}" for mean in means) if means != [None, None] else ""
