"""RAA, randomly amalgamated adapters (AAAI 2026), and its ancestor SSIAT (CVPR 2024, arXiv 2403.19979).

A frozen ViT learns by adapters beside its MLPs (convs/adapters.py). Forgetting is smaller where the loss is flat around
the adapters, so K of them train side by side, and with them a fresh random mixture in every forward pass:

    L = w CE(s (z_k - m y), y) over branches k  +  CE(s (z_mix - m y), y),        z = cos(f, W), the task's columns
    A_mix = sum_k alpha_k A_k,   alpha = u / sum(u),   u ~ U(0, 1)^K                          CosFace: scale s, margin m

    step    SAM+: a second pass at w + rho g / ||g||, steps along the ascent damped           (models/parts/optim.py)
    merge   after a task A_0 := mean_k A_k, and A_0 alone answers; from the second task on it is frozen, so with K = 2
            A_0 is an exponential average of what A_1 goes through
    shift   mu_c += sum_i w_ci (e'_i - e_i): old class means follow the features              (models/parts/shift.py)
    align   Gaussians N(mu_c, Sigma_c) of all classes seen train the cosine head          (models/parts/alignment.py)

Variants are fields: SSIAT is one branch without SAM; "amalgam", "sam" and "freeze" take the parts away one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from convs.adapters import Amalgam, Entered, ReplicaNetwork, add_adapters
from convs.heads import CosineHead
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.alignment import Alignment, align, mean_decay, upstream_tasks
from models.parts.gaussians import ClassGaussians
from models.parts.loop import extract_features
from models.parts.losses import Margin, margin_cross_entropy
from models.parts.optim import group, hold_rows
from models.parts.shift import FeaturesBefore, mean_shift
from utils.config import Count, Rate, RunConfig, Sam, Whole
from utils.data_manager import Task
from utils.landscape import Weights
from utils.runtime import Runtime
from utils.seed import mix

Positive = Annotated[float, Field(gt=0)]
# What "upstream" sets of the keys that a config does not name.
UPSTREAM = {"shift_pairs": "upstream", "alignment_task_index": "upstream", "frozen_decay": True, "normalize": "none"}
# A single branch is SSIAT's: there is nothing to mix, to merge or to freeze.
SINGLE = {"amalgam": "none", "freeze": False}


class RaaConfig(RunConfig):
    batch_size: Count = Field(48, description="images per step, over all processes; each is replicated K + 1 times")
    epochs: Whole = Field(10, description="epochs of every later task")
    sam: Sam | None = Field(
        Sam(rho=0.1, damping=25.0),
        description="second pass at weights that a step of length rho uphill has reached; damping T shortens steps "
        "along the ascent (SAM+), 0 does not (SAM); null: one pass",
    )
    branches: Count = Field(2, description="K: adapters per block that train side by side; 1: SSIAT")
    bottleneck: Count = Field(64, description="width of an adapter")
    adapter_scale: float = Field(0.1, description="factor of the adapters; constant in the reference")
    adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="behind an adapter's ReLU")
    amalgam: Amalgam = Field(
        "upstream",
        description="the random mixture: of the branches' outputs on the branches' own streams (the reference's code), "
        "of their parameters (its figure), or none",
    )
    freeze: bool = Field(True, description="freeze branch 0, the merged one, from the second task on")
    frozen_decay: bool = Field(
        False, description="let weight decay shrink the frozen branch, as the torch 1.11 of the reference does"
    )
    scale: Positive = Field(20.0, description="s, factor of the cosines in both losses")
    margin: Rate = Field(0.0, description="m, taken from the true class's cosine")
    margin_kind: Margin = Field("cosface", description="how the margin acts: cos - m, cos(angle + m), cos(m angle)")
    loss_weight: Rate = Field(2.0, description="w, weight of the branches' mean loss beside the amalgam's")
    shift: bool = Field(True, description="move the means of old classes with the features")
    shift_pairs: Literal["aligned", "upstream"] = Field(
        "aligned",
        description="features before and after a task: of the same images, or of two independent shuffled and "
        "augmented passes (the reference's defect, in its published numbers)",
    )
    shift_sigma: Positive = Field(4.0, description="width of the weights of the shift; constant in the reference")
    ca_epochs: Whole = Field(5, description="epochs of classifier alignment; 0: no alignment and no statistics")
    ca_lrate: Rate = Field(0.01, description="learning rate of the alignment")
    ca_samples: Count = Field(256, description="features drawn per class and alignment epoch, and per step")
    ca_with_logit_norm: Rate = Field(0.0, description="temperature of the normalised logits; 0: cosines times scale")
    mean_decay: Rate = Field(0.1, description="how far the means of the oldest classes shrink in alignment; 0: not")
    alignment_task_index: Literal["true", "upstream"] = Field(
        "true",
        description="a class's task in mean_decay: its own, or label // size of the current task (wrong with unequal "
        "tasks)",
    )
    cov_ridge: Rate = Field(1e-3, description="added to every variance")
    upstream: bool = Field(
        False,
        description="reproduce the reference: shift_pairs and alignment_task_index upstream, frozen_decay true, "
        "normalize none, unless the config names them; torch seeded with 1 whatever the class order",
    )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = UPSTREAM if given.get("upstream") is True else {}
        return values | (SINGLE if given.get("branches") == 1 else {})

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(given)
        if given.get("branches") == 1:
            if given.get("amalgam", "none") != "none":
                yield "amalgam", 'has nothing to mix with "branches": 1: use "none" or drop the key'
            if given.get("freeze"):
                yield "freeze", 'would leave nothing to train with "branches": 1: use false or drop the key'
        if given.get("frozen_decay") and given.get("freeze") is False:
            yield "frozen_decay", 'has no effect with "freeze": false: drop the key'
        if given.get("shift") is False:
            for key in sorted({"shift_pairs", "shift_sigma"} & set(given)):
                yield key, 'has no effect with "shift": false: drop the key'
        if given.get("ca_epochs") == 0:
            for key in sorted({"shift", "ca_lrate", "ca_samples", "ca_with_logit_norm", "mean_decay"} & set(given)):
                yield key, 'has no effect with "ca_epochs": 0: drop the key'


@LEARNERS.register("raa")
class RAA(Learner):
    """Randomly amalgamated adapters with SAM+, shift of class means and alignment; SSIAT with one branch. No images."""

    Config = RaaConfig
    upstream_seed = 1
    config: RaaConfig
    network: ReplicaNetwork

    def __init__(self, config: RaaConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = ReplicaNetwork(*self.network_parts(make_backbone, CosineHead), amalgam=config.amalgam)
        shape = config.branches, config.bottleneck, config.adapter_scale, config.adapter_dropout
        self.adapters = add_adapters(self.network.backbone.model, *shape)
        self.gaussians = ClassGaussians(self.network.feature_dim, ridge=config.cov_ridge)
        self.before = FeaturesBefore(self.network.feature_dim)

    def train(self, mode: bool = True) -> "RAA":
        """The frozen network stays in evaluation mode; the adapters alone have a dropout, and draw mixtures."""
        super().train(mode)
        self.network.eval()
        for adapter in self.adapters:
            adapter.train(mode)
        return self

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)
        if task.index == 0:
            return
        if self._shifts:
            self.before.keep(self._features(task, when=0)[0])
        for adapter in self.adapters:
            adapter.freeze(int(self.config.freeze))

    def param_groups(self) -> list[dict[str, Any]]:
        stacked = [parameter for adapter in self.adapters for parameter in adapter.parameters()]
        return [
            group(stacked, self.lrate, self.weight_decay, stacked=True),
            group(self.network.head.parameters(), self.lrate, self.weight_decay),
        ]

    def make_optimizer(self, epochs: int) -> tuple[Optimizer, LRScheduler]:
        optimizer, scheduler = super().make_optimizer(epochs)
        if not self.config.frozen_decay:
            hold_rows(optimizer, optimizer.param_groups[0]["params"], self.adapters[0].frozen)
        return optimizer, scheduler

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Entered, Tensor]:
        """What replicas and passes share of a batch, and its labels among the task's classes."""
        with self.runtime.autocast():
            return self.network.prefix(images), targets - self.task.classes.start

    def loss(self, net: nn.Module, images: Entered, targets: Tensor) -> Tensor:
        """Branches and amalgam, each a mean. Old heads get a zero gradient, not none: weight decay moves them."""
        config, classes = self.config, self.task.classes
        cosines = net(images)[:, classes.start : classes.stop]  # ((K + 1) B, classes of the task)
        rows = config.branches * len(targets)
        loss = config.loss_weight * self._penalty(cosines[:rows], targets.repeat(config.branches))
        return loss if config.amalgam == "none" else loss + self._penalty(cosines[rows:], targets)

    def after_task(self, task: Task) -> None:
        """Merge; class statistics, with the old means moved; from the second task on, alignment of the head."""
        for adapter in self.adapters:
            adapter.merge()
        if self.config.ca_epochs == 0:
            return
        self.eval()
        with self.runtime.stopwatch("statistics"):
            size = self.config.test_batch_size
            features, labels = extract_features(self.network.features, task.train.view("test"), self.runtime, size)
            if len(self.before):
                aligned = self.config.shift_pairs == "aligned"
                after = features if aligned else self._features(task, when=1)[0]
                means = self.gaussians.means
                means += mean_shift(means, self.before.rows, after, self.config.shift_sigma)
                self.before.forget()
            self.gaussians.add(features, labels, task.index)
        if task.index > 0:
            with self.runtime.stopwatch("alignment"):
                self._align(task)

    def statistics_bytes(self, tasks: Sequence[Task]) -> int:
        if self.config.ca_epochs == 0:
            return 0
        return self.gaussians.planned_bytes(sum(len(np.unique(task.train.labels)) for task in tasks), len(tasks))

    def trained_numbers(self) -> int:
        frozen = sum(p[: adapter.frozen].numel() for adapter in self.adapters for p in adapter.parameters())
        return super().trained_numbers() - frozen

    def landscape_parameters(self) -> dict[str, Weights]:
        """The adapters that answer: branch 0."""
        return self._branch(0)

    def landscape_branches(self) -> Sequence[Mapping[str, Weights]]:
        """Branch 0 is the merged one, the others are as they were trained."""
        return [self._branch(index) for index in range(self.config.branches)]

    def landscape_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Of branch 0 alone, which needs no random mixture."""
        classes = self.task.classes
        return self._penalty(self.network(images)[:, classes.start : classes.stop], targets - classes.start)

    def _branch(self, index: int) -> dict[str, Weights]:
        return {name: Weights(p, index) for name, p in self.named_parameters() if ".adapter." in name}

    def _penalty(self, cosines: Tensor, targets: Tensor) -> Tensor:
        config = self.config
        return margin_cross_entropy(cosines, targets, config.scale, config.margin, config.margin_kind)

    @property
    def _shifts(self) -> bool:
        return self.config.shift and self.config.ca_epochs > 0

    def _features(self, task: Task, when: int) -> tuple[Tensor, Tensor]:
        """Features of the task's images for the shift, before (0) and after (1) the task, and their labels."""
        self.eval()
        size, seed = self.config.test_batch_size, mix(self.config.seeds[0], task.index, when)
        with self.runtime.stopwatch("statistics"):
            if self.config.shift_pairs == "aligned":
                return extract_features(self.network.features, task.train.view("test"), self.runtime, size)
            return extract_features(self.network.features, task.train.view("train"), self.runtime, size, shuffle=seed)

    def _align(self, task: Task) -> None:
        """Train the whole head on samples of the Gaussians; it stays so, and later blocks join it."""
        config, gaussians, head = self.config, self.gaussians, self.network.head
        assert isinstance(head, CosineHead)
        tasks = gaussians.tasks
        if config.alignment_task_index == "upstream" and task.domain is None:
            tasks = upstream_tasks(gaussians.labels, len(task.classes))
        settings = Alignment(
            epochs=config.ca_epochs,
            lrate=config.ca_lrate,
            weight_decay=self.weight_decay,
            momentum=config.momentum,
            samples=config.ca_samples,
            tau=config.ca_with_logit_norm,
            cosine=True,
            scale=config.scale,
        )
        seed = self.upstream_seed if config.upstream else config.seeds[0]
        aligned = align(
            head.weight,
            None,
            [len(block) for block in head.blocks],
            gaussians,
            settings,
            mean_factor=mean_decay(tasks, task.index, config.mean_decay),
            generator=torch.Generator(self.runtime.device).manual_seed(mix(seed, task.index)),
        )
        head.set_weight(aligned.weight)
