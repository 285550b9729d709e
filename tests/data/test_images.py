"""Awkward files: each has a stated behaviour, and none brings a run down with a traceback."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import default_loader

from data.images import Paths, images_below, read_image
from data.layouts import Options
from data.loading import for_each_batch
from data.sources import load
from data.stream import DataManager
from models.factory import config_from
from tests.conftest import tiny_values
from tests.data import trees
from utils.errors import DataError
from utils.runtime import Runtime


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_image_bomb_is_refused_by_name(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(60_000, 60_000))
    with pytest.raises(DataError, match=r"bomb.png' cannot be read \(Image size \(3600000000 pixels\) exceeds limit"):
        read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", trees.jpeg(size=64)[:300]], ids=["empty", "text", "truncated"]
)
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jpg' cannot be read \(.+\). Replace or remove it"):
        read_image(path)


def test_sixteen_bit_grey_keeps_its_upper_eight(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = np.asarray(read_image(tmp_path / "a.png"))
    assert image.shape == (2, 3, 3)
    assert image[..., 0].tolist() == [[0, 0, 1], [128, 254, 255]]


def test_colour_modes_become_rgb(tmp_path):
    rgb = Image.new("RGB", (8, 8), (200, 30, 90))
    for mode, kind in (("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")):
        rgb.convert(mode).save(tmp_path / f"{mode}.img", kind)
        image = read_image(tmp_path / f"{mode}.img")
        assert image.mode == "RGB" and image.size == (8, 8)
        if mode in ("CMYK", "P", "RGBA"):
            assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 30, 90)).max() <= 26, (
                mode
            )  # P: the nearest of 216 colours


def test_a_gif_called_jpg_gives_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert np.asarray(read_image(tmp_path / "a.jpg"))[0, 0].tolist() == [255, 0, 0]


def test_walk_sorts_follows_links_and_ends_in_loops(tmp_path):
    inside = tmp_path / "class"
    trees.write_images(inside, ["b.JPG", "a b.jpg", "ü 画.png", "_c.webp"])
    trees.write_images(tmp_path / "elsewhere", ["z.jpg"])
    (inside / "linked").symlink_to(tmp_path / "elsewhere")
    (inside / "linked" / "back").symlink_to(inside)
    (inside / "up").symlink_to(tmp_path)
    (inside / "self").symlink_to("self")
    (inside / "gone.jpg").symlink_to("nowhere.jpg")
    images, ignored = images_below(inside)
    assert [path.name for path in images] == ["_c.webp", "a b.jpg", "b.JPG", "gone.jpg", "ü 画.png", "z.jpg"]
    assert ignored == ["self"]
    with pytest.raises(DataError, match="gone.jpg' cannot be read"):
        read_image(inside / "gone.jpg")


def test_paths_are_a_sequence_of_paths(tmp_path):
    given = [tmp_path / name for name in ("a.jpg", "ü 画.png", "with space.jpg")]
    paths = Paths(given)
    assert len(paths) == 3 and list(paths) == given and paths[-1] == given[-1] and paths[1:] == given[1:]
    with pytest.raises(IndexError):
        paths[3]
    assert len(Paths([])) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_unreadable_image_stops_a_run_with_its_path(tmp_path, workers):
    trees.split_folders(tmp_path / "mine", ["a", "b", "größe 大"])
    bad = tmp_path / "mine" / "train" / "b" / "b_1.JPEG"
    bad.write_bytes(b"")
    values = tiny_values(tmp_path, dataset=f"folder:{tmp_path / 'mine'}", increment=3)
    manager = DataManager(config_from(values, source="test"), image_size=16)
    runtime = Runtime("cpu", "fp32", num_workers=workers)
    with pytest.raises(DataError) as caught:
        for_each_batch(manager[0].train.view("train"), lambda images, labels: None, runtime, 4)
    assert str(caught.value).startswith(f"image '{bad}' cannot be read (") and "Traceback" not in str(caught.value)


def test_a_broken_link_is_named_before_anything_is_built(tmp_path):
    trees.split_folders(tmp_path / "mine", ["a", "b"])
    (tmp_path / "mine" / "train" / "a" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match="gone.jpg' cannot be read"):
        load(f"folder:{tmp_path / 'mine'}", None, Options())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_orientation_tag_is_read_as_torchvision_reads_it(tmp_path, kind):
    """The decoder of TIFF turns the picture itself, the others leave it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "a.img", kind, exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.img"), default_loader(str(tmp_path / "a.img")))
