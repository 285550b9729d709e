"""Signals that ask a run to stop: it does at the next safe point, where the state is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Interrupted

# Ctrl-C; what clusters send before they kill, by default or by `--signal=USR1@120`; a terminal that closes.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class StopSignal:
    """While active, a signal raises Interrupted at once, or, inside `deferred`, sets `requested`.

    A second signal ends the program the hard way. A SIGHUP that is ignored stays so: `nohup` means it.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal of another process"  # several processes agree on stopping
        self._deferred = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in STOPPING:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(self.name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that must not be cut: a signal is obeyed at its end, or where the block looks at `requested`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.requested and not self._deferred:
            raise Interrupted(self.name)
