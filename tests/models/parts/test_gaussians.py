"""Class Gaussians: against the reference's numbers, against a distribution object, and through a checkpoint."""

import weakref

import numpy as np
import pytest
import torch

from models.parts.gaussians import CHUNK, STORAGE, ClassGaussians, by_label, cholesky, summed
from tests.conftest import build_tiny, reference
from tests.models.parts.test_alignment import float32_factor_error


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def made(
    storage: str, classes: int = 3, count: int = 40, width: int = 6, **keys
) -> tuple[ClassGaussians, torch.Tensor]:
    """Gaussians of correlated features, and those features (classes, count, width)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(classes, width, width, generator=generator)
    features = torch.randn(classes, count, width, generator=generator) @ mixing + torch.arange(classes)[:, None, None]
    gaussians = ClassGaussians(width, storage, **keys)
    gaussians.add(features.flatten(0, 1), torch.arange(classes).repeat_interleave(count), task=0)
    return gaussians, features


@pytest.mark.parity
def test_means_and_covariances_of_the_reference():
    stats = reference("slca/class_stats")
    bounds = stats["bounds"]
    gaussians = ClassGaussians(stats["features/0"].shape[1])
    for task, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        features = [tensor(stats[f"features/{c}"]) for c in range(first, last)]
        labels = torch.arange(first, last).repeat_interleave(torch.tensor([len(rows) for rows in features]))
        mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(task))
        gaussians.add(torch.cat(features)[mixed], labels[mixed], task)
        assert torch.allclose(gaussians.means, tensor(stats[f"means/{task}"]), atol=1e-5, rtol=0)
        assert torch.allclose(gaussians.dense_covariances(), tensor(stats[f"covs/{task}"]), atol=1e-5, rtol=0)
        assert gaussians.labels.tolist() == list(range(last))
    assert gaussians.tasks.tolist() == np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)).tolist()


@pytest.mark.parity
def test_samples_of_the_reference():
    stats = reference("slca/class_stats")
    mean, cov, eps = (tensor(stats[f"sample/{name}"])[None] for name in ("mean", "cov", "eps"))
    gaussians = ClassGaussians(mean.shape[1])
    gaussians.add_moments(mean, cov, torch.tensor([0]), task=0)
    ours = gaussians.draw(gaussians.means, eps.shape[1], eps)
    exact = mean.double() + eps.double() @ torch.linalg.cholesky(cov.double()).mT
    assert torch.allclose(ours.double(), exact, atol=5e-6, rtol=0)
    tolerance = max(1e-5, float32_factor_error(cov))
    assert torch.allclose(ours[0], tensor(stats["sample/x"]), atol=tolerance, rtol=0)


def test_full_covariance_is_that_of_numpy_plus_ridge():
    gaussians, features = made("full", ridge=0.5)
    for dense, rows in zip(gaussians.dense_covariances(), features, strict=True):
        expected = np.cov(rows.double().numpy(), rowvar=False) + 0.5 * np.eye(rows.shape[1])
        np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-5)


def test_one_image_leaves_the_ridge_alone():
    for storage in STORAGE:
        gaussians = ClassGaussians(4, storage, ridge=1e-2)
        gaussians.add(torch.ones(1, 4), torch.tensor([7]), task=0)
        assert torch.allclose(gaussians.dense_covariances()[0], 1e-2 * torch.eye(4), atol=1e-8)
        assert gaussians.labels.tolist() == [7]


def test_diag_keeps_the_variances_and_nothing_else():
    full, diag = made("full")[0].dense_covariances(), made("diag")[0].dense_covariances()
    assert torch.allclose(diag, torch.diag_embed(full.diagonal(dim1=1, dim2=2)), rtol=1e-5)


@pytest.mark.parametrize(("count", "rank"), [(4, 3), (40, 6)])
def test_low_rank_is_exact_when_the_rank_suffices(count, rank):
    full, low = made("full", count=count)[0], made("low_rank", count=count, rank=rank)[0]
    assert torch.allclose(low.dense_covariances(), full.dense_covariances(), atol=1e-4, rtol=1e-4)


def test_low_rank_keeps_all_variances_and_improves_with_the_rank():
    full = made("full", width=8)[0].dense_covariances()
    errors = []
    for rank in (1, 3, 5):
        low = made("low_rank", width=8, rank=rank)[0].dense_covariances()
        assert torch.allclose(low.diagonal(dim1=1, dim2=2), full.diagonal(dim1=1, dim2=2), rtol=1e-4)
        errors.append(float((low - full).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_shared_pools_within_classes_by_degrees_of_freedom():
    generator = torch.Generator().manual_seed(1)
    groups = [torch.randn(n, 3, generator=generator) + 10 * n for n in (5, 9)]
    gaussians = ClassGaussians(3, "shared", ridge=0.0)
    gaussians.add(torch.cat(groups), torch.tensor([0] * 5 + [1] * 9), task=0)
    pooled = (4 * torch.cov(groups[0].T) + 8 * torch.cov(groups[1].T)) / 12
    assert torch.allclose(gaussians.dense_covariances(), pooled.expand(2, 3, 3), atol=1e-5)
    gaussians.add(groups[1], torch.full((9,), 2), task=1)
    assert torch.allclose(gaussians.dense_covariances()[2], torch.cov(groups[1].T), atol=1e-5)
    assert len(gaussians.covariances.factors) == 2


@pytest.mark.parametrize("storage", STORAGE)
def test_samples_have_the_stored_moments(storage):
    gaussians, _ = made(storage, rank=2)
    samples = gaussians.draw(gaussians.means, 40_000, torch.Generator().manual_seed(3)).double()
    for rows, mean, cov in zip(samples, gaussians.means, gaussians.dense_covariances(), strict=True):
        size = float(cov.diagonal().max())
        assert torch.allclose(rows.mean(dim=0), mean, atol=0.03 * size**0.5)
        assert torch.allclose(torch.cov(rows.T), cov.double(), atol=0.04 * size)


def test_same_draws_as_a_distribution_object():
    gaussians, _ = made("full")
    covs = gaussians.dense_covariances()
    torch.manual_seed(5)
    eps = torch.stack([torch.randn(11, gaussians.noise) for _ in covs])
    ours = gaussians.draw(gaussians.means, eps.shape[1], eps)
    torch.manual_seed(5)
    for mean, cov, rows in zip(gaussians.means.float(), covs, ours, strict=True):
        theirs = torch.distributions.MultivariateNormal(mean, cov).sample((11,))
        assert torch.allclose(rows, theirs, atol=1e-4)


def test_draw_is_the_same_in_chunks():
    gaussians, _ = made("low_rank", classes=130, count=4, rank=2)
    drawn = gaussians.draw(gaussians.means, 5, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    size = CHUNK["cpu"]
    sizes = [size] * (130 // size) + [130 % size]
    eps = torch.cat([torch.empty(size, 5, gaussians.noise).normal_(generator=generator) for size in sizes])
    assert torch.allclose(drawn, gaussians.draw(gaussians.means, 5, eps), atol=1e-5)


@pytest.mark.parametrize("storage", STORAGE)
def test_any_number_of_classes_comes_back_from_a_checkpoint(storage):
    gaussians, _ = made(storage)
    gaussians.add(torch.randn(9, 6), torch.tensor([3] * 4 + [4] * 5), task=1)
    empty = ClassGaussians(6, storage)
    empty.load_state_dict(gaussians.state_dict())
    assert torch.equal(empty.tasks, torch.tensor([0, 0, 0, 1, 1]))
    assert torch.equal(empty.dense_covariances(), gaussians.dense_covariances())
    held = sum(buffer.numel() * buffer.element_size() for buffer in empty.buffers())
    assert held == gaussians.bytes_of(classes=5, tasks=2)


def test_low_rank_brings_200_classes_at_width_768_under_30_mb():
    assert ClassGaussians(768, "low_rank").bytes_of(classes=200, tasks=10) < 30e6
    assert ClassGaussians(768, "full").bytes_of(classes=200, tasks=10) > 470e6


def test_by_label_is_ascending_and_complete():
    features = torch.arange(6.0)[:, None]
    groups = {label: rows.flatten().tolist() for label, rows in by_label(features, torch.tensor([4, 1, 4, 0, 1, 4]))}
    assert list(groups) == [0, 1, 4] and groups[4] == [0, 2, 5]


@pytest.mark.parametrize("count", [1, 2, 16, 17, 300, 4100])
def test_a_sum_of_terms_read_one_at_a_time_has_the_digits_of_the_sum_of_their_stack(count):
    terms = torch.randn(count, 16, 16, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    assert torch.equal(summed(iter(terms)), torch.stack(list(terms)).sum(dim=0))


def test_class_by_class_has_the_digits_of_all_at_once():
    features = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 5
    gaussians = ClassGaussians(16)
    gaussians.add(features, labels, task=0)
    rows = [features[labels == label].double() for label in range(5)]
    roots = [(own - own.mean(dim=0)) / 11**0.5 for own in rows]
    factors = torch.stack([cholesky(root.T @ root, gaussians.ridge) for root in roots]).float()
    assert torch.equal(gaussians.means, torch.stack([own.mean(dim=0) for own in rows]))
    assert torch.equal(gaussians.covariances.factors.dense(), factors)


@pytest.mark.parametrize("storage", STORAGE)
def test_no_more_than_a_class_is_held_in_double(storage):
    """The classes are read one after another: none before the one in front of it has been left."""
    alive: list[int] = []

    def roots():
        for _ in range(8):
            root = torch.randn(5, 16, dtype=torch.float64)
            weakref.finalize(root, alive.append, -1)
            alive.append(1)
            assert sum(alive) <= 2, "the one that is made, and the one that is worked on"
            yield root
            del root

    ClassGaussians(16, storage, rank=2).covariances.add(roots(), [4] * 8, ridge=1e-3)


def test_measure_reads_each_image_once(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil", test_batch_size=3)
    task = manager[1]
    seen = []

    def features(images):
        seen.append(len(images))
        return images.flatten(1)[:, :5]

    gaussians = ClassGaussians(5)
    gaussians.measure(features, task.train.view("test"), task.index, learner.runtime, batch_size=3)
    assert sum(seen) == len(task.train)
    assert gaussians.labels.tolist() == list(task.classes) and gaussians.tasks.tolist() == [1] * len(task.classes)
    assert learner.runtime.stopwatch.seconds["statistics"] > 0
