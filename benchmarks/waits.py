"""Waits for the device: python -m benchmarks.waits [LEARNER ...]

How often the host stands still in a training step, in an epoch beside its steps, and in an evaluation, and how many
kernels a step launches, on a pretended CUDA device (tests/pretend_cuda.py): counted, not timed, so any machine will do.
Two tasks of the tests' tiny stream; the first step of a stage, which uploads what stays, is left out.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import torch

from data.stream import DataManager
from models.base import LEARNERS
from models.factory import build_learner
from models.parts.evaluation import evaluate
from models.parts.loop import learn
from tests.pretend_cuda import pretended
from tests.test_pretend_cuda import Steps, build, undeclared


class Kernels(Steps):
    """Also the kernels of each step."""

    def __init__(self, recorder):
        super().__init__(recorder)
        self.kernels: list[int] = []
        self._before = 0

    def epoch_started(self, batches, done):
        super().epoch_started(batches, done)
        self._before = self.recorder.kernels.total()

    def step_done(self, state):
        super().step_done(state)
        now = self.recorder.kernels.total()
        self.kernels.append(now - self._before)
        self._before = now


def row(name: str, folder: Path) -> str:
    """One line of the table."""
    config, runtime = build(folder, name, {})
    with pretended() as recorder:
        manager = DataManager(config, image_size=16)
        torch.manual_seed(0)
        learner = build_learner(config, runtime, manager[0].info)
        watched = []
        for task in manager[:2]:
            watched.append(Kernels(recorder))
            learn(learner, task, watched[-1])
            before = recorder.waits().total()
            evaluate(learner, manager[: task.index + 1])
            passed = recorder.waits().total() - before
    steps = [waits for one in watched for waits in one.steps[1:]]
    kernels = [count for one in watched for count in one.kernels[1:]]
    most = max((waits.total() for waits in steps), default=0)
    wrong = max((len(undeclared(waits, learner.waits)) for waits in steps), default=0)
    places: dict[str, list[str]] = {}
    for what, why in learner.waits.items():
        places.setdefault(why, []).append(what)
    declared = "; ".join(f"{', '.join(where)}: {why}" for why, where in places.items())
    per_epoch = max((count for one in watched for count in one.epochs[1:]), default=0)
    mean = f"{sum(kernels) / len(kernels):.0f}" if kernels else "-"
    return f"| {name} | {most} | {wrong} | {per_epoch} | {passed} | {mean} | {declared} |"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("learners", nargs="*", metavar="LEARNER", help="default: all")
    warnings.simplefilter("ignore")
    print("| learner | waits a step | undeclared | an epoch | an evaluation | kernels a step | meant |")
    print("|---|---|---|---|---|---|---|")
    for name in parse.parse_args().learners or LEARNERS:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
