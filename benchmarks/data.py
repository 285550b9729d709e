"""Images per second of the ways to feed a run, in one go and on one folder of small JPEGs.

    python -m benchmarks.data --images 50000

Against a plain torchvision ImageFolder with a DataLoader of the same workers, batch size and transforms. "none" decodes
every time, "ram" and "disk" once (their preparation is timed apart), "device" crops whole batches where the network is.
Each figure is a full pass after a first, partial one that starts the loader processes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from data.batched import Resident
from data.image_cache import cached
from data.records import ImageData, Split
from data.sources import load
from data.transforms import RECIPES, Transform
from models.parts.loop import EpochLoader
from utils.data_manager import View
from utils.runtime import Runtime

CLASSES = 100
WARM_UP = 3  # batches


def arguments() -> argparse.Namespace:
    parse = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parse.add_argument("--images", type=int, default=50_000)
    parse.add_argument("--jpeg-size", type=int, default=96, metavar="PIXELS", help="side of the JPEGs")
    parse.add_argument("--crop", type=int, default=224, metavar="PIXELS", help="side of what the network would see")
    parse.add_argument("--recipe", default="crop_flip_scale05", choices=sorted(RECIPES))
    parse.add_argument("--batch", type=int, default=128)
    parse.add_argument("--workers", type=int, help="loader processes; default: as a run chooses them")
    parse.add_argument("--device", default="auto")
    parse.add_argument("--folder", type=Path, help="keep the JPEGs here; default: a temporary folder")
    return parse.parse_args()


def write_jpegs(root: Path, count: int, size: int) -> None:
    """`count` training images of smooth noise, one test image a class; a folder that has them is left as it is."""
    if (root / "train").is_dir():
        return
    rng = np.random.RandomState(0)
    for half, number in (("train", count), ("test", CLASSES)):
        for i in tqdm(range(number), desc=f"writing {half}", disable=None):
            small = rng.randint(0, 256, (12, 12, 3)).astype(np.uint8)
            path = root / half / f"class {i % CLASSES:02d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def image_folder(root: Path, options: argparse.Namespace, runtime: Runtime, workers: int) -> Callable[[], Iterator]:
    """The plain form that most repositories use."""
    steps = [*RECIPES[options.recipe].steps(options.crop), v2.PILToTensor()]
    loader: DataLoader = DataLoader(
        ImageFolder(str(root / "train"), v2.Compose(steps)),
        options.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=runtime.device.type == "cuda",
    )
    return lambda: (runtime.to_device(images, targets) for images, targets in loader)


def ours(split: Split, options: argparse.Namespace, runtime: Runtime, resident: Resident | None = None):
    rows = np.arange(len(split))
    view = View(split, rows, split.labels, Transform(options.recipe, options.crop), resident)
    loader = EpochLoader(view, options.batch, runtime, seed=0)
    return lambda: loader.epoch(0, 0)


def whole(split: Split) -> Split:
    """Cached images of one size as a single array, as CIFAR comes."""
    return replace(split, images=np.stack(list(split.images)))


def measure(epoch: Callable[[], Iterator], images: int, device: torch.device) -> float:
    """Images per second of a full pass."""
    for _ in islice(epoch(), WARM_UP):
        pass
    started = time.perf_counter()
    for _ in epoch():
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - started)


def timed(make: Callable[[], ImageData | Split]) -> tuple[ImageData | Split, float]:
    started = time.perf_counter()
    made = make()
    return made, time.perf_counter() - started


def compare(options: argparse.Namespace, root: Path, cache: Path) -> None:
    runtime = Runtime(options.device, num_workers=options.workers)
    workers = runtime.workers(cheap=False)
    data, reading = timed(lambda: load(f"folder:{root}", None))
    assert isinstance(data, ImageData)
    print(
        f"{len(data.train):,} JPEGs of {options.jpeg_size} px to {options.crop} px, {options.recipe}, batches of "
        f"{options.batch}, {workers} workers, {torch.get_num_threads()} threads, {runtime.device}, torch "
        f"{torch.__version__}; listing the folder took {reading:.1f} s"
    )
    print(f"{'pipeline':<24}{'images/s':>10}{'ratio':>8}{'prepared in':>13}")
    plain = measure(image_folder(root, options, runtime, workers), len(data.train), runtime.device)
    print(f"{'torchvision ImageFolder':<24}{plain:>10.0f}{1:>8.2f}{'-':>13}", flush=True)
    for kind in ("none", "ram", "disk", "device"):
        if kind == "device":
            held, seconds = timed(lambda: whole(cached(data, "ram", None, cache).train))
            assert isinstance(held, Split) and isinstance(held.images, np.ndarray)
            epoch = ours(held, options, runtime, Resident(held.images))
        else:
            held, seconds = timed(lambda kind=kind: cached(data, kind, None, cache))
            assert isinstance(held, ImageData)
            epoch = ours(held.train, options, runtime)
        rate = measure(epoch, len(data.train), runtime.device)
        prepared = "-" if kind == "none" else f"{seconds:.1f} s"
        print(f"{kind:<24}{rate:>10.0f}{rate / plain:>8.2f}{prepared:>13}", flush=True)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch, "jpegs")
        write_jpegs(root, options.images, options.jpeg_size)
        compare(options, root, Path(scratch, "cache"))


if __name__ == "__main__":
    main()
