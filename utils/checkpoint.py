"""Checkpoints that survive a kill: written under a temporary name, flushed, renamed; read without executing code."""

import os
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` always holds a whole checkpoint: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise many types for a damaged file
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint '{path}' cannot be read ({reason}). Remove it to start this seed anew") from None
