"""A seeded fuzz of what comes in: weight files, npz, folders, lists. Each case ends right, or with one sentence.

A failing case names its seed: `python -m pytest tests/attack -m long -k "weights and 37"` runs it again.
"""

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from convs.weights import load_weights
from data.images import read_image
from data.layouts import Options
from data.sources import load
from tests.conftest import write_stream
from tests.convs import published as at
from tests.convs.published import SIZES
from tests.convs.test_weight_layouts import CASES
from utils.errors import UserError

pytestmark = pytest.mark.long


def told(action: Callable[[], None]) -> bool:
    """Whether an action was refused; asserts that it was in one short sentence that is safe to print."""
    try:
        action()
    except UserError as error:
        text = str(error)
        assert 10 < len(text) < 2000 and "Traceback" not in text and "\x1b" not in text
        text.encode("utf-8")
        return True
    return False


def spoil(path: Path, rng: random.Random) -> str:
    """Change the bytes of a file; what was done."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["cut", "flip", "flip many", "insert", "zero", "begin", "nothing"])
    at_byte = rng.randrange(len(content))
    if how == "cut":
        del content[at_byte:]
    elif how.startswith("flip"):
        for _ in range(1 if how == "flip" else 40):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "insert":
        content[at_byte:at_byte] = rng.randbytes(rng.randrange(1, 50))
    elif how == "zero":
        content[at_byte : at_byte + 400] = bytes(len(content[at_byte : at_byte + 400]))
    elif how == "begin":
        content[:0] = rng.choice([b"\x80", b"PK\x03\x04", b"<html>", b"\xef\xbb\xbf", b"\n"])
    path.write_bytes(bytes(content))
    return how


def warped(state: dict, rng: random.Random) -> object:
    """A state dict with one thing changed, or none."""
    state, key = dict(state), rng.choice(list(state))
    value = state[key]
    other: dict[str, Callable[[], object]] = {
        "nothing": lambda: state,
        "lost": lambda: {k: v for k, v in state.items() if k != key},
        "renamed": lambda: {(k + "x" if k == key else k): v for k, v in state.items()},
        "longer": lambda: state | {key: torch.cat([value, value]) if value.dim() else value.expand(3)},
        "flat": lambda: state | {key: value.flatten()},
        "NaN": lambda: state | {key: torch.full_like(value, float("nan")) if value.is_floating_point() else value},
        "half": lambda: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        "bytes": lambda: state | {key: value.to(torch.uint8)},
        "sparse": lambda: state | {key: value.to_sparse()},
        "meta": lambda: state | {key: value.to("meta")},
        "text": lambda: state | {key: "no tensor"},
        "number": lambda: state | {key: 3},
        "integer key": lambda: state | {7: value},
        "beside": lambda: {"state_dict": state, "best": np.float32(3), "loss": torch.rand(3), "more": [1, {"a": 2}]},
        "deep": lambda: {"a": {"model": {"b": state}}},
        "prefix": lambda: {"".join(rng.choices("abc.", k=4)).strip(".") + "." + k: v for k, v in state.items()},
        "twice": lambda: {"model": state, "model_ema": {k: torch.zeros_like(v) for k, v in state.items()}},
        "list": lambda: list(state.values()),
        "itself": lambda: _looped(state),
        "extra": lambda: state | {"blocks.0.attn.new.weight": torch.rand(3)},
    }  # fmt: skip
    return other[rng.choice(list(other))]()


def _looped(state: dict) -> dict:
    state["model"] = state
    return state


@pytest.mark.parametrize("seed", range(300))
def test_weights(seed, tmp_path):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name = rng.choice(list(CASES))
    changes, write = CASES[name]
    source = at.vit(**changes)
    path = tmp_path / ("w" + rng.choice([".pth", ".pt", ".bin", ".safetensors", ""]))
    written = write(source.state_dict()) if rng.random() < 0.4 else warped(source.state_dict(), rng)
    tensors = isinstance(written, dict) and all(isinstance(value, torch.Tensor) for value in written.values())
    unchecked = False
    if tensors and rng.random() < 0.3:
        with contextlib.suppress(Exception):  # sparse, meta and integer keys have no safetensors
            save_file({key: value.contiguous() for key, value in written.items()}, path)
            unchecked = True
    if not path.is_file():
        torch.save(written, path, _use_new_zipfile_serialization=(new := rng.random() < 0.7))
        unchecked = not new
    damaged = rng.random() < 0.5 and spoil(path, rng) != "nothing"
    target = VisionTransformer(num_classes=0, **(SIZES | changes)).eval()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    if told(lambda: load_weights(target, path)):
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    elif not (damaged and unchecked):  # these formats have no sums
        images = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(target(images), source(images), rtol=3e-2, atol=3e-2)


def _arrays(path: Path, rng: random.Random) -> dict[str, np.ndarray]:
    write_stream(path, classes=3, train=4, test=3, size=8, domains=rng.choice([0, 0, 3]))
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    key = rng.choice(list(arrays))
    value = arrays[key]
    for _ in range(rng.randrange(3)):
        change = rng.choice(
            [
                lambda: value[:-1], lambda: value.astype(rng.choice(["f4", "i1", "u8", "c8", "S3", "?"])),
                lambda: value[..., None], lambda: value[:0], lambda: value * 0, lambda: value + np.uint8(1),
                lambda: np.array(3), lambda: value.astype(object), lambda: value.T,
                lambda: np.full(value.shape, 2**40),
            ]
        )  # fmt: skip
        arrays[key] = change()
    if rng.random() < 0.3:
        del arrays[key]
    if rng.random() < 0.3:
        arrays[rng.choice(["d_train", "x_val", "note"])] = np.arange(5)
    return arrays


@pytest.mark.parametrize("seed", range(200))
def test_npz(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "a.npz"
    arrays = _arrays(path, rng)
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(path, **arrays)
    if rng.random() < 0.5:
        spoil(path, rng)
    found = []
    if not told(lambda: found.append(load(f"npz:{path}", None))):
        data = found[0]
        for half, split in (("train", data.train), ("test", data.test)):
            assert np.array_equal(split.images, arrays[f"x_{half}"]) and len(split.images) == len(split.labels)
            assert set(split.labels.tolist()) == set(range(data.num_classes))


def _plant(place: Path, rng: random.Random) -> None:
    """Something odd in a folder."""
    name = rng.choice(
        ["x.png", "x\x1b[31m.jpg", "\udcff.png", "a" * 200 + ".png", ".hidden.png", "Thumbs.db", "n.txt", "y.PNG"]
    )
    path = place / name
    kind = rng.choice(["text", "pipe", "nowhere", "loop", "folder", "cut", "empty", "pointer", "image"])
    if path.exists() or path.is_symlink():
        return
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "nowhere":
        path.symlink_to(place / "none")
    elif kind == "loop":
        path.symlink_to(place)
    elif kind == "folder":
        path.mkdir()
    elif kind == "image":
        Image.new("RGB", (9, 9)).save(path, "PNG")
    else:
        words = {"text": b"hello", "cut": b"\x89PNG\r\n\x1a\n\x00", "empty": b"", "pointer": b"version https://git-lfs"}
        path.write_bytes(words[kind])


@pytest.mark.parametrize("seed", range(150))
def test_folders(seed, tmp_path):
    rng = random.Random(seed)
    halves = rng.choice([("train", "test"), ("train", "val"), ("training", "testing"), ("Train", "Test"), ("a", "b")])
    for half in halves:
        for name in ("cat", "dog", "e f"):
            place = tmp_path / half / name
            place.mkdir(parents=True)
            for i in range(rng.choice([0, 1, 2, 3, 3, 3, 3])):
                Image.new("RGB", (9, 8), (i, 80, 9)).save(place / f"{i}.png")
    folders = [place for place in tmp_path.rglob("*") if place.is_dir()]
    for _ in range(rng.randrange(4)):
        _plant(rng.choice(folders), rng)
    split = rng.choice(["folder", "folder", "seeded"])

    def read() -> None:
        data = load(f"folder:{tmp_path}", None, Options(split=split, cache=tmp_path / ".cache"))
        for half, least in ((data.train, 2), (data.test, 1)):
            assert np.bincount(half.labels, minlength=data.num_classes).min() >= least
            for image in half.images:
                assert read_image(image).mode == "RGB"

    told(read)


@pytest.mark.parametrize("seed", range(150))
def test_lists(seed, tmp_path):
    rng = random.Random(seed)
    for name in ("cat", "dog"):
        place = tmp_path / "pool" / name
        place.mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (9, 8), (i, 80, 9)).save(place / f"{i}.png")
    lines = {
        half: [f"{n}/{i}.png" for n in ("cat", "dog") for i in rows]
        for half, rows in (("train", (0, 1, 2)), ("test", (3, 4)))
    }
    odd = [
        "",
        "# x",
        "cat/9.png",
        "cow/1.png",
        "cat",
        "3",
        "cat/0.png",
        "\x1b[2Jcat/1.png",
        "data:",
        "x" * 5000,
        "cat/0.png 3",
    ]
    for _ in range(rng.randrange(3)):
        half = rng.choice(["train", "test"])
        lines[half].insert(rng.randrange(len(lines[half])), rng.choice(odd))
    for half, entries in lines.items():
        text = rng.choice(["", "\ufeff"]) + rng.choice(["\n", "\r\n"]).join(entries)
        (tmp_path / f"{half}.txt").write_bytes(text.encode())
        if rng.random() < 0.2:
            spoil(tmp_path / f"{half}.txt", rng)
    options = Options(split=f"list:{tmp_path / 'train.txt'}", cache=tmp_path)
    found = []
    if not told(lambda: found.append(load(f"folder:{tmp_path / 'pool'}", None, options))):
        for half, split in (("train", found[0].train), ("test", found[0].test)):
            text = (tmp_path / f"{half}.txt").read_text(encoding="utf-8-sig")
            named = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            assert len(split) == len(named)
