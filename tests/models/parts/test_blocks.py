"""Rows in blocks: any piece across them, any number from a checkpoint, and passed on in the order in which they lie."""

import math

import pytest
import torch

from models.factory import config_from
from models.parts.alignment import AlignmentSettings, Draws, align
from models.parts.blocks import Blocks, passed_on
from models.parts.gaussians import ClassGaussians
from tests.conftest import build_tiny, tiny_values, write_stream
from tests.pretend_cuda import CUDA, DeviceTensor, pretended

MOVED = {"full": "factors", "low_rank": "directions"}
ALIGNING = {"slca": {}, "slcapp": {}, "raa": {}, "inflora": {"ca_epochs": 1}, "mos": {}}


def made(*counts: int) -> tuple[Blocks, torch.Tensor]:
    blocks = Blocks(2, 3)
    rows = torch.randn(sum(counts), 2, 3)
    for count, some in zip(counts, rows.split(counts), strict=True):
        blocks.append(count, iter(some.double()))
    return blocks, rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 20])
def test_pieces_go_over_the_blocks_borders(size):
    blocks, rows = made(3, 1, 5, 2)
    assert len(blocks) == 11 and torch.equal(blocks.dense(), rows)
    for piece, expected in zip(blocks.in_turn(size), rows.split(size), strict=True):
        assert torch.equal(piece, expected)
    places = torch.empty(2, size, 2, 3)
    for piece, expected in zip(passed_on(blocks.pieces(size), places), rows.split(size), strict=True):
        assert torch.equal(piece, expected)


def test_none_has_no_pieces():
    blocks = Blocks(2)
    assert len(blocks) == 0 and not list(blocks.in_turn(4)) and not list(passed_on([], torch.empty(2, 4, 2)))
    assert blocks.dense().shape == (0, 2)


def test_rows_that_lie_are_not_copied_when_more_come():
    blocks, _ = made(2)
    where = blocks.all()[0].data_ptr()
    blocks.append(1, [torch.zeros(2, 3)])
    assert blocks.all()[0].data_ptr() == where


@pytest.mark.parametrize("saved", [(), (4,), (1, 2, 3), tuple([1] * 12)])
@pytest.mark.parametrize("there", [(), (5, 5)])
def test_any_number_of_blocks_comes_back(saved, there):
    (blocks, rows), (other, _) = made(*saved), made(*there)
    other.load_state_dict(blocks.state_dict())
    assert torch.equal(other.dense(), rows)
    assert [len(block) for block in other.all()] == list(saved)


def test_on_the_host_they_stay_where_the_module_goes():
    blocks, rows = made(2, 3)
    blocks.on_host = True
    blocks.to("meta")
    assert blocks.like.device.type == "meta"
    assert {block.device.type for block in blocks.all()} == {"cpu"}
    back = Blocks(2, 3)
    back.load_state_dict(blocks.state_dict())
    assert torch.equal(back.dense(), rows)


def stage(storage: str, on_host: bool) -> tuple[torch.Tensor, dict, dict]:
    """An alignment on the pretended device: the weight afterwards, what was waited for, copies made meanwhile."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(120, 8, generator=generator), torch.arange(120) % 40
    noise = [torch.randn(40, 6, 8 + 3 * (storage == "low_rank"), generator=generator) for _ in range(2)]
    orders = [torch.randperm(240, generator=generator) for _ in range(2)]
    with pretended() as recorder:
        gaussians = ClassGaussians(8, storage, rank=3)
        if on_host:
            gaussians.hold_on_host()
        gaussians.to(CUDA)
        for task in range(2):
            new = labels // 20 == task
            gaussians.add(features[new].to(CUDA), labels[new].to(CUDA), task)
        blocks = getattr(gaussians.covariances, MOVED[storage])
        assert {isinstance(block, DeviceTensor) for block in blocks.all()} == {not on_host}
        draws = [(eps.to(CUDA), torch.empty(0), order.to(CUDA)) for eps, order in zip(noise, orders, strict=True)]
        before, weight = recorder.events.copy(), torch.zeros(40, 8).to(CUDA)
        found = align(weight, None, [20, 20], gaussians, AlignmentSettings(epochs=2, samples=6),
                      draws=lambda epoch: Draws(*draws[epoch]))  # fmt: skip
        new = recorder.events - before
        waits = {event[1:]: count for event, count in new.items() if event[0] in ("sync", "d2h", "h2d")}
        copies = {event[1:]: count for event, count in new.items() if event[0] == "async"}
        return found.weight.cpu(), waits, copies


@pytest.mark.parametrize("storage", MOVED)
def test_alignment_from_the_host_has_the_same_digits_and_waits_no_more(storage):
    there, host = stage(storage, on_host=False), stage(storage, on_host=True)
    assert torch.equal(there[0], host[0]) and there[0].any()
    assert host[1] == there[1]
    fetched = sum(count for (_, place), count in host[2].items() if "blocks.py" in place)
    pieces = [16, 16, 8]  # Gaussians; the second one lies in both blocks
    assert fetched == 2 * (len(pieces) + 1) and not any("blocks.py" in place for _, place in there[2])


@pytest.mark.parametrize("storage", MOVED)
@pytest.mark.parametrize("saved_on_host", [True, False])
def test_a_state_goes_on_wherever_its_covariances_lie(storage, saved_on_host):
    with pretended():
        first, second = (ClassGaussians(6, storage, rank=2) for _ in range(2))
        (first if saved_on_host else second).hold_on_host()
        first.to(CUDA)
        first.add(torch.randn(20, 6).to(CUDA), torch.arange(20).to(CUDA) % 4, 0)
        state = {name: value.cpu() for name, value in first.state_dict().items()}
        second.to(CUDA)
        second.load_state_dict(state)
        second.add(torch.randn(20, 6).to(CUDA), 4 + torch.arange(20).to(CUDA) % 4, 1)
        blocks = getattr(second.covariances, MOVED[storage])
        assert {isinstance(block, DeviceTensor) for block in blocks.all()} == {saved_on_host}
        drawn = second.draw(second.means, 3).cpu()
    home = ClassGaussians(6, storage, rank=2)
    home.load_state_dict({name: value.cpu() for name, value in second.state_dict().items()})
    assert drawn.shape == home.draw(home.means, 3).shape == (8, 3, 6)
    assert torch.equal(home.dense_covariances()[:4], loaded(state, storage).dense_covariances())


def loaded(state: dict[str, torch.Tensor], storage: str) -> ClassGaussians:
    made = ClassGaussians(6, storage, rank=2)
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("name", ALIGNING)
@pytest.mark.parametrize(
    ("where", "share", "expected"),
    [
        ("auto", 1.01, False),
        ("auto", 0.99, True),
        ("device", 0.01, False),
        ("host", 100, True),
        ("auto", math.inf, False),
    ],
)
def test_auto_asks_whether_the_whole_stream_s_take_a_quarter_of_the_card(name, where, share, expected, tmp_path):
    manager, learner = build_tiny(tmp_path, name, cov_device=where, **ALIGNING[name])
    whole = learner.gaussians.expected_bytes(list(manager))
    assert whole == learner.gaussians.bytes_of(classes=6, tasks=3)
    learner.runtime.device_memory = lambda: 4 * whole * share
    made = learner.config.class_gaussians(learner.network.feature_dim, manager[2].info, learner.runtime)
    assert made.covariances.factors.on_host == expected


def test_of_a_stream_of_domains_every_domain_s_classes_are_counted(tmp_path):
    data = write_stream(tmp_path / "domains.npz", classes=3, domains=2)
    manager, learner = build_tiny(tmp_path, "slca", dataset=data, shuffle=False, increment=None)
    whole = learner.gaussians.expected_bytes(list(manager))
    for memory, expected in ((4 * whole, False), (4 * whole - 4, True)):
        learner.runtime.device_memory = lambda memory=memory: memory
        made = learner.config.class_gaussians(learner.network.feature_dim, manager[0].info, learner.runtime)
        assert made.covariances.factors.on_host == expected


@pytest.mark.parametrize("name", ALIGNING)
@pytest.mark.parametrize("storage", ["full", "diag", "low_rank", "shared"])
def test_every_learner_that_aligns_takes_every_kind(name, storage, tmp_path):
    keys = ALIGNING[name] | {"cov_storage": storage} | ({"cov_rank": 3} if storage == "low_rank" else {})
    _, learner = build_tiny(tmp_path, name, **keys)
    fresh = ClassGaussians(learner.network.feature_dim, storage, rank=3)
    assert type(learner.gaussians.covariances) is type(fresh.covariances)
    assert learner.gaussians.bytes_of(6, 3) == fresh.bytes_of(6, 3)


def test_where_covariances_lie_is_the_machine_s_and_may_change_on_resume(tmp_path):
    values = tiny_values(tmp_path, "slca", dataset="digits")
    one, other = (config_from(values | {"cov_device": where}, "test") for where in ("host", "device"))
    assert one.fingerprint() == other.fingerprint() and not one.same_run(other.saved())
