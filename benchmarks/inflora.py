"""InfLoRA's costs as ratios, each pair measured in turn in one process: python -m benchmarks.inflora --threads 1

step     training step of the learner in tasks 1, 10 and 50, and a bare step: timm's ViT with a rank-10 branch on key
         and value written by hand, Adam, the same batch
moments  pass that sums the input moments of all layers, over a plain forward pass
memory   memory update and branch design of 12 layers at D = 768, against the form that decomposes every matrix by SVD
         (of C for its energy, of Q C for the directions), both in float64

Random weights: times do not depend on them. --precision bf16 measures the step under autocast.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.stream import Task
from models.factory import config_from
from models.inflora.kv_lora import InputMoments
from models.inflora.learner import InfLoRA
from models.inflora.subspace import DualGPM
from trainer import prepare
from utils.runtime import Runtime

VIT = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
RANK, CLASSES, SEED = 10, 10, 0


def times(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least seconds of each, measured in turn: what else the machine does only adds, and falls on all alike.

    Processor seconds where there is no GPU, so that waiting for a core does not count.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            _synchronise()
            started = clock()
            run()
            _synchronise()
            if turn:  # the first one warms up
                found[name].append(clock() - started)
    return {name: min(values) for name, values in found.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class HandWritten(nn.Module):
    """Key and value branch as one would write it down: qkv plus two products."""

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        width = qkv.in_features
        self.qkv = qkv
        self.reduction = nn.Parameter(torch.randn(RANK, width) / width**0.5, requires_grad=False)
        self.key, self.value = (nn.Parameter(torch.zeros(width, RANK)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        reduced = F.linear(tokens, self.reduction)
        return torch.cat([q, k + F.linear(reduced, self.key), v + F.linear(reduced, self.value)], dim=-1)


def bare_step(runtime: Runtime, images: Tensor, targets: Tensor) -> Callable[[], object]:
    model = VisionTransformer(num_classes=CLASSES, **VIT).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = HandWritten(block.attn.qkv)
        block.attn.qkv.key.requires_grad_()
        block.attn.qkv.value.requires_grad_()
    model.head.requires_grad_()
    model.to(runtime.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()

    return step


def learner_in_task(folder: Path, runtime: Runtime, number: int) -> tuple[InfLoRA, Task]:
    """The learner as it stands after before_task of task `number` (1-based), earlier tasks folded in."""
    data = folder / "stream.npz"
    if not data.is_file():
        labels = np.arange(50 * CLASSES)
        pixels = np.random.RandomState(SEED).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
        np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    values = {
        "model_name": "inflora", "dataset": f"npz:{data}", "increment": CLASSES, "shuffle": False, "rank": RANK,
        "backbone": {"name": "vit", **VIT}, "weights": "random", "num_workers": 0, "image_size": 224,
    }  # fmt: skip
    manager, learner = prepare(config_from(values, "benchmark"), runtime)
    assert isinstance(learner, InfLoRA)
    for task in manager[:number]:
        learner.task = task.info
        learner.network.head.grow(task.total_classes)
        for layer in learner.layers:
            layer.fold()
            layer.start(torch.randn_like(layer.A) / VIT["embed_dim"] ** 0.5)
            layer.B.data.normal_(std=1e-3)
    learner.stage = learner.stages(manager[number - 1])[0]
    return learner, manager[number - 1]


def learner_step(learner: InfLoRA, task: Task, images: Tensor, targets: Tensor) -> Callable[[], object]:
    """What `fit` does with one batch."""
    learner.train()
    optimizer, _ = learner.make_optimizer()
    net = learner.runtime.wrap(learner.network)
    labels = targets + task.classes.start

    def closure(inputs: Tensor, wanted: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with learner.runtime.autocast():
            loss = learner.loss(net, inputs, wanted)
        loss.backward()
        learner.after_backward()
        return loss.detach()

    return lambda: optimizer.step(partial(closure, *learner.prepare(images, labels)))  # type: ignore[arg-type]


def measure_steps(arguments: argparse.Namespace, folder: Path, runtime: Runtime) -> float:
    """Seconds of the learner's step in task 1."""
    images, targets = batch(arguments, runtime)
    steps = {"bare": bare_step(runtime, images, targets)}
    for number in (1, 10, 50):
        steps[f"task {number}"] = learner_step(*learner_in_task(folder, runtime, number), images, targets)
    found = times(steps, arguments.repeats)
    precision = "bf16" if runtime.autocast_dtype else "fp32"
    show(f"step, {precision}", found, [("task 1", "bare"), ("task 10", "task 1"), ("task 50", "task 1")])
    return found["task 1"]


def measure_moments(arguments: argparse.Namespace, folder: Path, runtime: Runtime) -> None:
    images, _ = batch(arguments, runtime)
    learner, _ = learner_in_task(folder, runtime, 1)
    learner.eval()
    moments = InputMoments(learner.layers)
    with torch.no_grad(), runtime.autocast():
        found = times(
            {
                "forward": lambda: learner.network.features(images),
                "moments": lambda: moments.add(learner.network.features, images),
            },
            2 * arguments.repeats,
        )
    show("moment pass", found, [("moments", "forward")])


def by_svd_first(moments: Tensor, share: float) -> list[Tensor]:
    bases = []
    for matrix in moments:
        left, values, _ = torch.linalg.svd(matrix)
        kept = (values.square().cumsum(0) / values.square().sum() < share).sum()
        bases.append(left[:, : max(1, int(kept))])
    return bases


def by_svd_later(moments: Tensor, bases: list[Tensor], share: float) -> list[Tensor]:
    grown = []
    for matrix, basis in zip(moments, bases, strict=True):
        total = torch.linalg.svd(matrix).S.square().sum()
        left, values, _ = torch.linalg.svd(matrix - basis @ (basis.T @ matrix))
        kept = 1 - values.square().flip(0).cumsum(0).flip(0) / total
        grown.append(torch.cat([basis, left[:, : int((kept < share).sum())]], dim=1))
    return grown


def by_svd_design(moments: Tensor, bases: list[Tensor]) -> list[Tensor]:
    pairs = zip(moments, bases, strict=True)
    return [torch.linalg.svd(matrix - basis @ (basis.T @ matrix)).U[:, :RANK].T for matrix, basis in pairs]


def measure_memory(arguments: argparse.Namespace, runtime: Runtime) -> None:
    """A spectrum falling as 0.97^i, other directions in the second task."""
    width, layers, share = VIT["embed_dim"], VIT["depth"], 0.95
    generator = torch.Generator(runtime.device).manual_seed(SEED)
    make = partial(torch.randn, layers, width, width, generator=generator, device=runtime.device, dtype=torch.float64)
    spectrum = 0.97 ** torch.arange(width, device=runtime.device, dtype=torch.float64)
    first, second = (q * spectrum @ q.mT for q in (torch.linalg.qr(make()).Q, torch.linalg.qr(make()).Q))
    bases = by_svd_first(first, share)
    memory = DualGPM(layers, width, share, share).to(runtime.device)
    memory.update(first, 0, 2)
    state = {name: value.clone() for name, value in memory.state_dict().items()}

    def later() -> None:
        memory.load_state_dict(state)
        memory.update(second, 1, 2)

    def design() -> None:
        memory.load_state_dict(state)
        memory.design(second, RANK)

    found = times(
        {
            "first, SVD": lambda: by_svd_first(first, share),
            "first, ours": lambda: DualGPM(layers, width, share, share).to(runtime.device).update(first, 0, 2),
            "later, SVD": lambda: by_svd_later(second, bases, share),
            "later, ours": later,
            "design, SVD": lambda: by_svd_design(second, bases),
            "design, ours": design,
        },
        arguments.repeats,
    )
    show("memory", found, [(f"{stage}, SVD", f"{stage}, ours") for stage in ("first", "later", "design")])


def batch(arguments: argparse.Namespace, runtime: Runtime) -> tuple[Tensor, Tensor]:
    torch.manual_seed(SEED)
    images, targets = torch.rand(arguments.batch, 3, 224, 224), torch.randint(0, CLASSES, (arguments.batch,))
    return images.to(runtime.device), targets.to(runtime.device)


def show(title: str, seconds: Mapping[str, float], pairs: list[tuple[str, str]]) -> None:
    print(title, "; ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), sep=": ", flush=True)
    for above, below in pairs:
        print(f"  {above} / {below}: {seconds[above] / seconds[below]:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("step", "moments", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}")
    with TemporaryDirectory() as folder:
        steps = {
            precision: measure_steps(arguments, Path(folder), Runtime(arguments.device, precision))
            for precision in (arguments.precision if "step" in arguments.parts else ())
        }
        if len(steps) == 2:
            show("step in task 1", steps, [("fp32", "bf16")])
        if "moments" in arguments.parts:
            measure_moments(arguments, Path(folder), Runtime(arguments.device, "fp32"))
    if "memory" in arguments.parts:
        measure_memory(arguments, Runtime(arguments.device, "fp32"))


if __name__ == "__main__":
    main()
