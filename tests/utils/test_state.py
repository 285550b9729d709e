"""Seeds, generators, checkpoints, result files."""

import json
import random

import numpy as np
import pytest
import torch

from utils import checkpoint
from utils.errors import UserError
from utils.interrupt import StopSignal
from utils.results import EpochLog, curve_text, summarise_seeds
from utils.seed import mix, rng_state, seed_everything, set_rng_state


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_generators_are_restored_through_a_safe_file(tmp_path):
    seed_everything(3)
    draws()
    checkpoint.save({"rng": rng_state()}, tmp_path / "x.pt", {})
    expected = draws()
    set_rng_state(checkpoint.load(tmp_path / "x.pt")[1]["rng"])
    assert draws() == expected


def test_one_seed_seeds_everything():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first


def test_mixed_seeds_differ_and_repeat():
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and mix(1, 2) == mix(1, 2) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_cut_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path, {})

    def cut(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 2}, path, {})
    assert checkpoint.load(path)[1] == {"step": 1}


def test_a_damaged_checkpoint_is_a_sentence(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="Remove it to start this seed anew"):
        checkpoint.load(tmp_path / "last.pt")


def test_epoch_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = EpochLog(tmp_path / "e.jsonl", [])
    for epoch in range(5):
        log.append({"epoch": epoch})
    resumed = EpochLog(tmp_path / "e.jsonl", log.lines[:3])
    resumed.append({"epoch": 3})
    lines = (tmp_path / "e.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3] and len(resumed.lines) == 4


def test_epoch_lines_that_were_cut_are_written_again_and_damaged_ones_put_aside(tmp_path, caplog):
    path, lines = tmp_path / "e.jsonl", ['{"epoch": 0}', '{"epoch": 1}']
    for text, aside in (('{"epoch": 0}\n{"epo', False), ("", False), ('{"epoch": 7}\n', True)):
        path.write_text(text)
        EpochLog(path, lines)
        assert path.read_text().splitlines() == lines and (tmp_path / "e.jsonl.damaged").exists() == aside


def test_what_is_not_finite_is_null_in_json(tmp_path):
    EpochLog(tmp_path / "e.jsonl", []).append({"loss": float("nan"), "lr": float("inf"), "epoch": 1})
    assert (tmp_path / "e.jsonl").read_text() == '{"loss": null, "lr": null, "epoch": 1}\n'


def test_seed_statistics_by_hand():
    results = [
        {"config": {"seed": s}, "last_acc": a, "avg_acc": a, "last_acc_task_il": a, "avg_acc_task_il": a,
         "forgetting": None, "bwt": None}
        for s, a in ((1, 60.0), (2, 64.0))
    ]  # fmt: skip
    summary = summarise_seeds(results)
    assert summary["last_acc"] == {"mean": 62.0, "std": pytest.approx(8**0.5), "n": 2, "values": [60.0, 64.0]}
    assert "forgetting" not in summary
    assert summarise_seeds(results[:1])["last_acc"]["std"] is None


def test_the_curve_is_drawn_in_text():
    result = {"curve": [100.0, 50.0], "last_acc": 50.0, "avg_acc": 75.0, "forgetting": 1.0, "last_acc_task_il": 80.0}
    lines = curve_text(result).splitlines()
    assert lines[1].count("#") == 50 and lines[2].count("#") == 25 and "average 75.00" in lines[3]


def test_a_deferred_signal_waits_for_the_end_of_the_block():
    import os
    import signal

    from utils.errors import Interrupted

    done = []
    with StopSignal() as stop, pytest.raises(Interrupted), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the block went on")
        assert stop.requested
    assert done
