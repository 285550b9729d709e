"""Values of images that will never change, kept between evaluations: in memory, then in a file, then not at all."""

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.records import Split

KEEP_FREE = 0.1  # share of the disk that is left alone


@dataclass
class _Kept:
    """One name's values (N, ...) of the images of a split. there (N,): which are filled. split: kept alive, so that its
    id stays its own. values: None where there was no room."""

    split: Split
    values: Tensor | None
    there: np.ndarray


class FrozenStore:
    """What `Learner.frozen` has given, by image and name. Filled as images are evaluated; never part of a checkpoint.

    limit: bytes of memory; what is beyond goes to a file below `folder`, and is not kept where there is no room.
    """

    def __init__(self, limit: float, folder: Path | None = None):
        self._limit, self._folder, self._used = limit, folder, 0
        self._kept: dict[tuple[int, str], _Kept] = {}

    def has(self, split: Split, rows: np.ndarray, name: str) -> bool:
        """Whether the value of every one of these images is kept."""
        return bool(self.there(split, rows, name).all())

    def there(self, split: Split, rows: np.ndarray, name: str) -> np.ndarray:
        """(B,): whether the value of each of these images is kept."""
        kept = self._kept.get((id(split), name))
        return np.zeros(len(rows), dtype=bool) if kept is None else kept.there[rows]

    def get(self, split: Split, rows: np.ndarray, name: str, device: torch.device) -> Tensor:
        """(B, ...) as it was put, on the device."""
        values = self._kept[id(split), name].values
        assert values is not None
        return values[torch.from_numpy(rows)].to(device, non_blocking=True)

    def put(self, split: Split, rows: np.ndarray, name: str, values: Tensor) -> None:
        """values (B, ...): of the images at `rows` of a split."""
        key = id(split), name
        if key not in self._kept:
            room = self._room(len(split), values)
            self._kept[key] = _Kept(split, room, np.zeros(len(split), dtype=bool))
        kept = self._kept[key]
        if kept.values is not None:
            kept.values[torch.from_numpy(rows)] = values.detach().cpu()
            kept.there[rows] = True

    def _room(self, count: int, like: Tensor) -> Tensor | None:
        shape = (count, *like.shape[1:])
        size = int(np.prod(shape)) * like.element_size()
        if self._used + size <= self._limit:
            self._used += size
            return torch.empty(shape, dtype=like.dtype)
        if self._folder is None:
            return None
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            if size <= (1 - KEEP_FREE) * shutil.disk_usage(self._folder).free:
                # Without a name: the space is free again when the program ends, however it ends.
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    block = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
                return torch.from_numpy(block).view(like.dtype).view(shape)
        return None
