"""What RanPAC, MOS, EASE, FeCAM and stored features save: python -m benchmarks.prototypes --threads 1

Each beside the straightforward form of its specification, in turn in one process; answers are compared, too.

ridge     RanPAC's choice among 17 ridges from 700 rows of 3,000 random features: one SVD, a solve each
solve     RanPAC's weights from the sums of all tasks: Cholesky, LU, and the inverse
correct   MOS's choice of an adapter, 64 images and 10 tasks: all at once, image by image
ease      EASE's features in 10 subspaces: one batch of replicas, a pass through the ViT each; and what an evaluation
          after the tenth task costs when the features of finished subspaces are stored
fecam     distances to 100 classes: factors kept, an inverse per class in every evaluation; and their memory
stored    a stream of 20 tasks on glyphs, SimpleCIL: evaluation and whole run, with features stored and without
step      a training step of APER, EASE, MOS and LAE over a bare step of timm's ViT with the same trainable parts

Random weights: times do not depend on them.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import SGD, Adam

from benchmarks.inflora import show, times
from benchmarks.raa import resident, vit
from data.stream import DataManager
from models.ease.learner import EASE
from models.factory import config_from
from models.fecam.metric import ClassMetrics, by_variance, moments, shrunk
from models.mos.refine import PREDICTIONS, refined
from models.parts.evaluation import evaluate
from models.parts.frozen_store import FrozenStore
from models.parts.loop import begin, learn
from models.ranpac.ridge import FITTED, RandomRidge, ridge_losses
from trainer import prepare
from utils.runtime import Runtime

SEED, CLASSES, TASKS = 0, 20, 10
STEPS: dict[str, dict[str, Any]] = {
    "aper": {"bottleneck": 64},
    "ease": {"bottleneck": 64},
    "mos": {"bottleneck": 64},
    "lae": {"pet": "lora", "freeze_epochs": 0, "drop_last": False},
}
RIDGES = [10.0**k for k in range(-8, 9)]


def ridge_by_solves(h: Tensor, labels: Tensor) -> Tensor:
    """A system of M equations per candidate."""
    targets = F.one_hot(labels).to(h.dtype)
    fitted = int(FITTED * len(h))
    gram, known = h[:fitted].mT @ h[:fitted], h[:fitted].mT @ targets[:fitted]
    eye = torch.eye(len(gram), dtype=h.dtype)
    weights = [torch.linalg.solve(gram + ridge * eye, known) for ridge in RIDGES]
    return torch.stack([(h[fitted:] @ weight - targets[fitted:]).square().mean() for weight in weights])


def measure_ridge(arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    centres = torch.randn(CLASSES, 768)
    labels = torch.arange(700) % CLASSES
    h = F.relu((centres[labels] + torch.randn(700, 768)).double() @ torch.randn(768, arguments.features).double())
    contenders = {"17 solves": lambda: ridge_by_solves(h, labels), "one SVD": lambda: ridge_losses(h, labels, RIDGES)}
    found = times(contenders, 1)
    show(f"ridge, M = {arguments.features}, n = 700", found, [("17 solves", "one SVD")])
    plain, ours = (contender() for contender in contenders.values())
    # Below, rounding of the singular Gram matrix decides what a solve finds.
    sound = torch.tensor(RIDGES) >= 1
    print(f"  losses of ridges from 1 on differ by {((plain - ours) / plain)[sound].abs().max():.0e} relative")


def measure_solve(arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    ridge = RandomRidge(64)
    ridge.draw(arguments.features, torch.Generator().manual_seed(SEED))
    ridge.grow(200)
    ridge.add(torch.randn(8000, 64), torch.arange(8000) % 200)
    system = ridge.gram + torch.eye(len(ridge.gram), dtype=torch.float64)
    contenders = {
        "inverse": lambda: (torch.linalg.inv(system) @ ridge.sums.mT).mT,
        "LU": lambda: torch.linalg.solve(system, ridge.sums.mT).mT,
        "Cholesky": lambda: ridge.solve(1.0),
    }
    show(
        f"solve, M = {arguments.features}, 200 classes",
        times(contenders, 2),
        [("LU", "Cholesky"), ("inverse", "Cholesky")],
    )


def by_image(features: Tensor, first: Tensor, weight: Tensor, bias: Tensor, owner: Tensor) -> Tensor:
    """MOS's rule for one image after another, each stopping where it settles."""
    found = []
    for row, start in zip(features, first, strict=True):
        task = owner[start.argmax()].item()
        for _ in range(PREDICTIONS):
            logits = F.linear(row[task][None], weight, bias)
            before, task = task, owner[logits.argmax()].item()
            if task == before:
                break
        found.append(logits[0])
    return torch.stack(found)


def measure_correct(arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    classes = 10 * TASKS
    features, first = torch.randn(64, TASKS, arguments.width), torch.randn(64, classes)
    weight, bias, owner = torch.randn(classes, arguments.width), torch.randn(classes), torch.arange(classes) // 10
    inputs = features, first, weight, bias, owner
    assert torch.allclose(by_image(*inputs), refined(*inputs), atol=1e-3)
    contenders = {"image by image": lambda: by_image(*inputs), "all at once": lambda: refined(*inputs)}
    show(f"correct, 64 images, {TASKS} tasks", times(contenders, 20), [("image by image", "all at once")])


def measure_ease(arguments: argparse.Namespace, folder: Path) -> None:
    learner = learner_of("ease", arguments, folder, bottleneck=64)[1]
    assert isinstance(learner, EASE)
    learner.eval()
    for _ in range(TASKS):
        for adapter in learner.adapters:
            nn.init.normal_(adapter.up_w, std=0.01)
            adapter.keep()
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    names = [str(index) for index in range(TASKS)]

    @torch.inference_mode()
    def apart() -> Tensor:
        """Each subspace with the whole ViT, as plain blocks with a hook would run it."""
        return torch.stack([plain_pass(learner, images, index) for index in range(TASKS)])

    @torch.inference_mode()
    def together() -> dict[str, Tensor]:
        return learner.frozen(images, names)

    @torch.inference_mode()
    def newest() -> dict[str, Tensor]:
        return learner.frozen(images, names[-1:])

    assert torch.allclose(apart(), torch.stack(list(together().values())), atol=1e-4)
    found = times({"a pass each": apart, "one batch": together, "the newest alone": newest}, arguments.repeats)
    # After task T the images of T - 1 tasks want one subspace more, those of the last one all.
    found["evaluation, a pass each"] = TASKS * found["a pass each"]
    found["evaluation, stored"] = (TASKS - 1) * found["the newest alone"] + found["one batch"]
    pairs = [("a pass each", "one batch"), ("evaluation, a pass each", "evaluation, stored")]
    show(f"ease, {TASKS} subspaces, {len(images)} images", found, pairs)


def plain_pass(learner: EASE, images: Tensor, index: int) -> Tensor:
    """Features (B, D) of subspace `index`: every token through every block."""
    backbone = learner.network.backbone
    x = backbone.embed(learner.network.normalise(images))
    for block in learner.network.blocks:
        x = x + block.attn(block.norm1(x))
        down_w, down_b, up_w, up_b = (tensor[index] for tensor in block.adapter.kept)
        adapted = F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)
        x = x + block.mlp(block.norm2(x)) + block.adapter.scale * adapted
    return backbone.pool(x)


def fecam_inputs(arguments: argparse.Namespace, images: int) -> tuple[ClassMetrics, Tensor, Tensor, Tensor]:
    """(metrics, R (C, D, D), mean (1, D), u (B, D)); one covariance stands for all classes."""
    torch.manual_seed(SEED)
    rows = F.normalize(torch.randn(2 * arguments.width, arguments.width), dim=1)
    _, means, covs = moments(rows, torch.zeros(len(rows), dtype=torch.int64))
    correlations = by_variance(shrunk(covs[0], 1.0, 0.0)).expand(arguments.fecam_classes, -1, -1)
    metrics = ClassMetrics(arguments.width)
    metrics.add(correlations, means.expand(arguments.fecam_classes, -1), full_rank=True)
    return metrics, correlations.float(), means.float(), F.normalize(torch.randn(images, arguments.width), dim=1)


def inverting(correlations: Tensor, mean: Tensor, u: Tensor) -> Tensor:
    """An inverse per class, and the diagonal of a product between all pairs of images: (B, C)."""
    offsets = u - mean
    return torch.stack([(offsets @ torch.linalg.pinv(one) @ offsets.mT).diagonal() for one in correlations], dim=1)


def fecam_memory(arguments: argparse.Namespace, ours: bool) -> float:
    """MiB that the distances of 4,096 images take beside their inputs at the highest, in a new process."""
    torch.set_num_threads(arguments.threads)
    arguments.fecam_classes = 5
    metrics, correlations, mean, u = fecam_inputs(arguments, 4096)
    metrics.distances(u[:2]), inverting(correlations, mean, u[:2])  # the libraries' own buffers are not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    metrics.distances(u) if ours else inverting(correlations, mean, u)
    return resident("VmHWM") - before


def measure_fecam(arguments: argparse.Namespace) -> None:
    metrics, correlations, mean, u = fecam_inputs(arguments, 256)
    assert torch.allclose(inverting(correlations, mean, u), metrics.distances(u), atol=1e-3)
    contenders = {
        "inverting": lambda: inverting(correlations, mean, u),
        "factors kept": lambda: metrics.distances(u),
    }
    show(f"fecam, {len(metrics)} classes, {len(u)} images", times(contenders, 1), [("inverting", "factors kept")])
    for name in contenders:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            memory = pool.submit(fecam_memory, arguments, name == "factors kept").result()
        print(f"  {name}, 5 classes, 4096 images: {memory:.0f} MiB at the highest")


def measure_stored(arguments: argparse.Namespace) -> None:
    """Process seconds of learning and evaluating 20 tasks, evaluations apart."""
    found: dict[str, float] = {}
    for name, limit in (("stored", 4e9), ("a pass per evaluation", 0.0)):
        values = {
            "model_name": "simplecil", "dataset": "glyphs", "increment": 5, "backbone": "small_vit",
            "normalize": "model", "num_workers": 0, "device": "cpu", "seed": 1993,
        }  # fmt: skip
        manager, learner = prepare(config_from(values, "benchmark"), Runtime("cpu", "fp32", num_workers=0))
        store, evaluating, started = FrozenStore(limit), 0.0, time.process_time()
        for task in manager:
            learn(learner, task)
            before = time.process_time()
            last = evaluate(learner, task.seen, store)
            evaluating += time.process_time() - before
        found[f"evaluation, {name}"], found[f"run, {name}"] = evaluating, time.process_time() - started
        print(f"  {name}: {last.main[0].sum() / last.images:.4f} right")
    pairs = [(f"{what}, a pass per evaluation", f"{what}, stored") for what in ("evaluation", "run")]
    show(f"stored, {len(manager)} tasks", found, pairs)


class BareAdapter(nn.Module):
    """A block with an adapter written by hand."""

    def __init__(self, block: Any, width: int, bottleneck: int):
        super().__init__()
        self.block, self.down, self.up = block, nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block.attn(self.block.norm1(x))
        adapted = self.up(F.dropout(F.relu(self.down(x)), 0.1, self.training))
        return x + self.block.mlp(self.block.norm2(x)) + 0.1 * adapted


class BareBranches(nn.Module):
    """A qkv with LAE's branches on key and value written by hand."""

    def __init__(self, qkv: nn.Linear, rank: int):
        super().__init__()
        self.qkv, width = qkv, qkv.in_features
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(2))
        self.scales = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        q, *kv = self.qkv(x).chunk(3, dim=-1)
        branches = zip(kv, self.scales, self.down, self.up, strict=True)
        return torch.cat([q, *(own + scale * up(down(x)) for own, scale, down, up in branches)], dim=-1)


def bare_step(arguments: argparse.Namespace, name: str, images: Tensor, targets: Tensor) -> Callable[[], object]:
    """timm's ViT with the same trainable parts."""
    model: Any = VisionTransformer(num_classes=CLASSES, **vit(arguments)).requires_grad_(False)
    if name == "lae":
        for block in list(model.blocks)[:5]:
            block.attn.qkv = BareBranches(block.attn.qkv, 5)
            block.attn.qkv.qkv.requires_grad_(False)
    else:
        model.blocks = nn.Sequential(*(BareAdapter(block, arguments.width, 64) for block in model.blocks))
    model.head.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adam(trained, lr=0.01) if name == "lae" else SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def our_step(learner: Any, images: Tensor, targets: Tensor) -> Callable[[], object]:
    """What `fit` does with one batch."""
    learner.train()
    optimizer, _ = learner.make_optimizer()
    labels = targets + learner.task.classes.start

    def step() -> None:
        optimizer.zero_grad()
        learner.loss(learner.network, *learner.prepare(images, labels)).backward()
        learner.after_backward()
        optimizer.step()
        learner.after_step(images, labels)

    return step


def measure_step(arguments: argparse.Namespace, folder: Path) -> None:
    """In the second task, where MOS merges and LAE's copy follows; APER trains in the first."""
    torch.manual_seed(SEED)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    targets = torch.randint(0, CLASSES, (arguments.batch,))
    for name, keys in STEPS.items():
        manager, learner = learner_of(name, arguments, folder, **keys)
        for task in manager[: 1 if name == "aper" else 2]:
            begin(learner, task)
            if name in ("ease", "mos") and task.index == 0:
                for adapter in learner.adapters:
                    adapter.keep()
        contenders = {"bare": bare_step(arguments, name, images, targets), name: our_step(learner, images, targets)}
        show(f"step, batch {arguments.batch}", times(contenders, arguments.repeats), [(name, "bare")])


def learner_of(name: str, arguments: argparse.Namespace, folder: Path, **keys: Any) -> tuple[DataManager, Any]:
    data = folder / "stream.npz"
    if not data.is_file():
        labels = np.arange(2 * CLASSES)
        pixels = np.random.RandomState(SEED).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
        np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    values = {
        "model_name": name, "dataset": f"npz:{data}", "increment": CLASSES, "shuffle": False, "weights": "random",
        "backbone": {"name": "vit", **vit(arguments)}, "num_workers": 0, "image_size": arguments.size, **keys,
    }  # fmt: skip
    return prepare(config_from(values, "benchmark"), Runtime("cpu", "fp32", num_workers=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("ridge", "solve", "correct", "ease", "fecam", "stored", "step")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", type=int, default=3000, help="M, random features")
    parser.add_argument("--fecam-classes", type=int, default=100)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads", flush=True)
    with TemporaryDirectory() as folder:
        for part in arguments.parts:
            measure = globals()[f"measure_{part}"]
            measure(arguments, Path(folder)) if part in ("ease", "step") else measure(arguments)


if __name__ == "__main__":
    main()
