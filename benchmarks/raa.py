"""RAA's costs as ratios, each pair measured in turn in one process: python -m benchmarks.raa --threads 1

step      training step with SAM+ in the first task (both branches train) and in a later one (branch 0 frozen), against
          the straightforward form of the method: all replicas through the whole network in both passes, attention as
          two products and a softmax, adapters branch by branch, the loss row by row, SAM+ tensor by tensor on the host
sam       the arithmetic of SAM+ beside its two passes, over a step
shift     the means of 90 classes moved by 5,000 images at D = 768, time and memory, against the form that subtracts
          every pair
The alignment is that of SLCA: python -m benchmarks.alignment

Random weights: times do not depend on them. --precision bf16 measures the step under autocast; --width, --depth, --size
make it small.
"""

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.inflora import show, times
from models.factory import config_from
from models.parts.optim import SAM
from models.raa.learner import RAA
from models.raa.shift import FLOOR, mean_shift
from trainer import prepare
from utils.runtime import Runtime

CLASSES, BRANCHES, BOTTLENECK, SCALE, SEED = 20, 2, 64, 20.0, 0
RHO, DAMPING, SIGMA = 0.1, 25.0, 4.0


class Straightforward(nn.Module):
    """Replicas, adapters and loss as the method is usually written down."""

    def __init__(self, vit: VisionTransformer, frozen: int):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        width = vit.embed_dim
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for _ in vit.blocks:
            self.down.append(nn.ModuleList(nn.Linear(width, BOTTLENECK) for _ in range(BRANCHES)))
            self.up.append(nn.ModuleList(nn.Linear(BOTTLENECK, width) for _ in range(BRANCHES)))
        for layers in (*self.down, *self.up):
            for layer in list(layers)[:frozen]:
                layer.requires_grad_(False)
        # The head's old columns are there from the second task on.
        self.head = nn.Parameter(0.02 * torch.randn(CLASSES * (1 + frozen), width))

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images.repeat(BRANCHES + 1, 1, 1, 1)))
        for number, block in enumerate(self.vit.blocks):
            x1 = x + self.attention(block.attn, block.norm1(x))
            x = x1 + block.mlp(block.norm2(x1)) + self.adapters(number, x1)
        features = self.vit.norm(x)[:, 0]
        return F.linear(F.normalize(features, dim=1), F.normalize(self.head, dim=1))[:, -CLASSES:]

    @staticmethod
    def attention(attn: Any, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = attn.num_heads
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (width // heads) ** -0.5).softmax(dim=-1)
        return attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))

    def adapters(self, number: int, x1: Tensor) -> Tensor:
        alpha = torch.rand(BRANCHES)
        alpha = alpha / alpha.sum()
        replicas = x1.chunk(BRANCHES + 1)
        outputs = []
        for down, up, tokens in zip(self.down[number], self.up[number], replicas[:BRANCHES], strict=True):
            outputs.append(0.1 * up(F.dropout(F.relu(down(tokens)), 0.1)))
        mixed = torch.stack([weight * output for weight, output in zip(alpha, outputs, strict=True)]).sum(dim=0)
        return torch.cat([*outputs, mixed])


def loss_by_rows(cosines: Tensor, targets: Tensor) -> Tensor:
    """CosFace as a ratio of exponentials, row after row."""
    losses = []
    for row, target in enumerate(targets):
        true = torch.exp(SCALE * cosines[row, target])
        others = torch.cat([cosines[row, :target], cosines[row, target + 1 :]])
        losses.append(-torch.log(true / (true + torch.exp(SCALE * others).sum())))
    return torch.stack(losses).mean()


class HostSAM:
    """SAM+ tensor by tensor: a perturbation for every weight, frozen ones too, cosines on the host."""

    def __init__(self, model: nn.Module, lrate: float, decay: float, momentum: float):
        self.parameters, self.lrate, self.decay, self.momentum = list(model.parameters()), lrate, decay, momentum
        self.velocity: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], None]) -> None:
        with torch.enable_grad():
            closure()
        trained = [p for p in self.parameters if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()  # type: ignore[union-attr]
        eps = {}
        for number, p in enumerate(self.parameters):
            eps[number] = torch.zeros_like(p) if p.grad is None else RHO * p.grad / (norm + 1e-16)
            if p.grad is not None:
                p.add_(eps[number])
        with torch.enable_grad():
            closure()
        for number, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            p.sub_(eps[number])
            d = p.grad + self.decay * p
            v = self.velocity[number] = d + self.momentum * self.velocity.get(number, torch.zeros_like(d))
            cosine = F.cosine_similarity(100 * v.cpu().flatten(), 100 * eps[number].cpu().flatten(), dim=0).item()
            p.sub_(self.lrate * min(1.0, DAMPING * (1 - math.exp(cosine - 1))) * v)


def straightforward_step(arguments: argparse.Namespace, runtime: Runtime, frozen: int) -> Callable[[], object]:
    images, targets = batch(arguments, runtime)
    torch.manual_seed(SEED)
    model = Straightforward(VisionTransformer(num_classes=0, **vit(arguments)), frozen).to(runtime.device)
    optimizer = HostSAM(model, 0.01, 5e-4, 0.9)
    rows = BRANCHES * len(targets)

    def closure() -> None:
        for p in optimizer.parameters:
            p.grad = None
        with runtime.autocast():
            cosines = model(images)
        cosines = cosines.float()
        branches = loss_by_rows(cosines[:rows], targets.repeat(BRANCHES))
        (2 * branches + loss_by_rows(cosines[rows:], targets)).backward()

    return lambda: optimizer.step(closure)


def learner_in_task(arguments: argparse.Namespace, folder: Path, runtime: Runtime, number: int) -> RAA:
    """The learner as it stands before training in task `number` (0 or 1)."""
    data = folder / "stream.npz"
    if not data.is_file():
        labels = np.arange(2 * CLASSES)
        pixels = np.random.RandomState(SEED).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
        np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    values = {
        "model_name": "raa", "dataset": f"npz:{data}", "increment": CLASSES, "shuffle": False, "branches": BRANCHES,
        "backbone": {"name": "vit", **vit(arguments)}, "weights": "random", "num_workers": 0,
        "image_size": arguments.size, "bottleneck": BOTTLENECK, "sam": {"rho": RHO, "damping": DAMPING},
    }  # fmt: skip
    manager, learner = prepare(config_from(values, "benchmark"), runtime)
    assert isinstance(learner, RAA)
    for task in manager[: number + 1]:
        learner.task = task.info
        learner.network.head.grow(task.total_classes)
    learner.stage = learner.stages(manager[number])[0]
    for adapter in learner.adapters:
        adapter.freeze(number)
    return learner


def learner_step(learner: RAA, images: Tensor, targets: Tensor) -> Callable[[], object]:
    """What `fit` does with one batch."""
    learner.train()
    optimizer, _ = learner.make_optimizer()
    labels = targets + learner.task.classes.start

    def closure(inputs: Any, wanted: Tensor) -> Tensor:
        optimizer.zero_grad()
        with learner.runtime.autocast():
            loss = learner.loss(learner.network, inputs, wanted)
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(partial(closure, *learner.prepare(images, labels)))  # type: ignore[arg-type]


def measure_steps(arguments: argparse.Namespace, folder: Path) -> None:
    """Every contender in turn, in both precisions: ratios of one run."""
    steps = {}
    for precision in arguments.precision:
        runtime = Runtime(arguments.device, precision)
        images, targets = batch(arguments, runtime)
        for number, when in enumerate(("first", "later")):
            steps[f"{when}, {precision}"] = learner_step(
                learner_in_task(arguments, folder, runtime, number), images, targets
            )
            steps[f"{when}, {precision}, straightforward"] = straightforward_step(arguments, runtime, number)
    found = times(steps, arguments.repeats)
    pairs = [(f"{name}, straightforward", name) for name in found if not name.endswith("straightforward")]
    if len(arguments.precision) == 2:
        pairs += [(f"{when}, fp32, straightforward", f"{when}, bf16") for when in ("first", "later")]
    show("step", found, pairs)


def measure_sam(arguments: argparse.Namespace, folder: Path) -> None:
    """The optimisers with gradients that are there already, over the learner's step."""
    runtime = Runtime(arguments.device, "fp32")
    images, targets = batch(arguments, runtime)
    learner = learner_in_task(arguments, folder, runtime, 0)
    step = learner_step(learner, images, targets)
    groups = learner.param_groups()
    parameters = [p for entry in groups for p in entry["params"]]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    plain, inner = (SGD([dict(entry) for entry in groups], lr=1e-6, momentum=0.9) for _ in range(2))
    sam, passes = SAM(inner, RHO, DAMPING), [0]
    no_loss = torch.zeros((), device=runtime.device)

    def closure() -> Tensor:
        passes[0] += 1
        for p, gradient in zip(parameters, gradients[passes[0] % 2], strict=True):
            p.grad = gradient
        return no_loss

    def plain_step() -> None:
        closure()
        plain.step()

    found = times({"SGD": plain_step, "SAM+": lambda: sam.step(closure)}, 5 * arguments.repeats)
    found |= times({"step": step}, arguments.repeats)
    found["SAM+ beside its passes"] = found["SAM+"] - found["SGD"]
    show("SAM+", found, [("SAM+ beside its passes", "step")])


def pairwise_shift(means: Tensor, before: Tensor, after: Tensor, sigma: float) -> Tensor:
    distances = (before[None].double() - means[:, None]).square().sum(dim=2)
    weights = torch.exp(-distances / (2 * sigma**2)) + FLOOR
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights[:, :, None] * (after.double() - before)[None]).sum(dim=1)


def shift_inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(SEED)
    before = torch.randn(arguments.images, arguments.width)
    return torch.randn(arguments.old_classes, arguments.width).double(), before, before + 0.1 * torch.randn_like(before)


def shift_memory(arguments: argparse.Namespace) -> float:
    """MiB that the shift takes beside its inputs at its highest (Linux: the peak is reset first). For a new process:
    one that has freed memory takes it from there, unseen."""
    torch.set_num_threads(arguments.threads)
    inputs = shift_inputs(arguments)
    mean_shift(*(rows[:2] for rows in inputs), SIGMA)  # the libraries' own buffers are not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    mean_shift(*inputs, SIGMA)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """VmRSS, or its peak VmHWM, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def measure_shift(arguments: argparse.Namespace) -> None:
    inputs = shift_inputs(arguments)
    found = times(
        {"every pair": lambda: pairwise_shift(*inputs, SIGMA), "ours": lambda: mean_shift(*inputs, SIGMA)},
        min(2, arguments.repeats),
    )
    show(f"shift, {arguments.old_classes} classes x {arguments.images} images", found, [("every pair", "ours")])
    difference = (pairwise_shift(*inputs, SIGMA) - mean_shift(*inputs, SIGMA)).abs().max()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        memory = pool.submit(shift_memory, arguments).result()
    print(f"  largest difference {difference:.1e}; ours takes {memory:.0f} MiB beside its inputs")


def vit(arguments: argparse.Namespace) -> dict[str, int]:
    heads = max(1, arguments.width // 64)
    return {
        "img_size": arguments.size, "patch_size": 16, "embed_dim": arguments.width, "depth": arguments.depth,
        "num_heads": heads,
    }  # fmt: skip


def batch(arguments: argparse.Namespace, runtime: Runtime) -> tuple[Tensor, Tensor]:
    torch.manual_seed(SEED)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    return images.to(runtime.device), torch.randint(0, CLASSES, (arguments.batch,)).to(runtime.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("step", "sam", "shift")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--old-classes", type=int, default=90)
    parser.add_argument("--images", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}", flush=True)
    with TemporaryDirectory() as folder:
        if "step" in arguments.parts:
            measure_steps(arguments, Path(folder))
        if "sam" in arguments.parts:
            measure_sam(arguments, Path(folder))
    if "shift" in arguments.parts:
        measure_shift(arguments)


if __name__ == "__main__":
    main()
