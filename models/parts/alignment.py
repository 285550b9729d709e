"""Classifier alignment: all heads are trained together on features drawn from the stored class Gaussians.

Each epoch draws n samples of every Gaussian, shuffles them and takes one step per n samples:

    x = mean factor * mean_g + F_g e;  SLCA++ divides a row of task t by 1 + q (cur - t)
    z = W x + b   or   s cos(x, w_c)
    L = CE(reduce(z / (tau N)), y),   N = mean_k (||z of head k|| + 1e-7)      tau = 0:  L = CE(reduce(z), y)

Shapes: G Gaussians, n samples of each, B batch rows (n), D feature width, C outputs of all heads together, T heads.
Sources: SLCA (arXiv 2303.05118) section 3.3, SLCA++ (arXiv 2408.08295); RAA and InfLoRA+CA use the same stage:

                    mean factor        row jitter mu    tau      logits
    SLCA            mean_decay(...)    0                0.1      linear
    SLCA++          none               0.02             0.1      linear
    RAA             mean_decay(...)    0                0        cosine, scale s
    InfLoRA+CA      mean_decay(...)    0                0.1 | 0  linear

The heads are one (C, D) matrix, the norms one product with the head-of-column matrix, and losses stay on the device:
one step is a handful of kernels and nothing is read back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from convs.heads import CosineHead, Head
from data.stream import TaskInfo
from models.parts.gaussians import ClassGaussians
from utils.config import Count, Rate, TrainConfig, Whole
from utils.keys import GIVEN, key
from utils.runtime import Runtime
from utils.seed import mix

SHARE = 0.25  # of a card's memory, beyond which the Gaussians of a stream lie on the host
HALF_WIDTH = 0.01  # of the uniform distribution of q around mu; a constant in SLCA++'s reference


@dataclass(frozen=True)
class AlignmentSettings:
    """Settings of the stage. SGD from scratch, lrate falling to 0 along a cosine over the epochs.

    samples: per Gaussian and epoch, and rows per step.  tau: temperature of the normalised logits, 0 for plain logits.
    cosine: logits are scale * cos(x, w_c); the norm replaces the scale when tau > 0.  distance_mu: mu of the row
    jitter, q ~ U(mu - 0.01, mu + 0.01).
    """

    epochs: int = 5
    lrate: float = 0.01
    weight_decay: float = 5e-4
    momentum: float = 0.9
    samples: int = 256
    tau: float = 0.0
    cosine: bool = False
    scale: float = 1.0
    distance_mu: float = 0.0


class AlignmentConfig(TrainConfig):
    """The keys of the stage, for learners that have it."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = key(0.9, "of sgd, and of the alignment")
    ca_epochs: Whole = key(5, "epochs of classifier alignment; 0: no alignment and no statistics")
    ca_lrate: Rate | None = key(None, "learning rate of the alignment; default: lrate", only={"ca_epochs": GIVEN})
    ca_weight_decay: Rate | None = key(
        None, "weight decay of the alignment; default: weight_decay", only={"ca_epochs": GIVEN}
    )
    ca_samples: Count = key(
        256, "features drawn per class and alignment epoch, and per step", only={"ca_epochs": GIVEN}
    )
    ca_with_logit_norm: Rate = key(
        0.1, "temperature of the normalised logits; 0: plain logits", only={"ca_epochs": GIVEN}
    )
    mean_decay: Rate = key(
        0.1, "how far the means of the oldest classes shrink in alignment; 0: not", only={"ca_epochs": GIVEN}
    )
    cov_storage: Literal["full", "diag", "low_rank", "shared"] = key(
        "full",
        'covariances: per class, per class and dimension, "cov_rank" directions, one per task',
        only={"ca_epochs": GIVEN},
    )
    cov_rank: Count = key(32, 'directions per class of "cov_storage": "low_rank"', only={"cov_storage": "low_rank"})
    cov_ridge: Rate = key(1e-4, "added to every variance", only={"ca_epochs": GIVEN})
    cov_device: Literal["auto", "device", "host"] = key(
        "auto",
        "where the covariances of classes lie: on the device, or on the host, from where alignment fetches the next "
        "while it reads the last; auto: on the device unless the stream's would take more than a quarter of the card",
        only={"ca_epochs": GIVEN, "cov_storage": ("full", "low_rank")},
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.names("momentum") and self.optimizer != "sgd" and not self.ca_epochs:
            yield "momentum", 'has no effect with this "optimizer" and without "ca_epochs": drop the key'

    def class_gaussians(self, width: int, task: TaskInfo, runtime: Runtime) -> ClassGaussians | None:
        """Room for the Gaussians of the stream that a task is of, of features of that width; None without alignment."""
        if not self.ca_epochs:
            return None
        made = ClassGaussians(width, self.cov_storage, self.cov_ridge, self.cov_rank)
        made.samples = self.alignment(task).samples
        classes = task.num_classes * (1 if task.domain is None else task.num_tasks)
        fits = made.bytes_of(classes, task.num_tasks) <= SHARE * runtime.device_memory()
        if self.cov_device == "host" or (self.cov_device == "auto" and not fits):
            made.hold_on_host()
        return made

    def alignment(self, task: TaskInfo, distance_mu: float = 0.0, scale: float = 1.0) -> AlignmentSettings:
        """The settings of the stage after a task."""
        lrate, decay = self.ca_lrate, self.ca_weight_decay
        return AlignmentSettings(
            epochs=self.ca_epochs,
            lrate=self.of_task("lrate", task.index) if lrate is None else lrate,
            weight_decay=self.of_task("weight_decay", task.index) if decay is None else decay,
            momentum=self.momentum,
            samples=self.ca_samples,
            tau=self.ca_with_logit_norm,
            scale=scale,
            distance_mu=distance_mu,
        )


class Draws(NamedTuple):
    """The random numbers of one epoch: eps (G, n, K) normal, uniform (G, n) in [0, 1) (read when distance_mu > 0),
    order (G n,) the permutation of the rows."""

    eps: Tensor
    uniform: Tensor
    order: Tensor


class Aligned(NamedTuple):
    """weight (C, D) and bias (C,) or None after the stage; losses (epochs, G) of each step, on the device."""

    weight: Tensor
    bias: Tensor | None
    losses: Tensor


def align_head(
    head: Head,
    gaussians: ClassGaussians,
    settings: AlignmentSettings,
    task: TaskInfo,
    runtime: Runtime,
    *,
    decay: float = 0.0,
    upstream_index: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Train the whole head of a learner on samples of the classes seen; it stays so.

    decay: how far the means of the oldest classes shrink. upstream_index: a class's task is counted as the references
    do, see `upstream_tasks`. reduce: see `align`. seed: of the draws, mixed with the task: every process draws the
    same, wherever the run was interrupted. A cosine head is aligned by its cosines.
    """
    tasks = gaussians.tasks
    if upstream_index and task.domain is None:
        tasks = upstream_tasks(gaussians.labels, len(task.classes))
    with runtime.stopwatch("alignment"):
        aligned = align(
            *head.stacked(),
            head.sizes,
            gaussians,
            replace(settings, cosine=isinstance(head, CosineHead)),
            mean_factor=mean_decay(tasks, task.index, decay),
            ages=task.index - tasks,
            reduce=reduce,
            generator=torch.Generator(runtime.device).manual_seed(mix(seed, task.index)),
        )
        head.set_stacked(aligned.weight, aligned.bias)


def align(
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    gaussians: ClassGaussians,
    settings: AlignmentSettings,
    *,
    mean_factor: Tensor | None = None,
    ages: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    draws: Callable[[int], Draws] | None = None,
) -> Aligned:
    """Train stacked heads, weight (C, D) and bias (C,), on samples of the Gaussians; the arguments are not changed.

    sizes: outputs of each head, in order, C in all.  mean_factor (G,): see `mean_decay`.
    ages (G,): tasks since each Gaussian was measured, see `distance_factor`; needed when distance_mu > 0.
    reduce: (B, C) -> (B, classes), for streams where several outputs vote for one class; targets are gaussians.labels.
    generator: on the Gaussians' device; draws: epoch -> its random numbers, instead of fresh ones.
    """
    weight = weight.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    parameters = [weight] if bias is None else [weight, bias]
    optimizer = SGD(parameters, settings.lrate, settings.momentum, weight_decay=settings.weight_decay, fused=True)
    scheduler = CosineAnnealingLR(optimizer, T_max=max(1, settings.epochs))
    means = gaussians.means if mean_factor is None else gaussians.means * mean_factor.double()[:, None]
    heads = head_of_column(sizes, weight)
    targets = gaussians.labels.repeat_interleave(settings.samples)
    losses: list[Tensor] = []
    rows = weight.new_empty(len(targets), means.shape[1])
    for epoch in range(settings.epochs):
        order = _draw_epoch(rows, gaussians, means, settings, ages, generator, draws(epoch) if draws else None)
        for batch, labels in zip(order.split(settings.samples), targets[order].split(settings.samples), strict=True):
            logits = head_logits(rows.index_select(0, batch), weight, bias, settings, heads)
            loss = F.cross_entropy(logits if reduce is None else reduce(logits), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
    curve = torch.stack(losses).view(settings.epochs, -1) if losses else weight.new_empty(0, len(gaussians))
    return Aligned(weight.detach(), None if bias is None else bias.detach(), curve)


def _draw_epoch(
    rows: Tensor,
    gaussians: ClassGaussians,
    means: Tensor,
    settings: AlignmentSettings,
    ages: Tensor | None,
    generator: torch.Generator | None,
    given: Draws | None,
) -> Tensor:
    """Fill rows (G n, D) with one epoch's samples, Gaussian by Gaussian; returns the order (G n,) of reading them."""
    samples = rows.view(len(gaussians), settings.samples, -1)
    gaussians.draw(means, settings.samples, generator if given is None else given.eps, out=samples)
    device = rows.device
    order = torch.randperm(len(rows), generator=generator, device=device) if given is None else given.order
    if settings.distance_mu:
        if ages is None:
            raise ValueError("distance_mu scales rows by the age of their class: give align() the ages (G,)")
        shape = samples.shape[:2]
        uniform = torch.rand(shape, generator=generator, device=device) if given is None else given.uniform
        samples *= distance_factor(ages, uniform, settings.distance_mu)[..., None]
    return order


def head_logits(
    rows: Tensor, weight: Tensor, bias: Tensor | None, settings: AlignmentSettings, heads: Tensor
) -> Tensor:
    """(B, D) -> what the loss reads (B, C); heads (C, T) as `head_of_column` gives it."""
    if settings.cosine:
        logits = F.linear(F.normalize(rows, dim=1), F.normalize(weight, dim=1), bias)
        return settings.scale * logits if settings.tau <= 0 else normalised(logits, heads, settings.tau)
    logits = F.linear(rows, weight, bias)
    return logits if settings.tau <= 0 else normalised(logits, heads, settings.tau)


def normalised(logits: Tensor, heads: Tensor, tau: float) -> Tensor:
    """z / (tau N), N = mean over heads k of (||z_k||_2 + 1e-7), with its gradient. logits (B, C), heads (C, T).

    The clamp keeps the gradient finite where all logits of a head are zero.
    """
    norms = (logits.square() @ heads).clamp(min=1e-30).sqrt()  # (B, T)
    return logits / (tau * (norms.mean(dim=1, keepdim=True) + 1e-7))


def head_of_column(sizes: Sequence[int], like: Tensor) -> Tensor:
    """(C, T): 1 where output c belongs to head k."""
    owner = torch.arange(len(sizes), device=like.device).repeat_interleave(torch.tensor(sizes, device=like.device))
    return F.one_hot(owner, len(sizes)).to(like.dtype)


def mean_decay(tasks: Tensor, current: int, decay: float = 0.1) -> Tensor:
    """1 - decay + decay (t + 1) / (current + 1): older means are drawn towards 0 (SLCA). tasks (G,) -> (G,) float64."""
    return 1 - decay + decay * (tasks.double() + 1) / (current + 1)


def distance_factor(ages: Tensor, uniform: Tensor, mu: float) -> Tensor:
    """1 / (1 + q age), q = mu - 0.01 + 0.02 u: the draw undoes the feature scaling that SLCA++ evaluates with.

    ages (G,), uniform (G, n) in [0, 1) -> (G, n).
    """
    return 1 / (1 + (mu - HALF_WIDTH + 2 * HALF_WIDTH * uniform) * ages[:, None])


def upstream_tasks(labels: Tensor, last_size: int) -> Tensor:
    """Task of each class as the reference implementations of SLCA, RAA and InfLoRA count it: label // size of the
    current task. Right only while all tasks have one size."""
    return labels // last_size
