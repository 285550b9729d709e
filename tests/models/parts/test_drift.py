import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data.stream import TaskInfo
from models.parts import drift as part
from models.parts.drift import Features, StoredMeans, following, noted, say
from models.parts.evaluation import evaluate
from models.parts.loop import learn
from tests.conftest import build_tiny, write_stream
from utils.runtime import Runtime

CPU = Runtime("cpu", "fp32", num_workers=0)
STORED = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0]])  # nearest other mean: 4, 3, 3 -> median 3
ROWS = torch.tensor([[1.0, 0.0], [2.5, 0.0], [4.0, 1.0], [4.0, -1.0], [4.0, 3.0], [4.0, 3.0]])
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def task(index=1, sizes=(2, 1)):
    done = sum(sizes[:index])
    total = done + sizes[index]
    return TaskInfo(index, len(sizes), sum(sizes), tuple(sizes), done, total, range(done, total))


def drift_of(stored, rows=ROWS, labels=LABELS, batches=2, classes=3):
    features, head = Features(stored, len(rows)), torch.nn.Identity()
    with features.watching(head):
        for some, targets in zip(rows.chunk(batches), labels.chunk(batches), strict=True):
            head(some)
            features.add({"x": some}, targets)
    assert not head._forward_pre_hooks
    return features.drift(classes, CPU)


@pytest.mark.parametrize("names", [(), ("x",)], ids=["head", "frozen"])
def test_by_hand(names):
    """Class 0 moved by 1.75: its second image lies nearer to the stored mean of class 1 than to its own."""
    found = drift_of(StoredMeans(STORED, torch.arange(3), names=names))
    assert found.shift.tolist() == [1.75, 0.0, 0.0]
    assert found.between == 3.0
    assert found.nearest_stored == pytest.approx(100 * 5 / 6)
    assert found.nearest_present == 100.0


def test_a_class_without_a_mean_or_images_counts_nowhere():
    stored = StoredMeans(STORED, torch.arange(3), known=torch.tensor([True, True, False]))
    found = drift_of(stored, ROWS[:4], LABELS[:4])
    assert np.isnan(found.shift[2]) and found.between == 4.0
    one = drift_of(StoredMeans(STORED[:1], torch.arange(1)), classes=1, rows=ROWS[:2], labels=LABELS[:2])
    assert np.isnan(one.between) and one.shift.tolist() == [1.75]


def test_a_class_of_two_domains_has_the_mean_of_its_means():
    means = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 0.0]])
    found = drift_of(StoredMeans(means, torch.tensor([0, 0, 1])), ROWS[:4], LABELS[:4], classes=2)
    assert found.shift.tolist() == [1.75, 0.0] and found.between == 4.0


def test_unit_length_on_both_sides():
    means = STORED[1:] / STORED[1:].norm(dim=1, keepdim=True)
    stored = StoredMeans(means, torch.arange(2), of=lambda rows: rows / rows.norm(dim=1, keepdim=True), unit=True)
    found = drift_of(stored, ROWS[2:] * 10, LABELS[2:] - 1, classes=2)
    assert found.shift == pytest.approx([0.0, 0.0], abs=1e-6)


def test_nothing_stored_or_other_features_give_nothing():
    assert drift_of(None) is None
    assert drift_of(StoredMeans(torch.zeros(3, 5), torch.arange(3))) is None
    assert drift_of(StoredMeans(STORED, torch.arange(3), names=("y",))) is None


def test_beyond_the_room_every_second_image_is_kept(monkeypatch):
    monkeypatch.setattr(part, "ROOM", len(ROWS) * 8 // 2)
    found = drift_of(StoredMeans(STORED, torch.arange(3)), batches=3)
    assert found.shift.tolist() == [1.0, 1.0, 0.0]  # the first image of each class


class Process:
    """One of two that wait for each other, each in a thread of its own."""

    def __init__(self, rank, given, meeting):
        self.rank, self.given, self.meeting = rank, given, meeting

    def gather(self, value):
        self.given[self.rank] = value
        self.meeting.wait(10)
        values = list(self.given)
        self.meeting.wait(10)
        return values

    def reduce_sum(self, values):
        return values.copy_(sum(self.gather(values.clone())))


@pytest.mark.parametrize("first", [slice(0, 4), slice(0, 2), slice(0, 6, 2), slice(0, 0)])
def test_two_processes_agree_on_what_one_would_find(first):
    """Whatever classes are in the share of each."""
    stored = StoredMeans(STORED, torch.arange(3))
    own = torch.zeros(len(ROWS), dtype=torch.bool)
    own[first] = True
    given, meeting = [None, None], threading.Barrier(2)

    def share(rank, mine):
        features, head = Features(stored, len(ROWS)), torch.nn.Identity()
        if mine.any():
            with features.watching(head):
                head(ROWS[mine])
                features.add({}, LABELS[mine])
        return features.drift(3, Process(rank, given, meeting))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(share, (0, 1), (own, ~own)))
    alone = drift_of(stored)
    for one in found:
        assert one.shift.tolist() == alone.shift.tolist() and one.between == alone.between
        assert one.nearest_stored == alone.nearest_stored and one.nearest_present == alone.nearest_present


@pytest.mark.parametrize("known", [0, 1, 3])
def test_a_task_keeps_its_place_behind_an_older_checkpoint(known):
    notes = following([{"ratio": number} for number in range(known)], 2, {"ratio": 9.0})
    assert len(notes) == 3 and notes[2] == {"ratio": 9.0}
    assert [note["ratio"] for note in notes[:2]] == [0 if known > 0 else None, 1 if known > 1 else None]


def test_old_classes_make_the_ratio():
    """1.75 and 0 over 3; the third class is the task's own."""
    drift = drift_of(StoredMeans(STORED, torch.arange(3)))
    found = noted(drift, (3, 2, 6), task())
    assert (found["ratio"], found["largest_ratio"]) == (0.2917, 0.5833)
    assert (found["newest_predicted"], found["newest_expected"]) == (50.0, 33.33)
    first = noted(drift, (6, 6, 6), task(0))
    assert first["ratio"] is None and first["shift"] == [1.75, 0.0, 0.0], "in the first task nothing is old"
    assert set(noted(None, None, task()).values()) == {None}


@pytest.mark.parametrize("scale, warned", [(1.0, False), (8.0, True)])
def test_a_ratio_above_one_is_warned_of(scale, warned, caplog):
    stored = StoredMeans(STORED, torch.arange(3))
    with caplog.at_level(logging.INFO):
        drift = drift_of(stored, ROWS * scale)
        say(noted(drift, (3, 2, 6), task()), task(), drift)
    assert any(entry.levelno == logging.WARNING for entry in caplog.records) == warned
    assert sum("drift" in entry.message for entry in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("simplecil", {}, "these features never change"),
        ("aper", {"epochs": 1}, "these features never change"),
        ("fecam", {"epochs": 1}, "these features never change"),
        ("ease", {"epochs": 1}, "are written, not measured"),
        ("ease", {"epochs": 1, "use_reweight": False}, "which have not moved\n"),
        ("slca", {"epochs": 1}, "features of old classes have moved"),
        ("icarl", {"epochs": 1}, "features of old classes have moved"),
    ],
)
def test_only_what_trains_is_said_to_have_moved(name, keys, words, tmp_path, caplog):
    """A ratio above 1: no advice to train a frozen network more slowly."""
    manager, learner = build_tiny(tmp_path, name, **keys)
    for one in manager[:2]:
        learn(learner, one)
    found = evaluate(learner, manager[:2])
    say(noted(found.drift, found.newest, manager[1].info) | {"ratio": 1.5}, manager[1].info, found.drift)
    assert words in caplog.text and "{" not in caplog.text
    assert ("Train the backbone more slowly" in caplog.text) == ("have moved" in words)
    assert ('"alpha"' in caplog.text) == (name == "ease" and keys.get("use_reweight") is not False)


def test_prototypes_with_zero_blocks_are_not_compared(tmp_path):
    manager, learner = build_tiny(tmp_path, "ease", epochs=1, use_diagonal=True)
    for one in manager[:2]:
        learn(learner, one)
    assert evaluate(learner, manager[:2]).drift is None


def test_predictions_of_the_newest_task(tmp_path):
    """A head that answers its last class alone: all predictions fall on the newest task, a third of the images is."""
    manager, learner = build_tiny(tmp_path, "finetune", epochs=1)
    for one in manager:
        learn(learner, one)
    with torch.no_grad():
        learner.network.head.bias[-1] = 1e4
    found = evaluate(learner, manager[:])
    assert found.newest == (24, 8, 24)
    assert found.drift is None, "finetune stores nothing"


def test_domains_have_no_newest_classes(tmp_path):
    name = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    manager, learner = build_tiny(tmp_path, "simplecil", dataset=name, shuffle=False, increment=None)
    for one in manager:
        learn(learner, one)
    found = evaluate(learner, manager[:])
    assert found.newest is None and found.drift is not None


@pytest.mark.parametrize("name", ["simplecil", "slca"])
def test_domains_to_come_are_no_drift(name, tmp_path):
    """Tested on all domains, the images of those that are still to come say nothing of what is stored."""
    stream = write_stream(tmp_path / "d.npz", classes=3, domains=3)
    keys = {"dataset": stream, "shuffle": False, "increment": None, "epochs": 1}
    manager, learner = build_tiny(tmp_path, name, **keys, dil_eval="all")
    learn(learner, manager[0])
    for index in range(2):
        if index:
            learn(learner, manager[1])
        among_all = evaluate(learner, manager[:]).drift
        alone = evaluate(learner, manager[: index + 1]).drift
        assert among_all.shift == pytest.approx(alone.shift, rel=1e-4)
        assert among_all.nearest_stored == alone.nearest_stored
        assert among_all.nearest_present == alone.nearest_present


def test_what_moves_is_seen(tmp_path):
    """Statistics shifted behind the network's back: the ratio tells, the stored means fail, the present ones do not."""
    manager, learner = build_tiny(tmp_path, "slca", epochs=1)
    for one in manager:
        learn(learner, one)
    before = evaluate(learner, manager[:]).drift
    learner.gaussians.means = learner.gaussians.means.roll(1, dims=0)
    after = evaluate(learner, manager[:]).drift
    assert after.shift.min() > before.shift.max()
    assert after.nearest_stored < before.nearest_stored
    assert after.nearest_present == before.nearest_present


@pytest.mark.parametrize(
    "name, keys",
    [
        ("inflora", {"ca_epochs": 1}),
        ("ranpac", {"projection": 0}),
        ("ranpac", {"head": "ncm", "projection": None}),
        ("fecam", {"normalise": False, "tukey": 0.5}),
        ("raa", {"branches": 1, "sam": None}),
    ],
)
def test_variants_that_store_means(name, keys, tmp_path):
    """Of features that no training has moved since, training and test images of flat colours have nearly one mean."""
    manager, learner = build_tiny(tmp_path, name, **keys)
    for one in manager[:2]:
        learn(learner, one)
    found = evaluate(learner, manager[:2]).drift
    assert found.shift.shape == (4,) and (found.shift[2:] < 2 * found.between).all()
    assert found.nearest_present >= 50


def test_a_run_writes_its_drift(tmp_path, caplog):
    import json

    import main
    from tests.conftest import tiny_values

    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_values(tmp_path, "slca", epochs=1)))
    assert main.main(["--config", str(config), "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "seed1993" / "result.json").read_text())["drift"]
    assert [len(one["shift"]) for one in found] == [2, 4, 6]
    assert found[0]["ratio"] is None and found[0]["newest_expected"] == 100.0
    assert found[2]["ratio"] > 0 and found[2]["newest_expected"] == 33.33
    text = (tmp_path / "out" / "seed1993" / "train.log").read_text()
    assert text.count("  drift ") == 2
