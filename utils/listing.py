"""What --list and --keys print, and the JSON schemas for editors."""

import json
import textwrap
from pathlib import Path

from convs.backbones import NAMED
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


def write_schemas(folder: Path) -> None:
    """<learner>.json for each learner; a config names it with "$schema"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LEARNERS:
        text = json.dumps(json_schema(LEARNERS[name].Config, name), indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]
