"""Weight files as they lie on disk: which kind a file is, what it holds, and which of its networks is meant.

Kinds: Google's AugReg archives (.npz, Flax layout), .pth / .pt / .bin (torch, loaded without executing pickled code),
.safetensors. A torch file may hold its state dict bare, or under names ("model", "teacher", "state_dict_ema", ...),
beside optimisers, options and numbers.
"""

import argparse
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from convs.flax_archive import from_flax
from utils.errors import WeightsError
from utils.files import first_bytes, likely_cause, npz_headers, num_bytes, require_file, told
from utils.runtime import available_memory

KINDS = ".npz, .pth, .pt, .bin or .safetensors"
ONNX = "ONNX files are not read: save the state dict of the network that it was exported from, as .safetensors or .pth"
SUFFIXES = {"npz": (".npz",), "safetensors": (".safetensors",), "torch": (".pth", ".pt", ".bin", ".tar", ".ckpt")}
WORDS = {"npz": "a NumPy archive", "safetensors": "a safetensors file", "torch": "a torch file"}
DEEPEST = 6  # levels of dicts in dicts that are looked through
States = dict[str, dict[str, Tensor]]  # "" or "state_dict" or "a.b" -> names and tensors


def read_states(path: Path) -> States:
    """Every state dict of a file by the names that lead to it ("" for a bare one), with tensors as they stand in it.

    Raises WeightsError when the file is missing, damaged, of another kind, or asks for more than tensors and values.
    """
    require_file(path, "weights", WeightsError)
    if path.suffix.lower() == ".onnx":
        raise WeightsError(f"weights '{path}': {ONNX}")
    kind = _kind(path)
    with told("weights", path, WeightsError, KINDS, "fetch the file again"):
        if kind == "npz":
            return {"": _read_npz(path)}
        if kind == "safetensors":
            from safetensors.torch import load_file

            return {"": load_file(path)}
        _check_sums(path)
        return _state_dicts(_read_torch(path), path)


def _kind(path: Path) -> str:
    """By content. Raises WeightsError for what is none of the kinds, and for a file called as one and being another."""
    if cause := likely_cause(path):
        raise WeightsError(f"weights '{path}' cannot be read as {KINDS}: {cause}")
    found, suffix = _content(path), path.suffix.lower()
    if found is None:
        return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), "torch")
    named = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), found)
    if found != named:
        raise WeightsError(
            f"weights '{path}': {WORDS[found]} whose name ends in {suffix}. Rename it to end in {SUFFIXES[found][0]}"
        )
    return found


def _content(path: Path) -> str | None:
    begin = first_bytes(path)
    if begin.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return None
        if any(name.endswith("/code/") or "/code/__torch__" in name for name in names):
            raise WeightsError(
                f"weights '{path}': a TorchScript archive holds a program, which is not run. "
                "Save the state dict of the network instead"
            )
        if names and all(name.endswith(".npy") for name in names):
            return "npz"
        return "torch" if any(name.endswith("data.pkl") for name in names) else None
    length = int.from_bytes(begin[:8], "little")
    if begin[8:9] == b"{" and 1 < length <= path.stat().st_size:
        return "safetensors"
    return "torch" if begin[:1] == b"\x80" else None


def _check_sums(path: Path) -> None:
    """Raises WeightsError where a part of a torch archive is not what was written: torch itself checks no sums. An
    archive written without sums (torch.serialization.set_crc32_options) has none that is right."""
    if not zipfile.is_zipfile(path):
        return  # written before torch 1.6
    wrong, right = [], 0
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                continue
            found = 0
            for block in _stored(file, member):
                found = zlib.crc32(block, found)
            if member.file_size and found != member.CRC:
                wrong.append(member.filename)
            right += found == member.CRC
    if wrong and right:
        raise WeightsError(f"weights '{path}' are damaged: {wrong[0]} is not what was written. Fetch the file again")


def _stored(file: BinaryIO, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member that is not compressed, block by block, whatever its sum."""
    file.seek(member.header_offset)
    header = file.read(30)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    file.seek(member.header_offset + 30 + name + extra)
    left = member.compress_size
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        left -= len(block)
        yield block


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Raises WeightsError before anything is unpacked where the arrays do not fit in memory."""
    total = sum(num_bytes(*header) for header in npz_headers(path).values())
    if (free := available_memory()) is not None and total > free:
        raise WeightsError(
            f"weights '{path}' unpack to {total / 2**30:,.1f} GiB, more than the {free / 2**30:,.1f} GiB of memory "
            "that are free: no weights of a backbone"
        )
    with np.load(path, allow_pickle=False) as archive:
        return from_flax({key: archive[key] for key in archive.files})


# What training scripts leave beside a state dict: bags of plain values, numbers of numpy, paths. None runs code.
def _harmless() -> list[Any]:
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    places = [
        (function, f"numpy.{core}.multiarray.{name}")  # renamed by numpy 2
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for core in ("core", "_core")
    ]
    types = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    pure = [
        (pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ]
    windows = [
        (pathlib.PureWindowsPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("WindowsPath", "PureWindowsPath")
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *places, *types, *pure, *windows]


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise WeightsError(
                f"weights '{path}' cannot be read as a torch file, or hold more than tensors and plain values, and "
                "loading them could run foreign code: refused. Save the bare state dict, or convert the file to "
                ".safetensors"
            ) from None
        raise WeightsError(
            f"weights '{path}' hold more than tensors and plain values, and loading them could run foreign "
            f"code: refused (objects of {named[1]}). Save the bare state dict, or convert the file to .safetensors"
        ) from None


def _state_dicts(tree: Any, path: Path) -> States:
    """The dicts of a file that hold tensors by name. A dict that holds itself is looked into once."""
    if not isinstance(tree, Mapping):
        raise WeightsError(f"weights '{path}' hold a {type(tree).__name__}, expected a state dict")
    found: States = {}
    numbered: list[str] = []
    seen: set[int] = set()
    level: list[tuple[str, Mapping[Any, Any]]] = [("", tree)]
    for _ in range(DEEPEST):
        below: list[tuple[str, Mapping[Any, Any]]] = []
        for place, values in level:
            tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
            if any(not isinstance(key, str) for key in tensors):
                numbered.append(place)
            elif tensors:
                found[place] = {key: value.detach() for key, value in tensors.items()}
            inner = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
            inner = [] if id(values) in seen else inner
            seen.add(id(values))
            below += [(f"{place}.{key}" if place else str(key), value) for key, value in inner]
        level = below
    if not found and numbered:
        raise WeightsError(
            f"weights '{path}'{_under(numbered[0])} number their tensors (0, 1, 2, ...) instead of naming them: save "
            "the state dict of the network, whose keys are names"
        )
    if not found:
        entries = ", ".join(map(str, list(tree)[:6])) or "none"
        raise WeightsError(
            f"weights '{path}' hold no tensors; entries: {entries}. Expected a state dict, bare or under a name such "
            "as model, state_dict, teacher"
        )
    return found


def _under(place: str) -> str:
    return f' under "{place}"' if place else ""
