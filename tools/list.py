"""Learners, data sets, transforms, bundled backbones, experiments: a line each."""

import argparse
from pathlib import Path

from convs.backbones import NAMED
from convs.small import SMALL
from data.sources import SOURCES
from data.transforms import RECIPES
from models.base import LEARNERS
from models.factory import BROKEN
from tools.index import experiments
from utils.checking import read_json

COMMAND = "list"
HELP = "learners, data sets, transforms, backbones, experiments"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main(options: argparse.Namespace) -> int:
    print(everything())
    return 0


def everything() -> str:
    """Learners, data sets, transforms, bundled backbones, experiments: a line each."""
    sections = {
        "learners": [
            *((name, _first_line(LEARNERS[name].__doc__)) for name in LEARNERS),
            *((f"models/{name}", f"cannot be imported: {reason}") for name, reason in sorted(BROKEN.items())),
        ],
        "data sets": [
            *((name, _first_line(SOURCES[name].__doc__)) for name in SOURCES),
            ("npz:FILE", "x_train uint8 [N, H, W, 3], y_train, x_test, y_test"),
            ("folder:DIR", "train/<class>/*.jpg and test/<class>/*.jpg"),
            ("torchvision:NAME", "any classification set of torchvision, for example torchvision:EMNIST?split=letters"),
            ("hf:NAME", "through the library datasets, from the hub or a folder, for example hf:NAME?label=fine_label"),
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
        "experiments": [(str(path), "") for path in experiments(Path("exps"))],
        "tables": [
            (str(path), str(read_json(path).get("title", ""))) for path in sorted(Path("exps", "tables").glob("*.json"))
        ],
    }
    lines = []
    for title, rows in sections.items():
        width = max((len(name) for name, _ in rows), default=0)
        lines += [title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows), ""]
    return "\n".join(lines).rstrip()


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]
