"""Benchmarks answer a wrong argument by one sentence and exit status 2, before they measure anything."""

import importlib
import sys

import pytest

CASES = [
    *((name, ["nosuch"], 'unknown learner "nosuch"') for name in ("costs", "waits", "memory", "gpu", "endurance")),
    ("long_streams", ["nosuch", "--json", "{folder}/new.json"], 'unknown learner "nosuch"'),
    ("waits", ["--depth", "0", "finetune"], '"0" is no whole number of at least 1'),
    ("costs", ["--before", "{folder}/missing.json"], "holds no figures"),
    ("costs", ["--before", "{folder}/bad.json"], "holds no figures"),
    ("costs", ["--json", "{folder}/none/new.json"], "cannot be written: there is no folder"),
    ("gpu", ["--json", "{folder}/none/new.json"], "cannot be written: there is no folder"),
    ("long_streams", ["--json", "{folder}"], "cannot be written: it is a folder"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), CASES)
def test_a_wrong_argument_is_answered_before_anything_is_measured(
    name, arguments, sentence, tmp_path, monkeypatch, capsys
):
    (tmp_path / "bad.json").write_text("no figures")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out and sentence in said.err
