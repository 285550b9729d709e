"""From a task's images to batches on the device: views, loader processes, epochs, passes without gradient.

Labels and rows are fixed beforehand, so a pass over a view is the same whatever process reads it; augmentation draws
are seeded image by image (`utils/seed.py`).
"""

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batched import BATCHED, Resident, apply
from data.images import read_image
from data.records import Split
from data.transforms import Transform, as_tensor
from utils.errors import UserError
from utils.interrupt import STOPPING
from utils.runtime import Runtime
from utils.seed import mix, mix_rows


@dataclass(frozen=True)
class Batch:
    """Which images to fetch. seed, mixed with an image's row, seeds that image's augmentation draws."""

    rows: np.ndarray
    seed: int = 0


class View(Dataset):
    """Images of one task under one transform. Fetching takes a `Batch` and gives
    (images uint8 (B, 3, s, s), labels int64 (B,)).

    beside: another transform whose images follow those of the first along the channels: (B, 6, s, s).
    """

    def __init__(
        self,
        split: Split,
        rows: np.ndarray,
        labels: np.ndarray,
        transform: Transform,
        resident: Resident | None = None,
        beside: Transform | None = None,
    ):
        self._beside = None if beside is None else View(split, rows, labels, beside, resident)
        self._split, self._rows, self._transform, self._resident = split, rows, transform, resident
        self.labels = labels  # (N,) new labels
        arrays = split.images if isinstance(split.images, np.ndarray) else None
        # The images themselves, when fetching is nothing but copying.
        self._plain = arrays if arrays is not None and transform.is_identity_on(arrays) else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.__getitems__(Batch(np.array([index])))
        return images[0], labels[0]

    def __getitems__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self._fetch(batch)
        if self._beside is None:
            return images, labels
        return torch.cat([images, self._beside.__getitems__(batch)[0]], dim=1), labels

    def _fetch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = self._rows[batch.rows], torch.from_numpy(self.labels[batch.rows])
        if self._plain is not None:
            return as_tensor(self._plain, rows), labels
        if not self._transform.random:
            return torch.stack([self._transform(self._read(row)) for row in rows]), labels
        # The transforms draw from torch's global generator: lend it to them, seeded image by image.
        before = torch.get_rng_state()
        images = []
        for row in rows:
            torch.default_generator.manual_seed(mix(batch.seed, int(row)))
            images.append(self._transform(self._read(row)))
        torch.set_rng_state(before)
        return torch.stack(images), labels

    def _read(self, row: int) -> np.ndarray | Image.Image:
        image = self._split.images[row]
        return read_image(image) if isinstance(image, Path) else image

    @property
    def image_bytes(self) -> int:
        """Of one image as a batch holds it."""
        return 3 * self._transform.size**2 * (1 if self._beside is None else 2)

    @property
    def on_device(self) -> bool:
        """Whether batches are made on the device, by `fetch_on`."""
        return self._resident is not None

    def fetch_on(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As `__getitems__`, from images that lie on the device."""
        images, labels = self._fetch_on(batch, device)
        if self._beside is None:
            return images, labels
        return torch.cat([images, self._beside.fetch_on(batch, device)[0]], dim=1), labels

    def _fetch_on(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._resident is not None
        rows, labels = self._rows[batch.rows], torch.from_numpy(self.labels[batch.rows])
        images = self._resident.on(device)[torch.from_numpy(rows).to(device, non_blocking=True)]
        if self._plain is not None:
            return images.permute(0, 3, 1, 2).contiguous(), labels
        recipe, size = BATCHED[self._transform.name], self._transform.size
        return apply(images, recipe, size, mix_rows(batch.seed, rows)), labels

    @property
    def cheap(self) -> bool:
        """Whether a batch is a copy from memory, so that loader processes would only slow it down."""
        return self._plain is not None


def training_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    drop_last: bool = False,
    joined: bool = False,
) -> list[Batch]:
    """This process's share of each batch of an epoch, from batch `start` on.

    The order depends on (seed, epoch) alone. Each global batch is cut into `world` parts, so that any number of
    processes sees the same batches; a part that would be empty repeats the batch's first image, with weight 0
    (see `loss_weight`). joined: a last batch of one image joins the one before it.
    """
    order = np.random.RandomState(mix(seed, epoch) % (1 << 32)).permutation(count)
    batches = []
    for step in range(start, num_batches(count, batch_size, drop_last, joined)):
        rows = order[step * batch_size : _batch_end(step, count, batch_size, joined)]
        part = np.array_split(rows, world)[rank]
        batches.append(Batch(part if len(part) else rows[:1], mix(seed, epoch)))
    return batches


def num_batches(count: int, batch_size: int, drop_last: bool = False, joined: bool = False) -> int:
    """Of an epoch over `count` images. drop_last: without a smaller last one, unless it is the only one."""
    whole, rest = divmod(count, batch_size)
    return whole + (rest > 0 and not (whole > 0 and (drop_last or (joined and rest == 1))))


def _batch_end(step: int, count: int, batch_size: int, joined: bool) -> int:
    """Where a batch ends in the order of an epoch."""
    end = min(count, (step + 1) * batch_size)
    return count if joined and count - end == 1 else end


def loss_weight(size: int, rank: int, world: int) -> float:
    """Factor that makes the mean over processes of local mean losses the mean over a global batch of `size` images."""
    local = len(np.array_split(np.empty(size), world)[rank])
    return local * world / size


class EpochLoader:
    """Batches of an epoch, on the device, from any batch on; loader processes live as long as the loader."""

    def __init__(
        self, view: View, batch_size: int, runtime: Runtime, seed: int, drop_last: bool = False, joined: bool = False
    ):
        """joined: a last batch of one image, of which BatchNorm takes no variance, joins the one before it; unless
        drop_last leaves it out."""
        self.view, self.batch_size, self.runtime, self.seed = view, batch_size, runtime, seed
        self.drop_last, self.joined = drop_last, joined and not drop_last
        self._batches: list[Batch] = []
        self._loader = _loader(view, self._batches, runtime, batch_size)

    def __len__(self) -> int:
        return num_batches(len(self.view), self.batch_size, self.drop_last, self.joined)

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, float, int]]:
        """(images in [0, 1], labels, loss weight of this process's share, size of the global batch)."""
        count, size, rank, world = len(self.view), self.batch_size, self.runtime.rank, self.runtime.world
        drop, joined = self.drop_last, self.joined
        self._batches[:] = training_batches(count, size, self.seed, epoch, rank, world, start, drop, joined)
        stopwatch, waited = self.runtime.stopwatch, time.perf_counter()
        for step, batch in enumerate(_iterate(self._loader), start):
            images, targets = self.runtime.to_device(*_received(batch))
            stopwatch.add("data", time.perf_counter() - waited)
            whole = _batch_end(step, count, size, joined) - step * size
            yield images, targets, loss_weight(whole, rank, world), whole
            waited = time.perf_counter()


@torch.no_grad()
def for_each_batch(
    view: View,
    function: Callable[[Tensor, Tensor], None],
    runtime: Runtime,
    batch_size: int = 256,
    shuffle: int | None = None,
) -> None:
    """Call function(images in [0, 1], labels) on each batch of this process's share of the view, under autocast.

    shuffle: a seed of the order and of the augmentation; default: in order, the same augmentation in every pass.
    Sums that the function makes are to be reduced with `runtime.reduce_sum`.
    """
    order = _pass_order(view, shuffle)
    for images, targets, _ in pass_over(view, order[runtime.rank :: runtime.world], runtime, batch_size, shuffle or 0):
        with runtime.autocast():
            function(images, targets)


def pass_over(
    view: View, positions: np.ndarray, runtime: Runtime, batch_size: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """(images in [0, 1], labels, positions) of the images at `positions` of a view, batch by batch, on the device."""
    batches = [Batch(positions[first : first + batch_size], seed) for first in range(0, len(positions), batch_size)]
    for batch, received in zip(batches, _iterate(_loader(view, batches, runtime, batch_size)), strict=True):
        yield *runtime.to_device(*_received(received)), batch.rows


def extract_features(
    features: Callable[[Tensor], Tensor],
    view: View,
    runtime: Runtime,
    batch_size: int = 256,
    shuffle: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(features (N, D), labels (N,)) of a view, in its order or that of `shuffle` (see `for_each_batch`), on the device
    of every process. Features of less than 32 bits become float32."""
    found: list[Tensor] = []

    def add(images: Tensor, _: Tensor) -> None:
        rows = features(images)
        found.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    for_each_batch(view, add, runtime, batch_size, shuffle)
    local = torch.cat(found) if found else torch.empty(0, device=runtime.device)
    labels = torch.from_numpy(view.labels[_pass_order(view, shuffle)]).to(runtime.device)
    if runtime.world == 1:
        return local, labels
    shares = [share.to(runtime.device) for share in runtime.gather(local.cpu())]
    whole = next(share for share in shares if len(share)).new_empty(len(view), shares[0].shape[-1])
    for rank, share in enumerate(shares):
        whole[rank :: runtime.world] = share
    return whole, labels


def _pass_order(view: View, shuffle: int | None) -> np.ndarray:
    """(N,): the rows of a view in the order of a pass."""
    count = len(view)
    return np.arange(count) if shuffle is None else np.random.RandomState(shuffle % (1 << 32)).permutation(count)


_Fetched = tuple[Tensor, Tensor] | UserError


class _Fetch(Dataset):
    """A view whose faults travel as values: torch would bury the sentence under a loader process's traceback."""

    def __init__(self, view: View):
        self._view = view

    def __getitems__(self, batch: Batch) -> _Fetched:
        try:
            return self._view.__getitems__(batch)
        except UserError as error:
            return error


def _received(batch: _Fetched) -> tuple[Tensor, Tensor]:
    if isinstance(batch, UserError):
        raise batch
    return batch


class _OnDevice:
    """The batches of a view whose images lie on the device; the list may be changed between passes."""

    def __init__(self, view: View, batches: list[Batch], device: torch.device):
        self._view, self._batches, self._device = view, batches, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._view.fetch_on(batch, self._device) for batch in self._batches)


def _loader(view: View, batches: list[Batch], runtime: Runtime, batch_size: int) -> DataLoader | _OnDevice:
    if view.on_device:
        return _OnDevice(view, batches, runtime.device)
    workers = runtime.workers(view.cheap)
    return DataLoader(
        _Fetch(view),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_is,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=runtime.prefetch(batch_size * view.image_bytes, workers) if workers else None,
        persistent_workers=workers > 0,
        pin_memory=runtime.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
        generator=torch.Generator(),  # else every pass would draw from the run's own random stream
    )


def _as_is(batch: _Fetched) -> _Fetched:
    return batch


def _leave_signals_to_the_parent(_: int) -> None:
    """A terminal and most clusters signal the whole process group: the parent stops the run, and ends this process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


_processes: set[multiprocessing.process.BaseProcess] = set()  # loader processes that this program has started


def _iterate(loader: DataLoader | _OnDevice) -> Iterator[Any]:
    """The loader's batches; the processes that it starts are noted, so that they alone are ended with the program."""
    if isinstance(loader, _OnDevice) or not loader.num_workers:
        return iter(loader)
    if not _processes:
        atexit.register(_end_loader_processes)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    _processes.intersection_update(before)
    _processes.update(set(multiprocessing.active_children()) - before)
    return _told(batches)


def _told(batches: Iterator[Any]) -> Iterator[Any]:
    """Raises UserError where a loader process is gone: torch says so in one of several words."""
    try:
        yield from batches
    except (RuntimeError, EOFError, ConnectionError) as error:
        if any(process.exitcode not in (None, 0) for process in _processes) or "DataLoader worker" in str(error):
            raise UserError(
                "a loader process was killed, often for want of memory (the kernel's log says so): lower num_workers, "
                "or cache_size, and go on with --resume"
            ) from None
        raise


def _end_loader_processes() -> None:
    """What is left of them when the program ends, say by an error that still holds its loader. `multiprocessing` would
    ask them to stop by the signal that they ignore, and wait for ever; torch would report each as killed, in the place
    where the reason of the end should stand."""
    left = [process for process in _processes if process.is_alive()]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()
