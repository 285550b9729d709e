"""Finished runs side by side."""

import pytest

import main
from tests.made_results import made_config, write_seed


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, change in (("simplecil/digits", {}), ("other/digits", {"normalize": "half"})):
        for seed in (1993, 1996):
            write_seed(tmp_path / "runs" / name, made_config(**change), seed, curve=(99.0, 95.0, 80.0 + seed % 10))
    return tmp_path / "runs"


def test_table_names_runs_by_label_or_folder(runs, capsys):
    assert main.main(["compare", "runs/simplecil/digits", "plain=runs/other/digits"]) == 0
    out = capsys.readouterr().out
    assert "simplecil/digits  2  84.50 ± 2.12" in out and "\nplain" in out
    assert out.startswith("digits: 3 tasks of 2 classes, class order by seed")
    assert "mean ± standard deviation over n seeds" in out


@pytest.mark.parametrize("form, expected", [
    ("--latex", r"84.50 $\pm$ 2.12"), ("--csv", "a,2,84.5,512.0"), ("--markdown", "| a | 2 | 84.50 ± 2.12 |"),
])  # fmt: skip
def test_forms_and_metrics(runs, capsys, form, expected):
    assert main.main(["compare", "a=runs/other/digits", "--metrics", "last_acc", "peak_memory_mib", form]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_figure(runs, suffix):
    file = runs.parent / "figures" / f"x.{suffix}"
    assert main.main(["compare", "a=runs/other/digits", "b=runs/simplecil/digits", "--figure", str(file)]) == 0
    assert file.stat().st_size > 1000
    beside = {path.suffix for path in file.parent.iterdir()}
    assert beside == ({".png", ".pdf", ".svg"} if suffix == "png" else {f".{suffix}"})


@pytest.mark.parametrize("keys, told", [
    ({"data": {"name": "digits", "split": "fixed", "hash": "e" * 64}}, "in the data"),
    ({"data": {"name": "digits", "split": "other", "hash": "d" * 64}}, "in the split"),
    ({"curve": (99.0, 95.0)}, "in the number of tasks"),
    ({"task_sizes": [1, 2, 3]}, "in the sizes of the tasks"),
    ({"class_order": [5, 4, 3, 2, 1, 0]}, "in the class order under seed 1993"),
])  # fmt: skip
def test_runs_that_are_no_match_are_refused_by_name(runs, capsys, keys, told):
    write_seed(runs / "wrong", made_config(), 1993, **keys)
    assert main.main(["compare", "a=runs/other/digits", "b=runs/simplecil/digits", "c=runs/wrong"]) == 2
    err = capsys.readouterr().err
    assert f'"c" differs from "a" {told}' in err and '"b"' not in err


@pytest.mark.parametrize("arguments, told", [
    (["runs/none"], "no such folder"),
    (["runs/other/digits", "--metrics", "lst_acc"], 'did you mean "last_acc"'),
    (["a=runs/other/digits", "a=runs/simplecil/digits"], 'two runs are called "a"'),
    (["runs/other/digits", "--figure", "x.doc"], "a figure is written as"),
])  # fmt: skip
def test_wrong_arguments_are_answered(runs, capsys, arguments, told):
    assert main.main(["compare", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_with_an_equals_sign_is_a_folder(runs, capsys):
    write_seed(runs / "a+normalize=half", made_config(), 1993)
    assert main.main(["compare", "runs/a+normalize=half"]) == 0
    assert "a+normalize=half  1" in capsys.readouterr().out
