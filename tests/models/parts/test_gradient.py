"""One gradient of a batch: its parts, its norm, what is refused."""

import json
from typing import NamedTuple

import pytest
import torch

import main
from models.factory import config_from
from models.parts.gradient import rows_of, shares
from models.parts.loop import Observer, begin, fit
from tests.conftest import build_tiny, in_forks, tiny_values, write_stream
from tests.contract.test_resume import final_state, killed_and_resumed, run, same
from utils.errors import ConfigError


class Pair(NamedTuple):
    images: torch.Tensor
    taught: torch.Tensor | None


@pytest.mark.parametrize(("count", "parts"), [(7, 3), (5, 2), (4, 4), (2, 5), (1, 3), (128, 1)])
def test_shares_are_even_and_none_is_empty(count, parts):
    found = list(shares(count, parts))
    if min(count, parts) == 1:
        assert found == [(None, 1.0)]
        return
    sizes = [rows.stop - rows.start for rows, _ in found]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and min(sizes) > 0 and len(sizes) == min(count, parts)
    assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
    assert sum(share for _, share in found) == pytest.approx(1)


def test_rows_are_taken_of_what_has_as_many():
    batch, other = torch.arange(10).view(5, 2), torch.arange(4)
    found = rows_of([Pair(batch, None), {"query": batch, "scale": torch.tensor(2.0)}, (other, 7)], slice(1, 3), 5)
    assert type(found[0]) is Pair and found[0].taught is None
    assert torch.equal(found[0].images, batch[1:3]) and torch.equal(found[1]["query"], batch[1:3])
    assert found[1]["scale"] == 2 and found[2] == (other, 7)


def activations(tmp_path, parts: int) -> int:
    """The most bytes that a step keeps for backward passes at one time."""
    manager, learner = build_tiny(tmp_path, batch_size=12, accumulate=parts, epochs=1)
    begin(learner, manager[0])
    live, most = {}, 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in learner.parameters()}

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            live[id(self)] = 0 if tensor.untyped_storage().data_ptr() in weights else tensor.nbytes

        def __del__(self):
            live.pop(id(self), None)

    def keep(tensor):
        nonlocal most
        kept = Kept(tensor)
        most = max(most, sum(live.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        fit(learner, manager[0])
    return most


def test_parts_keep_the_activations_of_one_part(tmp_path):
    whole, halves, sixths = (activations(tmp_path, parts) for parts in (1, 2, 6))
    assert halves < 0.6 * whole and sixths < 0.3 * whole


@pytest.mark.parametrize("keys", [{}, {"sam": {"rho": 0.05, "damping": 0.0}}, {"accumulate": 3}])
def test_the_gradient_of_a_step_is_no_longer_than_clip_norm(keys, tmp_path, monkeypatch):
    """The whole gradient: all parameters together, once a step, the direction kept."""
    import models.parts.gradient as gradient

    seen, clip = [], gradient.clip_gradient

    def watched(parameters, largest):
        parameters = list(parameters)
        before = [p.grad.clone() for p in parameters]
        norm = float(torch.cat([g.flatten() for g in before]).norm())
        clip(parameters, largest)
        assert norm > largest and len(before) == len(list(learner.parameters()))
        for was, parameter in zip(before, parameters, strict=True):
            torch.testing.assert_close(parameter.grad, was * largest / norm, rtol=1e-3, atol=1e-7)
        seen.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))

    monkeypatch.setattr(gradient, "clip_gradient", watched)
    manager, learner = build_tiny(tmp_path, clip_norm=0.01, epochs=1, **keys)
    begin(learner, manager[0])
    fit(learner, manager[0])
    assert seen == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_large_clip_norm_changes_nothing(tmp_path):
    weights = []
    for keys in ({}, {"clip_norm": 1e6}):
        manager, learner = build_tiny(tmp_path, epochs=1, **keys)
        begin(learner, manager[0])
        fit(learner, manager[0])
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    assert torch.equal(*weights)


def test_after_backward_comes_once_a_gradient_and_processes_meet_in_the_last_part(tmp_path, monkeypatch):
    """Twice a step with SAM, whatever the parts."""
    events = []
    manager, learner = build_tiny(tmp_path, accumulate=2, sam={"rho": 0.05, "damping": 0.0}, epochs=1)
    begin(learner, manager[0])

    class Processes(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.alone = network, False

        def forward(self, images):
            events.append("alone" if self.alone else "together")
            return self.network(images)

        def no_sync(self):
            return self

        def __enter__(self):
            self.alone = True

        def __exit__(self, *_):
            self.alone = False

    learner.runtime.wrap = Processes
    learner.after_backward = lambda: events.append("after")

    class First(Observer):
        def step_done(self, state):
            events.append("step")

    fit(learner, manager[0], 0, First())
    assert events[: events.index("step")] == ["alone", "together", "after"] * 2


REFUSED = {
    "more parts than images": ({"accumulate": 5}, "more parts than a batch has images"),
    "no part": ({"accumulate": 0}, '"accumulate"'),
    "zero": ({"clip_norm": 0}, '"clip_norm"'),
    "negative": ({"clip_norm": -1.0}, '"clip_norm"'),
    "er": ({"model_name": "derpp", "variant": "er", "accumulate": 2}, "derpp needs the whole batch at once"),
    "regulariser": ({"model_name": "mos", "accumulate": 2}, "every image of a batch with every other"),
    "vote": ({"model_name": "l2p", "upstream": True, "accumulate": 2}, "a vote of the batch"),
    "nothing trains": ({"model_name": "simplecil", "accumulate": 2}, "accumulate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_parts_is_refused_with_a_sentence(case, tmp_path):
    keys, sentence = REFUSED[case]
    values = tiny_values(tmp_path, keys.get("model_name", "finetune")) | keys
    with pytest.raises(ConfigError, match=sentence):
        config_from(values, "test")


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_batch_norm_in_parts_is_refused_before_the_run(arguments, tmp_path, capsys):
    stream = write_stream(tmp_path / "d.npz", size=32)
    values = tiny_values(tmp_path, "replay", dataset=stream, backbone="small_resnet18", image_size=32, accumulate=2)
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr()
    assert "accumulate" in said.err + said.out and "replay trains small_resnet18 with BatchNorm" in said.err + said.out
    assert not (tmp_path / "out" / "seed1993" / "epochs.jsonl").exists()


def test_batch_norm_of_a_later_network_is_refused_before_the_first_is_trained(tmp_path, capsys):
    networks = [{"name": "small_lenet", "image_size": 32}, {"name": "small_resnet18", "image_size": 32}]
    stream = write_stream(tmp_path / "d.npz", domains=2, size=32)
    keys = {"dataset": stream, "shuffle": False, "increment": None, "networks": networks, "accumulate": 2}
    values = tiny_values(tmp_path, "hcl", backbone="small_lenet", image_size=32, **keys)
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 2
    assert "hcl trains small_resnet18 with BatchNorm" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed1993" / "epochs.jsonl").exists()


def test_a_run_in_parts_resumes_inside_an_epoch_and_names_both_keys(tmp_path, monkeypatch):
    import trainer

    keys = {"accumulate": 2, "clip_norm": 0.5, "epochs": 2, "train_transform": "pad_crop", "checkpoint_minutes": 1e-9}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(tiny_values(tmp_path, "lwf", **keys)))
    run(config, tmp_path / "whole")
    assert killed_and_resumed(config, tmp_path / "cut", monkeypatch, [(trainer.SeedRun, "step_done", 3)]) == 1
    same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    result = json.loads((tmp_path / "cut" / "seed1993" / "result.json").read_text())
    assert result["config"]["accumulate"] == 2 and result["config"]["clip_norm"] == 0.5


def test_parts_in_bf16_give_the_gradient_of_the_whole_batch(tmp_path):
    """To what bf16 resolves; sums over the parts are in fp32."""
    whole, parts = (trained(tmp_path, torch.bfloat16, accumulate=count, clip_norm=None) for count in (1, 3))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-3, rtol=1e-2)
        assert parts[name].dtype == torch.float32


def trained(folder, autocast=None, **keys):
    """The weights behind a task of ragged batches."""
    keys = {"batch_size": 5, "optimizer": "sgd", "lrate": 0.02, "epochs": 2, "clip_norm": 0.5} | keys
    manager, learner = build_tiny(folder, **keys)
    learner.runtime.autocast_dtype = autocast
    begin(learner, manager[0])
    fit(learner, manager[0])
    return {name: value.detach() for name, value in learner.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("sam", [None, {"rho": 0.05, "damping": 25.0}], ids=["sgd", "sam"])
def test_two_processes_in_parts_equal_one_whole(sam, tmp_path):
    """Over gloo: a whole batch in one process, in each of two its share in parts; all clip alike."""
    whole = trained(tmp_path, sam=sam)
    for found in in_forks(tmp_path, lambda folder: trained(folder, sam=sam, accumulate=2)):
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)
