"""L2P against its reference: the whole forward pass, two tasks of training, ViTs that no reference builds."""

import numpy as np
import pytest
import torch

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
SCHEDULERS = {"cosine": "cosine", "constant": "constant", "steplr": "multistep"}


def learner_of(arrays, vit, tmp_path, upstream: bool, backbone=None, **keys):
    entries, length, _ = next(v for k, v in arrays.items() if k.endswith("/prompt.prompt")).shape
    sizes = np.diff(arrays["bounds"]).tolist() if "bounds" in arrays else [int(arrays["split"])] * 2
    shape = {"pool_size": entries, "prompt_length": length, "top_k": int(arrays["top_k"])}
    shape |= {"lrate": float(arrays["lr"])} if "lr" in arrays else {}
    return build("l2p", tmp_path, backbone or architecture(vit), sizes, upstream=upstream, **shape, **keys)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["instance", "vote"])
@pytest.mark.parametrize("dropout", [False, True])
def test_forward_and_gradients(mode, dropout, tmp_path):
    """The frozen ViT stays in evaluation mode: with every dropout rate at 0.3 the numbers stay."""
    arrays = reference("l2p/vit_forward")
    backbone = noisy(architecture(arrays)) if dropout else architecture(arrays)
    learner = learner_of(arrays, arrays, tmp_path, mode == "vote", backbone)
    network = learner.network
    load(network, arrays, "vit/", "trained/")
    x, split = torch.from_numpy(arrays["x"]).double(), int(arrays["split"])
    learner.train()
    asked = network.ask(x)
    np.testing.assert_allclose(asked.query, arrays["queries"], atol=ATOL, rtol=0)
    logits, _ = network(asked, vote=mode == "vote")
    np.testing.assert_allclose(logits.detach(), arrays[f"{mode}/logits"], atol=ATOL, rtol=0)
    if mode == "instance":
        alone = torch.cat([network(network.ask(image[None]))[0] for image in x])
        np.testing.assert_allclose(alone.detach(), arrays["batch_of_one/logits"], atol=ATOL, rtol=0)
        np.testing.assert_allclose(
            network.head(network.features(x)).detach(), arrays["instance/logits"], atol=ATOL, rtol=0
        )
    loss = learner.loss(network, asked, torch.arange(len(x)) % split)
    assert float(loss.detach()) == pytest.approx(float(arrays[f"{mode}/train/loss"]), abs=ATOL)
    loss.backward()
    named = dict(network.named_parameters())
    for name, value in below(arrays, f"{mode}/train/grad/").items():
        np.testing.assert_allclose(named[ours(name)].grad, value, atol=ATOL, rtol=0, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["instance", "vote"])
def test_two_tasks(mode, tmp_path, monkeypatch):
    arrays, vit = reference(f"l2p/steps_{mode}"), reference("l2p/vit_forward")
    batch = arrays["task0/x"].shape[1]
    learner = learner_of(arrays, vit, tmp_path, mode == "vote", epochs=1, batch_size=batch)
    load(learner.network, vit | {k: v for k, v in arrays.items() if k.startswith("start/")}, "vit/", "start/")
    run_steps(learner, arrays, monkeypatch)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["correct", "upstream"])
def test_two_tasks_of_several_epochs(mode, tmp_path, monkeypatch):
    arrays, vit = reference(f"l2p/steps_epochs_{mode}"), reference("l2p/vit_forward")
    schedule = {"scheduler": SCHEDULERS[str(arrays["scheduler"])], "min_lr": float(arrays["min_lr"])}
    learner = learner_of(
        arrays, vit, tmp_path, mode == "upstream", epochs=int(arrays["epochs"]), batch_size=int(arrays["batches"][0]),
        **schedule,
    )  # fmt: skip
    load(learner.network, vit | {k: v for k, v in arrays.items() if k.startswith("start/")}, "vit/", "start/")
    run_steps(learner, arrays, monkeypatch)


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_vits_of_timm_that_no_reference_builds(variant, tmp_path):
    arrays = reference("l2p/vit_variants")
    entries, length, _ = arrays["trained/prompt.prompt"].shape
    classes = len(arrays["trained/head.bias"])
    learner = build(
        "l2p", tmp_path, variant_backbone(arrays, variant), [classes // 2, classes - classes // 2],
        pool_size=entries, prompt_length=length, top_k=int(arrays["top_k"]),
    )  # fmt: skip
    load(learner.network, arrays, f"{variant}/vit/", "trained/")
    learner.eval()
    asked = learner.network.ask(torch.from_numpy(arrays["x"]).double())
    np.testing.assert_allclose(asked.query, arrays[f"{variant}/queries"], atol=ATOL, rtol=0)
    logits, _ = learner.network(asked)
    np.testing.assert_allclose(logits.detach(), arrays[f"{variant}/logits"], atol=ATOL, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["l2p", "dualprompt"])
def test_rates(family, tmp_path):
    """Ours are those of a scheduler that belongs to the optimiser in use; upstream's has no effect behind task 0."""
    arrays = reference(f"{family}/rates")
    keys = {"lrate": float(arrays["lr"]), "epochs": int(arrays["epochs"])}
    for scheduler, ours_ in SCHEDULERS.items():
        extra = {"min_lr": float(arrays["min_lr"])} if ours_ == "cosine" else {}
        if ours_ == "multistep":
            extra = {"milestones": arrays["milestones"].tolist(), "lrate_decay": float(arrays["decay"])}
        for upstream in (False, True):
            manager, learner = build_tiny(tmp_path, family, scheduler=ours_, upstream=upstream, **keys, **extra)
            for index in (0, 1):
                begin(learner, manager[index])
                optimizer, schedule = learner.make_optimizer()
                rates = []
                for _ in range(keys["epochs"]):
                    rates.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    schedule.step()
                stored = arrays[f"{scheduler}/{'reinit' if upstream else 'keep'}/{index}"]
                np.testing.assert_allclose(rates, stored, atol=1e-15, rtol=0, err_msg=f"{scheduler} {upstream} {index}")


@pytest.mark.parity
@pytest.mark.parametrize("family", ["l2p", "dualprompt", "coda_prompt"])
def test_what_trains(family, tmp_path):
    arrays = reference(f"{family}/trainable")
    counts = dict(zip(arrays["names"].tolist(), arrays["counts"].tolist(), strict=True))
    _, learner = build_tiny(tmp_path, family)
    trained = {name for name, p in learner.network.named_parameters() if p.requires_grad}
    kinds = {ours(name).split(".")[0] for name in counts}
    assert {name.split(".")[0] for name in trained} == kinds and all(count > 0 for count in counts.values())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"prompt_selection": "batch_vote"}, 'only "upstream": true allows'),
        ({"pool_size": 3, "top_k": 4}, "more than the 3 entries"),
        ({"prompt_lenght": 3}, 'did you mean "prompt_length"'),
        ({"backbone": "resnet18", "image_size": 32}, "choose a ViT of timm"),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build_tiny(tmp_path, "l2p", **keys)


def test_the_vote_depends_on_the_batch_and_says_so(tmp_path):
    manager, learner = build_tiny(tmp_path, "l2p", upstream=True)
    assert learner.config.batch_dependent and learner.config.prompt_selection == "batch_vote"
    _, alone = build_tiny(tmp_path, "l2p")
    assert not alone.config.batch_dependent
