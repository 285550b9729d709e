"""Waits for the device and kernels: python -m benchmarks.waits [LEARNER ...]

How often the host stands still in a training step, in an epoch beside its steps, and in an evaluation, and how many
kernels a step launches, on a pretended CUDA device (tests/pretend_cuda.py): counted, not timed, so any machine will do.
Kernels stand beside those of a bare step with the same trainable modules (benchmarks/bare.py), and beside how much more
arithmetic the method asks for: second passes, teachers, replicas. Two tasks of the tests' tiny stream; the first step
of a stage, which uploads what stays, is left out.
"""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.asked import add_learners, count
from benchmarks.bare import bare_step
from data.loading import Batch
from data.stream import DataManager
from models.base import LEARNERS
from models.factory import build_learner
from models.parts.evaluation import evaluate
from models.parts.loop import learn
from tests.conftest import tiny_values
from tests.pretend_cuda import pretended
from tests.test_pretend_cuda import Steps, build, undeclared

BATCH = 4  # images of a bare step, as many as the tests' steps have


class Kernels(Steps):
    """Also the kernels and the arithmetic of each step, and of a bare one before the first stage."""

    def __init__(self, recorder, learner, task, flops):
        super().__init__(recorder)
        self.learner, self.task, self.flops = learner, task, flops
        self.counts: list[np.ndarray] = []  # (kernels, floating point operations) of each step
        self.bare: np.ndarray | None = None

    def _now(self) -> np.ndarray:
        return np.array([self.recorder.kernels.total(), self.flops.get_total_flops()], dtype=float)

    def stage_started(self, number):
        if number == 0:
            view = self.task.train.view("train")
            images, _ = self.learner.runtime.to_device(*view.__getitems__(Batch(np.arange(len(view))[:BATCH])))
            self.learner.train()
            step = bare_step(self.learner, images)
            step()  # makes the optimiser's state
            before = self._now()
            step()
            self.bare = self._now() - before
            self.learner.eval()
        super().stage_started(number)

    def epoch_started(self, batches, done):
        super().epoch_started(batches, done)
        self._batches, self._before = batches, self._now()

    def step_done(self, state):
        super().step_done(state)
        now = self._now()
        if state.step < self._batches:  # the last batch is a smaller one
            self.counts.append(now - self._before)
        self._before = now


HEADS = ["waits a step", "undeclared", "an epoch", "an evaluation", "kernels a step", "over bare"]
HEADS += ["arithmetic over bare", "loaders an evaluation", "meant"]


def figures(name: str, folder: Path, depth: int = 12) -> list[str]:
    """The cells of a learner, as `HEADS` names them."""
    backbone = tiny_values(folder, name)["backbone"]
    config, runtime = build(folder, name, {"backbone": backbone | {"depth": depth}} if "depth" in backbone else {})
    with FlopCounterMode(display=False) as flops, pretended() as recorder:
        manager = DataManager(config, image_size=16)
        torch.manual_seed(0)
        learner = build_learner(config, runtime, manager[0].info)
        watched = []
        for task in manager[:2]:
            watched.append(Kernels(recorder, learner, task, flops))
            learn(learner, task, watched[-1])
            before = recorder.waits().total()
            with patch("data.loading.DataLoader", wraps=DataLoader) as opened:
                evaluate(learner, manager[: task.index + 1])
            passed = recorder.waits().total() - before
    steps = [waits for one in watched for waits in one.steps[1:]]
    most = max((waits.total() for waits in steps), default=0)
    wrong = max((len(undeclared(waits, learner.waits)) for waits in steps), default=0)
    places: dict[str, list[str]] = {}
    for what, why in learner.waits.items():
        places.setdefault(why, []).append(what)
    declared = "; ".join(f"{', '.join(where)}: {why}" for why, where in places.items())
    per_epoch = max((count for one in watched for count in one.epochs[1:]), default=0)
    counts = map(str, (most, wrong, per_epoch, passed))
    return [*counts, *kernels(watched), str(opened.call_count), declared]


def kernels(watched: Sequence[Kernels]) -> list[str]:
    """Of a step of the last task that trains, and beside a bare one: kernels, arithmetic."""
    trained = [one for one in watched if one.counts]
    if not trained:
        return ["-"] * 3
    last = trained[-1]
    mean = np.mean(last.counts[1:], axis=0)
    times, work = mean / last.bare
    return [f"{mean[0]:.0f}", f"{times:.2f}", f"{work:.2f}"]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    add_learners(parse)
    parse.add_argument("--depth", type=count, default=12, help="blocks of the tiny ViT")
    warnings.simplefilter("ignore")
    options = parse.parse_args()
    print(f"| {' | '.join(['learner', *HEADS])} |\n{'|---' * (1 + len(HEADS))}|")
    for name in options.learners or LEARNERS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join([name, *figures(name, Path(folder), options.depth)])} |", flush=True)


if __name__ == "__main__":
    main()
