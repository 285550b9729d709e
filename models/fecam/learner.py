"""FeCAM (Goswami et al., NeurIPS 2023, arXiv 2309.14062): nearest mean in a metric of each class's own. Nothing trains.

    u = f / ||f||,   z_c = -(u - mu_c)^T R_c^+ (u - mu_c),   R_c: correlations of the class's covariance    (metric.py)

LAMDA-PILOT's form tunes an adapter in the first task, takes statistics of raw features, and R_c as the correlation
between the rows of the covariance: close to a nearest normalised mean.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from convs.backbones import BackboneMaker
from data.loading import extract_features
from data.stream import Task
from models.base import LEARNERS
from models.fecam.metric import ClassMetrics, by_variance, moments, shrunk
from models.first_session import FirstSession
from models.parts.drift import StoredMeans
from utils.config import Rate
from utils.keys import key

SHRINKAGE = 100.0  # on the covariance's diagonal under "rows"; a constant of LAMDA-PILOT


@LEARNERS.register("fecam")
class FeCAM(FirstSession):
    """One mean and one metric per class; keeps D^2 numbers a class and no images."""

    class Config(FirstSession.Config):
        petl: Literal["none", "adapter", "ssf", "vpt_deep", "vpt_shallow"] = key(
            "none", "what a first session tunes; none: there is no first session"
        )
        correlation: Literal["variance", "rows"] = key(
            "variance", "R: entries over both deviations, of normalised features; rows: LAMDA-PILOT's, of raw ones"
        )
        shrink: tuple[Rate, Rate] = key(
            (1.0, 0.0),
            "a1 and a2: multiples of the mean variance and the mean covariance that are added",
            only={"correlation": "variance"},
        )
        normalise: bool = key(True, "features of length 1", only={"correlation": "variance"})
        tukey: Annotated[float, Field(gt=0)] | None = key(
            None, "power that features are raised to, keeping their sign", only={"correlation": "variance"}
        )
        upstream: bool | Literal["pilot"] = key(  # type: ignore[assignment]
            False, "reproduce a reference: true, the authors'; pilot: petl adapter and correlation rows"
        )

        def implied(self) -> dict[str, Any]:
            pilot = {"petl": "adapter", "correlation": "rows"} if self.upstream == "pilot" else {}
            return super().implied() | pilot

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.shrink[1] > self.shrink[0]:
                yield "shrink", f"must not have its second number above its first, got {list(self.shrink)}"

    example = {"petl": "adapter", "bottleneck": 4, "shrink": [1.0, 0.0]}

    def build(self, make_backbone: BackboneMaker) -> None:
        super().build(make_backbone)
        self.metrics = ClassMetrics(self.network.feature_dim)

    def _measure(self, task: Task) -> None:
        """The same in every process: each has the features of all of the task's images."""
        view, size = task.train.view("test"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            self._add(*extract_features(self.network.features, view, self.runtime, size))

    def _add(self, features: Tensor, labels: Tensor) -> None:
        if self.config.correlation == "rows":
            _, means, covs = moments(features, labels)
            eye = SHRINKAGE * torch.eye(covs.shape[1], dtype=covs.dtype, device=covs.device)
            correlations = (torch.corrcoef(cov + eye) for cov in covs)
            self.metrics.add(correlations, F.normalize(means, dim=1), full_rank=False)
        else:
            _, means, covs = moments(self._transformed(features), labels)
            correlations = (by_variance(shrunk(cov, *self.config.shrink)) for cov in covs)
            self.metrics.add(correlations, means, full_rank=True)

    def _stored_means(self) -> StoredMeans | None:
        """mu of the centres V mu; with correlation "rows", V leaves directions out and mu is not to be had."""
        if self.config.correlation == "rows" or not len(self.metrics):
            return None
        centres = self.metrics.centres.double()[..., None]
        means = torch.linalg.solve_triangular(self.metrics.whitenings.double(), centres, upper=False)[..., 0]
        labels = torch.arange(len(means), device=means.device)
        return StoredMeans(means, labels, of=self._transformed, names=tuple(self.frozen_names))

    def _transformed(self, features: Tensor) -> Tensor:
        """What distances are taken of: (B, D) -> (B, D)."""
        if self.config.tukey is not None:
            features = features.sign() * features.abs().pow(self.config.tukey)
        return F.normalize(features, dim=1) if self.config.normalise else features

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        features = self._features(images, frozen)
        scores = features.new_full((len(features), self.task.total_classes), -torch.inf)
        if known := len(self.metrics):
            scores[:, :known] = -self.metrics.distances(self._transformed(features))
        return scores
