"""What a file is, from its first bytes, so that a reader's complaint can name the likely cause."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from utils.errors import UserError, did_you_mean, reason

# (how a file begins, what it is then, what to do about it)
_MARKS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"<!doctype html", "an HTML page", "the download gave a web page: fetch the file itself"),
    (b"<html", "an HTML page", "the download gave a web page: fetch the file itself"),
    (b"<?xml", "an XML page", "the download gave a message: fetch the file itself"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file", "convert it"),
    (b"\x93NUMPY", "a single NumPy array", "save it as npz, by name"),
    (b"%PDF", "a PDF document", "name another file"),
    (b"GGUF", "a GGUF file", "convert it"),
)
_IMAGES = (
    (b"\x89PNG", "a PNG image", "name another file"),
    (b"\xff\xd8\xff", "a JPEG image", "name another file"),
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_file(path: Path, what: str, error: type[UserError]) -> None:
    """Raises `error` when `path` is no regular file with something in it: nothing else is opened, since a pipe would be
    waited for."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise error(f"{what}: no such file: {path}{_near(path)}") from None
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        raise error(f"{what} '{path}' cannot be read ({reason(fault)}). Name a file that exists") from None
    if kind := special(info.st_mode):
        raise error(f"{what} '{path}' is {kind}: name a file")
    if not info.st_size:
        raise error(f"{what} '{path}' is empty (0 bytes): fetch it again")
    if not os.access(path, os.R_OK):
        raise error(f"{what} '{path}' cannot be read (Permission denied). Change its permissions")


def special(mode: int) -> str | None:
    """What a path is that is no regular file, in words; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((words for test, words in _KINDS if test(mode)), "no file")


def likely_cause(path: Path, images: bool = True) -> str | None:
    """ "it is a Git LFS pointer, not the file itself: fetch the file: git lfs pull", where the first bytes tell.
    images: whether an image is the wrong kind of file."""
    begin = first_bytes(path)
    plain = begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, kind, remedy in (*_MARKS, *(_IMAGES if images else ())):
        if begin.startswith(mark) or plain.startswith(mark.lower()):
            return f"it is {kind}: {remedy}"
    if not begin.strip(b"\x00"):
        return "it holds nothing but zeros, as a download that was cut short leaves: fetch it again"
    return None


def first_bytes(path: Path, count: int = 512) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


@contextmanager
def told(what: str, path: Path, error: type[UserError], kind: str, remedy: str) -> Iterator[None]:
    """Whatever a reader raises inside becomes one sentence: what cannot be read as which kind, why, the likely cause or
    a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:  # noqa: BLE001 - readers raise many types for damaged files, MemoryError among them
        cause = likely_cause(path)
        why = f"cannot be read as {kind} ({reason(fault)})"
        raise error(f"{what} '{path}' {why}. {_sentence(cause or remedy)}") from None


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of an npz, without unpacking any. Raises what zipfile and numpy raise."""
    import zipfile

    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                continue
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            found[member[: -len(".npy")]] = shape, dtype
    return found


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = dtype.itemsize
    for side in shape:
        size *= side
    return size


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, (other.name for other in path.parent.iterdir()))
    except (OSError, ValueError):
        return ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
