"""The arithmetic of landscapes against losses whose answers are known in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from models.parts.varied import Weights
from tools.landscape import surfaces as flat
from tools.landscape.surfaces import Landscape

SHAPES = [(4, 3), (5,), (2, 3, 2), (3, 2, 2, 2), ()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_weights(seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator(seed), dtype=torch.float64)) for shape in SHAPES]


def quadratic(spectrum: list[float], at_minimum: bool = False):
    """L = x H x / 2 + g x with H of the given eigenvalues, x a 2-D weight; (landscape, H, g)."""
    n = len(spectrum)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator(1), dtype=torch.float64)).Q
    hessian = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    slope = torch.zeros(n, dtype=torch.float64) if at_minimum else torch.arange(n, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(2, n // 2, dtype=torch.float64))

    def loss() -> torch.Tensor:
        x = weight.flatten()
        return x @ hessian @ x / 2 + slope @ x

    # Two halves add up to the whole, as the parts of a batch do.
    return Landscape([lambda: loss() / 2, lambda: loss() / 2], [Weights(weight)]), hessian, slope


def test_directions_have_the_rows_of_the_weights_and_are_orthogonal():
    weights = some_weights()
    with torch.no_grad():
        weights[0][1] = 0  # a row of zeros stays where it is
    landscape = Landscape([], [Weights(weight) for weight in weights])
    first, second = flat.directions(landscape, generator())
    for weight, one, two in zip(weights, first, second, strict=True):
        torch.testing.assert_close(flat.row_norms(one), flat.row_norms(weight.detach()))
        if weight.dim():  # a single number has no second direction
            torch.testing.assert_close(flat.row_norms(two), flat.row_norms(weight.detach()))
        rows = flat.rows_of(one) * flat.rows_of(two)
        torch.testing.assert_close(rows.sum(dim=1), torch.zeros(len(rows), dtype=torch.float64))
    assert first[0][1].eq(0).all() and first[0][0].ne(0).all() and second[-1] == 0
    assert flat.share_in_zero_rows(landscape.start) == 3 / (12 + 5 + 12 + 24 + 1)


def test_what_counts_as_one_row():
    sizes = [tuple(flat.rows_of(weight).shape) for weight in some_weights()]
    assert sizes == [(4, 3), (1, 5), (6, 2), (3, 8), (1, 1)]


def test_directions_of_a_fixed_radius_move_zeros_too():
    weights = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(5))]
    first, second = flat.directions(Landscape([], [Weights(w) for w in weights]), generator(), radius=0.3)
    for direction in (first, second):
        for value in direction:
            torch.testing.assert_close(flat.row_norms(value), torch.full((len(flat.rows_of(value)), 1), 0.3))
    assert abs(flat.dot(first, second)) < 1e-6


def test_surface_and_line_of_a_quadratic():
    landscape, hessian, slope = quadratic([3.0, 1.0, 0.5, -1.0])
    first, second = ([torch.randn(2, 2, generator=generator(s), dtype=torch.float64)] for s in (2, 3))
    grid = np.linspace(-1, 1, 5)

    def exact(a: float, b: float) -> float:
        x = (a * first[0] + b * second[0]).flatten()
        return float(x @ hessian @ x / 2 + slope @ x)

    with landscape:
        found = flat.surface(landscape, first, second, grid)
        line = flat.line(landscape, first, grid, (1.0, second))
    np.testing.assert_allclose(found, [[exact(a, b) for a in grid] for b in grid], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(line, [exact(a, 1.0) for a in grid], rtol=1e-12, atol=1e-12)


def test_one_step_on_the_sphere_follows_the_gradient():
    landscape, hessian, slope = quadratic([3.0, 1.0, 0.5, 0.25])
    step = 0.1 * slope / slope.norm()
    with landscape:
        found = flat.sphere_increase(landscape, 0.1, 10, generator())
    assert found[0] == pytest.approx(float(0.1 * slope.norm() + step @ hessian @ step / 2), rel=1e-12)
    assert (np.diff(found) >= 0).all()
    # The maximum over the sphere lies where the gradient is parallel to the offset: (H - m) e = -g, |e| = rho.
    values, vectors = torch.linalg.eigh(hessian)
    low, high = 3.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        length = ((vectors.T @ slope) / (middle - values)).norm()
        low, high = (middle, high) if length > 0.1 else (low, middle)
    best = vectors @ ((vectors.T @ slope) / (low - values))
    assert found[-1] == pytest.approx(float(best @ hessian @ best / 2 + slope @ best), rel=1e-9)


def test_the_sphere_around_a_minimum_is_climbed_to_the_top_eigenvector():
    landscape, _, _ = quadratic([4.0, 1.0, 0.5, 0.25], at_minimum=True)
    with landscape:
        found = flat.sphere_increase(landscape, 0.1, 10, generator())
    assert 0 < found[0] < found[-1] == pytest.approx(0.1**2 * 4 / 2, rel=1e-6)


def test_noise_raises_a_quadratic_by_half_its_scaled_trace():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    curvature = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    start = weight.detach().clone()
    with Landscape([lambda: (curvature * (weight - start) ** 2).sum() / 2], [Weights(weight)]) as landscape:
        found = flat.noise_increase(landscape, 0.1, 4000, generator())
    # Each number of a row has variance r^2 |row|^2 / n: 0.01 * 25 / 2, 0.01 * 4 / 2, 0.
    expected = 0.5 * (0.125 * (1 + 2) + 0.02 * (3 + 4))
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() / np.sqrt(len(found)) < 0.03 * expected


@pytest.mark.parametrize(
    ("spectrum", "top", "tolerance"),
    [
        ([7.0, 2.0, 1.0, 0.1], 7.0, 1e-9),
        ([-9.0, 2.0, -1.0, 0.5], 2.0, 1e-2),  # the largest in size is negative
        ([0.0, 0.0, 0.0, 0.0], 0.0, 1e-12),
    ],
)
def test_top_eigenvalue(spectrum, top, tolerance):
    landscape, _, _ = quadratic(spectrum)
    with landscape:
        value, residual = flat.top_eigenvalue(landscape, 20, generator())
    assert value == pytest.approx(top, rel=tolerance, abs=1e-12)
    assert residual < 0.2


def test_a_residual_shows_that_the_iteration_has_not_arrived():
    landscape, hessian, _ = quadratic([5.0, 4.9, 1.0, 1.0])
    with landscape:
        value, residual = flat.top_eigenvalue(landscape, 3, generator())
    assert residual > 1e-3
    assert min(abs(value - true) for true in (5.0, 4.9, 1.0)) <= residual * abs(value) + 1e-12


def test_trace():
    landscape, hessian, _ = quadratic([7.0, 2.0, -1.0, 0.1])
    with landscape:
        samples = flat.trace_samples(landscape, 2000, generator())
    assert abs(samples.mean() - 8.1) < 4 * samples.std() / np.sqrt(2000)
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    with Landscape([lambda: (torch.arange(6).view(3, 2) * weight**2).sum() / 2], [Weights(weight)]) as diagonal:
        assert flat.trace_samples(diagonal, 3, generator()).tolist() == [15.0] * 3  # exact, whatever the signs


def test_barrier_is_what_lies_above_the_mean_of_the_ends():
    grid = np.linspace(-0.5, 1.5, 9)  # holds 0, 0.25, ..., 1
    losses = np.array([90, 90, 1.0, 2, 6, 3, 2, 90, 90])
    assert flat.barrier(losses, grid) == 6 - 1.5
    assert flat.barrier(np.abs(grid - 0.5), grid) == 0  # a valley between two equal ends: the ends are highest
    assert flat.barrier(grid, grid) == 0.5  # a slope: its upper end stands above the mean of both


def test_between_two_points_that_are_not_the_weights():
    weight = nn.Parameter(torch.tensor([[5.0, 5.0]], dtype=torch.float64))
    ends = ([torch.tensor([[1.0, 0.0]], dtype=torch.float64)], [torch.tensor([[0.0, 2.0]], dtype=torch.float64)])
    with Landscape([lambda: (weight * torch.tensor([1.0, 10.0])).sum()], [Weights(weight)]) as landscape:
        np.testing.assert_allclose(flat.between(landscape, ends, np.array([-1, 0, 0.5, 1, 2])), [-18, 1, 10.5, 20, 39])


def test_an_entry_of_a_stack_is_varied_alone():
    stack = nn.Parameter(torch.arange(12, dtype=torch.float64).view(3, 2, 2))
    before = stack.detach().clone()
    with Landscape([lambda: (stack**3).sum()], [Weights(stack, 1)]) as landscape:
        value, gradient = landscape.gradient()
        torch.testing.assert_close(gradient[0], 3 * before[1] ** 2)
        product = landscape.hessian_product([torch.ones(2, 2, dtype=torch.float64)])
        torch.testing.assert_close(product[0], 6 * before[1])
        moved = landscape.loss((1.0, [torch.ones(2, 2, dtype=torch.float64)]))
    assert moved - value == pytest.approx(float(((before[1] + 1) ** 3 - before[1] ** 3).sum()))
    assert torch.equal(stack, before)


def test_weights_and_what_trains_are_restored_bit_for_bit():
    """Also after an error; adding and taking away the same offset would not bring every float32 back."""
    weights = [nn.Parameter(torch.randn(40, 30, generator=generator())), nn.Parameter(torch.randn(7), False)]
    before = [weight.detach().clone() for weight in weights]

    def loss() -> torch.Tensor:
        return sum(((weight - 1) ** 4).sum() for weight in weights)

    with Landscape([loss], [Weights(weight) for weight in weights]) as landscape:
        first, second = flat.directions(landscape, generator())
        flat.surface(landscape, first, second, np.linspace(-1, 1, 3))
        flat.sphere_increase(landscape, 0.1, 3, generator())
        flat.top_eigenvalue(landscape, 3, generator())
        flat.noise_increase(landscape, 0.1, 3, generator())
    assert all(torch.equal(weight, saved) for weight, saved in zip(weights, before, strict=True))
    assert [weight.requires_grad for weight in weights] == [True, False]
    assert all(weight.grad is None for weight in weights)

    with pytest.raises(ZeroDivisionError), Landscape([loss], [Weights(weights[0])]) as landscape:
        landscape.loss((1.0, [torch.ones(40, 30)]))
        _ = 1 / 0
    assert torch.equal(weights[0], before[0])


def test_only_the_varied_weights_are_copied():
    frozen, varied = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(3))
    landscape = Landscape([lambda: (frozen.sum() + varied).sum()], [Weights(varied)])
    assert [value.shape for value in landscape.start] == [varied.shape]


def test_numbers_are_the_same_for_a_seed_and_others_for_another():
    def once(seed: int) -> list:
        landscape, _, _ = quadratic([3.0, 1.0, 0.5, -1.0])
        with landscape:
            first, second = flat.directions(landscape, generator(seed), radius=1.0)
            return [
                *flat.surface(landscape, first, second, np.linspace(-1, 1, 3)).flatten(),
                *flat.trace_samples(landscape, 3, generator(seed)),
                flat.top_eigenvalue(landscape, 2, generator(seed))[0],
            ]

    assert once(1) == once(1) != once(2)


def test_second_derivatives_go_through_a_vision_transformer():
    """Attention, LayerNorm and GELU; H v against the difference of two gradients."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = (
        VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).double().eval()
    )
    images, targets = torch.rand(5, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    weights = [Weights(parameter) for parameter in vit.parameters()]
    with Landscape([lambda: nn.functional.cross_entropy(vit(images), targets)], weights) as landscape:
        vector = landscape.random(torch.randn, generator())
        product = landscape.hessian_product(vector)
        ahead, behind = (landscape.gradient((step, vector))[1] for step in (1e-5, -1e-5))
    for exact, up, down in zip(product, ahead, behind, strict=True):
        torch.testing.assert_close((up - down) / 2e-5, exact, rtol=1e-4, atol=1e-6)


def test_changes_between_two_states():
    start = {"w": torch.zeros(2, 3), "same": torch.ones(2), "scale": torch.tensor(1.0), "count": torch.tensor(3)}
    end = {"w": torch.ones(4, 3), "same": torch.ones(2), "scale": torch.tensor(3.0), "count": torch.tensor(5), "x": 1}
    found = flat.changes(start, end)
    assert {name: change.tolist() for name, (_, change) in found.items()} == {"w": [[1] * 3] * 2, "scale": 2}
    assert found["w"][0] is start["w"]
    assert flat.changes(start, end | {"w": torch.ones(2, 4)}) is None
    assert flat.changes(start, end | {"w": torch.ones(1, 3)}) is None
    assert flat.changes({"gone": torch.zeros(1)}, end) is None
