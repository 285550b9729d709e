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
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bare import bare_step, work
from data.loading import Batch, EpochLoader
from data.stream import DataManager
from models.base import LEARNERS, Learner
from models.factory import build_learner, config_from, learner_class
from models.parts.loop import Observer, learn
from utils.config import TrainConfig
from utils.runtime import Runtime, available_cpus

CLASSES, STEPS, TIMED = 4, 12, 8  # of a task: classes, steps, steps that are timed
SMALL = {"name": "vit_tiny_patch16_224", "depth": 2, "img_size": 32, "patch_size": 8}
PRECISIONS = ("fp32", "tf32", "bf16", "compiled")


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
    """Times the steps of the first stage of a task, and counts the kernels and the arithmetic of a bare one before."""

    def __init__(self, learner: Learner, images: torch.Tensor):
        self.learner, self.images, self.clock = learner, images, Clock(learner.runtime.device)
        self.bare: dict[str, float] = {}
        self.kernels: float | None = None
        self.stage, self._profile = 0, None

    def stage_started(self, number: int) -> None:
        self.stage = number
        if number == 0:
            self.learner.train()
            step = bare_step(self.learner, self.images)
            self.bare = {"ms": milliseconds(step, self.clock.device), "kernels": launches(step, self.clock.device)}
            self.bare["flops"] = work(step)
            self.learner.eval()

    def epoch_started(self, batches: int, done: int) -> None:
        if self.stage == 0:
            self.clock.mark()

    def step_done(self, fit: Any) -> None:
        if self.stage == 0:
            self.clock.mark()

    @property
    def ms(self) -> float:
        return statistics.median(self.clock.milliseconds()[-TIMED:])


class Profiled(Observer):
    """Kernels of the last steps of the first stage."""

    def __init__(self, steps: int):
        self.steps, self.done, self.kernels = steps, 0, 0.0
        self._profile: Any = None

    def stage_started(self, number: int) -> None:
        self.active = number == 0

    def step_done(self, fit: Any) -> None:
        if not self.active:
            return
        self.done += 1
        if self.done == self.steps - 3:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()
        elif self.done == self.steps - 1:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self.kernels = kernels_of(self._profile) / 2


def kernels_of(recorded: Any) -> int:
    """Kernels, copies and fills that ran on the device."""
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def launches(step: Callable[[], Any], device: torch.device) -> float:
    """Kernels of one step; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize(device)
    return kernels_of(recorded)


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
        count = STEPS // 2 * self.batch
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
            values |= {"batch_size": self.batch, "epochs": 2, "train_transform": "crop_flip"}
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
        watched: list[Watch] = []
        for task in manager[:2]:
            watched.append(Watch(learner, images))
            learn(learner, task, watched[-1])
        trained = [one for one in watched if one.bare]
        if not trained:
            return None
        last, ms = trained[-1], trained[-1].ms
        memory = learner.runtime.peak_memory_mib()
        return {
            "ms": ms, "bare_ms": last.bare["ms"], "images_per_second": 1e3 * self.batch / ms,
            "kernels": self.kernels(name, len(trained) == 2, keys), "bare_kernels": last.bare["kernels"],
            "bare_flops": last.bare["flops"], "memory_mib": memory,
        }  # fmt: skip

    def kernels(self, name: str, second: bool, keys: dict[str, Any]) -> float:
        """Of a step, in a run of its own: a profiler takes time. second: whether the second task trains."""
        if self.device == "cpu":
            return 0
        manager, learner = self.learner(self.config(name, **keys))
        watch = Profiled(STEPS)
        for task in manager[: 1 + second]:
            watch = Profiled(STEPS)
            learn(learner, task, watch)
        return watch.kernels

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
        "| learner | ms a step | over bare | images/s | kernels | over bare | bare's share of peak | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["learners"].items():
        share = row["bare_flops"] / row["bare_ms"] * 1e3 / found["peak"][row["precision"]]
        kernels = f"{row['kernels'] / row['bare_kernels']:.2f}" if row["bare_kernels"] else "-"
        lines.append(
            f"| {name} | {row['ms']:.1f} | {row['ms'] / row['bare_ms']:.2f} | {row['images_per_second']:.0f} | "
            f"{row['kernels']:.0f} | {kernels} | {100 * share:.0f} % | {row['memory_mib']:.0f} |"
        )
    lines += ["", f"Fed, images a second: {found['fed']}; products: {found['peak']}", f"{found['environment']}"]
    return "\n".join(lines)


def measure(bench: Bench, names: Sequence[str]) -> dict[str, Any]:
    device = Runtime(bench.device).device
    size = 256 if bench.small else 8192
    found: dict[str, Any] = {
        "peak": {precision: peak(device, precision, size) for precision in ("fp32", "tf32", "bf16")},
        "learners": {},
        "fed": {"device": bench.fed("device"), f"host, {available_cpus()} cores": bench.fed("host")},
    }
    for precision in PRECISIONS:
        keys = {"precision": "bf16", "compile": True} if precision == "compiled" else {"precision": precision}
        row = bench.row("finetune", **keys)
        assert row is not None
        found["learners"][f"finetune, {precision}"] = row | {"precision": keys["precision"]}
    for name in names:
        if (row := bench.row(name, precision="bf16")) is not None:
            found["learners"][name] = row | {"precision": "bf16"}
            print(name, {key: round(value, 1) for key, value in row.items()}, flush=True)
    config = bench.config("finetune")
    found["environment"] = Runtime.of(config).describe() | {"cores": available_cpus(), "batch": bench.batch}
    if device.type == "cuda":
        found["environment"]["cuda"] = torch.version.cuda
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("learners", nargs="*", metavar="LEARNER", help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Bench(Path(folder), options.device, options.small), options.learners or list(LEARNERS))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
