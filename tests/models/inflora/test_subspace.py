"""GPM, DualGPM and the branch design, without a learner."""

import numpy as np
import pytest
import torch

from models.inflora.subspace import GPM, DualGPM
from tests.conftest import reference
from utils.errors import TrainingError


def moments(layers: int, width: int, seed: int = 0, decay: float = 0.8) -> torch.Tensor:
    """Second moments with eigenvalues decay^i (L, D, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(layers, width, width, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q
    values = decay ** torch.arange(width, dtype=torch.float64)
    return vectors * values @ vectors.mT


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.mT


@pytest.mark.parity
@pytest.mark.parametrize(
    "name, kind", [("dualgpm_sequence", DualGPM), ("dualgpm_sequence_tight", DualGPM), ("gpm_sequence", GPM)]
)
def test_memory_sequence(name, kind):  # README: dimensions exact, projectors 1e-9
    ref = reference(f"inflora/{name}")
    given, sessions = torch.from_numpy(ref["moments"]), int(ref["total_sessions"])
    memory = kind(given.shape[1], given.shape[2], float(ref["lamb"]), float(ref["lame"]))
    for task in range(len(given)):
        assert memory.threshold(task, sessions) == pytest.approx(ref["thresholds"][task], abs=1e-15)
        memory.update(given[task], task, sessions)
        np.testing.assert_array_equal(memory.columns, ref["basis_dim"][task])
        np.testing.assert_array_equal(memory.retain, ref["is_retain"][task].astype(bool))
        np.testing.assert_allclose(memory.projector(), ref["projector"][task], rtol=0, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("prefix", ["first", "remove", "retain"])
def test_branch_design(prefix, upstream):  # README: 1e-10 on projectors
    ref = {k: torch.from_numpy(v) for k, v in reference("inflora/branch_design").items()}
    moment = ref[f"{prefix}_moment"][None]
    memory = GPM(1, moment.shape[1], 0.9, 1.0, upstream=upstream)
    if prefix != "first":
        memory._set([ref[f"{prefix}_basis"]], torch.tensor([prefix == "retain"]))
    rank = int(ref["rank"])
    design, ranks = memory.design(moment, rank)
    assert ranks.tolist() == [rank]
    torch.testing.assert_close(3 * design[0].mT @ design[0], ref[f"{prefix}_A_projector"], rtol=0, atol=1e-10)
    signs = (design[0] * ref[f"{prefix}_A_k"]).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(design[0] * signs, ref[f"{prefix}_A_k"], rtol=0, atol=1e-10)


def test_energy_rules_by_the_decay_of_the_specification():
    """Eigenvalues 0.97^i, D = 768: 49 directions by the code's rule, 98 by the paper's, at 95 %; 64 and 128 at 98 %."""
    moment = torch.diag(0.97 ** torch.arange(768, dtype=torch.float64))[None]
    for share, upstream, paper in ((0.95, 49, 98), (0.98, 64, 128)):
        for energy, columns in (("upstream", upstream), ("paper", paper)):
            memory = GPM(1, 768, share, share, energy)
            memory.update(moment, 0, 1)
            assert memory.columns.tolist() == [columns]


@pytest.mark.parametrize("energy", ["upstream", "paper"])
def test_later_tasks_reach_the_threshold_and_not_a_direction_more(energy):
    memory = GPM(3, 20, 0.9, 0.9, energy)
    for task in range(3):
        moment = moments(3, 20, seed=task)
        before = memory.free_projector()
        memory.update(moment, task, 3)
        free = memory.free_projector()

        def left_out(space, moment=moment):
            if energy == "paper":
                return (space @ moment @ space).diagonal(dim1=1, dim2=2).sum(1) / moment.diagonal(dim1=1, dim2=2).sum(1)
            return (space @ moment).square().sum(dim=(1, 2)) / moment.square().sum(dim=(1, 2))

        if task:
            assert bool((left_out(free) <= 0.1 + 1e-12).all())
            assert bool((left_out(before) > 0.1).all())
        torch.testing.assert_close(before @ free, free)  # the old space only grows


def test_layers_do_not_depend_on_their_neighbours():
    given = [moments(3, 16, seed=task, decay=d) for task, d in enumerate((0.5, 0.8, 0.95))]
    together = DualGPM(3, 16, 0.9, 1.0)
    alone = [DualGPM(1, 16, 0.9, 1.0) for _ in range(3)]
    for task, moment in enumerate(given):
        together.update(moment, task, 3)
        for layer, memory in enumerate(alone):
            memory.update(moment[layer : layer + 1], task, 3)
    torch.testing.assert_close(together.free_projector(), torch.cat([m.free_projector() for m in alone]))


def test_first_task_that_fills_half_the_width_stores_the_complement():
    """D4 of the specification: the reference aborts, or with exactly half the width trains inside the old space."""
    moment = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0.1, 0.1, 0.1], dtype=torch.float64))[None]
    old = torch.diag(torch.tensor([1.0] * 4 + [0] * 4, dtype=torch.float64))

    for share in (0.8, 0.9999):
        memory, plain = DualGPM(1, 8, share, 1.0), GPM(1, 8, share, 1.0)
        memory.update(moment, 0, 2)
        plain.update(moment, 0, 2)
        assert memory.retain.tolist() == [True] and not plain.retain.item()
        assert memory.columns.item() == 8 - plain.columns.item() <= 4
        torch.testing.assert_close(memory.free_projector(), plain.free_projector())

    half = torch.diag(torch.tensor([4.0, 3, 2, 1, 0.5, 0.1, 0.1, 0.1], dtype=torch.float64))[None]
    share = float((16 + 9 + 4 + 1.1) / half.square().sum())
    inverted = DualGPM(1, 8, share, 1.0, upstream=True)
    inverted.update(half, 0, 2)
    assert inverted.retain.item() and inverted.columns.item() == 4
    torch.testing.assert_close(inverted.free_projector()[0], old)

    with pytest.raises(TrainingError, match="keeps 7 of 8 directions"):
        DualGPM(1, 8, 0.9999, 1.0, upstream=True).update(moment, 0, 2)


def test_exhausted_space_gives_no_branch():
    """D5: where nothing is free, A is zero; the reference returns coordinate axes, which interfere fully."""
    moment = moments(2, 12)
    memory, quirk = GPM(2, 12, 0.9, 1.0), GPM(2, 12, 0.9, 1.0, upstream=True)
    everything = torch.eye(12, dtype=torch.float64)
    for each in (memory, quirk):
        each._set([everything, everything[:, :10]], torch.tensor([False, False]))
    design, ranks = memory.design(moment, 4)
    assert ranks.tolist() == [0, 2]
    assert not design[0].any() and not design[1, 2:].any()
    assert float((design[1] @ everything[:, :10]).abs().max()) < 1e-10
    torch.testing.assert_close((design[1, :2] @ design[1, :2].mT) * 3, everything[:2, :2])

    design, ranks = quirk.design(moment, 4)
    assert ranks.tolist() == [0, 2]
    torch.testing.assert_close(design[0] * 3**0.5, everything[:4])


@pytest.mark.parametrize("dtype, size, kept", [(torch.float64, 1e-6, 3), (torch.float64, 1e-9, 2)])
def test_rank_of_a_design_counts_singular_values_above_the_floor(dtype, size, kept):
    moment = torch.zeros(1, 16, 16, dtype=dtype)
    moment[0].diagonal()[:3] = torch.tensor([1.0, 0.5, size], dtype=dtype)
    rotated = moments(1, 16)[0]
    vectors = torch.linalg.eigh(rotated).eigenvectors.to(dtype)
    _, ranks = GPM(1, 16, 0.9, 1.0).design(vectors @ moment @ vectors.mT, 8)
    assert ranks.tolist() == [kept]


def test_moments_summed_in_single_precision_have_a_higher_floor():
    moment = torch.diag(torch.tensor([1.0, 0.5, 1e-6] + [0.0] * 13))[None]
    assert GPM(1, 16, 0.9, 1.0).design(moment, 8)[1].tolist() == [2]


def test_full_threshold_stops_where_the_inputs_end():
    """lamb = 1: the memory holds every direction of the inputs and none beside them."""
    memory = DualGPM(1, 10, 1.0, 1.0)
    generator = torch.Generator().manual_seed(1)
    for task in range(3):
        tokens = torch.randn(2, 10, generator=generator, dtype=torch.float64)
        memory.update((tokens.mT @ tokens)[None], task, 3)
        left = (memory.free_projector()[0] @ tokens.mT).norm() / tokens.norm()
        if task:  # the first task stops one direction short, as specified
            assert left < 1e-7
    assert memory.free.item() >= 10 - 6


@pytest.mark.parametrize("kind", [GPM, DualGPM])
def test_state_restores_a_memory_of_any_size(kind):
    memory = kind(2, 12, 0.95, 1.0)
    for task in range(3):
        memory.update(moments(2, 12, seed=task), task, 4)
    copy = kind(2, 12, 0.95, 1.0)
    copy.load_state_dict(memory.state_dict())
    for each in (memory, copy):
        each.update(moments(2, 12, seed=9), 3, 4)
    assert torch.equal(memory.basis, copy.basis) and torch.equal(memory.retain, copy.retain)


def test_dual_memory_stores_at_most_half_the_width():
    memory = DualGPM(2, 14, 0.95, 1.0)
    for task in range(6):
        memory.update(moments(2, 14, seed=task), task, 6)
        assert memory.basis.shape[2] <= 7
        assert float((memory.projector() @ memory.projector() - memory.projector()).abs().max()) < 1e-12
