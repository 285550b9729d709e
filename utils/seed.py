"""Randomness from outside: one function seeds everything, per-sample seeds make augmentation reproducible.

Augmentation draws are seeded by (seed, task, epoch, position in the data set), not by a stream that runs along.
So they do not depend on the number of workers or processes, nor on where a run was interrupted.
"""

import logging
import random
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

_MASK = (1 << 64) - 1


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(folded(seed, 32))
    torch.manual_seed(folded(seed, 63))


def folded(seed: int, bits: int) -> int:
    """The seed where it has at most so many bits; one mixed from all of its digits where it has more."""
    if not seed >> bits:
        return seed
    return mix(*(seed >> shift for shift in range(0, seed.bit_length(), 64))) % (1 << bits)


def mix(*numbers: int) -> int:
    """A 63-bit seed from any whole numbers; another order gives another seed (splitmix64 steps)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = _step(state, number)
    return state >> 1


def _step(state: int, number: int) -> int:
    state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def mix_rows(seed: int, rows: np.ndarray) -> np.ndarray:
    """(B,) uint64: mix(seed, row) of each row, at once."""
    state = np.uint64(_step(0x9E3779B97F4A7C15, seed))
    states = (state ^ rows.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ states >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (states ^ states >> np.uint64(31)) >> np.uint64(1)


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """State of every global generator that a process draws from, in types that `torch.load(weights_only=True)`
    accepts. device: the one that the process computes on."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": None if device is None or device.type != "cuda" else torch.cuda.get_rng_state(device),
    }


def set_rng_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore what `rng_state` returned. A run that goes on on a device of another kind than before is told that what
    is drawn there begins anew."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, np_keys, position, has_gauss, np_gauss = state["numpy"]
    np.random.set_state((kind, np_keys.numpy().astype(np.uint32), position, has_gauss, np_gauss))
    torch.set_rng_state(state["torch"])
    on_cuda = device is not None and device.type == "cuda"
    if on_cuda and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)  # type: ignore[arg-type]
    elif on_cuda or state["cuda"] is not None:
        log.warning("the run goes on on another kind of device: random numbers that are drawn there begin anew")
