"""RAA, randomly amalgamated adapters (AAAI 2026), and its ancestor SSIAT (CVPR 2024, arXiv 2403.19979).

A frozen ViT learns by adapters beside its MLPs (convs/adapters.py). Forgetting is smaller where the loss is flat around
the adapters, so K of them train side by side, and with them a fresh random mixture in every forward pass:

    L = w CE(s (z_k - m y), y) over branches k  +  CE(s (z_mix - m y), y),        z = cos(f, W), the task's columns
    A_mix = sum_k alpha_k A_k,   alpha = u / sum(u),   u ~ U(0, 1)^K                          CosFace: scale s, margin m

    step    SAM+: a second pass at w + rho g / ||g||, steps along the ascent damped           (models/parts/optim.py)
    merge   after a task A_0 := mean_k A_k, and A_0 alone answers; from the second task on it is frozen, so with K = 2
            A_0 is an exponential average of what A_1 goes through
    shift   mu_c += sum_i w_ci (e'_i - e_i): old class means follow the features              (models/raa/shift.py)
    align   Gaussians N(mu_c, Sigma_c) of all classes seen train the cosine head          (models/parts/alignment.py)

Variants are fields: SSIAT is one branch without SAM; "amalgam", "sam" and "freeze" take the parts away one by one.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from convs.adapters import Amalgam, Entered, ReplicaNetwork, add_adapters
from convs.backbones import BackboneMaker
from convs.heads import CosineHead
from data.loading import extract_features
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.alignment import AlignmentConfig, align_head
from models.parts.losses import Margin, margin_cross_entropy
from models.parts.optim import group, hold_rows
from models.parts.varied import Varied, Weights
from models.raa.shift import FeaturesBefore, mean_shift
from utils.config import Count, Rate, Sam, Whole
from utils.keys import GIVEN, key, redefault
from utils.seed import mix

Positive = Annotated[float, Field(gt=0)]
# What "upstream" sets of the keys that a config does not name.
UPSTREAM = {"shift_pairs": "upstream", "alignment_task_index": "upstream", "frozen_decay": True, "normalize": "none"}
# A single branch is SSIAT's: there is nothing to mix, to merge or to freeze.
SINGLE = {"amalgam": "none", "freeze": False}
SHIFTING = {"ca_epochs": GIVEN, "shift": True}


@LEARNERS.register("raa")
class RAA(Learner):
    """Randomly amalgamated adapters with SAM+, shift of class means and alignment; SSIAT with one branch. No images."""

    class Config(AlignmentConfig):
        batch_size: Count = key(48, "images per step, over all processes; each is replicated K + 1 times")
        epochs: Whole = redefault(AlignmentConfig, "epochs", 10)
        sam: Sam | None = key(
            Sam(rho=0.1, damping=25.0),
            "second pass at weights that a step of length rho uphill has reached; damping T shortens steps "
            "along the ascent (SAM+), 0 does not (SAM); null: one pass",
        )
        branches: Count = key(2, "K: adapters per block that train side by side; 1: SSIAT")
        bottleneck: Count = key(64, "width of an adapter")
        adapter_scale: float = key(0.1, "factor of the adapters; constant in the reference")
        adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "behind an adapter's ReLU")
        amalgam: Amalgam = key(
            "upstream",
            "the random mixture: of the branches' outputs on the branches' own streams (the reference's code), "
            "of their parameters (its figure), or none",
        )
        freeze: bool = key(True, "freeze branch 0, the merged one, from the second task on")
        frozen_decay: bool = key(
            False,
            "let weight decay shrink the frozen branch, as the torch 1.11 of the reference does",
            only={"freeze": True},
        )
        scale: Positive = key(20.0, "s, factor of the cosines in both losses")
        margin: Rate = key(0.0, "m, taken from the true class's cosine")
        margin_kind: Margin = key("cosface", "how the margin acts: cos - m, cos(angle + m), cos(m angle)")
        loss_weight: Rate = key(2.0, "w, weight of the branches' mean loss beside the amalgam's")
        shift: bool = key(True, "move the means of old classes with the features", only={"ca_epochs": GIVEN})
        shift_pairs: Literal["aligned", "upstream"] = key(
            "aligned",
            "features before and after a task: of the same images, or of two independent shuffled and "
            "augmented passes (the reference's defect, in its published numbers)",
            only=SHIFTING,
        )
        shift_sigma: Positive = key(4.0, "width of the weights of the shift; constant in the reference", only=SHIFTING)
        ca_lrate: Rate | None = redefault(AlignmentConfig, "ca_lrate", 0.01)
        ca_with_logit_norm: Rate = key(
            0.0, "temperature of the normalised logits; 0: cosines times scale", only={"ca_epochs": GIVEN}
        )
        alignment_task_index: Literal["true", "upstream"] = key(
            "true",
            "a class's task in mean_decay: its own, or label // size of the current task (wrong with unequal tasks)",
            only={"ca_epochs": GIVEN},
        )
        cov_ridge: Rate = redefault(AlignmentConfig, "cov_ridge", 1e-3)
        upstream: bool = key(
            False,
            "reproduce the reference: shift_pairs and alignment_task_index upstream, frozen_decay true, "
            "normalize none, unless the config names them; torch seeded with 1 whatever the class order",
        )
        fixed_torch_seeds = {True: 1}

        def implied(self) -> dict[str, Any]:
            return super().implied() | (UPSTREAM if self.upstream else {}) | (SINGLE if self.branches == 1 else {})

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.branches == 1:
                if self.amalgam != "none":
                    yield "amalgam", 'has nothing to mix with "branches": 1: use "none" or drop the key'
                if self.freeze:
                    yield "freeze", 'would leave nothing to train with "branches": 1: use false or drop the key'

    streams = {"class", "domain"}
    transient = {"_mixtures"}
    network: ReplicaNetwork

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = ReplicaNetwork(make_backbone(), CosineHead, config.normalize, config.amalgam)
        shape = config.branches, config.bottleneck, config.adapter_scale, config.adapter_dropout
        self.adapters = add_adapters(self.network.backbone.model, *shape)
        width = self.network.feature_dim
        self.gaussians = config.class_gaussians(width, self.task, self.runtime)
        self.before = FeaturesBefore(width) if config.ca_epochs and config.shift else None
        self._mixtures: Tensor | None = None  # alpha of the pass at work, (L, K)

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
        if self.before is not None:
            self.before.keep(self._features(task, when=0)[0])
        for adapter in self.adapters:
            adapter.freeze(int(self.config.freeze))

    def param_groups(self) -> list[dict[str, Any]]:
        stage = self.stage
        assert stage is not None
        stacked = [parameter for adapter in self.adapters for parameter in adapter.parameters()]
        return [
            group(stacked, stage.lrate, stage.weight_decay, stacked=True),
            group(self.network.head.parameters(), stage.lrate, stage.weight_decay),
        ]

    def make_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        optimizer, scheduler = super().make_optimizer()
        if not self.config.frozen_decay:
            hold_rows(optimizer, optimizer.param_groups[0]["params"], self.adapters[0].frozen)
        return optimizer, scheduler

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Entered, Tensor]:
        """What replicas and passes share of a batch, and its labels among the task's classes."""
        with self.runtime.autocast():
            return self.network.prefix(images), targets - self.task.classes.start

    def loss(self, net: nn.Module, inputs: Entered, targets: Tensor) -> Tensor:
        """Branches and amalgam, each a mean. Old heads get a zero gradient, not none: weight decay moves them."""
        config, classes = self.config, self.task.classes
        drawn = () if config.accumulate == 1 else (self._pass_mixtures(inputs),)
        cosines = net(inputs, *drawn)[:, classes.start : classes.stop]  # ((K + 1) B, classes of the task)
        rows = config.branches * len(targets)
        loss = config.loss_weight * self._penalty(cosines[:rows], targets.repeat(config.branches))
        return loss if config.amalgam == "none" else loss + self._penalty(cosines[rows:], targets)

    def after_task(self, task: Task) -> None:
        """Merge; class statistics, with the old means moved; from the second task on, alignment of the head."""
        for adapter in self.adapters:
            adapter.merge()
        if self.gaussians is None:
            return
        config = self.config
        self.eval()
        with self.runtime.stopwatch("statistics"):
            view, size = task.train.view("test"), config.test_batch_size
            features, labels = extract_features(self.network.features, view, self.runtime, size)
            if self.before is not None and len(self.before):
                after = features if config.shift_pairs == "aligned" else self._features(task, when=1)[0]
                means = self.gaussians.means
                means += mean_shift(means, self.before.rows, after, config.shift_sigma)
                self.before.forget()
            self.gaussians.add(features, labels, task.index)
        if task.index > 0:
            align_head(
                self.network.head,
                self.gaussians,
                config.alignment(task, scale=config.scale),
                task,
                self.runtime,
                decay=config.mean_decay,
                upstream_index=config.alignment_task_index == "upstream",
                seed=config.torch_seed,
            )

    def landscape(self) -> Varied:
        """Of the adapters that answer, branch 0, which need no random mixture. Branch 0 is the merged one, the others
        are as they were trained."""

        def loss(images: Tensor, targets: Tensor) -> Tensor:
            classes = self.task.classes
            return self._penalty(self.network(images)[:, classes.start : classes.stop], targets - classes.start)

        branches = [self._branch(index) for index in range(self.config.branches)]
        return Varied(branches[0], loss, branches)

    def _branch(self, index: int) -> dict[str, Weights]:
        return {name: Weights(p, index) for name, p in self.named_parameters() if ".adapter." in name}

    def _pass_mixtures(self, inputs: Entered) -> Tensor:
        """One draw a pass, for all parts of its batch."""
        if self._mixtures is None or self.progress.part == 0:
            self._mixtures = self.network.mixtures(inputs.tokens)
        return self._mixtures

    def _penalty(self, cosines: Tensor, targets: Tensor) -> Tensor:
        config = self.config
        return margin_cross_entropy(cosines, targets, config.scale, config.margin, config.margin_kind)

    def _features(self, task: Task, when: int) -> tuple[Tensor, Tensor]:
        """Features of the task's images for the shift, before (0) and after (1) the task, and their labels."""
        self.eval()
        size, seed = self.config.test_batch_size, mix(self.config.seeds[0], task.index, when)
        with self.runtime.stopwatch("statistics"):
            if self.config.shift_pairs == "aligned":
                return extract_features(self.network.features, task.train.view("test"), self.runtime, size)
            return extract_features(self.network.features, task.train.view("train"), self.runtime, size, shuffle=seed)
