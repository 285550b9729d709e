"""What every learner costs, in one command: python -m benchmarks.costs [LEARNER ...] [--json FILE] [--before FILE]

One table: waits for the device, kernels of a training step beside a bare one with the same trainable modules, loaders
that an evaluation opens (all counted: benchmarks.waits), bytes by class and by task (benchmarks.memory); below it
images fed a second on this machine (benchmarks.gpu, whose steps need a card). --json keeps the figures; --before takes
those of another commit and prints what has changed as "then -> now".
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks import memory, waits
from benchmarks.asked import add_learners, kept, new_file
from benchmarks.gpu import Bench
from models.base import LEARNERS
from utils.runtime import available_cpus

HEADS = [*waits.HEADS[:-1], *memory.HEADS, waits.HEADS[-1]]


def figures(name: str) -> list[str]:
    """The cells of a learner, or of a variant that is stored in another way, whose steps are those of its learner."""
    if name in memory.VARIANTS:
        counted = [""] * len(waits.HEADS)
    else:
        with tempfile.TemporaryDirectory() as folder:
            counted = waits.figures(name, Path(folder))
    return [*counted[:-1], *memory.figures(name), counted[-1]]


def fed() -> dict[str, float]:
    """Images of 224 pixels a second that reach the device, nothing trained."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), "auto", small=False)
        return {where: bench.fed(where) for where in ("host", "device")}


def changed(then: str | None, now: str) -> str:
    """A cell, with what stood there before if that was another value."""
    return now if then in (None, now) else f"{then or '-'} -> {now or '-'}"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_learners(parse, memory.VARIANTS, "default: all, and variants")
    parse.add_argument("--json", type=new_file, metavar="FILE", help="keep the figures")
    parse.add_argument("--before", type=kept, metavar="FILE", help="figures that another commit kept")
    options = parse.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    then: dict[str, Any] = options.before or {"learners": {}, "fed": {}}
    found: dict[str, Any] = {"learners": {}, "fed": fed()}
    print(f"| {' | '.join(['learner', *HEADS])} |\n{'|---' * (1 + len(HEADS))}|")
    for name in options.learners or [*LEARNERS, *memory.VARIANTS]:
        row = found["learners"][name] = dict(zip(HEADS, figures(name), strict=True))
        before = then["learners"].get(name, {})
        print(f"| {' | '.join([name, *(changed(before.get(head), cell) for head, cell in row.items())])} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    earlier = {where: f"{rate:.0f}" for where, rate in then["fed"].items()}
    rates = (f"{changed(earlier.get(where), f'{rate:.0f}')} ({where})" for where, rate in found["fed"].items())
    print(f"\nFed, images of 224 pixels a second, {available_cpus()} cores: {', '.join(rates)}")


if __name__ == "__main__":
    main()
