"""Means over seeds: of one experiment only."""

import pytest

from tests.made_results import made_config, made_result, write_seed
from utils.aggregate import differences, finished_runs, runs_of, spread
from utils.errors import UserError

CONFIG = made_config()


def test_mean_and_sample_deviation(tmp_path):
    for seed, last in ((1993, 90.0), (1996, 92.0), (1997, 94.0)):
        write_seed(tmp_path, CONFIG, seed, curve=(99.0, last))
    runs = finished_runs(tmp_path)
    found = runs.metric("last_acc")
    assert (found.mean, found.std, found.n) == (92.0, 2.0, 3)
    assert runs.seeds == [1993, 1996, 1997] and runs.curves.shape == (3, 2)
    assert runs.metric("no_such_number") is None
    assert spread([3.0]).std is None


def test_one_seed_folder_is_one_run(tmp_path):
    folder = write_seed(tmp_path, CONFIG, 7)
    assert finished_runs(folder).seeds == [7]


@pytest.mark.parametrize("other, told", [
    (made_result(made_config(test_batch_size=8), 2), '"test_batch_size"'),
    (made_result(made_config(normalize="half"), 2), '"normalize"'),
    (made_result(CONFIG, 2, data={"name": "digits", "hash": "e" * 64, "split": "fixed"}), "data"),
    (made_result(CONFIG, 2, data={"name": "digits", "hash": "d" * 64, "split": "other"}), "split of the data"),
    (made_result(CONFIG, 2, weights={"name": "small_vit", "sha256": "x" * 64}), "weights"),
    (made_result(CONFIG, 2, environment={"precision": "bf16"}), "precision"),
    (made_result(CONFIG, 2, task_sizes=[3, 2, 1]), "sizes of the tasks"),
    (made_result(CONFIG, 1993), "seed"),
])  # fmt: skip
def test_runs_that_differ_in_more_than_the_seed_are_not_mixed(tmp_path, other, told):
    with pytest.raises(UserError, match="mixes runs") as caught:
        runs_of(tmp_path, [made_result(CONFIG, 1993), other])
    assert f"- {told}" in str(caught.value)


def test_machine_keys_may_differ():
    assert differences([made_result(CONFIG, 1), made_result(made_config(device="cpu", num_workers=0), 2)]) == []


def test_nothing_finished_is_said(tmp_path):
    write_seed(tmp_path, CONFIG, 1, finished=False)
    with pytest.raises(UserError, match="no seed in .* is finished"):
        finished_runs(tmp_path)
