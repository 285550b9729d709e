"""Images are one array, many arrays of several sizes, or paths: whatever reads a data set knows all three."""

import numpy as np
import pytest
from PIL import Image

from data.checks import Findings
from data.faults import protocol_faults
from data.image_cache import cached
from data.images import Paths
from data.records import ImageData, Split
from data.unreadable import readable
from models.factory import config_from
from models.parts.predictions import Predictions
from tests.conftest import tiny_values
from tools import check_data

KINDS = ("array", "sizes", "files")


def data_of(train, test, folder):
    """Three classes; the first test image is the first training image."""
    halves = {}
    for half, kind, count in (("train", train, 6), ("test", test, 3)):
        images = [np.full((8, 8 + (kind == "sizes") * (n % 2), 3), 20 * n, dtype=np.uint8) for n in range(count)]
        if kind == "files":
            for n, pixels in enumerate(images):
                Image.fromarray(pixels).save(folder / f"{half}{n}.png")
            found = Paths(folder / f"{half}{n}.png" for n in range(count))
        else:
            found = np.stack(images) if kind == "array" else images
        halves[half] = Split(found, np.arange(count) % 3)
    return ImageData("mine", halves["train"], halves["test"], ("a", "b", "c"))


@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("test", KINDS)
def test_every_kind_in_either_half(train, test, tmp_path):
    data = data_of(train, test, tmp_path)
    assert (data.train.in_files, data.test.in_files) == (train == "files", test == "files")
    left, bad = readable(data)
    assert (len(left.train), len(left.test), bad) == (6, 3, [])
    for split, kind in zip((data.train, data.test), (train, test), strict=True):
        kept = cached(data, "ram", None, tmp_path)
        kept = kept.train if split is data.train else kept.test
        assert len(kept.images) == len(split) and isinstance(kept.images[0], np.ndarray)
        assert (kept.images is split.images) == (kind != "files")
    findings = Findings("mine")
    modes, digests = check_data._decode_all(data, findings, lambda found, _: found)
    assert len(digests) == 9 and all(digests) and set(modes) == {"RGB"}
    check_data._check_repeated(data, digests, findings)
    found = [finding.text for finding in findings.of("warning")]
    assert any("train and in test" in text for text in found)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_bad_files_needs_files(kind, tmp_path):
    data = data_of(kind, kind, tmp_path)
    config = config_from(tiny_values(tmp_path, on_bad_image="skip", increment=1), source="test")
    assert any("on_bad_image" in fault for fault in protocol_faults(config, data)) == (kind != "files")


@pytest.mark.parametrize("kind", [*KINDS, "cached"])
def test_predictions_name_files_or_numbers(kind, tmp_path):
    data = data_of("files" if kind == "cached" else kind, "array", tmp_path)
    data = cached(data, "ram", None, tmp_path) if kind == "cached" else data

    class OfSplit:
        split = data.train

    kept = Predictions()
    kept._data = OfSplit()
    names = kept._files(np.array([4, 1])).tolist()
    assert names == ([str(tmp_path / f"train{n}.png") for n in (4, 1)] if kind == "files" else ["4", "1"])
