"""Rows that come in blocks and may lie on the host: passed to the device piece by piece, the next while one is read.

What alignment reads of a class (its factor, 2.4 MB at 768 features) is read once an epoch and in order, so it need not
lie on the card: two places for a piece do. A copy goes over a stream of its own, device events keep the two streams in
step, and the host waits for none of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Blocks(nn.Module):
    """Rows of one shape; those that come together are one buffer ("0", "1", ...), and never copied again.

    on_host: they stay in the host's memory wherever the module is moved, page-locked where there is a CUDA device.
    Blocks of their own, and not one buffer, also because page-locked memory comes in powers of two.
    """

    like: Tensor  # (0, ...): type and device of what is passed on

    def __init__(self, *shape: int):
        super().__init__()
        self.on_host = False
        self.register_buffer("like", torch.zeros(0, *shape), persistent=False)

    def __len__(self) -> int:
        return sum(len(block) for block in self.all())

    @property
    def row_bytes(self) -> int:
        return math.prod(self.like.shape[1:]) * self.like.element_size()

    def all(self) -> list[Tensor]:
        """(n, ...) of each time that rows came."""
        return [block for name, block in self._buffers.items() if name != "like" and block is not None]

    def dense(self) -> Tensor:
        """All rows, on the device."""
        return torch.cat([self.like, *(block.to(self.like.device) for block in self.all())])

    def append(self, count: int, rows: Iterable[Tensor]) -> None:
        """`count` rows of any floating type, one after another."""
        room = self._room((count, *self.like.shape[1:]))
        for place, row in zip(room, rows, strict=True):
            place.copy_(row)
        self.register_buffer(str(len(self.all())), room)

    def pieces(self, size: int) -> Iterator[list[Tensor]]:
        """Where each `size` rows lie, in order; the last piece may be smaller."""
        blocks, total = self.all(), len(self)
        starts = [sum(len(block) for block in blocks[:number]) for number in range(len(blocks))]
        for first in range(0, total, size):
            spans = [(max(first - start, 0), first + size - start) for start in starts]
            found = [block[begin : max(end, 0)] for block, (begin, end) in zip(blocks, spans, strict=True)]
            yield [rows for rows in found if len(rows)]

    def in_turn(self, size: int) -> Iterator[Tensor]:
        """`size` rows at a time, on the device. A piece may be overwritten as soon as the next one is asked for."""
        device = self.like.device
        if self.on_host and device.type != "cpu":
            return passed_on(self.pieces(size), self.like.new_empty(2, size, *self.like.shape[1:]))
        return self._joined(size)

    def _joined(self, size: int) -> Iterator[Tensor]:
        """A piece that lies in several blocks is put together, always in the same memory: fresh memory costs more than
        the copy."""
        room: Tensor | None = None
        for rows in self.pieces(size):
            if len(rows) > 1:
                room = self.like.new_empty(size, *self.like.shape[1:]) if room is None else room
                yield torch.cat(rows, out=room[: sum(len(part) for part in rows)])
            else:
                yield rows[0]

    def _room(self, shape: Sequence[int]) -> Tensor:
        if not self.on_host:
            return self.like.new_empty(shape)
        return torch.empty(shape, dtype=self.like.dtype, pin_memory=torch.cuda.is_available())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Blocks":
        kept = {name: block for name, block in self._buffers.items() if self.on_host and name != "like"}
        for name in kept:
            del self._buffers[name]
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As many blocks as were saved, each where this module has its own."""
        for name in [name for name in self._buffers if name != "like"]:
            del self._buffers[name]
        pattern = re.compile(re.escape(prefix) + r"(\d+)")
        found = {int(match[1]): value for name, value in state_dict.items() if (match := pattern.fullmatch(name))}
        for number in sorted(found):
            self.register_buffer(str(number), self._room(found[number].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def passed_on(pieces: Iterable[list[Tensor]], places: Tensor) -> Iterator[Tensor]:
    """The pieces, lists of tensors (n_i, ...) of the host, one after another on the device of places (2, n, ...): while
    one place is read, the next piece is copied to the other. A place is filled again behind all work that the device
    was given before the next piece was asked for."""
    lanes = _Lanes(places.device)
    filled: Tensor | None = None
    for number, piece in enumerate(pieces):
        place = places[number % 2]
        with lanes.filling(number % 2):
            start = 0
            for rows in piece:
                place[start : start + len(rows)].copy_(rows, non_blocking=True)
                start += len(rows)
        if filled is not None:
            lanes.wait_for(1 - number % 2)
            yield filled
            lanes.read(1 - number % 2)
        filled = place[:start]
    if filled is not None:
        lanes.wait_for(number % 2)
        yield filled


class _Lanes:
    """The order of copies and work on two places, kept by the device: copies have a stream of their own."""

    def __init__(self, device: torch.device):
        self._copies = self._work = None
        if torch.cuda.is_available():
            self._copies, self._work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            self._filled, self._read = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            self._copies.wait_stream(self._work)  # the places may be memory that earlier work still reads

    @contextmanager
    def filling(self, place: int) -> Iterator[None]:
        """The copies go behind the work on what the place has held."""
        if self._copies is None:
            yield
            return
        self._copies.wait_event(self._read[place])
        with torch.cuda.stream(self._copies):
            yield
            self._filled[place].record()

    def wait_for(self, place: int) -> None:
        """The work from here on goes behind the copies to the place."""
        if self._work is not None:
            self._work.wait_event(self._filled[place])

    def read(self, place: int) -> None:
        """All work on the place has been handed over."""
        if self._work is not None:
            self._read[place].record(self._work)
