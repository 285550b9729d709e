"""GEM (Lopez-Paz & Ranzato, 2017, "Gradient episodic memory"), as class-incremental learning uses it.

The exemplars of a past task k train nothing; they say in which directions a step may go. With g the gradient of the
batch, M (T, P) those of the T past tasks and P the number of weights:

    g~ = argmin |g - x|^2  with  M x >= 0     = g + M^T v,    v = argmin_{v >= margin} v^T (M M^T) v / 2 + (M g)^T v

Every loss sees the logits of its own task alone. Only M M^T (T, T) and M g (T,) leave the device: the solver is
quadprog, in float64, and M^T v is formed where M lies.
"""

import logging
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.loading import View, pass_over
from data.stream import Task
from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig
from models.parts.losses import slice_cross_entropy
from models.rehearsal import Rehearsal
from utils.config import Rate
from utils.errors import UserError
from utils.keys import key
from utils.seed import mix

log = logging.getLogger(__name__)

TOLERANCE = 0.01  # how far a constraint may be missed, over the largest of |M g|, before the exact solver is asked
COLUMNS_AT_ONCE = 1 << 22  # of M, when products are summed in float64


@LEARNERS.register("gem")
class GEM(Rehearsal):
    """Trains on new images alone, in directions that hurt no past task; stores exemplars."""

    class Config(RehearsalConfig):
        gem_margin: Rate = key(0.0, "the least weight of every past task's gradient in a corrected step")
        gem_eps: Rate = key(1e-3, "added to the diagonal of the past gradients' products, over its mean")

    example = {"exemplars": {"total": 12}}
    waits = {"models/gem.py": "the quadratic program of past tasks is solved on the host: T x T numbers a step"}
    transient = {"_memories", "_past"}

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        self._remember()
        self._memories: list[tuple[Tensor, Tensor, range]] | None = None  # images, labels and classes of each past task
        self._past: Tensor | None = None  # M

    def train_data(self, task: Task) -> View:
        """The task's images alone: past ones enter by their gradients."""
        return task.train.view("train")

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """M at the weights of this step, before the batch: BatchNorm meets past tasks first."""
        if self.task.index > 0:
            self._past = self._past_gradients()
        return images, targets

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return slice_cross_entropy(net(inputs), targets, self.task.classes)

    def after_backward(self) -> None:
        if self._past is None:
            return
        moved = self._moved()
        gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in moved])
        projected = project(gradient, self._past, self.config.gem_margin, self.config.gem_eps)
        for parameter, part in zip(moved, projected.split([p.numel() for p in moved]), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))

    def _moved(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _past_gradients(self) -> Tensor:
        """(T, P)."""
        if self._memories is None:
            self._memories = self._read_memories()
        moved, rows = self._moved(), []
        for images, labels, classes in self._memories:
            with torch.enable_grad(), self.runtime.autocast():
                loss = slice_cross_entropy(self.network(images), labels, classes)
                grads = torch.autograd.grad(loss, moved, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows)

    def _read_memories(self) -> list[tuple[Tensor, Tensor, range]]:
        """The exemplars of each past task in one batch, augmented once for the whole task; all in every process."""
        assert self.data is not None
        kept, memories, first = self.exemplars.data(self.data), [], 0
        size, seed = self.config.test_batch_size, mix(self.config.seeds[0], self.task.index)
        for count in self.task.sizes[: self.task.index]:
            classes = range(first, first + count)
            view = kept.take(np.flatnonzero(np.isin(kept.labels, classes))).view("train")
            images, labels, _ = zip(*pass_over(view, np.arange(len(view)), self.runtime, size, seed), strict=True)
            memories.append((torch.cat(images), torch.cat(labels), classes))
            first += count
        return memories


def project(gradient: Tensor, past: Tensor, margin: float = 0.0, eps: float = 0.0) -> Tensor:
    """g (P,), M (T, P) -> g~ (P,); g itself, where it violates nothing.

    eps: added to the diagonal of M M^T, over its mean.
    """
    linear = (past @ gradient).double().cpu().numpy()
    if (linear >= 0).all():
        return gradient
    weights = solve(gram(past).cpu().numpy(), linear, margin, eps)
    return gradient + torch.from_numpy(weights).to(past) @ past


def gram(past: Tensor) -> Tensor:
    """M (T, P) -> M M^T (T, T) in float64, without a copy of M in float64."""
    return torch.stack([part.double() @ part.double().T for part in past.split(COLUMNS_AT_ONCE, dim=1)]).sum(dim=0)


def solve(matrix: np.ndarray, linear: np.ndarray, margin: float = 0.0, eps: float = 0.0) -> np.ndarray:
    """v (T,) for M M^T (T, T) and M g (T,), float64. All rows take part: one that g does not violate can bind after
    the step. Where quadprog refuses, or its answer misses a constraint, `solve_exactly` answers, with a warning."""
    try:
        import quadprog
    except ImportError:
        raise UserError("GEM needs the package quadprog for its projection: pip install quadprog") from None
    count = len(linear)
    ridge = eps * np.trace(matrix) / count * np.eye(count)
    try:
        weights = quadprog.solve_qp(matrix + ridge, -linear, np.eye(count), np.full(count, float(margin)))[0]
    except ValueError as error:  # singular, or without a solution to its precision
        _warn(f"quadprog gave no projection ({error})")
        return solve_exactly(matrix, linear, margin)
    if (matrix @ weights + linear).min() < -TOLERANCE * abs(linear).max():
        _warn("quadprog's projection missed a constraint")
        return solve_exactly(matrix, linear, margin)
    return weights


@cache
def _warn(what: str) -> None:
    """Once a run: a step is one of thousands."""
    log.warning("GEM: %s: solved by least squares instead", what)


def solve_exactly(matrix: np.ndarray, linear: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The same v, also for a singular matrix and without a ridge, as non-negative least squares.

    With v = margin + u and M M^T = Q L Q^T, of which only L > 0 is kept:  min |L^{1/2} Q^T u + L^{-1/2} Q^T b|^2,
    u >= 0, b = M g + M M^T margin.
    """
    from scipy.optimize import nnls

    shift = linear + matrix @ np.full(len(linear), float(margin))
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    roots, basis = np.sqrt(values[kept]), vectors[:, kept]
    return margin + nnls(roots[:, None] * basis.T, -(basis.T @ shift) / roots)[0]
