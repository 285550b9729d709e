"""What old tasks feed into a layer, and what is still free: GPM, DualGPM, and the branch design of InfLoRA.

L layers, D width, r rank. C (L, D, D): second moments h h^T of the tokens entering each layer, averaged, not centred.
Every layer has an old space and its orthogonal complement, the free space; Q projects onto the free one:

    M spans the old space  (kind "remove"):  Q = I - M M^T
    M spans the free space (kind "retain"):  Q = M M^T

Sources: Saha et al., 2021 (GPM); Liang & Li, 2023 (DualGPM); Liang & Li, 2024 (InfLoRA, arXiv 2404.00228).

Everything is float64, all layers in one call. Left singular vectors of Q C are eigenvectors of Q C C Q. Subtracting
(tot) (I - Q) from that matrix moves the old space to the end of the spectrum without touching the free one, so that
one eigendecomposition yields orthonormal bases of both, whichever of them is stored: no SVD, no second basis for the
complement, and no drift out of orthogonality over many tasks.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convs.growing import Growing
from utils.errors import TrainingError

Energy = Literal["upstream", "paper"]


class GPM(Growing):
    """Gradient projection memory: an orthonormal basis M of each layer's old space, which only grows.

    lamb, lame: task t of T keeps the share eps_t = lamb + (lame - lamb) t / T of the energy; lame is never reached.
    energy: what is summed to that share; "upstream": squared singular values of C, "paper": those of the inputs H,
        the singular values of C, which keeps about twice as many directions.
    upstream: keep the two defects of the reference (see `_store` and `design`).
    """

    def __init__(
        self,
        layers: int,
        width: int,
        lamb: float,
        lame: float,
        energy: Energy = "upstream",
        upstream: bool = False,
    ):
        super().__init__()
        self.lamb, self.lame, self.energy, self.upstream = lamb, lame, energy, upstream
        self.basis: Tensor  # (L, D, K): columns beyond a layer's own number are zero
        self.columns: Tensor  # (L,)
        self.retain: Tensor  # (L,): whether M spans the free space
        self.register_buffer("basis", torch.zeros(layers, width, 0, dtype=torch.float64))
        self.register_buffer("columns", torch.zeros(layers, dtype=torch.int64))
        self.register_buffer("retain", torch.zeros(layers, dtype=torch.bool))

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    @property
    def free(self) -> Tensor:
        """(L,): dimensions of the free space."""
        return torch.where(self.retain, self.columns, self.width - self.columns)

    def projector(self) -> Tensor:
        """M M^T (L, D, D)."""
        return self.basis @ self.basis.mT

    def free_projector(self) -> Tensor:
        """Q (L, D, D)."""
        stored = self.projector()
        return torch.where(self.retain[:, None, None], stored, self._eye() - stored)

    def describe(self) -> str:
        """Columns and kind by layer, and the room that is left."""
        kinds = ["retain" if kept else "remove" for kept in self.retain.tolist()]
        columns = ", ".join(f"{n} {kind}" for n, kind in zip(self.columns.tolist(), kinds, strict=True))
        free = ", ".join(map(str, self.free.tolist()))
        return f"columns by layer {columns}; free for new branches {free} of {self.width} directions"

    def threshold(self, task: int, num_tasks: int) -> float:
        """eps_t."""
        return self.lamb + (self.lame - self.lamb) * task / num_tasks

    def update(self, moments: Tensor, task: int, num_tasks: int) -> None:
        """Move directions of C (L, D, D) from the free to the old space until it holds the share eps_t of C's energy.

        s_i: energies of Q C in descending order, tot: energy of C, kept_i = 1 - (s_i + s_{i+1} + ...) / tot.
        First task:  r = number of i with s_0 + ... + s_i < eps tot, one fewer than needed to reach it, at least 1.
        Later:       r = number of i with kept_i < eps (retain: <= eps), so that eps is reached.

        Raises TrainingError with `upstream` where the reference aborts.
        """
        energies, vectors, total = self._spectrum(moments, self.energy)
        share, eps = energies / total[:, None], self.threshold(task, num_tasks)
        free = self.free
        if task == 0:
            new = (share.cumsum(dim=1) < eps).sum(dim=1).clamp(min=1)
        else:
            kept = 1 - share.flip(1).cumsum(dim=1).flip(1)
            wanted = (kept < eps) | (self.retain[:, None] & (kept == eps))
            # Energies below rounding are not directions of C: a share of 1 would take them all.
            wanted &= share > self.width * torch.finfo(share.dtype).eps
            new = wanted.sum(dim=1)
        self._store(vectors, new.clamp(max=free), free, first=task == 0)

    def design(self, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Input factors A (L, r, D), float64, and how many of each layer's rows are usable (L,).

        A = U[:, :r]^T / sqrt(3), U: left singular vectors of Q C; its rows have the norm that Kaiming-uniform rows
        have in expectation. Rows beyond the rank of Q C are zero, since any direction there would interfere. A
        singular value counts when it exceeds max(1e-8, D eps) ||C||, eps of the type in which C was summed.

        upstream: such rows are whatever an SVD returns, coordinate axes where Q C = 0, which interfere fully.
        """
        _, vectors, _ = self._spectrum(moments, "upstream")
        directions = vectors[:, :, :rank]  # (L, D, r)
        # ||u^T Q C|| = ||u^T C||, from the vectors: roots of eigenvalues would resolve nothing below 1e-8.
        singular = (directions.mT @ moments.double()).norm(dim=2)  # (L, r)
        floor = max(1e-8, self.width * torch.finfo(moments.dtype).eps)
        usable = singular > floor * moments.double().norm(dim=(1, 2))[:, None]
        usable &= torch.arange(rank, device=usable.device) < self.free[:, None]
        ranks = usable.sum(dim=1)
        if self.upstream and bool((ranks < rank).any()):
            left = torch.linalg.svd(self.free_projector() @ moments.double()).U
            return left[:, :, :rank].mT / math.sqrt(3), ranks
        return directions.mT * usable[:, :, None] / math.sqrt(3), ranks

    def _eye(self) -> Tensor:
        return torch.eye(self.width, dtype=self.basis.dtype, device=self.basis.device)

    def _spectrum(self, moments: Tensor, energy: Energy) -> tuple[Tensor, Tensor, Tensor]:
        """Energies (L, D) of Q C in descending order, 0 for the old space, which comes last; the orthonormal
        vectors (L, D, D) as columns; the energy of C (L,)."""
        moments = moments.double()
        squared = energy == "upstream"
        total = moments.square().sum(dim=(1, 2)) if squared else moments.diagonal(dim1=1, dim2=2).sum(dim=1)
        if not bool((self.free < self.width).any()):  # Q = I: C itself, without squaring it
            values, vectors = torch.linalg.eigh(moments)
            values = values.clamp(min=0)
            return (values.square() if squared else values).flip(1), vectors.flip(2), total
        free = self.free_projector()
        projected = free @ moments
        matrix = projected @ (projected.mT if squared else free)
        old = self._eye() - free
        values, vectors = torch.linalg.eigh(matrix - total[:, None, None] * old)
        return values.flip(1).clamp(min=0), vectors.flip(2), total

    def _store(self, vectors: Tensor, new: Tensor, free: Tensor, first: bool) -> None:
        """Keep the basis of one of the two spaces. vectors (L, D, D): free directions first, then the old space; the
        first `new` (L,) of the `free` (L,) directions become old."""
        old = self.width - free + new
        retain = self._flips(old, first)
        bases = []
        for matrix, n, f, flipped in zip(vectors, new.tolist(), free.tolist(), retain.tolist(), strict=True):
            bases.append(matrix[:, n:f] if flipped else torch.cat([matrix[:, :n], matrix[:, f:]], dim=1))
        self._set(bases, retain)

    def _flips(self, old: Tensor, first: bool) -> Tensor:
        """(L,): whether M spans the free space from now on; old (L,): dimensions of the old space."""
        return self.retain

    def _set(self, bases: Sequence[Tensor], retain: Tensor) -> None:
        sizes = [basis.shape[1] for basis in bases]
        self.basis = torch.stack([F.pad(b, (0, max(sizes) - b.shape[1])) for b in bases])
        self.columns, self.retain = self.columns.new_tensor(sizes), retain


class DualGPM(GPM):
    """GPM that stores the smaller of the two spaces, so at most D / 2 columns a layer: once the old space has more
    than D / 2 dimensions (in the first task: at least D / 2), M becomes a basis of its complement and shrinks.

    upstream: the reference calls the first task's basis "retain" without taking the complement. With more than D / 2
    columns it then aborts; with exactly D / 2 it trains inside the old space, and so do we.
    """

    def _flips(self, old: Tensor, first: bool) -> Tensor:
        return self.retain | (2 * old >= self.width if first else 2 * old > self.width)

    def _store(self, vectors: Tensor, new: Tensor, free: Tensor, first: bool) -> None:
        super()._store(vectors, new, free, first)
        if not (self.upstream and first and bool(self.retain.any())):
            return
        for layer, (columns, kept) in enumerate(zip(self.columns.tolist(), self.retain.tolist(), strict=True)):
            if kept and 2 * columns != self.width:
                raise TrainingError(
                    f"the memory of layer {layer} keeps {self.width - columns} of {self.width} directions after the "
                    'first task, where the reference aborts: lower lamb, or drop "upstream"'
                )
            if kept:
                self.basis[layer, :, :columns] = vectors[layer, :, :columns]
