"""Checkpoints that survive a kill, and say when they are damaged or another run's.

Written in one step (`utils.storage`); read without executing code. A checkpoint is torch's own zip file with a comment
at its end: a JSON object of its identity and the SHA-256 of everything before the comment, which torch itself
does not check.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import UserError
from utils.storage import replace_file
from utils.version import VERSION

FORMAT = 3
_END = 22  # bytes of a zip's end record without a comment; the last two are the comment's length
_START_ANEW = "Remove it to start this seed anew"


def save(state: dict[str, Any], path: Path, identity: Mapping[str, Any]) -> None:
    """Write `state` so that `path` always holds a whole checkpoint: the old one or the new one.

    identity: what it belongs to, readable without loading it (see `identity_of`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, partial(_write_checked, state, {"format": FORMAT, "version": VERSION, **identity}))


def _write_checked(state: dict[str, Any], identity: Mapping[str, Any], file: IO[bytes]) -> None:
    watched = _Hashing(file)
    torch.save(state, watched)  # type: ignore[arg-type]
    comment = json.dumps({**identity, "sha256": watched.digest.hexdigest()}).encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(comment).to_bytes(2, "little") + comment)


class _Hashing(io.RawIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()


def keep(path: Path, name: str) -> None:
    """Keep the checkpoint at `path` under another name beside it, which the next `save` leaves alone.

    A second link to the same bytes, since `save` puts a new file in the old one's place; a copy where there are none.
    """
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(path.with_name(name))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_other(path: Path, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint is not of the run that reads it. found, own: identities."""
    for name, value in own.items():
        if found.get(name) != value:
            was, now = (str(text)[:16] for text in (found.get(name), value))
            way = f"Put the {name} back, or choose" if name in ("data", "weights") else "Choose"
            raise UserError(
                f"checkpoint '{path}' is of another run: its {name} is {was}, here it is {now}. {way} another folder "
                "with --output DIR"
            )


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, state). Raises UserError when the file is missing, damaged, or of a version that cannot be read."""
    identity = identity_of(path)
    try:
        return identity, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise many types for what they cannot read
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint '{path}' cannot be read ({reason}). {_START_ANEW}") from None


def identity_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: {"format", "version", "learner", "seed", ..., "sha256"}; its digest is checked.

    Raises UserError when it is missing, damaged, or of a version that cannot be read.
    """
    try:
        with path.open("rb") as file:
            start, comment = _end_of_zip(file)
            digest = _sha256(file, start)
    except OSError as error:
        raise UserError(f"checkpoint '{path}' cannot be read ({error.strerror})") from None
    if start < 0:
        raise UserError(f"checkpoint '{path}' is damaged: it is cut off, or no checkpoint. {_START_ANEW}")
    if not comment:
        raise UserError(
            f"checkpoint '{path}' was written by version 0.1, whose runs this version ({VERSION}) does not continue. "
            "Finish the run with that version, or remove the file to start this seed anew"
        )
    try:
        identity = json.loads(comment)
        written = identity["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint '{path}' is damaged: its identity cannot be read. {_START_ANEW}") from None
    if written != digest:
        raise UserError(f"checkpoint '{path}' is damaged: its content is not what was written. {_START_ANEW}")
    if identity.get("format") != FORMAT:
        raise UserError(
            f"checkpoint '{path}' was written by version {identity.get('version')}, in a format that this version "
            f"({VERSION}) does not read. Finish the run with that version, or remove the file to start this seed anew"
        )
    return identity


def _end_of_zip(file: IO[bytes]) -> tuple[int, bytes]:
    """(where the end record begins, the comment behind it); -1 where there is none that ends the file."""
    size = file.seek(0, os.SEEK_END)
    first = max(0, size - _END - 65535)  # no comment is longer
    file.seek(first)
    tail = file.read()
    start = tail.rfind(b"PK\x05\x06")
    comment = tail[start + _END :]
    length = int.from_bytes(tail[start + _END - 2 : start + _END], "little")
    return (first + start, comment) if start >= 0 and len(comment) == length else (-1, b"")


def _sha256(file: IO[bytes], end_record: int) -> str:
    """Of the file as torch wrote it: up to the comment, whose length was 0."""
    digest, left = hashlib.sha256(), end_record + _END - 2
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()
