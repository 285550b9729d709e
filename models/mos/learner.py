"""MOS (Sun et al., AAAI 2025, arXiv 2412.09441): one adapter carried on, a copy per task, and the choice of a copy.

    L = CE(z[K_old : K], y - K_old) + reg CE(M M^T / 0.8, (0, 1, ...)),   M = [means of old classes ; features]
    A <- (1 - m) A + m mean(A_0 .. A_t-1)        after every step: the adapter stays close to its past

After a task A is copied to A_t; Gaussians of its classes are measured, and from the second task on train the whole head
(models/parts/alignment.py); prototypes in the subspace of A_0 are means. At test the predictions themselves find the
copy that an image needs (refine.py).

The public code merges in every pass instead, before each block, also while statistics are taken and at test, where the
copies converge to running means: "merge": "pass", "upstream".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from convs.adapter_sets import Merging, add_adapter_sets, begin_task, named_subspaces
from convs.adapters import AdapterNetwork
from convs.backbones import BackboneMaker
from convs.heads import CosineHead, TaskHeads
from data.loading import extract_features
from data.stream import Task, TaskInfo
from models.base import LEARNERS, Learner
from models.mos.refine import ensemble, refined, self_match
from models.parts.alignment import AlignmentConfig, AlignmentSettings, align_head
from models.parts.drift import StoredMeans
from models.parts.gaussians import ClassGaussians
from models.parts.losses import slice_cross_entropy
from models.parts.optim import group
from models.parts.prototypes import ClassMeans
from utils.config import Count, Rate, Whole
from utils.keys import GIVEN, key, redefault

STATISTICS_BATCHES = 3  # training batches at a time, while the public code measures a class
SAMPLED_BATCHES = 5  # training batches of samples, in a step of the alignment


class ScoredFeatures(AdapterNetwork):
    """In training a batch gives logits and features, which the loss both reads."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.features(images)
        return self.head(features), features


@LEARNERS.register("mos")
class MOS(Learner):
    """Merged adapters, class Gaussians, an aligned head and prototypes. Keeps no images."""

    class Config(AlignmentConfig):
        batch_size: Count = redefault(AlignmentConfig, "batch_size", 48)
        bottleneck: Count = key(16, "width of an adapter")
        adapter_scale: Rate = key(0.1, "factor of the adapters")
        adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "behind an adapter's ReLU")
        adapter_momentum: Annotated[float, Field(ge=0, le=1)] = key(0.1, "m, share of the past in a merge")
        merge: Literal["step", "pass"] = key("step", "merge after every step, or before every block of a pass as well")
        reg: Rate = key(0.1, "weight of the regulariser")
        head_lr_factor: Rate = key(0.1, "the head's learning rate over the adapters'")
        full_head: bool = key(
            False, "outputs for all classes of the stream from the start: weight decay shrinks them until their task"
        )
        ensemble: bool = key(True, "add the prototypes' probabilities to the head's")
        covariance: Literal["full", "diag"] | None = key(
            None, 'the reference\'s name for "cov_storage"; default: that key', only={"ca_epochs": GIVEN}
        )
        ca_epochs: Whole = redefault(AlignmentConfig, "ca_epochs", 30)
        ca_lrate: Rate = redefault(AlignmentConfig, "ca_lrate", 0.005)
        ca_samples: Count | None = key(  # type: ignore[assignment]
            None, "features drawn per class and alignment epoch, and per step; default: 5 batch_size",
            only={"ca_epochs": GIVEN},
        )  # fmt: skip
        ca_with_logit_norm: Rate = redefault(AlignmentConfig, "ca_with_logit_norm", 0.0)
        mean_decay: Rate = redefault(AlignmentConfig, "mean_decay", 0.0)
        upstream: bool = key(False, "reproduce the reference: merge pass, full_head, prototypes measured with dropout")

        def implied(self) -> dict[str, Any]:
            quirks = {"merge": "pass", "full_head": True} if self.upstream else {}
            kind = {"cov_storage": self.covariance} if self.covariance else {}
            return super().implied() | quirks | kind

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.sam is not None and self.merge == "pass":
                yield "sam", 'does not go with "merge": "pass", whose passes move the weights: drop one of the two'
            if self.covariance not in (None, self.cov_storage):
                yield "covariance", f'contradicts "cov_storage": "{self.cov_storage}": drop one of the two'

        def undivided(self) -> str | None:
            if self.merge == "pass":
                return 'every pass of "merge": "pass" moves the adapters'
            if self.reg:
                return 'its regulariser compares every image of a batch with every other ("reg": 0 leaves it out)'
            return super().undivided()

        def alignment(self, task: TaskInfo, distance_mu: float = 0.0, scale: float = 1.0) -> AlignmentSettings:
            settings = super().alignment(task, distance_mu, scale)
            return replace(settings, samples=self.ca_samples or SAMPLED_BATCHES * self.batch_size)

    example = {"bottleneck": 4, "ca_epochs": 2, "ca_samples": 8}
    transient = {"merging"}
    needs_images = False
    network: ScoredFeatures

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = ScoredFeatures(make_backbone(), TaskHeads, config.normalize)
        width, model = self.network.feature_dim, self.network.backbone.model
        shape = config.bottleneck, config.adapter_scale, config.adapter_dropout
        self.adapters = add_adapter_sets(model, *shape, converged=config.merge == "pass")
        # Without alignment the means alone are read, by the regulariser.
        made = config.class_gaussians(width, self.task, self.runtime)
        self.gaussians = ClassGaussians(width, "diag", config.cov_ridge) if made is None else made
        self.class_means = ClassMeans(width)
        self.prototypes = CosineHead(width, init="zeros")
        self.merging: Merging | None = None

    def before_task(self, task: Task) -> None:
        total = task.total_classes
        self.network.head.grow(task.num_classes if self.config.full_head else total, freeze_old=False)
        self.class_means.grow(total)
        self.prototypes.grow(total)
        self.prototypes.requires_grad_(False)
        begin_task(self.adapters, self.config.adapter_momentum, self.config.merge == "pass")

    def param_groups(self) -> list[dict[str, Any]]:
        stage = self.stage
        assert stage is not None
        adapters = [p for adapter in self.adapters for p in adapter.parameters()]
        return [
            group(adapters, stage.lrate, stage.weight_decay),
            group(self.network.head.parameters(), self.config.head_lr_factor * stage.lrate, stage.weight_decay),
        ]

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits, features = net(inputs)
        loss = slice_cross_entropy(logits, targets, self.task.classes)
        return loss + self.config.reg * self._self_match(features) if self.config.reg else loss

    def _self_match(self, features: Tensor) -> Tensor:
        """The regulariser reads the whole batch, whose rows may lie in several processes. Each has the gradient of its
        own rows, which the mean over processes makes too small by their share of the batch."""
        counts = self._counts(len(features))
        value = self_match(self.runtime.gather_rows(features, counts), self.gaussians.means)
        factor = sum(counts) / max(1, counts[self.runtime.rank])
        return value if factor == 1 else value.detach() + factor * (value - value.detach())

    def _counts(self, own: int) -> list[int]:
        """Rows of the batch at hand that each process has."""
        world = self.runtime.world
        if world == 1 or self.data is None:
            return [own]
        size = self.config.batch_size
        batch = min(size, len(self.data.train) - self.progress.step * size)
        return [batch // world + (rank < batch % world) for rank in range(world)]

    def after_backward(self) -> None:
        """The public code's step starts from what its pass has left behind."""
        if self.config.merge == "pass":
            self._merge(times=len(self.adapters))

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        self._merge()

    def after_task(self, task: Task) -> None:
        for adapter in self.adapters:
            adapter.keep()
        self.eval()
        view, size = task.train.view("test"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            if self.config.merge == "pass" and task.index > 0:
                self._measure_while_merging(task)
            else:
                features = extract_features(self.network.features, view, self.runtime, size)
                self.gaussians.add(*features, task.index)
        for adapter in self.adapters:
            adapter.pull = 0.0
        if task.index > 0 and self.config.ca_epochs:
            self._align(task)
        self.train(self.config.upstream and task.index > 0)
        self.class_means.update(lambda images: self.network.subspaces(images, 0, 1)[0], view, self.runtime, size)
        self.eval()
        self.prototypes.set_stacked(self.class_means.exact_means)

    @property
    def frozen_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(str(index) for index in range(self.adapters[0].copies))

    def _stored_means(self) -> StoredMeans | None:
        """The prototypes: those of the first adapter. A Gaussian lies in the features of its own task's adapter."""
        return self.class_means.stored_means(tuple(self.frozen_names[:1])) if len(self.gaussians) else None

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return named_subspaces(self.network, images, names)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        total, known = self.task.total_classes, len(self.gaussians)
        if not frozen:
            assert images is not None
            return images.new_full((len(images), total), -torch.inf)
        features = torch.stack([frozen[name] for name in self.frozen_names], dim=1)  # (B, T, D)
        weight, bias = (part[:known] for part in self.network.head.stacked())
        first = self.prototypes(features[:, 0])[:, :known]
        owner = self.gaussians.tasks[:known]
        scores = refined(features, first, weight, bias, owner)
        if self.config.ensemble:
            scores = ensemble(scores, first, features.shape[1])
        return nn.functional.pad(scores, (0, total - known), value=-torch.inf)

    def _merge(self, times: int = 1) -> None:
        if self.task.index > 0:
            if self.merging is None:
                self.merging = Merging(self.adapters, self.config.adapter_momentum)
            self.merging.merge(times)

    def _measure_while_merging(self, task: Task) -> None:
        """The public code's statistics: class after class, and every batch moves the adapter that measures the next."""

        def features(images: Tensor) -> Tensor:
            found = self.network.features(images)
            self._merge(times=len(self.adapters))
            return found

        for label in task.classes:
            view = task.train.take(np.flatnonzero(task.train.labels == label)).view("test")
            found = extract_features(features, view, self.runtime, STATISTICS_BATCHES * self.config.batch_size)
            self.gaussians.add(*found, task.index)

    def _align(self, task: Task) -> None:
        config, seen = self.config, task.total_classes
        settings = config.alignment(task)
        align_head(
            self.network.head, self.gaussians, settings, task, self.runtime,
            decay=config.mean_decay, reduce=lambda logits: logits[:, :seen], seed=config.torch_seed,
        )  # fmt: skip
