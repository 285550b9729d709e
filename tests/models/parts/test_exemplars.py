"""Exemplars against the reference: choice, reduction, means, nearest mean; budgets; what is joined with a task."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data.stream import DataManager
from models.factory import config_from
from models.parts.exemplars import Budget, ExemplarSet, class_means, draw, first_of_each, herd, normalised
from tests.conftest import reference, tiny_values, write_stream
from utils.errors import ConfigError
from utils.runtime import Runtime

RUNTIME = Runtime("cpu", "fp32", num_workers=0)


def exemplar_set(budget: Budget, selection: str = "herding", image_size: int = 16, groups: int = 1) -> ExemplarSet:
    config = SimpleNamespace(exemplars=budget, selection=selection, test_batch_size=5, seeds=(0,))
    return ExemplarSet(config, image_size, groups)


def stream(tmp_path, arrays) -> DataManager:
    """The fixture's images as a stream."""
    halves = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "given.npz", **{key: arrays[key] for key in halves})
    values = tiny_values(
        tmp_path, dataset=f"npz:{tmp_path / 'given.npz'}", increment=None, shuffle=False,
        task_sizes=arrays["increments"].tolist(),
    )  # fmt: skip
    return DataManager(config_from(values, source="test"), image_size=arrays["x_train"].shape[1])


def flat(images):
    return images.flatten(1)


def tanh_layer(arrays, index: int):
    weight, bias = (torch.from_numpy(arrays[f"extractor/{index}/a.{name}"]) for name in ("weight", "bias"))
    return lambda images: torch.tanh(images.flatten(1) @ weight.T + bias)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["total", "per_class"])
def test_whole_stream_of_the_reference(tmp_path, mode):
    """Rows and predictions exact, means to 1e-6."""
    arrays = reference("classic/memory")
    number = int(arrays["memory_size" if mode == "total" else "memory_per_class"])
    memory = exemplar_set(Budget(**{mode: number}))
    images = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 255
    for task in stream(tmp_path, arrays):
        extractor, prefix = tanh_layer(arrays, task.index), f"{mode}/{task.index}/"
        memory.update(task, extractor, RUNTIME)
        assert memory.rows.tolist() == arrays[prefix + "rows"].tolist()
        assert memory.labels.tolist() == arrays[prefix + "labels"].tolist()
        np.testing.assert_allclose(memory.means, arrays[prefix + "class_means"], atol=1e-6, rtol=0)
        scores = memory.scores(extractor(images[arrays[prefix + "test_rows"]]), task.total_classes)
        assert scores.topk(2).indices.tolist() == arrays[prefix + "nme_pred"].tolist()


def textbook_herding(vectors: np.ndarray, count: int) -> list[int]:
    """The quadratic form: every candidate's distance at each pick."""
    mean, left, chosen = vectors.mean(axis=0), list(range(len(vectors))), []
    for k in range(1, count + 1):
        total = vectors[chosen].sum(axis=0)
        distances = [np.linalg.norm(mean - (vectors[i] + total) / k) for i in left]
        chosen.append(left.pop(int(np.argmin(distances))))
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_herding_is_the_textbook_form(seed):
    rng = np.random.RandomState(seed)
    features = torch.from_numpy(rng.standard_normal((60, 12)) + rng.standard_normal(12))
    vectors = normalised(features).numpy()
    assert herd(vectors, 25).tolist() == textbook_herding(vectors, 25)
    assert sorted(herd(vectors, 100).tolist()) == list(range(60))


def test_equal_images_are_taken_in_file_order():
    vectors = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert herd(vectors, 2).tolist() == [0, 1]


def test_means_by_hand():
    means = class_means(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -1.0]]), torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(means, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))


def test_first_of_each_group():
    assert first_of_each(torch.tensor([2, 2, 2, 5, 1, 1]), 2).tolist() == [0, 1, 3, 4, 5]
    assert first_of_each(torch.tensor([], dtype=torch.int64), 2).tolist() == []


def test_random_draws_are_even():
    labels = np.array([0, 1] * 4)
    counts = sum(np.bincount(draw(labels, 1, seed), minlength=8) for seed in range(800))
    assert counts.sum() == 1600 and (abs(counts - 200) < 5 * np.sqrt(150)).all()
    assert (labels[draw(labels, 3, 0)] == [0, 0, 0, 1, 1, 1]).all()


@pytest.mark.parametrize("selection", ["herding", "random"])
@pytest.mark.parametrize("budget", [{"total": 13}, {"per_class": 2}])
def test_budget_join_and_state(tmp_path, budget, selection):
    """Never above the budget; what trains beside the task's images is the memory and nothing else; saved and loaded."""
    config = config_from(tiny_values(tmp_path), source="test")
    manager = DataManager(config, image_size=16)
    memory = exemplar_set(Budget(**budget), selection)
    for task in manager:
        before = memory.rows.tolist()
        joined = memory.join(task)
        assert sorted(set(joined.rows) - set(task.train.rows)) == sorted(before)
        assert len(joined) == len(task.train) + len(before) and len(before) <= budget.get("total", 100)
        assert joined.rows[len(task.train) :].tolist() == before
        assert (np.diff(joined.labels[: len(task.train)]) >= 0).all()
        memory.update(task, flat, RUNTIME)
        share = budget.get("per_class") or budget["total"] // task.total_classes
        assert memory.labels.tolist() == sorted([*range(task.total_classes)] * share)
        assert memory.data(task).labels.tolist() == memory.labels.tolist()
    assert memory.stored_bytes() == len(memory) * 3 * 16 * 16 == memory.expected_bytes(manager[:])
    again = exemplar_set(Budget(**budget), selection)
    again.load_state_dict(memory.state_dict())
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(again.scores(images.flatten(1), 6), memory.scores(images.flatten(1), 6))
    assert again.rows.tolist() == memory.rows.tolist()


def test_domains_have_shares_of_their_own(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    values = tiny_values(tmp_path, dataset=dataset, increment=None, shuffle=False)
    manager = DataManager(config_from(values, source="test"), 16)
    memory = exemplar_set(Budget(total=12))
    memory.update(manager[0], flat, RUNTIME)
    assert memory.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    first = memory.rows.view(3, 4)[:, :2].flatten().tolist()
    memory.update(manager[1], flat, RUNTIME)
    assert memory.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2 and memory.rows[:6].tolist() == first


def test_small_classes_are_kept_whole(tmp_path, caplog):
    task = DataManager(config_from(tiny_values(tmp_path), source="test"), image_size=16)[0]
    memory = exemplar_set(Budget(per_class=50))
    with caplog.at_level(logging.WARNING):
        memory.update(task, flat, RUNTIME)
    assert sorted(memory.rows.tolist()) == task.train.rows.tolist()
    assert "50 exemplars a class, one has 7 images: all are kept" in caplog.text


def test_wrong_budgets_are_answered():
    with pytest.raises(ValidationError, match='give one of {"total"'):
        Budget(total=10, per_class=2)
    with pytest.raises(ConfigError, match='"total" 5 keeps none of 6 classes: give at least 6'):
        exemplar_set(Budget(total=5), groups=6)


def test_class_without_exemplars_scores_lowest():
    memory = exemplar_set(Budget(per_class=1))
    memory.means = class_means(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), 3)
    features = torch.tensor([[1.0, -1.0]])
    assert memory.scores(features, 4).tolist() == [[-np.inf, memory.scores(features, 4)[0, 1], -np.inf, -np.inf]]
    logits = torch.zeros(1, 4)
    assert list(memory.beside(logits, features, "nme")) == ["nme", "logits"]
    empty = exemplar_set(Budget(per_class=1))
    assert empty.scores(features, 4).shape == (1, 4)
