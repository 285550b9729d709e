"""LAE: whole runs of the references, the two answers, its own answers to wrong keys."""

import re

import pytest
import torch

import models.lae as lae
from models.factory import config_from
from models.parts.loop import learn
from tests.conftest import build_tiny, reference, tiny_values
from tests.convs.vits import close, fill, group
from tests.models.stored_runs import StoredRun
from utils.errors import ConfigError

TOLERANCE = 1e-8  # of Adam
SIZES = {"prefix": "key", "adapter": "down.bias", "lora": "key_A"}


def kind_of(arrays) -> str:
    return next(kind for kind, name in SIZES.items() if any(key.endswith(f".{name}") for key in arrays))


def run_of(name: str, tmp_path, monkeypatch) -> StoredRun:
    arrays = reference(f"lae/{name}")
    start, kind = group(arrays, "start/"), kind_of(arrays)
    blocks = sorted({int(re.match(r"blocks\.(\d+)\.", key)[1]) for key in start})
    keys = {
        "pet": kind, "adapt_blocks": blocks, "pet_size": len(start[f"blocks.{blocks[0]}.{SIZES[kind]}"]),
        "freeze_epochs": int(arrays["freeze_epochs"]), "ema": arrays["ema"].item(),
        "upstream": "pilot" if name == "run_pilot" else True,
    }  # fmt: skip
    return StoredRun(f"lae/{name}", "lae", tmp_path, monkeypatch, **keys)


def named(learner, tensors) -> dict[str, torch.Tensor]:
    """The modules' tensors under the fixtures' names."""
    names = [re.sub(r"attn\.(qkv\.|adapter\.)?", "", name) for name in learner._names]
    return dict(zip(names, tensors, strict=True))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["run_prefix", "run_adapter", "run_lora", "run_blocks", "run_pilot"])
def test_whole_run_of_the_reference(name, tmp_path, monkeypatch):
    run = run_of(name, tmp_path, monkeypatch)
    arrays, learner = run.arrays, run.learner

    def check(tensors, prefix: str) -> None:
        stored, ours = group(arrays, prefix), named(learner, tensors)
        assert stored.keys() <= ours.keys()
        for key, value in stored.items():
            close(ours[key], value, TOLERANCE, key)

    def start(index: int) -> None:
        if index == 0:
            fill(named(learner, learner._online()), group(arrays, "start/"))
            if name == "run_pilot":
                learner.offline.start(learner._online())
        check(
            learner.offline.tensors() if len(learner.offline.vector) else [], f"ema_start/{index}/"
        ) if index else None
        weight, bias = (torch.from_numpy(arrays[f"start_head/{index}/{part}"]) for part in ("weight", "bias"))
        head = learner.network.head
        if name == "run_pilot":
            head.set_stacked(weight, bias)
        else:
            head.heads[-1].weight.data.copy_(weight), head.heads[-1].bias.data.copy_(bias)

    for task in run.tasks:
        index = task.index
        losses = run.learn(task, start)
        close(torch.tensor(losses, dtype=torch.float64), arrays[f"losses/{index}"], TOLERANCE)
        check(learner._online(), f"online/{index}/")
        if len(learner.offline.vector):
            check(learner.offline.tensors(), f"ema/{index}/")
        weight, bias = learner.network.head.stacked()
        close(weight, arrays[f"head.weight/{index}"], TOLERANCE)
        close(bias, arrays[f"head.bias/{index}"], TOLERANCE)
        close(run.predict(task), arrays[f"scores/{index}"], TOLERANCE)


@pytest.mark.parity
def test_the_surer_answer_counts(tmp_path):
    arrays = {name: torch.from_numpy(value) for name, value in reference("lae/predict").items()}
    close(lae.surer(arrays["online"], arrays["offline"]), arrays["scores"], 1e-12)


def test_the_first_task_answers_alone_and_rests_not(tmp_path):
    keys = {"pet_size": 2, "adapt_blocks": [0, 1], "epochs": 2, "freeze_epochs": 2, "lrate": 0.01, "optimizer": None}
    manager, learner = build_tiny(tmp_path, "lae", **keys)
    start = [p.clone() for p in learner._online()]
    learn(learner, manager[0])
    trained = [p.clone() for p in learner._online()]
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(learner.predict(images, {}), learner.network(images).softmax(dim=1))
    learn(learner, manager[1])  # all of its epochs are frozen: online and offline stay
    assert all(torch.equal(a, b) for a, b in zip(trained, learner._online(), strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(trained, learner.offline.tensors(), strict=True))


def test_one_of_the_two_may_answer_alone(tmp_path):
    keys = {"pet_size": 2, "adapt_blocks": [0, 1], "epochs": 2, "freeze_epochs": 0, "lrate": 0.01, "optimizer": None}
    images, answers = torch.rand(3, 3, 16, 16), {}
    for answer in ("surer", "online", "offline"):
        ema = None if answer == "online" else 0.9
        manager, learner = build_tiny(tmp_path, "lae", answer=answer, ema=ema, **keys)
        for task in manager[:2]:
            torch.manual_seed(task.index)
            learn(learner, task)
        answers[answer] = learner.predict(images, {})
        assert bool(len(learner.offline.vector)) == (answer != "online")
    assert not torch.equal(answers["online"], answers["offline"])
    assert torch.equal(answers["surer"], torch.maximum(answers["online"], answers["offline"]))
    with pytest.raises(ConfigError, match="ema"):
        build_tiny(tmp_path, "lae", answer="online", ema=0.9)


def test_upstream_of_two_references(tmp_path):
    def config(**keys):
        return config_from(tiny_values(tmp_path, "lae", **keys), "test")

    pilot, authors = config(upstream="pilot"), config(upstream=True)
    assert (pilot.freeze_first, pilot.offline_start, pilot.head, pilot.drop_last) == (True, "drawn", "one", False)
    assert (authors.freeze_first, authors.offline_start, authors.head, authors.drop_last) == (
        False, "trained", "per_task", True,
    )  # fmt: skip
    assert (pilot.torch_seed, authors.torch_seed) == (1993, 1)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"adapt_blocks": [0, 5]}, "block 5 of a backbone with 2 blocks"),
        ({"adapt_blocks": [1, 1]}, '"adapt_blocks" names a block twice, [1, 1]: name each once'),
        ({"backbone": "resnet18", "image_size": 32, "adapt_blocks": [0]}, "choose a ViT of timm"),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "lae", **keys)
    assert sentence in str(caught.value)
