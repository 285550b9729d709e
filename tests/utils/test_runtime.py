"""What a run takes from the machine: loader processes and batches kept ready."""

import os

import pytest

from utils import runtime
from utils.runtime import Runtime, available_cpus, available_memory


@pytest.fixture
def run():
    return Runtime("cpu", "fp32")


def test_workers_follow_the_cores_that_the_process_may_use(run, monkeypatch):
    for cores, processes, expected in ((2, 1, 2), (64, 1, 8), (16, 4, 4), (2, 4, 1)):
        monkeypatch.setattr(runtime, "available_cpus", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert run.workers(cheap=False) == expected
        assert run.workers(cheap=True) == 0
    assert Runtime("cpu", "fp32", num_workers=3).workers(cheap=True) == 3


def test_prefetch_leaves_memory_alone(run, monkeypatch):
    monkeypatch.setattr(runtime, "available_memory", lambda: 16 * 2**30)
    assert run.prefetch(20 * 2**20, workers=8) == 4
    assert run.prefetch(64 * 2**20, workers=8) == 2
    assert run.prefetch(2**30, workers=8) == 1
    monkeypatch.setattr(runtime, "available_memory", lambda: None)
    assert run.prefetch(2**30, workers=8) == 4


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="the machine does not say")
def test_the_machine_answers():
    assert 2**20 < available_memory() < 2**46
    assert 1 <= available_cpus() <= 4096
