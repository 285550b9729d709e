"""Checkpoints that survive a kill: written under a temporary name, flushed, renamed; read without executing code."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` always holds a whole checkpoint: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, partial(torch.save, state))


def write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Replace a file by what `content(file)` writes, in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)


def keep(path: Path, name: str) -> None:
    """Keep the checkpoint at `path` under another name beside it, which the next `save` leaves alone.

    A second link to the same bytes, since `save` puts a new file in the old one's place; a copy where there are none.
    """
    temporary = path.with_name(name + ".tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(path.with_name(name))


def load(path: Path) -> dict[str, Any]:
    """Raises UserError when the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise many types for a damaged file
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint '{path}' cannot be read ({reason}). Remove it to start this seed anew") from None
