"""What --check says of memory around training: counted tensors, what parts answer, and which stages do not fit."""

import copy

import pytest
import torch

from models.base import LEARNERS
from models.parts.costs import tensor_bytes
from models.parts.gaussians import ClassGaussians
from models.parts.loop import learn
from models.parts.peaks import Live, held_bytes, passing_bytes, peaks, shortage
from models.parts.state import learner_state
from tests.conftest import build_tiny
from tests.pretend_cuda import CUDA, pretended
from tools.plan import plan

PIXELS = torch.rand(2, 3, 16, 16)


def test_the_peak_is_that_of_what_is_there_at_a_time():
    x = torch.zeros(1000)
    with Live() as live:
        y = x + 1
        z = y.view(10, 100).T * 2
        del y
        assert live.now == 4000
        x += 1
        w = z.T @ z
        del z, w
    assert live.now == 0 and live.peak == 8000


def test_what_a_backward_pass_needs_stays():
    layer = torch.nn.Linear(100, 100, bias=False)
    with Live() as live:
        loss = layer(torch.ones(10, 100)).relu().sum()
        kept = live.now
        loss.backward()
    assert kept >= 2 * 4000 and live.peak >= 40000, "the input and the output of relu; the gradient of the weight"


@pytest.mark.parametrize("name", list(LEARNERS))
def test_every_learner_s_plan_has_its_stages(name, tmp_path):
    _, learner = build_tiny(tmp_path, name)
    said = [line for line in plan(learner.config).splitlines() if line.startswith("memory")]
    assert any("MiB in evaluation with batches of 256" in line for line in said)
    assert any("in training with batches of" in line for line in said) == (name != "simplecil")
    assert not any("too little" in line for line in said)


@pytest.mark.parametrize("name", ["slca", "fecam", "ranpac", "lwf", "der", "foster", "memo", "mos", "ease", "replay"])
def test_what_is_held_after_the_last_task_is_known_before_the_first(name, tmp_path):
    """As far as parts say it: statistics, copies, branches. What is left are heads and what no part answers for."""
    manager, learner = build_tiny(tmp_path, name, epochs=0)
    learner.before_task(manager[0])
    before = held_bytes(learner, manager[:])
    for task in manager:
        learn(learner, task)
    state = learner_state(learner)
    assert before == pytest.approx(tensor_bytes([state["module"], state["parts"]]), rel=0.12)


def test_statistics_and_alignment_of_gaussians_by_hand(tmp_path):
    manager, learner = build_tiny(tmp_path, "slca", ca_samples=8)
    found = passing_bytes(learner, manager[:])
    assert found == {
        "statistics": 8 * 14 * 16 + 8 * (3 * 7 * 16 + 3 * 16**2),  # 2 classes of 7 images a task, 16 features
        "alignment": 6 * 8 * (4 * 16 + 24),
    }
    assert passing_bytes(learner, manager[:1])["alignment"] == 0


def test_what_lies_on_the_host_is_not_held_by_the_card(tmp_path):
    manager, _ = build_tiny(tmp_path, "slca")
    with pretended():
        there, host = ClassGaussians(16), ClassGaussians(16)
        host.hold_on_host()
        assert host.held_bytes(manager[:]) == there.held_bytes(manager[:])  # on a CPU the same place
        for gaussians in (there, host):
            gaussians.to(CUDA)
        many = manager[:] * 20
        assert there.held_bytes(many) - host.held_bytes(many) == 4 * 16 * 16 * (120 - 32)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_that_lie_on_a_card_are_held_there(device, tmp_path):
    """Both halves once, whatever the number of tasks: 42 and 24 images of 16 x 16."""
    manager, learner = build_tiny(tmp_path, train_transform="crop_flip", augment_on="device")
    bare, plain = build_tiny(tmp_path, train_transform="crop_flip", augment_on="host")
    learner.runtime.device = plain.runtime.device = torch.device(device)
    more = held_bytes(learner, manager[:]) - held_bytes(plain, bare[:])
    assert more == (0 if device == "cpu" else (42 + 24) * 16 * 16 * 3)


def test_stored_values_of_test_images_are_counted_up_to_their_limit(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil", test_batch_size=2)
    learner.before_task(manager[0])
    found = {}
    for gib in (4.0, 0.0):
        learner.config = learner.config.model_copy(update={"frozen_gib": gib})
        found[gib] = peaks(learner.eval(), manager[:], PIXELS)["evaluation"]
    assert found[4.0] - found[0.0] == 24 * 16 * 4


def test_a_pass_grows_with_its_batch_and_no_further_than_the_images(tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune")
    learner.before_task(manager[0])
    sizes = {}
    for size in (1, 2, 12, 24, 1000):
        learner.config = learner.config.model_copy(update={"test_batch_size": size})
        sizes[size] = peaks(copy.deepcopy(learner).eval(), manager[:], PIXELS)["evaluation"]
    assert sizes[12] - sizes[2] == 10 * (sizes[2] - sizes[1]) > 0
    assert sizes[24] == sizes[1000], "there are 24 test images"


def test_too_little_memory_is_said_with_the_stages_and_a_way(tmp_path, monkeypatch):
    _, learner = build_tiny(tmp_path, "slca")
    monkeypatch.setattr("utils.runtime.Runtime.device_memory", lambda self: 1000)
    said = next(line for line in plan(learner.config).splitlines() if "too little" in line)
    assert "training and statistics and alignment and evaluation need up to" in said
    assert said.endswith("MiB of cpu: lower batch_size and test_batch_size and ca_samples")
    assert shortage({"evaluation": 10}, learner) is None


def test_a_card_is_asked_for_its_whole_memory(tmp_path):
    _, learner = build_tiny(tmp_path, "simplecil")
    with pretended():
        learner.runtime.device = CUDA
        assert shortage({"evaluation": 80 << 30}, learner) is None
        assert (
            "evaluation needs up to 81,920 MiB, more than the 81,920 MiB of cuda:0: lower test_batch_size"
            in shortage({"evaluation": (80 << 30) + 1}, learner)
        )
