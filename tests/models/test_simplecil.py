import torch

from data.loading import extract_features
from models.parts.costs import stored_bytes
from models.parts.loop import learn
from tests.conftest import build_tiny, write_stream


def class_means(learner, task):
    features, labels = extract_features(learner.network.features, task.train_so_far.view("test"), learner.runtime)
    return torch.stack([features[labels == c].mean(dim=0) for c in range(task.total_classes)])


def test_scores_are_cosines_with_the_raw_class_means(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil")
    for task in manager[:2]:
        learn(learner, task)
    images = torch.rand(5, 3, 16, 16)
    features, means = learner.network.features(images), class_means(learner, manager[1])
    expected = torch.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(
        learner.predict(None, learner.frozen(images, ("features",))), expected, atol=1e-5, rtol=1e-5
    )


def test_old_prototypes_never_change(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil")
    learn(learner, manager[0])
    before = learner.network.head.weight.clone()
    learn(learner, manager[1])
    assert torch.equal(learner.network.head.weight[:2], before)


def test_a_class_that_comes_back_in_another_domain_is_averaged_over_both(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    manager, learner = build_tiny(tmp_path, "simplecil", dataset=dataset, shuffle=False, increment=None)
    for task in manager:
        learn(learner, task)
    torch.testing.assert_close(learner.network.head.weight, class_means(learner, manager[1]), atol=1e-5, rtol=1e-5)
    assert learner.class_means.counts.tolist() == [14.0] * 3


def test_stores_the_prototypes_alone(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil")
    learn(learner, manager[0])
    prototypes, sums, counts = 2 * 16 * 4, 2 * 16 * 8, 2 * 8
    assert stored_bytes(learner) == prototypes + sums + counts
