"""What `fit` costs over a bare PyTorch loop: same model, batches, optimiser, thread count, in one run.

    python -m benchmarks.overhead --threads 1

Prints, for the small ViT and for ViT-B/16 at 224 px, the median over rounds of (fit's epoch) / (bare epoch); the two
alternate, so that a drifting machine slows both. On a CPU processor seconds are compared, which other programs disturb
less; with several threads they hold waiting too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.loading import EpochLoader
from data.stream import DataManager
from models.factory import build_learner, config_from
from models.parts.loop import begin, fit
from utils.runtime import Runtime
from utils.seed import mix

CASES = {
    # name: (backbone, pixels a side, batch, images an epoch on CPU, on CUDA)
    "small ViT": ("small_vit", 32, 32, 1024, 8192),
    "ViT-B/16": ({"name": "vit_base_patch16_224"}, 224, 4, 12, 1024),
}


def setup(case: str, folder: Path, device: str):
    backbone, size, batch, cpu_images, cuda_images = CASES[case]
    images = cpu_images if device == "cpu" else cuda_images
    rng = np.random.RandomState(0)
    labels = np.arange(images) % 4
    pixels = rng.randint(0, 256, (images, size, size, 3), dtype=np.uint8)
    np.savez(folder / "stream.npz", x_train=pixels, y_train=labels, x_test=pixels[:4], y_test=labels[:4])
    values = {
        "model_name": "finetune", "dataset": f"npz:{folder / 'stream.npz'}", "increment": 4, "backbone": backbone,
        "epochs": 1, "batch_size": batch, "lrate": 1e-3, "scheduler": "constant", "num_workers": 0, "device": device,
    } | ({} if backbone == "small_vit" else {"weights": "random"})  # fmt: skip
    config = config_from(values, "benchmark")
    task = DataManager(config, size)[0]
    learner = build_learner(config, Runtime(device, "auto", num_workers=0), task.info)
    begin(learner, task)
    return learner, task


def bare_epoch(learner, task) -> None:
    """The loop that one would write by hand, reading the loss once an epoch."""
    runtime, network = learner.runtime, learner.network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=runtime.device.type == "cuda"
    )
    total = torch.zeros((), device=runtime.device)
    batches = EpochLoader(task.train.view("train"), learner.config.batch_size, runtime, mix(1993, 0)).epoch(0, 0)
    for images, targets, _, _ in batches:
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {options.rounds} rounds")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            learner, task = setup(case, Path(folder), options.device)
        seconds: dict[str, list[float]] = {"bare": [], "fit": []}
        for turn in range(options.rounds + 1):
            # Which goes first alternates too: the second finds warmer caches.
            for name in ("bare", "fit") if turn % 2 else ("fit", "bare"):
                started = clock()
                bare_epoch(learner, task) if name == "bare" else fit(learner, task)
                seconds[name].append(clock() - started)
        pairs = [mine / bare for mine, bare in zip(seconds["fit"][1:], seconds["bare"][1:], strict=True)]
        print(
            f"{case:>10}: bare epoch {statistics.median(seconds['bare'][1:]):.2f} s, fit / bare "
            f"{statistics.median(pairs):.3f} (min {min(pairs):.3f}, max {max(pairs):.3f})"
        )


if __name__ == "__main__":
    main()
