"""What a card gives: python -m benchmarks.gpu [LEARNER ...] [--json FILE]

One line a learner: its step on ViT-B/16 (random weights, images of 224 pixels that lie on the device) beside a bare
step with the same trainable modules (benchmarks/bare.py): milliseconds, images a second, kernels launched, share of the
largest rate of matrix products that this card reached a moment before, peak of memory. Then fine-tuning in fp32, tf32,
bf16 and compiled, and images fed a second by loader processes and on the device.

The second of two tasks is timed, by the device's own clock. --small takes a tiny network, for a try without a card.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.asked import add_learners, new_file
from benchmarks.bare import bare_step, work
from data.loading import Batch, EpochLoader
from data.stream import DataManager
from models.base import LEARNERS, Learner
from models.factory import build_learner, config_from, learner_class
from models.parts.loop import Observer, learn
from utils.config import TrainConfig
from utils.errors import TrainingError
from utils.runtime import Runtime, available_cpus

CLASSES, PER_EPOCH, EPOCHS = 4, 8, 2
WARM, TIMED = 4, 8  # steps before those that are timed, and those
OTHERWISE = {"ewc": {"lamda": 1e-3}}  # the Fisher of random weights is so large that SGD diverges on its penalty
SMALL = {"name": "vit_tiny_patch16_224", "depth": 2, "img_size": 32, "patch_size": 8}


class Clock:
    """Marks on the device's time line (the host's on a CPU)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        if self.device.type != "cuda":
            return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]


class Watch(Observer):
    """The first stage of a task: a bare step before it, then time, arithmetic and kernels of its steps, each in steps
    of its own."""

    def __init__(self, learner: Learner, images: torch.Tensor):
        self.learner, self.images = learner, images
        self.device = learner.runtime.device
        self.clock, self.recorder = Clock(self.device), Recorder(self.device)
        self.bare: dict[str, float] = {}
        self.active, self.done = False, 0

    def stage_started(self, number: int) -> None:
        self.active = number == 0
        if self.active:
            self.learner.train()
            step = bare_step(self.learner, self.images)
            self.bare = {"ms": milliseconds(step, self.device), "flops": work(step)}
            with self.recorder.profiled():
                step()
            self.bare["kernels"] = self.recorder.kernels
            self.learner.eval()

    def step_done(self, fit: Any) -> None:
        if not self.active:
            return
        self.done += 1
        if WARM <= self.done <= WARM + TIMED:
            self.clock.mark()
        if self.done == WARM + TIMED:
            self.recorder.count()
        elif self.done == WARM + TIMED + 1:
            self.recorder.profile()
        elif self.done == WARM + TIMED + 2:
            self.recorder.close()

    @property
    def ms(self) -> float:
        return statistics.median(self.clock.milliseconds())


class Recorder:
    """Arithmetic of one step, then kernels of the next, between two calls of an observer."""

    def __init__(self, device: torch.device):
        self.device, self.flops, self.kernels = device, 0.0, 0.0
        self._flops: Any = None
        self._profile: Any = None

    def count(self) -> None:
        self._flops = FlopCounterMode(display=False)
        self._flops.__enter__()

    def profile(self) -> None:
        self._flops.__exit__(None, None, None)
        self.flops = self._flops.get_total_flops()
        self._profile = self.profiled()
        self._profile.__enter__()

    def close(self) -> None:
        self._profile.__exit__(None, None, None)

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Counts the kernels of what is done inside; 0 on a CPU."""
        if self.device.type != "cuda":
            yield
            return
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            yield
            torch.cuda.synchronize(self.device)
        self.kernels = kernels_of(recorded)


def kernels_of(recorded: Any) -> int:
    """Kernels, copies and fills that ran on the device."""
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def milliseconds(step: Callable[[], Any], device: torch.device, times: int = TIMED) -> float:
    """Median of a step, after two that warm up."""
    clock = Clock(device)
    for number in range(times + 2):
        if number >= 2:
            clock.mark()
        step()
    clock.mark()
    return statistics.median(clock.milliseconds())


def peak(device: torch.device, precision: str, size: int) -> float:
    """Floating point operations a second of a square matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device) * 1e3


class Bench:
    """Runs of learners on one made-up stream."""

    def __init__(self, folder: Path, device: str, small: bool):
        self.device, self.small = device, small
        self.batch, self.size = (8, 32) if small else (64, 224)
        self.backbone: Any = SMALL if small else {"name": "vit_base_patch16_224"}
        count = PER_EPOCH * self.batch
        rng = np.random.RandomState(0)
        pixels = rng.randint(0, 256, (2 * count, self.size, self.size, 3), dtype=np.uint8)
        labels = np.repeat(np.arange(2 * CLASSES), count // CLASSES)
        self.file = folder / "stream.npz"
        np.savez(self.file, x_train=pixels, y_train=labels, x_test=pixels[:: count // 4], y_test=labels[:: count // 4])

    def config(self, name: str, **keys: Any) -> Any:
        learner = learner_class(name)
        values = {
            "model_name": name, "dataset": f"npz:{self.file}", "increment": CLASSES, "backbone": self.backbone,
            "weights": "random", "normalize": "half", "device": self.device, "augment_on": "device",
        } | learner.example  # fmt: skip
        if issubclass(learner.Config, TrainConfig):
            values |= {"batch_size": self.batch, "epochs": EPOCHS, "train_transform": "crop_flip"}
        values |= OTHERWISE.get(name, {})
        if "networks" in learner.Config.model_fields:
            values |= {"networks": [self.backbone, None]}
        return config_from(values | keys, "benchmark")

    def learner(self, config: Any) -> tuple[DataManager, Learner]:
        runtime = Runtime.of(config)
        runtime.begin_run()
        manager = DataManager(config, self.size, runtime.device)
        torch.manual_seed(0)
        return manager, build_learner(config, runtime, manager[0].info)

    def row(self, name: str, **keys: Any) -> dict[str, float] | None:
        """A learner's figures; None where nothing trains."""
        manager, learner = self.learner(self.config(name, **keys))
        view = manager[0].train.view("train")
        rows = Batch(np.arange(self.batch))
        images, _ = learner.runtime.to_device(*view.fetch_on(rows, learner.runtime.device))
        watch: Watch | None = None
        for task in manager[:2]:
            one = Watch(learner, images)
            learn(learner, task, one)
            watch = one if one.bare else watch
        if watch is None:
            return None
        bare = {f"bare_{name}": value for name, value in watch.bare.items()}
        return {
            "ms": watch.ms, "images_per_second": 1e3 * self.batch / watch.ms, "flops": watch.recorder.flops,
            "kernels": watch.recorder.kernels, "memory_mib": learner.runtime.peak_memory_mib(),
        } | bare  # fmt: skip

    def fed(self, where: str) -> float:
        """Images a second of an epoch that nothing trains on."""
        manager, learner = self.learner(self.config("finetune", augment_on=where))
        loader = EpochLoader(manager[0].train.view("train"), self.batch, learner.runtime, 0)
        seen, started = 0, 0.0
        for epoch in range(3):
            for step, (images, *_) in enumerate(loader.epoch(epoch, 0)):
                if epoch == 0 and step == 1:  # loader processes are there, the array is placed
                    started = time.perf_counter()
                elif epoch or step:
                    seen += len(images)
        if learner.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return seen / (time.perf_counter() - started)


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| learner | ms a step | over bare | images/s | kernels | over bare | share of peak | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["learners"].items():
        share = row["flops"] / row["ms"] * 1e3 / found["peak"][row["precision"]]
        kernels = f"{row['kernels'] / row['bare_kernels']:.2f}" if row["bare_kernels"] else "-"
        lines.append(
            f"| {name} | {row['ms']:.1f} | {row['ms'] / row['bare_ms']:.2f} | {row['images_per_second']:.0f} | "
            f"{row['kernels']:.0f} | {kernels} | {100 * share:.0f} % | {row['memory_mib']:.0f} |"
        )
    lines += ["", f"Fed, images a second: {found['fed']}; products: {found['peak']}", f"{found['environment']}"]
    return "\n".join(lines)


def measure(bench: Bench, names: Sequence[str], kept: Path | None) -> dict[str, Any]:
    """kept: written anew after each row, so that a stop loses one."""
    device = Runtime(bench.device).device
    environment = Runtime.of(bench.config("finetune")).describe() | {"cores": available_cpus(), "batch": bench.batch}
    size = 256 if bench.small else 8192
    found: dict[str, Any] = {
        "environment": environment | {"cuda": torch.version.cuda},
        "peak": {precision: peak(device, precision, size) for precision in ("fp32", "tf32", "bf16")},
        "fed": {"device": bench.fed("device"), "host": bench.fed("host")},
        "learners": {},
    }
    rows = [(name, name, {"precision": "bf16"}) for name in names]
    rows += [(f"finetune, {precision}", "finetune", {"precision": precision}) for precision in ("fp32", "tf32")]
    rows += [("finetune, compiled", "finetune", {"precision": "bf16", "compile": True})]
    for title, name, keys in rows:
        try:
            row = bench.row(name, **keys)
        except TrainingError as error:  # random weights; the other rows stand
            print(f"{title}: {error}", file=sys.stderr)
            continue
        if row is not None:
            found["learners"][title] = row | {"precision": keys["precision"]}
        if kept is not None:
            kept.write_text(json.dumps(found, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_learners(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=new_file, help="also keep the figures here, row by row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Bench(Path(folder), options.device, options.small), options.learners or list(LEARNERS), options.json
        )
    print(table(found))


if __name__ == "__main__":
    main()
