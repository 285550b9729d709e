"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251): random projections and ridge regression.

task 0      something of the ViT is tuned, or nothing                                         (models/first_session.py)
then        W (D, M) ~ N(0, 1) is drawn, and never trained
every task  G += h^T h,  Q += h^T y,   h = relu(f(x) W),   lambda from the task's own images             (ridge.py)
scores      z = h (G + lambda I)^-1 Q,  without normalisation or bias

G and Q hold all tasks and all domains; lambda is the current task's. Where few images meet many dimensions the choice
of lambda is unstable: its loss is flat over many decades, and a tiny lambda costs points where G is nearly singular (on
clothes with a ViT-S 83 -> 11 % in one task, docs/results_real.md; a lambda below the rounding of G is warned of).
"ridges": [0, 8] and "ridge_slack": 0.01 avoid that.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from convs.backbones import BackboneMaker
from data.loading import extract_features
from data.stream import Task
from models.base import LEARNERS, Report
from models.first_session import FirstSession
from models.parts.drift import StoredMeans
from models.parts.prototypes import cosines
from models.ranpac.ridge import RandomRidge, choose_ridge, ridge_losses
from utils.config import Rate, Whole
from utils.keys import key
from utils.seed import folded

log = logging.getLogger(__name__)

Exponent = Annotated[int, Field(ge=-12, le=12)]
REGRESSION = ("linear", "cosine")


@LEARNERS.register("ranpac")
class RanPAC(FirstSession):
    """Ridge regression on random features of a ViT that was tuned in the first task. Keeps no images."""

    class Config(FirstSession.Config):
        petl: Literal["adapter", "ssf", "vpt_deep", "vpt_shallow", "none"] = key(
            "adapter", "what the first session tunes; none: there is no first session"
        )
        head: Literal["linear", "cosine", "ncm"] = key(
            "linear", "scores: h W_o; cos(h, W_o), as LAMDA-PILOT has it; ncm: the ablation, nearest class mean"
        )
        projection: Whole = key(10_000, "M, random features; 0: the features themselves", only={"head": REGRESSION})
        ridges: tuple[Exponent, Exponent] = key(
            (-8, 8), "candidates for lambda, exponents of ten, both ends included", only={"head": REGRESSION}
        )
        ridge_slack: Rate = key(
            0.0,
            "the largest lambda whose loss is within this share of the smallest; 0: the smallest loss",
            only={"head": REGRESSION},
        )
        upstream: bool | Literal["pilot"] = key(  # type: ignore[assignment]
            False,
            "reproduce a reference: true, the authors' (torch seeded with 1); pilot: head cosine",
        )
        fixed_torch_seeds = {True: 1}

        def implied(self) -> dict[str, Any]:
            return super().implied() | ({"head": "cosine"} if self.upstream == "pilot" else {})

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.ridges[0] > self.ridges[1]:
                yield "ridges", f"is empty, {list(self.ridges)}: give the smaller exponent first"

    streams = {"class", "domain"}
    example = {"bottleneck": 4, "projection": 50}

    def build(self, make_backbone: BackboneMaker) -> None:
        super().build(make_backbone)
        self.ridge = RandomRidge(self.network.feature_dim, self.config.projection * (self.config.head != "ncm"))
        self.generator = torch.Generator().manual_seed(folded(self.config.seeds[0], 63))

    def _measure(self, task: Task) -> None:
        """The same in every process: each has the features of all of the task's images."""
        if task.index == 0:
            self.ridge.draw(0 if self.config.head == "ncm" else self.config.projection, self.generator)
        view, size = task.train.view("test"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            features, labels = extract_features(self.network.features, view, self.runtime, size)
            self.ridge.grow(task.total_classes)
            self.ridge.add(features, labels)
            if self.config.head == "ncm":
                self.ridge.weight = self.ridge.sums.clone()
            else:
                ridge = self._lambda(features, labels)
                self.ridge.solve(ridge)
                self._warn_of_rounding(task, ridge)

    def _lambda(self, features: Tensor, labels: Tensor) -> float:
        """The choice among the candidates, on the task's images in a random order."""
        low, high = self.config.ridges
        ridges = [10.0**exponent for exponent in range(low, high + 1)]
        order = self._order(len(labels)).to(labels.device)
        losses = ridge_losses(self.ridge.expand(features[order]), labels[order], ridges)
        return choose_ridge(losses, ridges, self.config.ridge_slack)

    def _warn_of_rounding(self, task: Task, ridge: float) -> None:
        if ridge < (rounding := self.ridge.rounding):
            log.warning(
                "task %d: lambda %.0e lies below the rounding of the Gram matrix (%.0e): where that is singular the "
                'scores are noise. "ridges": [%d, 8], "ridge_slack": 0.01 keep lambda above it',
                task.index + 1, ridge, rounding, max(0, math.ceil(math.log10(rounding))),
            )  # fmt: skip

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        features = self._features(images, frozen)
        scores = features.new_full((len(features), self.task.total_classes), -torch.inf, dtype=torch.float64)
        if (known := len(self.ridge.weight)) > 0:
            h, weight = self.ridge.expand(features), self.ridge.weight
            scores[:, :known] = h @ weight.mT if self.config.head == "linear" else cosines(h, weight)
            scores[:, :known].masked_fill_(self.ridge.counts == 0, -torch.inf)
        return scores

    def _stored_means(self) -> StoredMeans | None:
        """Without random features alone: to expand every test image once more would cost what a prediction costs, and
        nothing can drift behind the first session."""
        ridge = self.ridge
        if ridge.projection.shape[1] or not len(ridge.counts):
            return None
        labels = torch.arange(len(ridge.counts), device=ridge.counts.device)
        means = ridge.sums / ridge.counts.clamp(min=1)[:, None]
        return StoredMeans(means, labels, known=ridge.counts > 0, names=tuple(self.frozen_names))

    def report(self) -> Report:
        return Report({"ridges": self.ridge.chosen.tolist()})
