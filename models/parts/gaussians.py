"""Gaussians of class features: measured in one pass over a task's images, factored once, sampled by matrix products.

    mean_g = mean of f(x),   cov_g = sum (f - mean_g)(f - mean_g)^T / (n_g - 1) + ridge I
    x = m_g + F_g e,   F_g F_g^T = cov_g,   e ~ N(0, I)

Shapes: G Gaussians, D feature width, n samples of each, K width of the noise that a storage kind reads, R the rows of
a root of a covariance. Sources: SLCA (arXiv 2303.05118), SLCA++ (arXiv 2408.08295). A class that comes back in another
task (another domain) is a Gaussian of its own under the same label.

A distribution object per class and epoch factors each covariance twice and draws by matrix-vector products; here the
factor is what is stored, and the samples of many classes are one batched product (benchmarks/alignment.py).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from convs.growing import Growing
from data.loading import View, extract_features
from data.stream import Task
from models.parts.blocks import Blocks
from models.parts.drift import StoredMeans
from models.parts.peaks import largest
from utils.runtime import Runtime

# Gaussians sampled at a time, so that noise never takes the memory of an epoch: on a CPU what its cache holds.
CHUNK = {"cpu": 4, "cuda": 16}
STRIPS = 8  # of a triangular factor: the zeros to the right of a strip are not multiplied, 9/16 of the work is left


class FullCovariances(nn.Module):
    """The lower Cholesky factor: 4 D^2 bytes a class."""

    def __init__(self, feature_dim: int, rank: int):
        super().__init__()
        self.noise = feature_dim
        self.factors = Blocks(feature_dim, feature_dim)

    def add(self, roots: Iterable[Tensor], free: Sequence[int], ridge: float) -> None:
        """One task's covariances root^T root + ridge I, root (R, D) float64, read one at a time; free: their degrees of
        freedom."""
        self.factors.append(len(free), (cholesky(root.T @ root, ridge) for root in roots))

    def pieces(self, size: int) -> Iterator[Tensor]:
        """What `sample` reads of `size` Gaussians at a time, in order."""
        return self.factors.in_turn(size)

    def sample(self, means: Tensor, eps: Tensor, first: int, piece: Tensor, out: Tensor) -> None:
        """out = m + F e for the Gaussians from `first` on: means (g, D), noise eps (g, n, K), out (g, n, D)."""
        triangular_product(means, eps, piece, out)

    def dense(self) -> Tensor:
        """(G, D, D)."""
        factors = self.factors.dense()
        return factors @ factors.mT

    def planned_bytes(self, gaussians: int, tasks: int) -> int:
        return 4 * gaussians * self.noise**2


class DiagonalCovariances(Growing):
    """Standard deviations alone: 4 D bytes a class."""

    deviations: Tensor  # (G, D)

    def __init__(self, feature_dim: int, rank: int):
        super().__init__()
        self.noise = feature_dim
        self.declare("deviations", feature_dim)

    def add(self, roots: Iterable[Tensor], free: Sequence[int], ridge: float) -> None:
        self.append(deviations=torch.stack([(root.square().sum(dim=0) + ridge).sqrt() for root in roots]))

    def pieces(self, size: int) -> Iterator[Tensor]:
        return iter(self.deviations.split(size))

    def sample(self, means: Tensor, eps: Tensor, first: int, piece: Tensor, out: Tensor) -> None:
        torch.addcmul(means[:, None], eps, piece[:, None], out=out)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.deviations.square())

    def planned_bytes(self, gaussians: int, tasks: int) -> int:
        return 4 * gaussians * self.noise


class LowRankCovariances(Growing):
    """cov ~ V V^T + diag(d): the r strongest directions and the variances that they leave, 4 D (r + 1) bytes a class.

    The diagonal is exact; a class of at most r + 1 images is kept whole.
    """

    deviations: Tensor  # (G, D)

    def __init__(self, feature_dim: int, rank: int):
        super().__init__()
        self.rank = min(rank, feature_dim)
        self.noise = self.rank + feature_dim
        self.directions = Blocks(feature_dim, self.rank)
        self.declare("deviations", feature_dim)

    def add(self, roots: Iterable[Tensor], free: Sequence[int], ridge: float) -> None:
        rest = []

        def strongest() -> Iterator[Tensor]:
            for root in roots:
                along = strongest_directions(root, self.rank)
                rest.append(root.square().sum(dim=0) + ridge - along.square().sum(dim=1))
                yield along

        self.directions.append(len(free), strongest())
        self.append(deviations=torch.stack(rest).clamp(min=0).sqrt())

    def pieces(self, size: int) -> Iterator[Tensor]:
        return self.directions.in_turn(size)

    def sample(self, means: Tensor, eps: Tensor, first: int, piece: Tensor, out: Tensor) -> None:
        along, each = eps[..., : self.rank], eps[..., self.rank :]
        torch.addcmul(means[:, None], each, self.deviations[first : first + len(eps), None], out=out)
        out.baddbmm_(along, piece.mT)

    def dense(self) -> Tensor:
        directions = self.directions.dense()
        return directions @ directions.mT + torch.diag_embed(self.deviations.square())

    def planned_bytes(self, gaussians: int, tasks: int) -> int:
        return 4 * gaussians * (self.noise - self.rank) * (self.rank + 1)


class SharedCovariances(Growing):
    """One pooled within-class covariance a task: 4 D^2 bytes a task, however many classes it has."""

    factors: Tensor  # (tasks, D, D)
    owners: Tensor  # (G,): the factor of each Gaussian

    def __init__(self, feature_dim: int, rank: int):
        super().__init__()
        self.noise = feature_dim
        self.declare("factors", feature_dim, feature_dim)
        self.declare("owners", dtype=torch.int64)

    def add(self, roots: Iterable[Tensor], free: Sequence[int], ridge: float) -> None:
        pooled = summed(n * (root.T @ root) for root, n in zip(roots, free, strict=True))
        owner = torch.full((len(free),), len(self.factors))
        self.append(factors=cholesky(pooled / max(1, sum(free)), ridge)[None], owners=owner)

    def pieces(self, size: int) -> Iterator[Tensor]:
        return (self.factors[owners] for owners in self.owners.split(size))

    def sample(self, means: Tensor, eps: Tensor, first: int, piece: Tensor, out: Tensor) -> None:
        triangular_product(means, eps, piece, out)

    def dense(self) -> Tensor:
        return (self.factors @ self.factors.mT)[self.owners]

    def planned_bytes(self, gaussians: int, tasks: int) -> int:
        return 4 * tasks * self.noise**2 + 8 * gaussians


Covariances = FullCovariances | DiagonalCovariances | LowRankCovariances | SharedCovariances
STORAGE: Mapping[str, Callable[[int, int], Covariances]] = {
    "full": FullCovariances,
    "diag": DiagonalCovariances,
    "low_rank": LowRankCovariances,
    "shared": SharedCovariances,
}


class ClassGaussians(Growing):
    """The Gaussians of all classes seen, in the order in which they were added.

    storage: "full" | "diag" | "low_rank" | "shared" (how covariances are kept); rank: of "low_rank".
    ridge: what every variance gets on top; the whole covariance of a class with one image.
    means are float64 and may be moved by their owner (RAA's shift); factors are float32.
    """

    means: Tensor  # (G, D) float64
    labels: Tensor  # (G,) the class
    tasks: Tensor  # (G,) the task that it was measured in

    def __init__(self, feature_dim: int, storage: str = "full", ridge: float = 1e-4, rank: int = 32):
        super().__init__()
        self.ridge = ridge
        self.declare("means", feature_dim, dtype=torch.float64)
        self.declare("labels", dtype=torch.int64)
        self.declare("tasks", dtype=torch.int64)
        self.samples = 0  # of each Gaussian that will be drawn at a time; for what is said beforehand
        self.covariances: Covariances = STORAGE[storage](feature_dim, rank)

    def __len__(self) -> int:
        return len(self.labels)

    def hold_on_host(self) -> None:
        """Keep what comes in blocks in the host's memory; where the device is the host, nothing changes."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.on_host = True

    def measure(
        self, features: Callable[[Tensor], Tensor], view: View, task: int, runtime: Runtime, batch_size: int
    ) -> None:
        """Add the classes of a view: one pass over its images, whatever the number of classes."""
        with runtime.stopwatch("statistics"):
            self.add(*extract_features(features, view, runtime, batch_size), task)

    def add(self, features: Tensor, labels: Tensor, task: int) -> None:
        """Add the classes among `labels` (N,), of features (N, D), as those of `task`. Sums in float64, class by class:
        no more than one class is held in it."""
        members = rows_by_label(labels)
        free = [len(rows) - 1 for rows in members.values()]
        means = self.means.new_empty(len(members), features.shape[1])

        def roots() -> Iterator[Tensor]:
            for mean, rows, n in zip(means, members.values(), free, strict=True):
                own = features[rows].double()
                mean.copy_(own.mean(dim=0))
                yield (own - mean) / max(1, n) ** 0.5

        self.covariances.add(roots(), free, self.ridge)
        self._append(means, torch.tensor(list(members)), task)

    def add_moments(self, means: Tensor, covs: Tensor, labels: Tensor, task: int) -> None:
        """Add Gaussians by their moments: means (g, D), positive definite covs (g, D, D) as they are, labels (g,)."""
        roots = (torch.linalg.cholesky(cov.double()).mT for cov in covs)
        self.covariances.add(roots, [1] * len(labels), ridge=0.0)
        self._append(means, labels, task)

    def _append(self, means: Tensor, labels: Tensor, task: int) -> None:
        self.append(means=means, labels=labels, tasks=torch.full_like(labels, task))

    def draw(
        self, means: Tensor, count: int, source: torch.Generator | Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x = m + F e, `count` samples around each of means (G, D), perhaps scaled or moved -> (G, count, D) of the
        factors' type.

        source: of the noise, a generator on the device of the means, or the noise itself (G, count, K).
        out: written to, if given: fresh memory for each of many draws costs as much as their noise.
        """
        means, size = means.to(self.dtype), CHUNK.get(means.device.type, 16)
        samples = means.new_empty(len(self), count, means.shape[1]) if out is None else out
        noise = means.new_empty(size, count, self.noise)
        for first, piece in zip(range(0, len(self), size), self.covariances.pieces(size), strict=False):
            some = samples[first : first + size]
            if isinstance(source, Tensor):
                eps = source[first : first + size]
            else:
                eps = noise[: len(some)].normal_(generator=source)
            self.covariances.sample(means[first : first + size], eps, first, piece, some)
        return samples

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors, and so of the samples."""
        return next(buffer.dtype for buffer in self.covariances.buffers() if buffer.is_floating_point())

    @property
    def noise(self) -> int:
        """K: numbers that one sample takes from the generator."""
        return self.covariances.noise

    def stored_means(self, names: tuple[str, ...]) -> StoredMeans:
        return StoredMeans(self.means, self.labels, names=names)

    def dense_covariances(self) -> Tensor:
        """(G, D, D) float32, as far as the storage kind keeps them."""
        return self.covariances.dense()

    def expected_bytes(self, tasks: Sequence[Task]) -> int:
        """What the buffers will take once the classes of these tasks are measured."""
        return self.bytes_of(sum(len(np.unique(task.train.labels)) for task in tasks), len(tasks))

    def held_bytes(self, tasks: Sequence[Task]) -> int:
        """Of these on the device; where that is the host, blocks that lie there count as well."""
        away = [m for m in self.modules() if isinstance(m, Blocks) and m.on_host and m.like.device.type != "cpu"]
        count = sum(len(np.unique(task.train.labels)) for task in tasks)
        there = min(count, 2 * CHUNK["cuda"])  # rows of the two places
        return self.expected_bytes(tasks) - sum((count - there) * m.row_bytes for m in away)

    def passing_bytes(self, tasks: Sequence[Task]) -> dict[str, int]:
        """Statistics: the features of a task, as they come and joined; one class and its covariance in float64.
        Alignment: an epoch's samples, with the order of reading them and their labels in it."""
        width, (images, of_class) = self.means.shape[1], largest(tasks)
        samples = self.samples * sum(len(np.unique(task.train.labels)) for task in tasks)
        return {
            "statistics": 8 * images * width + 8 * (3 * of_class * width + 3 * width**2),
            "alignment": samples * (4 * width + 24) if len(tasks) > 1 else 0,
        }

    def bytes_of(self, classes: int, tasks: int) -> int:
        """Of that many Gaussians from that many tasks."""
        return classes * (8 * self.means.shape[1] + 16) + self.covariances.planned_bytes(classes, tasks)


def rows_by_label(labels: Tensor) -> dict[int, Tensor]:
    """{label: where it stands} for each label that occurs, ascending: one sort, not one search per class."""
    order = labels.argsort(stable=True)
    classes, counts = labels[order].unique_consecutive(return_counts=True)
    return dict(zip(classes.tolist(), order.split(counts.tolist()), strict=True))


def by_label(features: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(label, its rows of features) for each label that occurs, ascending."""
    for label, rows in rows_by_label(labels).items():
        yield label, features[rows]


def summed(terms: Iterable[Tensor], width: int = 16, levels: int = 4) -> Tensor:
    """The sum of at least one term, which are read one at a time. Sixteens are added up, then sixteens of these: fewer
    roundings than one after another, and for features of any network's width the digits of torch's sum of the stack."""
    partial: list[Tensor | None] = [None] * levels
    for count, term in enumerate(terms, 1):
        level, carried = 0, term
        while True:
            before = partial[level]
            partial[level] = carried = carried if before is None else before + carried
            if level + 1 == levels or count % width ** (level + 1):
                break
            partial[level] = None
            level += 1
    return functools.reduce(torch.add, [part for part in partial if part is not None])


def triangular_product(means: Tensor, eps: Tensor, factors: Tensor, out: Tensor) -> None:
    """out = m + e L^T for lower triangular factors L: means (g, D), eps (g, n, D), factors (g, D, D), out (g, n, D).

    The means are added at the end: as baddbmm's input they would be copied to `out` first, a tenth of the time.
    """
    width = -(-factors.shape[1] // STRIPS)
    for start in range(0, factors.shape[1], width):
        strip, end = slice(start, start + width), start + width
        torch.bmm(eps[..., :end], factors[:, strip, :end].mT, out=out[..., strip])
    out += means[:, None]


def cholesky(cov: Tensor, ridge: float) -> Tensor:
    """(D, D) float64 -> lower factor of cov + ridge I; float32 fails where an eigenvalue passes 1e7 ridges."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    return torch.linalg.cholesky(cov + ridge * eye)


def strongest_directions(root: Tensor, rank: int) -> Tensor:
    """(D, r): the leading eigenvectors of root^T root times the square root of their eigenvalues; zero columns where
    there are fewer. root (R, D); the smaller of the two Gram matrices is decomposed."""
    if len(root) < root.shape[1]:
        vectors = torch.linalg.eigh(root @ root.T).eigenvectors
        directions = root.T @ vectors[:, -rank:]
    else:
        values, vectors = torch.linalg.eigh(root.T @ root)
        directions = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    return nn.functional.pad(directions, (0, rank - directions.shape[1]))
