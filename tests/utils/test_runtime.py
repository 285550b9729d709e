"""What a run takes from the machine: loader processes and batches kept ready."""

import gc
import os
import weakref

import pytest
import torch

import trainer
from models.factory import config_from
from tests.conftest import tiny_values
from utils import runtime
from utils.errors import UserError
from utils.interrupt import StopSignal
from utils.runtime import Runtime, available_cpus, available_memory
from utils.seed import rng_state, set_rng_state


@pytest.fixture
def run():
    return Runtime("cpu", "fp32")


def test_workers_follow_the_cores_that_the_process_may_use(run, monkeypatch):
    for cores, processes, expected in ((2, 1, 2), (64, 1, 64), (16, 4, 4), (2, 4, 1)):
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


@pytest.fixture
def card(monkeypatch):
    """A card for the asking: what a `Runtime` sets on it, without one."""
    monkeypatch.setattr(runtime, "_find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield monkeypatch
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("precision", "fewer_bits"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_fp32_is_fp32_in_convolutions_too(precision, fewer_bits, card):
    torch.backends.cudnn.allow_tf32 = not fewer_bits
    made = Runtime("cuda", precision)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == fewer_bits
    assert (made.autocast_dtype is None) == (precision != "bf16") and made.fused_attention


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("auto", True), ("bf16", False)])
def test_attention_is_fused_where_that_is_faster(precision, fused):
    assert Runtime("cpu", precision).fused_attention == fused


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), None), ((7, 5), None), ((8, 0), torch.bfloat16)])
def test_auto_is_bf16_where_the_card_computes_in_it(capability, dtype, card):
    card.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Runtime("cuda", "auto").autocast_dtype == dtype


def test_deterministic_sets_torch_s_algorithms(card):
    Runtime("cuda", "fp32", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    Runtime("cuda", "fp32")
    assert not torch.are_deterministic_algorithms_enabled()


def test_generators_of_another_kind_of_device_are_not_dropped_without_a_word(caplog):
    state = rng_state()
    set_rng_state(state)
    assert not caplog.records
    set_rng_state(state | {"cuda": torch.zeros(16, dtype=torch.uint8)})
    assert "another kind of device" in caplog.text


class Knot:
    """Refers to itself, so that only the collector ends it."""

    def __init__(self):
        self.me = self


def test_a_seed_begins_with_an_empty_card_and_a_peak_of_its_own(card):
    """What the seed before left in cycles is gone before its memory is given back and the peak begins anew."""
    left = weakref.ref(Knot())
    calls = []
    card.setattr(torch.cuda, "empty_cache", lambda: calls.append(("emptied", left() is None)))
    card.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device.index)))
    Runtime("cuda", "fp32").begin_run()
    assert calls == [("emptied", True), ("reset", 0)]


def test_a_finished_seed_leaves_nothing_behind(tmp_path, monkeypatch):
    """Its learner is gone before the next one is built."""
    alive: list[weakref.ref] = []
    made = trainer.seeded_learner

    def watched(*arguments, **keys):
        assert not [learner for learner in alive if learner() is not None], "an old learner is still there"
        learner = made(*arguments, **keys)
        alive.append(weakref.ref(learner))
        return learner

    monkeypatch.setattr(trainer, "seeded_learner", watched)
    config = config_from(tiny_values(tmp_path, epochs=1, seed=[1, 2, 3]), "test")
    trainer.run(config, tmp_path / "out", resume=False)
    gc.collect()
    assert len(alive) == 3 and alive[-1]() is None


def test_several_processes_agree_at_every_twentieth_safe_point(tmp_path, monkeypatch):
    config = config_from(tiny_values(tmp_path), "test").with_seed(1993)
    seed_run = trainer.SeedRun(config, tmp_path / "out", Runtime("cpu", "fp32", 0), StopSignal())
    agreed = []
    monkeypatch.setattr(seed_run, "save_if_due", lambda phase, fit=None: agreed.append(phase))
    seed_run.runtime.world = 2
    seed_run.runtime.on_safe_point = seed_run._safe_point
    for _ in range(61):
        seed_run.runtime.safe_point()
    assert agreed == ["start"] * 4, "the first, and three more"
    seed_run._held.close()


WRONG_LAUNCHERS = {
    "rank alone": {"RANK": "1"},
    "size alone": {"WORLD_SIZE": "2"},
    "no process": {"RANK": "0", "WORLD_SIZE": "0"},
    "a rank beyond": {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    "a word": {"RANK": "zero", "WORLD_SIZE": "1"},
    "negative": {"RANK": "-1", "WORLD_SIZE": "1"},
    "empty": {"RANK": "", "WORLD_SIZE": "1"},
    "no master": {"RANK": "0", "WORLD_SIZE": "2"},
    "local": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"},
}


@pytest.mark.parametrize("case", WRONG_LAUNCHERS)
def test_what_no_launcher_sets_is_a_sentence(case, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in WRONG_LAUNCHERS[case].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun sets them all"):
        Runtime("cpu", "fp32")
