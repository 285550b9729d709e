"""WA: the reference's run, the aligned head."""

import pytest

from models.parts.loop import learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, budget, schedule


@pytest.mark.parity
def test_run_of_the_reference(tmp_path, monkeypatch):
    keys = lambda s: schedule(s) | budget(s) | {"temperature": float(s["T"])}  # noqa: E731
    WholeRun("classic/wa_run", "wa", tmp_path, keys).run(monkeypatch)


@pytest.mark.parametrize("align", [True, False])
def test_new_rows_get_the_length_of_old_ones(align, tmp_path):
    manager, learner = build_tiny(tmp_path, "wa", align=align)
    for task in manager:
        learn(learner, task)
        lengths = learner.network.head.weight.norm(dim=1)
        if task.index:
            gap = lengths[: task.known_classes].mean() - lengths[task.known_classes :].mean()
            assert (abs(gap) < 1e-6) == align
