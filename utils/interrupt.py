"""SIGINT and SIGTERM: stop at the next safe point, where the state is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Interrupted


class StopSignal:
    """While active, a signal raises Interrupted at once, or, inside `deferred`, sets `requested`.

    A second signal ends the program the hard way.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self._deferred:
            raise Interrupted(signal.Signals(number).name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that must not be cut: a signal is obeyed at its end, or where the block looks at `requested`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.requested and not self._deferred:
            raise Interrupted("a signal")
