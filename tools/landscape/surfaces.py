"""The loss around a point: surfaces, lines, and numbers of flatness, over some weights with all others fixed.

    surface   L(w + a d1 + b d2),  d1, d2 ~ N(0, 1) orthogonal, every row as long as the weights' own row
              (filter normalisation: Li et al., 2018, "Visualizing the loss landscape of neural nets")
    sphere    max L(w + e) - L(w) over |e| = rho (Foret et al., 2021, "Sharpness-aware minimization")
    spectrum  top eigenvalue and trace of the Hessian, from products H v alone

A `Vector` is a list of tensors, one for each entry of the weights and of its shape.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.parts.varied import Weights

Vector = list[Tensor]


class Landscape:
    """L as a function of an offset from the weights as they are now: L(w + a v + b u + ...).

    losses: L is their sum; each is called anew for every value. fine: the same sum in smaller parts, for derivatives,
    which hold on to all that a part computes; default: losses. tick: called after each value, gradient or product H v.
    Use as a context: the weights are the old ones at its end, bit for bit.
    """

    def __init__(
        self,
        losses: Sequence[Callable[[], Tensor]],
        weights: Sequence[Weights],
        tick: Callable[[], object] | None = None,
        fine: Sequence[Callable[[], Tensor]] | None = None,
    ):
        self.losses, self.weights = losses, weights
        self.fine = losses if fine is None else fine
        self.start = [entry.value.clone() for entry in weights]
        self._tick = tick or (lambda: None)
        self._required = [entry.tensor.requires_grad for entry in weights]

    def __enter__(self) -> "Landscape":
        for entry in self.weights:
            entry.tensor.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._move()
        for entry, required in zip(self.weights, self._required, strict=True):
            entry.tensor.requires_grad_(required)

    @torch.no_grad()
    def loss(self, *offset: tuple[float, Vector]) -> float:
        """L(w + sum of factor * vector)."""
        self._move(*offset)
        total = float(torch.stack([loss().double() for loss in self.losses]).sum())
        self._tick()
        return total

    def gradient(self, *offset: tuple[float, Vector]) -> tuple[float, Vector]:
        """L and its gradient at w + sum of factor * vector."""
        self._move(*offset)
        total, gradient = 0.0, [torch.zeros_like(value) for value in self.start]
        for loss in self.fine:
            value = loss()
            _add(gradient, self._derivative(value))
            total += float(value.detach())
        self._tick()
        return total, gradient

    def hessian_product(self, vector: Vector) -> Vector:
        """H v at w. Attention runs in its plain form: the fused kernels have no second derivative."""
        self._move()
        product = [torch.zeros_like(value) for value in self.start]
        for loss in self.fine:
            with sdpa_kernel(SDPBackend.MATH):
                gradient = self._derivative(loss(), create_graph=True)
                slope = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
                if slope.requires_grad:  # a loss linear in the weights has no second derivative
                    _add(product, self._derivative(slope))
        self._tick()
        return product

    def random(self, draw: Callable[..., Tensor], generator: torch.Generator) -> Vector:
        """A vector of draw(shape, generator=...): made on the CPU, so that every device sees the same numbers."""
        return [draw(value.shape, generator=generator).to(value) for value in self.start]

    @torch.no_grad()
    def _move(self, *offset: tuple[float, Vector]) -> None:
        for i, entry in enumerate(self.weights):
            value = entry.value.copy_(self.start[i])
            for factor, vector in offset:
                value.add_(vector[i], alpha=factor)

    def _derivative(self, of: Tensor, create_graph: bool = False) -> Vector:
        tensors = [entry.tensor for entry in self.weights]
        whole = torch.autograd.grad(of, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        return [entry.select(gradient) for entry, gradient in zip(self.weights, whole, strict=True)]


def rows_of(value: Tensor) -> Tensor:
    """The units that filter normalisation scales as one, as rows (R, n): rows of a matrix or of a stack of matrices,
    filters of a convolution, a bias or any other vector as a whole."""
    if value.dim() < 2:
        return value.reshape(1, -1)
    return value.flatten(0, -2) if value.dim() < 4 else value.flatten(1)


def counts_by_module(varied: Mapping[str, Weights]) -> dict[str, int]:
    """Numbers varied, by the first two parts of their names: {"network.backbone": 1216896, "network.head": 1290}."""
    counts: Counter[str] = Counter()
    for name, weights in varied.items():
        counts[".".join(name.split(".")[:2])] += weights.value.numel()
    return dict(counts)


def directions(landscape: Landscape, generator: torch.Generator, radius: float | None = None) -> tuple[Vector, Vector]:
    """Two random directions, orthogonal in every row, each row as long as the weights' own row (a row of zeros gets a
    row of zeros), or of length `radius` whatever the weights.

    A row of a single number has no second dimension: it belongs to the first direction alone.
    """
    first, second = (landscape.random(torch.randn, generator) for _ in range(2))
    for one, two, start in zip(first, second, landscape.start, strict=True):
        size = row_norms(start) if radius is None else radius
        a = F.normalize(rows_of(one), dim=1)
        b = rows_of(two)
        b = F.normalize(b - (a * b).sum(dim=1, keepdim=True) * a, dim=1)
        one.copy_((a * size).view_as(one))
        two.copy_((b * size).view_as(two))
    return first, second


def row_norms(value: Tensor) -> Tensor:
    """(R, 1), of `rows_of`."""
    return rows_of(value).norm(dim=1, keepdim=True)


def share_in_zero_rows(start: Vector) -> float:
    """Of all numbers: those that a direction as long as the weights' own rows cannot move."""
    still = sum(int((row_norms(value) == 0).sum()) * rows_of(value).shape[1] for value in start)
    return still / sum(value.numel() for value in start)


def surface(
    landscape: Landscape, first: Vector, second: Vector, grid: np.ndarray, *base: tuple[float, Vector]
) -> np.ndarray:
    """(G, G): [i, j] = L(w + base + grid[j] first + grid[i] second)."""
    return np.array([line(landscape, first, grid, *base, (float(b), second)) for b in grid])


def line(landscape: Landscape, vector: Vector, grid: np.ndarray, *base: tuple[float, Vector]) -> np.ndarray:
    """(G,): L(w + base + grid[i] vector)."""
    return np.array([landscape.loss(*base, (float(a), vector)) for a in grid])


def between(landscape: Landscape, ends: tuple[Vector, Vector], grid: np.ndarray) -> np.ndarray:
    """(G,): L((1 - grid[i]) p + grid[i] q) for two points p, q."""
    start, end = ends
    return line(landscape, subtract(end, start), grid, (1.0, subtract(start, landscape.start)))


def barrier(losses: np.ndarray, grid: np.ndarray) -> float:
    """max over 0 <= a <= 1 of L((1 - a) p + a q), less the mean of L(p) and L(q); the grid holds 0 and 1."""
    inside = losses[(grid >= 0) & (grid <= 1)]
    return float(inside.max() - (inside[0] + inside[-1]) / 2)


def changes(start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """{name: (tensor of `start`, what `end` adds to it)} for the tensors of a state that differ.

    A head has grown by rows since: those that `start` has not are left out. None: the two are different networks.
    """
    found = {}
    for name, value in start.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        later = end.get(name)
        if not isinstance(later, Tensor) or later.shape[1:] != value.shape[1:]:
            return None
        if value.dim() and len(later) < len(value):
            return None
        change = (later[: len(value)] if value.dim() else later).to(value) - value
        if change.any():
            found[name] = value, change
    return found


def sphere_increase(landscape: Landscape, rho: float, steps: int, generator: torch.Generator) -> np.ndarray:
    """(steps,): the largest L(w + e) - L(w) with |e| = rho found by 1, 2, ... gradient steps.

    A step goes to the point of the sphere that the gradient at the last one points to, e = rho g / |g|, which climbs
    at every step where L is convex. Where the gradient is zero it begins in a random direction.
    """
    base, gradient = landscape.gradient()
    found = []
    for _ in range(steps):
        if norm(gradient) == 0:
            gradient = landscape.random(torch.randn, generator)
        value, gradient = landscape.gradient((rho / norm(gradient), gradient))
        found.append(value - base)
    return np.maximum.accumulate(found)


def noise_increase(landscape: Landscape, size: float, draws: int, generator: torch.Generator) -> np.ndarray:
    """(draws,): L(w + noise) - L(w); the noise is normal, in each row E|noise|^2 = size^2 |row|^2."""
    base, found = landscape.loss(), []
    for _ in range(draws):
        noise = landscape.random(torch.randn, generator)
        for value, start in zip(noise, landscape.start, strict=True):
            rows = rows_of(value)
            value.copy_((rows * row_norms(start) / math.sqrt(rows.shape[1])).view_as(value))
        found.append(landscape.loss((size, noise)) - base)
    return np.array(found)


def top_eigenvalue(landscape: Landscape, iterations: int, generator: torch.Generator) -> tuple[float, float]:
    """Largest eigenvalue of the Hessian by power iteration, and |H v - value v| / |value|, how far it is from one.

    Power iteration finds the eigenvalue largest in size. If that one is negative, the same number of iterations with
    the spectrum shifted to be positive finds the largest.
    """
    value, residual = _power_iteration(landscape, iterations, generator, shift=0.0)
    return (value, residual) if value >= 0 else _power_iteration(landscape, iterations, generator, shift=-value)


def trace_samples(landscape: Landscape, probes: int, generator: torch.Generator) -> np.ndarray:
    """(probes,): v . H v for random signs v; their mean estimates the trace (Hutchinson), exactly if H is diagonal."""
    found = []
    for _ in range(probes):
        signs = landscape.random(_rademacher, generator)
        found.append(dot(signs, landscape.hessian_product(signs)))
    return np.array(found)


def dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum())


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def subtract(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def _power_iteration(
    landscape: Landscape, iterations: int, generator: torch.Generator, shift: float
) -> tuple[float, float]:
    """Of H + shift; the eigenvalue of H."""
    vector = landscape.random(torch.randn, generator)
    value = residual = 0.0
    for _ in range(iterations):
        length = norm(vector)
        if length == 0:  # H is zero
            return 0.0, 0.0
        vector = [v / length for v in vector]
        product = landscape.hessian_product(vector)
        value = dot(vector, product)
        residual = norm([p - value * v for p, v in zip(product, vector, strict=True)]) / max(abs(value), 1e-30)
        vector = [p + shift * v for p, v in zip(product, vector, strict=True)]
    return value, residual


def _rademacher(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)


def _add(total: Vector, more: Vector) -> None:
    for value, addend in zip(total, more, strict=True):
        value.add_(addend)
