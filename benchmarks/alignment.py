"""python -m benchmarks.alignment: what SLCA computes outside training, against the straightforward form.

Alignment    100 classes, width 768, 5 epochs, 256 draws a class: a distribution object per class and epoch, one module
             per head, the loss read at every step; against factors made once, one product per epoch, stacked heads.
             Both get the same draws.
Statistics   10 classes x 500 images: one pass over the features of a task, against one loader and pass per class.
LoRA start   the full SVD of every matrix that the reference wraps (qkv, fc1, fc2 of 12 blocks); against the leading
             eigenvectors of the smaller Gram matrix, of the same matrices and of qkv alone (our default).
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from convs.lora import right_singular_vectors
from data.loading import View, for_each_batch
from data.sources import Split
from data.transforms import Transform
from models.parts.alignment import AlignmentSettings, Draws, align, mean_decay
from models.parts.gaussians import ClassGaussians
from utils.runtime import Runtime

TAU, LRATE, DECAY = 0.1, 0.01, 5e-4


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def straightforward_alignment(
    heads: nn.ModuleList,
    means: Tensor,
    covs: Tensor,
    factor: Tensor,
    settings: AlignmentSettings,
    order: Callable[[int], Tensor],
) -> None:
    """One stage as it is usually written; draws from torch's generator class by class."""
    optimizer = torch.optim.SGD(heads.parameters(), LRATE, momentum=0.9, weight_decay=DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    count = settings.samples
    for epoch in range(settings.epochs):
        inputs, targets = [], []
        for label, (mean, cov) in enumerate(zip(means, covs, strict=True)):
            distribution = MultivariateNormal((mean * factor[label]).float(), cov)
            inputs.append(distribution.sample((count,)))
            targets += [label] * count
        rows, labels, permutation = torch.cat(inputs), torch.tensor(targets), order(epoch)
        rows, labels = rows[permutation], labels[permutation]
        for step in range(len(means)):
            batch = slice(step * count, (step + 1) * count)
            parts = [head(rows[batch]) for head in heads]
            norm = torch.stack([part.norm(dim=1, keepdim=True) + 1e-7 for part in parts]).mean(dim=0)
            loss = F.cross_entropy(torch.cat(parts, dim=1) / norm / settings.tau, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        scheduler.step()


def alignment(classes: int, width: int, epochs: int) -> None:
    settings = AlignmentSettings(epochs=epochs, lrate=LRATE, weight_decay=DECAY, tau=TAU)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    features = torch.randn(classes, 3 * width, width, generator=generator) @ mixing
    labels = torch.arange(classes).repeat_interleave(3 * width)
    features = features.flatten(0, 1) + torch.randn(classes, width, generator=generator)[labels]
    gaussians = ClassGaussians(width)
    gaussians.add(features, labels, task=0)
    sizes = [10] * (classes // 10)
    factor = mean_decay(torch.arange(classes) // 10, len(sizes) - 1)
    heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
    weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
    orders = [torch.randperm(classes * settings.samples, generator=generator) for _ in range(epochs)]
    covs = gaussians.dense_covariances()

    def same_draws(epoch: int) -> Draws:
        """What torch's generator gives the distribution objects."""
        draws = [torch.randn(settings.samples, width) for _ in range(classes)]
        return Draws(torch.stack(draws), torch.empty(0), orders[epoch])

    def run(**keys):
        return align(weight, bias, sizes, gaussians, settings, mean_factor=factor, **keys)

    torch.manual_seed(1)
    ours, aligned = timed(lambda: run(draws=same_draws))
    fresh, _ = timed(lambda: run(generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(1)
    means = gaussians.means
    theirs, _ = timed(
        lambda: straightforward_alignment(heads, means, covs, factor, settings, lambda epoch: orders[epoch])
    )
    difference = (torch.cat([head.weight for head in heads]) - aligned.weight).abs().max()
    print(f"alignment    {classes} classes, width {width}, {epochs} epochs: straightforward {theirs:.2f} s, "
          f"ours {fresh:.2f} s, {theirs / fresh:.1f} times faster; with the same draws {ours:.2f} s, "
          f"largest difference of a weight {difference:.1e}")  # fmt: skip


def statistics(classes: int, count: int, width: int) -> None:
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, size=(classes * count, 32, 32, 3)).astype(np.uint8)
    labels = np.repeat(np.arange(classes), count)
    runtime = Runtime("cpu", "fp32", num_workers=0)
    project = torch.randn(3 * 32 * 32, width)
    calls = {"passes": 0, "images": 0}

    def features(batch: Tensor) -> Tensor:
        calls["images"] += len(batch)
        return batch.flatten(1) @ project

    def view(rows: np.ndarray) -> View:
        calls["passes"] += 1
        return View(Split(images, labels), rows, labels[rows], Transform("none", 32))

    def one_pass() -> ClassGaussians:
        gaussians = ClassGaussians(width)
        gaussians.measure(features, view(np.arange(len(labels))), 0, runtime, 256)
        return gaussians

    def pass_per_class() -> Tensor:
        """A loader with four fresh worker processes for each class, as it is usually written."""
        covs = []
        for label in range(classes):
            found: list[Tensor] = []
            fresh = Runtime("cpu", "fp32", num_workers=4)
            chosen = view(np.flatnonzero(labels == label))
            for_each_batch(chosen, lambda x, _, found=found: found.append(features(x)), fresh, 64)
            covs.append(torch.cov(torch.cat(found).double().T) + 1e-4 * torch.eye(width))
        return torch.stack(covs).float()

    ours, gaussians = timed(one_pass)
    passes, seen = calls["passes"], calls["images"]
    theirs, covs = timed(pass_per_class)
    difference = (gaussians.dense_covariances() - covs).abs().max() / covs.abs().max()
    print(f"statistics   {classes} classes x {count} images, width {width}: {passes} pass over {seen} images, "
          f"{ours:.2f} s, factors included; a loader per class {theirs:.2f} s without them; relative difference "
          f"{difference:.1e}")  # fmt: skip


def lora_start(depth: int, width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (3 * width, width), "fc1": (4 * width, width), "fc2": (width, 4 * width)}
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours = {name: timed(lambda w=w: right_singular_vectors(w, rank))[0] * depth for name, w in weights.items()}
    theirs = {name: timed(lambda w=w: torch.linalg.svd(w))[0] * depth for name, w in weights.items()}
    every = sum(theirs.values())
    print(f"LoRA start   {depth} blocks, width {width}, one block measured: full SVD of qkv, fc1, fc2 {every:.1f} s; "
          f"ours {sum(ours.values()):.1f} s for the same, {every / sum(ours.values()):.1f} times faster, and "
          f"{ours['qkv']:.1f} s for qkv alone, {every / ours['qkv']:.1f} times faster than all, "
          f"{theirs['qkv'] / ours['qkv']:.1f} than qkv's")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", message=".*worker processes")  # four are what the usual form asks for
    print(f"torch {torch.__version__}, {given.threads} threads")
    alignment(given.classes, given.width, given.epochs)
    statistics(10, 500, given.width)
    lora_start(12, given.width, 4)
