"""What --list and --keys print; the JSON schemas for editors and the table of experiments."""

import json
import textwrap
from pathlib import Path

from convs.backbones import NAMED
from convs.small import SMALL
from data.sources import SOURCES
from data.transforms import RECIPES
from models.base import LEARNERS
from utils.config import RunConfig, json_schema, key_table


def everything() -> str:
    """Learners, data sets, transforms, bundled backbones, experiments: a line each."""
    sections = {
        "learners": [(name, _first_line(LEARNERS[name].__doc__)) for name in LEARNERS],
        "data sets": [
            *((name, _first_line(SOURCES[name].__doc__)) for name in SOURCES),
            ("npz:FILE", "x_train uint8 [N, H, W, 3], y_train, x_test, y_test"),
            ("folder:DIR", "train/<class>/*.jpg and test/<class>/*.jpg"),
        ],
        "transforms": [(name, RECIPES[name].meaning) for name in RECIPES],
        "backbones": [
            *((name, "bundled, pre-trained on glyphs") for name in NAMED),
            *((name, "for small images, random weights (convs/small.py)") for name in SMALL),
            ("any full timm tag", "for example vit_base_patch16_224.augreg_in21k"),
            (
                '{"name": "vit", ...}',
                "timm's VisionTransformer with these arguments; any other timm architecture likewise",
            ),
        ],
        "experiments": [
            (str(path), "") for path in sorted(Path("exps").glob("**/*.json")) if "schema" not in path.parts
        ],
    }
    lines = []
    for title, rows in sections.items():
        width = max((len(name) for name, _ in rows), default=0)
        lines += [title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows), ""]
    return "\n".join(lines).rstrip()


def keys(learner: str) -> str:
    """The key table of a learner: its own keys, then those of every learner."""
    cls = LEARNERS[learner].Config
    lines = []
    for key, kind, default, meaning in key_table(cls):
        own = "" if key in RunConfig.model_fields else f"  [{learner}]"
        lines += [
            f"{key}{own}",
            f"    {kind}; default {default}" if default != "required" else f"    {kind}; required",
        ]
        lines += textwrap.wrap(meaning, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def write_index(folder: Path) -> None:
    """schema/<learner>.json for each learner (a config names it with "$schema"), and README.md, the experiments as
    tables."""
    (folder / "schema").mkdir(parents=True, exist_ok=True)
    for name in LEARNERS:
        text = json.dumps(json_schema(LEARNERS[name].Config, name), indent=1)
        (folder / "schema" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(experiment_tables(folder), encoding="utf-8")


def experiments(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.json")) if path.parent.name != "schema"]


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
    return " / ".join("" if mean is None else f"{mean:g}" for mean in means)


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]
