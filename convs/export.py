"""python -m convs.export CHECKPOINT FILE: write a run's backbone as safetensors, under timm's parameter names."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "network.backbone.model."


def export_backbone(checkpoint: Path, target: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["learner"]
    tensors = {key[len(PREFIX) :]: value.contiguous() for key, value in state.items() if key.startswith(PREFIX)}
    save_file(tensors, target)


if __name__ == "__main__":
    export_backbone(Path(sys.argv[1]), Path(sys.argv[2]))
