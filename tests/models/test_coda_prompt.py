"""CODA-Prompt against its reference: whole tasks with the stored draws, rates, starts, further timm ViTs."""

import re

import numpy as np
import pytest
import torch

from convs.prompt_pool import Components
from models.parts.loop import begin
from tests.conftest import build_tiny, reference
from tests.models.prompt_runs import (
    VARIANTS,
    architecture,
    below,
    build,
    load,
    noisy,
    ours,
    run_steps,
    variant_backbone,
)
from utils.errors import ConfigError

ATOL = 1e-10


def shape_of(arrays) -> dict:
    """Components and blocks of the stored parameters."""
    found = {int(m[1]): v.shape for k, v in arrays.items() if (m := re.search(r"/prompt\.e_p_(\d+)$", k))}
    entries, length, _ = next(iter(found.values()))
    return {"pool_size": entries, "prompt_length": length, "blocks": sorted(found)}


@pytest.mark.parity
@pytest.mark.parametrize("dropout", [False, True])
def test_forward_and_gradients(dropout, tmp_path):
    arrays = reference("coda_prompt/vit_forward")
    classes, task, tasks = len(arrays["trained/fc.bias"]), int(arrays["task"]), int(arrays["tasks"])
    split = int(arrays["split"])
    sizes = [split, classes - split, *[1] * (tasks - 2)]
    backbone = noisy(architecture(arrays)) if dropout else architecture(arrays)
    learner = build("coda_prompt", tmp_path, backbone, sizes, **shape_of(arrays))
    load(learner.network, arrays, "vit/", "trained/")
    learner.train()
    asked = learner.network.ask(torch.from_numpy(arrays["x"]).double())
    np.testing.assert_allclose(asked.query, arrays["queries"], atol=ATOL, rtol=0)
    logits = learner.network(asked, *learner._rows(task))
    np.testing.assert_allclose(logits.detach(), arrays["logits"], atol=ATOL, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits[:, split:], torch.from_numpy(arrays["train/y"]).long() - split)
    assert float(loss.detach()) == pytest.approx(float(arrays["train/loss"]), abs=ATOL)
    loss.backward()
    named = dict(learner.network.named_parameters())
    for name, value in below(arrays, "train/grad/").items():
        np.testing.assert_allclose(named[ours(name)].grad, value, atol=ATOL, rtol=0, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["plain", "ortho"])
def test_two_tasks(kind, tmp_path, monkeypatch):
    arrays, vit = reference(f"coda_prompt/steps_{kind}"), reference("coda_prompt/vit_forward")
    sizes = np.diff(arrays["bounds"]).tolist()
    learner = build(
        "coda_prompt", tmp_path, architecture(vit), sizes, upstream=True, lrate=float(arrays["lr"]),
        epochs=int(arrays["epochs"]), batch_size=arrays["task0/x"].shape[1], ortho=float(arrays["mu"]),
        **shape_of(arrays),
    )  # fmt: skip
    load(learner.network, vit | {k: v for k, v in arrays.items() if k.startswith("start/")}, "vit/", "start/")
    start, index = Components.start, {id(part): name for name, part in learner.network.components.items()}

    def stored(self, first, last):
        names = iter(("k", "a", "p"))
        draw = lambda rows: torch.from_numpy(arrays[f"task1/draws/e_{next(names)}_{index[id(self)]}"]).double()  # noqa: E731
        start(self, first, last, draw)

    monkeypatch.setattr(Components, "start", stored)
    run_steps(learner, arrays, monkeypatch)


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_vits_of_timm_that_no_reference_builds(variant, tmp_path):
    arrays = reference("coda_prompt/vit_variants")
    classes, tasks = len(arrays["trained/fc.bias"]), int(arrays["tasks"])
    sizes = [classes // tasks] * (tasks - 1) + [classes - classes // tasks * (tasks - 1)]
    learner = build("coda_prompt", tmp_path, variant_backbone(arrays, variant), sizes, **shape_of(arrays))
    load(learner.network, arrays, f"{variant}/vit/", "trained/")
    learner.eval()
    asked = learner.network.ask(torch.from_numpy(arrays["x"]).double())
    np.testing.assert_allclose(asked.query, arrays[f"{variant}/queries"], atol=ATOL, rtol=0)
    logits = learner.network(asked, *learner._rows(int(arrays["task"])))
    np.testing.assert_allclose(logits.detach(), arrays[f"{variant}/logits"], atol=ATOL, rtol=0)


@pytest.mark.parity
def test_rates(tmp_path):
    arrays = reference("coda_prompt/rates")
    for epochs in sorted({int(key.split("/")[0]) for key in arrays if "/" in key}):
        for upstream, kind in ((True, "pilot"), (True, "authors"), (False, "correct")):
            if f"{epochs}/{kind}" not in arrays:
                continue
            keys = {"epochs": epochs, "lrate": float(arrays["lr"]), "upstream": upstream}
            manager, learner = build_tiny(tmp_path, "coda_prompt", **keys)
            begin(learner, manager[0])
            optimizer, scheduler = learner.make_optimizer()
            rates = []
            for _ in range(epochs):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            np.testing.assert_allclose(rates, arrays[f"{epochs}/{kind}"], atol=1e-12, rtol=0)


def test_the_start_is_orthonormal_and_the_rest_waits_at_zero(tmp_path):
    manager, learner = build_tiny(tmp_path, "coda_prompt")
    first, last = learner._rows(0)
    for parts in learner.network.components.values():
        for values in (parts.prompts, parts.keys, parts.attention):
            rows = values.detach().flatten(1)
            torch.testing.assert_close(rows[first:last] @ rows[first:last].T, torch.eye(last), atol=1e-5, rtol=0)
            assert not rows[last:].any()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"prompt_length": 3}, "half of it are keys, half values: give an even number"),
        ({"pool_size": 2}, "2 components for 3 tasks"),
        ({"pool_size": 99}, "99 rows cannot be orthogonal in width 16"),
        ({"blocks": [0, 5]}, "the backbone has 2 blocks"),
        ({"orto": 0.1}, 'did you mean "ortho"'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build_tiny(tmp_path, "coda_prompt", **keys)


def test_components_that_no_task_gets_are_said(tmp_path, caplog):
    build_tiny(tmp_path, "coda_prompt", pool_size=7)
    assert "7, 3 tasks: 1 components are never used" in caplog.text
