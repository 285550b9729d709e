"""Runs a program, and asks it to stop when it is asked to, or when who started it dies, however that dies.

    python -S -E supervise.py PARENT PROGRAM ...

The kernel tells of a parent's death once for each of its threads, and a program of ours takes a second signal for an
order to stop at once, without saving: signals within a second are one. Nothing but the standard library, so that it
starts in no time.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

APART = 1.0  # seconds between two signals that are two
_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    """The program's exit status; that of a signal is given on as the signal."""
    child: subprocess.Popen | None = None
    asked = -APART

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if time.monotonic() - asked >= APART:
            asked = time.monotonic()
            if child is not None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or asked > 0:  # it died, or changed its mind, before anything was begun
        return 3
    child = subprocess.Popen(command)
    if asked > 0:
        child.send_signal(signal.SIGTERM)
    status = child.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
