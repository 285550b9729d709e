"""What a weight file may be instead: one sentence with the place and the likely cause, and quickly."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convs.backbones import make_backbone
from convs.weights import load_weights
from tests.conftest import TINY_VIT
from tests.convs import published as at
from utils.errors import WeightsError


class Foreign:
    pass


def text(content: bytes):
    return lambda path: path.write_bytes(content)


def bomb(path: Path):
    """An array of 8 TiB by its header, a few bytes long."""
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1048576, 1048576), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embedding/kernel.npy", header + words.ljust(117) + b"\n")


def cut(path: Path, share: float = 0.5):
    torch.save(at.vit().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def cut_safetensors(path: Path):
    save_file(at.vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


def fifo(path: Path):
    os.mkfifo(path)


def nested(path: Path):
    state: dict = {"weight": torch.zeros(1)}
    for _ in range(200):
        state = {"model": state}
    torch.save(state, path)


def script(path: Path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/__torch__.py", "")
        archive.writestr("net/data.pkl", "")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
FILES = {
    "a.pth": (text(LFS), "Git LFS pointer.*git lfs pull"),
    "b.safetensors": (text(LFS), "Git LFS pointer"),
    "c.npz": (text(LFS), "Git LFS pointer"),
    "d.pth": (text(b"\n<!DOCTYPE html><html>"), "HTML page.*fetch the file itself"),
    "e.npz": (text(b"<html>no"), "HTML page"),
    "f.pth": (text(b""), "is empty"),
    "g.pth": (text(b"\x00" * 999), "nothing but zeros"),
    "h.pth": (text(b"hello"), "cannot be read"),
    "i.safetensors": (text(b"hello"), "cannot be read .*npz, .pth"),
    "j.npz": (text(b"PK\x03\x04hello"), "cannot be read"),
    "k.bin": (lambda path: save_file(at.vit().state_dict(), path), "a safetensors file whose name ends in .bin"),
    "l.safetensors": (lambda path: torch.save(at.vit().state_dict(), path), "a torch file whose name ends in"),
    "m.pth": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "a NumPy archive whose name ends in .pth"),
    "n.npz": (bomb, "unpack to 8,192.0 GiB"),
    "o.pth": (cut, "cannot be read"),
    "p.safetensors": (cut_safetensors, "cannot be read"),
    "q.pth": (fifo, "is a named pipe"),
    "r.pth": (Path.mkdir, "is a folder"),
    "s.pth": (lambda path: torch.save({"a": Foreign()}, path), "objects of tests.convs.test_weight_files.Foreign"),
    "t.pth": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "objects of torch.nn.modules.linear.Linear"),
    "u.pth": (text(pickle.dumps({"a": 1})), "cannot be read|hold no tensors"),
    "v.onnx": (text(b"\x08\x07pytorch"), "ONNX files are not read"),
    "w.pth": (nested, "hold no tensors|cannot be read"),
    "x.pth": (script, "TorchScript archive"),
    "y.pth": (text(b"\x1f\x8b123"), "gzip archive: unpack"),
    "z.h5": (text(b"\x89HDF\r\n"), "HDF5"),
    "zz.npy": (text(b"\x93NUMPY123"), "single NumPy array"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_weight_file_is_named(tmp_path, name):
    write, sentence = FILES[name]
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=sentence) as error:
        load_weights(at.vit(), tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "name", ["none.pth", "x" * 300, "a\x00b", "~nobody_at_all/x.pth", "/dev/zero", "\udc80.pth", "."]
)
def test_a_name_that_is_no_file_is_answered(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="weights"):
        make_backbone(TINY_VIT, name, None)


def test_an_upper_case_suffix_and_none_at_all_are_read(tmp_path):
    for name in ("A.PTH", "weights"):
        torch.save(at.vit().state_dict(), tmp_path / name)
        assert load_weights(at.vit(), tmp_path / name).matched == 1


def test_a_flipped_bit_in_a_torch_file_is_noticed(tmp_path):
    """torch checks no sums: the network would be another one."""
    torch.save(at.vit().state_dict(), tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        starts = [member.header_offset + 200 for member in archive.infolist() if member.file_size > 500]
    for start in starts:
        changed = bytearray(content)
        changed[start] ^= 4
        (tmp_path / "a.pth").write_bytes(changed)
        with pytest.raises(WeightsError, match="are damaged: .* is not what was written|cannot be read"):
            load_weights(at.vit(), tmp_path / "a.pth")


def test_a_torch_file_written_without_sums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(at.vit().state_dict(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_weights(at.vit(), tmp_path / "a.pth").matched == 1
