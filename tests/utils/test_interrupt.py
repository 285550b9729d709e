"""Signals that ask a run to stop: which, when, and that nobody takes a stop for a damaged file."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import main
from tests.conftest import tiny_values, write_stream
from utils.errors import Interrupted
from utils.interrupt import STOPPING, StopSignal

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Tests may run under nohup, or behind a shell's "&", which ignore some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: signal.Signals(number).name)
def test_each_signal_stops_at_the_end_of_what_must_not_be_cut(number):
    with pytest.raises(Interrupted, match=signal.Signals(number).name), StopSignal() as stop, stop.deferred():
        signal.raise_signal(number)
        assert stop.requested


def test_a_second_signal_ends_the_program_the_hard_way():
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def sources() -> list[Path]:
    folders = ("models", "convs", "data", "utils", "tools")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def test_nothing_catches_a_stop_and_goes_on():
    """A handler of BaseException, or of everything, raises again."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                names = {inner.id for inner in ast.walk(node.type or node) if isinstance(inner, ast.Name)}
                everything = node.type is None or "BaseException" in names
                raises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
                assert not everything or raises, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "suppress":
                assert not {getattr(inner, "id", "") for inner in node.args} & {"BaseException"}, (
                    f"{path}:{node.lineno}"
                )


@pytest.fixture
def finished(tmp_path):
    """(command, checkpoint) of a run that stands behind its first task."""
    import trainer
    from tests.test_resume import Killed, kill_after

    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, epochs=1)))
    command = ["--config", str(path), "--output", str(tmp_path / "out"), "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, trainer.SeedRun, "save", 2)
        with pytest.raises(Killed):
            main.main(command)
    return command, tmp_path / "out" / "seed1993" / "checkpoint" / "last.pt"


READERS = {
    "checkpoint": (torch, "load"),
    "npz": (np, "load"),
    "hash of the data": ("data.sources", "_digest"),
    "network": ("models.factory", "BackboneMaker"),
    "state": ("trainer", "restore"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_signal_inside_a_reader_is_a_stop(reader, finished, monkeypatch, capsys):
    command, last = finished
    before = last.read_bytes()
    owner, name = READERS[reader]
    with monkeypatch.context() as patch:
        stop = lambda *arguments, **keys: signal.raise_signal(signal.SIGTERM)  # noqa: E731
        patch.setattr(
            f"{owner}.{name}" if isinstance(owner, str) else owner,
            *([stop] if isinstance(owner, str) else [name, stop]),
        )
        capsys.readouterr()
        assert main.main(command) == 3
    said = capsys.readouterr().err
    assert said == "stopped by SIGTERM; what was done is saved. The same command with --resume continues\n"
    assert last.read_bytes() == before
    assert main.main(command) == 0


def test_a_signal_inside_an_image_is_a_stop(tmp_path, monkeypatch):
    from data.images import read_image

    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted), StopSignal():
        read_image(tmp_path / "a.png")


def test_a_second_signal_inside_a_checkpoint_leaves_the_old_one_and_no_traceback(finished, monkeypatch, capsys):
    command, last = finished
    before = last.read_bytes()

    def cut(*arguments):
        try:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch's writer does

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        capsys.readouterr()
        assert main.main(command) == 130
    assert capsys.readouterr().err.startswith("stopped at once") and last.read_bytes() == before
    assert not list(last.parent.glob("*.tmp")) and main.main(command) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8, 1.5])
def test_a_signal_during_the_imports_leaves_without_a_traceback(seconds, tmp_path):
    values = tiny_values(tmp_path, dataset=write_stream(tmp_path / "d.npz"), epochs=1000)
    (tmp_path / "run.json").write_text(json.dumps(values))
    command = [sys.executable, "main.py", "--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if seconds > 0.2:  # before, not even python is ready
        assert "Traceback" not in said
    assert process.returncode in (3, 130, -signal.SIGINT)
