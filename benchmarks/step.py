"""python -m benchmarks.step: SLCA's and SLCA++'s training step over a bare PyTorch step with the same trainable set.

Ours runs through `fit`: loader, normalisation, heads, loss, optimiser. The bare step is timm's model with a linear head
(for SLCA++ with a hand-written branch beside qkv), cross-entropy and SGD on tensors that lie ready. Both alternate in
one process; figures are CPU seconds on a CPU, so that other work on the machine does not count, and wall time on CUDA.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.stream import DataManager
from models.factory import build_learner, config_from
from models.parts.loop import Observer, begin, fit
from models.slca import LIGHT
from utils.runtime import Runtime

VIT_B = "vit_base_patch16_224"


class BareBranch(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 0.8 * self.lora_b(self.lora_a(x))


class Clock(Observer):
    """Seconds between steps."""

    def __init__(self, device: torch.device):
        self.cuda, self.steps, self.last = device.type == "cuda", [], 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def epoch_started(self, batches: int, done: int) -> None:
        self.last = self.now()

    def step_done(self, state: Any) -> None:
        now = self.now()
        self.steps.append(now - self.last)
        self.last = now


def stream(folder: Path, images: int, size: int) -> str:
    """Random images of two classes."""
    rng = np.random.RandomState(0)
    x = rng.randint(0, 256, size=(images, size, size, 3), dtype=np.uint8)
    y = np.arange(images) % 2
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    return f"npz:{folder / 'images.npz'}"


def our_steps(model_name: str, dataset: str, batch: int, runtime: Runtime, clock: Clock):
    """A function that trains one epoch through `fit` and adds its steps to the clock."""
    values = {"model_name": model_name, "dataset": dataset, "increment": 2, "backbone": VIT_B, "weights": "random",
              "batch_size": batch, "epochs": 1, "normalize": "imagenet"}  # fmt: skip
    config = config_from(values, source="benchmark")
    task = DataManager(config, image_size=224)[0]
    learner = build_learner(config, runtime, task.info)
    begin(learner, task)
    return lambda: fit(learner, task, observer=clock)


def bare_steps(model_name: str, batch: int, steps: int, runtime: Runtime, clock: Clock):
    """The same with a loop of eight lines."""
    model: Any = timm.create_model(VIT_B, num_classes=2)
    model.norm = nn.LayerNorm(model.num_features)
    if model_name == "slcapp":
        for block in model.blocks:
            block.attn.qkv = BareBranch(block.attn.qkv, rank=4)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head") or any(part in name for part in LIGHT))
    model.to(runtime.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-4, 0.9, weight_decay=5e-4, fused=runtime.device.type == "cuda")
    images = torch.rand(batch, 3, 224, 224, device=runtime.device)
    targets = torch.arange(batch, device=runtime.device) % 2

    def epoch() -> None:
        clock.epoch_started(steps, 0)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with runtime.autocast():
                loss = F.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            clock.step_done(None)

    return epoch


def compare(model_name: str, batch: int, steps: int, rounds: int, runtime: Runtime) -> None:
    ours, bare = Clock(runtime.device), Clock(runtime.device)
    with tempfile.TemporaryDirectory() as folder:
        train_ours = our_steps(model_name, stream(Path(folder), batch * steps, 224), batch, runtime, ours)
        train_bare = bare_steps(model_name, batch, steps, runtime, bare)
        for _ in range(rounds):
            train_ours()
            train_bare()
    # The first round warms up caches and allocators.
    found, wanted = (statistics.median(clock.steps[steps:]) for clock in (ours, bare))
    print(f"{model_name:<7} ViT-B/16, batch {batch}: ours {found:.3f} s, bare {wanted:.3f} s a step, "
          f"ratio {found / wanted:.3f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    place = Runtime(given.device, given.precision, num_workers=0)
    print(f"torch {torch.__version__}, {place.device}, {'bf16' if place.autocast_dtype else 'fp32'}, "
          f"{given.threads} threads")  # fmt: skip
    for name in ("slca", "slcapp"):
        compare(name, given.batch, given.steps, given.rounds, place)
