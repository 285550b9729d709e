"""DualPrompt against its reference: both layouts, mask and transfer, whole tasks, ViTs that no reference builds."""

import numpy as np
import pytest
import torch

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
SCHEDULERS = {"cosine": "cosine", "constant": "constant", "steplr": "multistep"}


def learner_of(arrays, blocks, tmp_path, sizes, mode="instance", layout="correct", backbone=None, **keys):
    e = next(v for k, v in arrays.items() if k.endswith("/e_prompt.prompt"))
    g = next(v for k, v in arrays.items() if k.endswith("/g_prompt"))
    keys |= {"lrate": float(arrays["lr"])} if "lr" in arrays else {}
    upstream = mode == "vote" or layout == "upstream"
    choice = {"upstream": True, "prompt_selection": "batch_vote" if mode == "vote" else "instance",
              "prefix_layout": "reshaped" if layout == "upstream" else "permuted"} if upstream else {}  # fmt: skip
    return build(
        "dualprompt", tmp_path, backbone or architecture(blocks), sizes, pool_size=e.shape[2], e_length=e.shape[3],
        g_length=g.shape[2], g_blocks=blocks["g_layers"].tolist(), e_blocks=blocks["e_layers"].tolist(),
        top_k=int(arrays["top_k"]), **choice, **keys,
    )  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["instance", "vote"])
@pytest.mark.parametrize("layout", ["upstream", "correct"])
@pytest.mark.parametrize("dropout", [False, True])
def test_forward_and_gradients(mode, layout, dropout, tmp_path):
    arrays = reference("dualprompt/vit_forward")
    classes = len(arrays["trained/head.bias"])
    split = int(arrays["split"]) if "split" in arrays else classes // 2
    backbone = noisy(architecture(arrays)) if dropout else architecture(arrays)
    learner = learner_of(arrays, arrays, tmp_path, [split, classes - split], mode, layout, backbone)
    network, where = learner.network, f"{mode}/{layout}"
    load(network, arrays, "vit/", "trained/")
    x = torch.from_numpy(arrays["x"]).double()
    learner.train()
    asked = network.ask(x)
    np.testing.assert_allclose(asked.query, arrays["queries"], atol=ATOL, rtol=0)
    logits, _ = network(asked, vote=mode == "vote")
    np.testing.assert_allclose(logits.detach(), arrays[f"{where}/logits"], atol=ATOL, rtol=0)
    if where == "instance/correct":
        alone = torch.cat([network(network.ask(image[None]))[0] for image in x])
        np.testing.assert_allclose(alone.detach(), arrays["batch_of_one/logits"], atol=ATOL, rtol=0)
    loss = learner.loss(network, asked, torch.arange(len(x)) % split)
    assert float(loss.detach()) == pytest.approx(float(arrays[f"{where}/train/loss"]), abs=ATOL)
    loss.backward()
    named = dict(network.named_parameters())
    for name, value in below(arrays, f"{where}/train/grad/").items():
        gradient = named[ours(name)].grad
        found = torch.zeros_like(value) if gradient is None else gradient
        np.testing.assert_allclose(found, value, atol=ATOL, rtol=0, err_msg=name)


def steps(name: str, tmp_path, monkeypatch, mode: str, layout: str, **keys) -> None:
    arrays, vit = reference(f"dualprompt/{name}"), reference("dualprompt/vit_forward")
    blocks = arrays if "g_layers" in arrays else vit
    sizes = np.diff(arrays["bounds"]).tolist()
    learner = learner_of(arrays, {**vit, **blocks}, tmp_path, sizes, mode, layout, architecture(vit), **keys)
    load(learner.network, vit | {k: v for k, v in arrays.items() if k.startswith("start/")}, "vit/", "start/")
    run_steps(learner, arrays, monkeypatch)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["upstream", "correct"])
def test_two_tasks_with_mask_and_transfer(layout, tmp_path, monkeypatch):
    batch = reference(f"dualprompt/steps_{layout}")["task0/x"].shape[1]
    mode = "vote" if layout == "upstream" else "instance"
    steps(f"steps_{layout}", tmp_path, monkeypatch, mode, layout, epochs=1, batch_size=batch)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "layout"),
    [("steps_pool", "correct"), ("steps_epochs_correct", "correct"), ("steps_epochs_upstream", "upstream")],
)
def test_several_epochs_and_the_end_of_the_pool(name, layout, tmp_path, monkeypatch):
    arrays = reference(f"dualprompt/{name}")
    schedule = {"scheduler": SCHEDULERS[str(arrays["scheduler"])]}
    schedule |= {"min_lr": float(arrays["min_lr"])} if schedule["scheduler"] == "cosine" else {}
    mode = "vote" if layout == "upstream" else "instance"
    steps(
        name, tmp_path, monkeypatch, mode, layout, epochs=int(arrays["epochs"]), batch_size=int(arrays["batches"][0]),
        **schedule,
    )  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_vits_of_timm_that_no_reference_builds(variant, tmp_path):
    arrays = reference("dualprompt/vit_variants")
    classes = len(arrays["trained/head.bias"])
    sizes = [classes // 2, classes - classes // 2]
    learner = learner_of(arrays, arrays, tmp_path, sizes, backbone=variant_backbone(arrays, variant))
    load(learner.network, arrays, f"{variant}/vit/", "trained/")
    learner.eval()
    asked = learner.network.ask(torch.from_numpy(arrays["x"]).double())
    np.testing.assert_allclose(asked.query, arrays[f"{variant}/queries"], atol=ATOL, rtol=0)
    logits, _ = learner.network(asked)
    np.testing.assert_allclose(logits.detach(), arrays[f"{variant}/logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"prefix_layout": "reshaped"}, 'only "upstream": true allows'),
        ({"e_blocks": [7]}, "block 7 of a backbone with 2 blocks"),
        ({"g_blocks": [9]}, "block 9 of a backbone with 2 blocks"),
        ({"task_maks": True}, 'did you mean "task_mask"'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build_tiny(tmp_path, "dualprompt", **keys)
