"""Ridge regression on random features: the reference's losses, choices and weights."""

import numpy as np
import pytest
import torch

from models.ranpac.ridge import RandomRidge, choose_ridge, ridge_losses, ridge_predictions
from tests.conftest import reference
from tests.convs.vits import numbers

RIDGES = [10.0**k for k in range(-8, 9)]


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def near(ours: torch.Tensor, stored, tolerance: float) -> None:
    """Largest absolute error over the largest value."""
    assert (ours - tensor(stored)).abs().max() <= tolerance * np.abs(stored).max()


@pytest.mark.parity
def test_losses_and_choice_of_the_reference():
    arrays = reference("ranpac/ridge_search")
    h, labels = tensor(arrays["H"]), tensor(arrays["Y"].argmax(axis=1))
    factor = len(labels.unique()) / arrays["Y"].shape[1]
    losses = factor * ridge_losses(h.double(), labels, RIDGES)
    np.testing.assert_allclose(losses.numpy(), arrays["f64/losses"], rtol=1e-6)
    assert choose_ridge(losses, RIDGES) == pytest.approx(arrays["f64/ridge"].item())


@pytest.mark.parity
def test_equal_and_nearly_equal_losses():
    arrays = reference("ranpac/ridge_choice")
    slack = arrays["slack"].item()
    for losses, ridge, slow in zip(arrays["losses"], arrays["ridge"], arrays["ridge_with_slack"], strict=True):
        assert choose_ridge(tensor(losses), RIDGES) == pytest.approx(ridge)
        assert choose_ridge(tensor(losses), RIDGES, slack) == pytest.approx(slow)
    for case in sorted({key.split("/")[0] for key in arrays if key.endswith("/H")}):
        labels = tensor(arrays[f"{case}/Y"].argmax(axis=1))
        losses = ridge_losses(tensor(arrays[f"{case}/H"]), labels, RIDGES)
        factor = len(labels.unique()) / arrays[f"{case}/Y"].shape[1]
        np.testing.assert_allclose(factor * losses.numpy(), arrays[f"{case}/losses"], rtol=1e-6)
        assert choose_ridge(losses, RIDGES) == pytest.approx(arrays[f"{case}/ridge"].item())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["domains", "domains_ncm"])
def test_sums_go_on_over_domains(name):
    """README: 1e-9; without a projection the weights are the class sums."""
    arrays = reference(f"ranpac/{name}")
    classes = int(arrays["classes"])
    ridge = RandomRidge(arrays["test_features"].shape[1]).double()
    ridge.draw(arrays["W_rand"].shape[1] if "W_rand" in arrays else 0, torch.Generator())
    if "W_rand" in arrays:
        ridge.projection.copy_(tensor(arrays["W_rand"]))
    ridge.grow(classes)
    for domain in numbers(arrays, r"features/(\d+)"):
        features, labels = tensor(arrays[f"features/{domain}"]), tensor(arrays[f"labels/{domain}"])
        ridge.add(features, labels)
        h = ridge.expand(tensor(arrays["test_features"]))
        if name == "domains_ncm":
            near(ridge.sums, arrays[f"weight/{domain}"], 1e-9)
            logits = torch.nn.functional.cosine_similarity(h[:, None], ridge.sums, dim=2)
            near(logits, arrays[f"logits/{domain}"], 1e-9)
            continue
        losses = ridge_losses(ridge.expand(features), labels, RIDGES) * len(labels.unique()) / classes
        np.testing.assert_allclose(losses.numpy(), arrays[f"ridge_losses/{domain}"], rtol=1e-6)
        ridge.solve(choose_ridge(losses, RIDGES))
        near(ridge.weight, arrays[f"weight/{domain}"], 1e-9)
        near(h @ ridge.weight.mT, arrays[f"logits/{domain}"], 1e-9)


@pytest.mark.parametrize(("rows", "width"), [(40, 10), (40, 100), (40, 32), (5, 3)])
def test_losses_are_those_of_a_solve_each(rows, width):
    torch.manual_seed(0)
    h = torch.randn(rows, width, dtype=torch.float64).relu()
    labels = torch.randint(4, (rows,))
    targets = torch.nn.functional.one_hot(labels, 4).double()
    targets = targets[:, targets.any(dim=0)]
    fitted = int(0.8 * rows)
    a, y, eye = h[:fitted], targets[:fitted], torch.eye(width, dtype=torch.float64)
    plain = [
        (h[fitted:] @ torch.linalg.solve(a.T @ a + ridge * eye, a.T @ y) - targets[fitted:]).square().mean()
        for ridge in RIDGES[4:]
    ]
    torch.testing.assert_close(ridge_losses(h, labels, RIDGES[4:]), torch.stack(plain), rtol=1e-6, atol=0)


def test_the_projection_is_standard_normal_and_repeats():
    first, second = RandomRidge(64), RandomRidge(64)
    for ridge in (first, second):
        ridge.draw(1000, torch.Generator().manual_seed(3))
    assert torch.equal(first.projection, second.projection) and first.projection.dtype == torch.float32
    assert abs(first.projection.mean()) < 0.02 and abs(first.projection.std() - 1) < 0.02


def test_a_system_that_rounding_makes_indefinite_is_solved():
    ridge = RandomRidge(3)
    ridge.draw(0, torch.Generator())
    ridge.grow(2)
    ridge.gram.copy_(torch.diag(torch.tensor([1e7, 1.0, -1e-7])))
    ridge.sums.copy_(torch.ones(2, 3))
    expected = torch.tensor([1e-7, 1 / (1 + 1e-8), 1 / (1e-8 - 1e-7)], dtype=torch.float64)
    ridge.solve(1e-8)
    torch.testing.assert_close(ridge.weight, expected.expand(2, 3), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3, 1e6])
def test_below_the_rounding_of_the_sums_scores_are_chance(scale):
    """A singular system (rank 8 of 200) against the answer by singular values, which has no such limit."""
    torch.manual_seed(0)
    features = scale * (torch.randn(60, 8) @ torch.randn(8, 200))
    labels = torch.arange(60) % 3
    ridge = RandomRidge(200)
    ridge.draw(0, torch.Generator())
    ridge.grow(3)
    ridge.add(features, labels)

    def error(lamb: float) -> float:
        ridge.solve(lamb)
        rows = features.double()
        exact = ridge_predictions(rows, torch.nn.functional.one_hot(labels).double(), rows, [lamb])[0]
        return float((rows @ ridge.weight.mT - exact).abs().max())

    assert error(1e4 * ridge.rounding) < 0.01
    assert error(1e-3 * ridge.rounding) > 0.1


def test_state_of_any_width():
    ridge, other = RandomRidge(6), RandomRidge(6)
    ridge.draw(9, torch.Generator())
    ridge.grow(3)
    ridge.add(torch.randn(7, 6), torch.randint(3, (7,)))
    ridge.solve(1.0)
    other.load_state_dict(ridge.state_dict())
    assert torch.equal(ridge.weight, other.weight) and other.chosen.tolist() == [1.0]
