"""A run's backbone as safetensors, under timm's parameter names."""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from utils import checkpoint
from utils.errors import UserError
from utils.folders import single_seed

COMMAND = "export"
HELP = "write the backbone of a run as a safetensors file"
PREFIX = "network.backbone.model."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a seed, or of a run with one")
    parser.add_argument("file", type=Path, metavar="FILE", help="to write; must not be there")


def main(options: argparse.Namespace) -> int:
    export_backbone(single_seed(options.run), options.file)
    return 0


def export_backbone(folder: Path, target: Path) -> None:
    """Raises UserError when the run has no checkpoint, or when the file is there."""
    if target.exists():
        raise UserError(f"'{target}' is there already: choose another name")
    _, state = checkpoint.load(folder / "checkpoint" / "last.pt")
    module = state["learner"]["module"]
    tensors = {key[len(PREFIX) :]: value.contiguous() for key, value in module.items() if key.startswith(PREFIX)}
    save_file(tensors, target)
