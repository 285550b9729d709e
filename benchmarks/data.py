"""Images per second of the ways to feed a run, in one go and on one folder of small JPEGs.

    python -m benchmarks.data --images 50000

Against a plain torchvision ImageFolder with a DataLoader of the same workers, batch size and transforms. "none" decodes
every time, "ram" and "disk" once (their preparation is timed apart), "device" crops whole batches where the network is.
Each figure is the median of several full passes, in which the pipelines take turns: a drifting machine slows all
of them. A first, partial pass starts the loader processes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from data.batched import Resident
from data.image_cache import cached
from data.loading import EpochLoader, View
from data.records import ImageData, Split
from data.sources import load
from data.transforms import RECIPES, Transform
from utils.runtime import Runtime

Epoch = Callable[[], Iterator]
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
    parse.add_argument("--rounds", type=int, default=3, help="full passes of each pipeline")
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


def image_folder(root: Path, options: argparse.Namespace, runtime: Runtime) -> Epoch:
    """The plain form that most repositories use."""
    workers = runtime.workers(cheap=False)
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


def ours(split: Split, options: argparse.Namespace, runtime: Runtime, resident: Resident | None = None) -> Epoch:
    rows = np.arange(len(split))
    view = View(split, rows, split.labels, Transform(options.recipe, options.crop), resident)
    loader = EpochLoader(view, options.batch, runtime, seed=0)
    return lambda: loader.epoch(0, 0)


def whole(split: Split) -> Split:
    """Cached images of one size as a single array, as CIFAR comes."""
    return replace(split, images=np.stack(list(split.images)))


def measure(epoch: Epoch, images: int, device: torch.device) -> float:
    """Images per second of a full pass."""
    started = time.perf_counter()
    for _ in epoch():
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - started)


def pipelines(data: ImageData, root: Path, cache: Path, options: argparse.Namespace, runtime: Runtime):
    """(name, epoch, seconds of preparation) of each."""
    yield "torchvision ImageFolder", image_folder(root, options, runtime), None
    yield "none", ours(data.train, options, runtime), None
    for kind in ("ram", "disk"):
        started = time.perf_counter()
        held = cached(data, kind, None, cache).train
        yield kind, ours(held, options, runtime), time.perf_counter() - started
    started = time.perf_counter()
    array = whole(cached(data, "ram", None, cache).train)
    yield "device", ours(array, options, runtime, Resident(array.images)), time.perf_counter() - started


def compare(options: argparse.Namespace, root: Path, cache: Path) -> None:
    runtime = Runtime(options.device, num_workers=options.workers)
    data = load(f"folder:{root}", None)
    print(
        f"{len(data.train):,} JPEGs of {options.jpeg_size} px to {options.crop} px, {options.recipe}, batches "
        f"of {options.batch}, {runtime.workers(cheap=False)} workers, {torch.get_num_threads()} threads, "
        f"{runtime.device}, torch {torch.__version__}; median of {options.rounds}"
    )
    made = list(pipelines(data, root, cache, options, runtime))
    for _, epoch, _ in made:
        for _ in islice(epoch(), WARM_UP):
            pass
    rates: dict[str, list[float]] = {name: [] for name, *_ in made}
    for _ in range(options.rounds):
        for name, epoch, _ in made:
            rates[name].append(measure(epoch, len(data.train), runtime.device))
    print(f"{'pipeline':<24}{'images/s':>10}{'min..max':>16}{'ratio':>8}{'prepared in':>13}")
    for name, _, seconds in made:
        rate, prepared = median(rates[name]), "-" if seconds is None else f"{seconds:.1f} s"
        spread = f"{min(rates[name]):.0f}..{max(rates[name]):.0f}"
        ratio = median(mine / plain for mine, plain in zip(rates[name], rates[made[0][0]], strict=True))
        print(f"{name:<24}{rate:>10.0f}{spread:>16}{ratio:>8.2f}{prepared:>13}")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch, "jpegs")
        write_jpegs(root, options.images, options.jpeg_size)
        compare(options, root, Path(scratch, "cache"))


if __name__ == "__main__":
    main()
