"""InfLoRA against its reference, its claim, its streams and its state."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models.parts.alignment as alignment
import trainer
from benchmarks.inflora_interference import allowed, change, hit, key_value, learn
from models.factory import config_from
from models.inflora.learner import lagging_cosine
from models.parts.costs import expected_bytes, stored_bytes
from models.parts.evaluation import evaluate
from models.parts.loop import begin, fit
from tests.conftest import build_tiny, reference, tiny_values, write_stream
from tests.stages import ExactRuntime, Given, in_stored_order
from utils import checkpoint
from utils.errors import ConfigError, Interrupted

QUICK = {"rank": 4, "epochs": 3}


STAGES = {
    "train_stage_adam": {"subspace": "dualgpm"},
    "train_stage_b5": {"subspace": "gpm"},
    "train_stage_domain_sgd": {
        "subspace": "gpm", "optimizer": "sgd", "scheduler": "multistep", "milestones": (4,), "init_lr": None,
    },
}  # fmt: skip


def stage_learner(tmp_path, ref, **keys):
    """The real learner in float64 with the reference's weights, and its tasks."""
    classes = int(ref["hp_T"]) * int(ref["hp_per_task"])
    backbone = {name[5:]: int(ref[name]) for name in ref if name.startswith("arch_")} | {"name": "vit"}
    size, batch = backbone["img_size"], ref["train_x"].shape[2]
    two_groups = keys.get("optimizer") == "sgd"
    values = {
        "dataset": write_stream(tmp_path / "stream.npz", classes=classes, size=size), "shuffle": False,
        "increment": int(ref["hp_per_task"]), "batch_size": batch, "test_batch_size": batch,
        "epochs": int(ref["hp_epochs"]), "lrate": float(ref["hp_lr"]), "init_lr": float(ref["hp_init_lr"]),
        "weight_decay": float(ref["hp_wd"]), "init_weight_decay": float(ref["hp_init_wd"]),
        "fc_lrate": float(ref["hp_fc_lr"]) if two_groups else None, "optimizer": str(ref["hp_optim"]),
        "rank": int(ref["hp_rank"]), "lamb": float(ref["hp_lamb"]), "lame": float(ref["hp_lame"]),
        "image_size": size, "backbone": backbone, "upstream": True, "normalize": "none",
        "blocks": tuple(range(len(ref["task0/A_k"]))),
    }  # fmt: skip
    manager, learner = build_tiny(tmp_path, "inflora", **(values | keys))
    learner = learner.double()
    learner.runtime = ExactRuntime("cpu", "fp32", num_workers=0)
    prefix = "init/image_encoder."
    state = {key[len(prefix) :]: torch.from_numpy(v) for key, v in ref.items() if key.startswith(prefix)}
    state = {key: value for key, value in state.items() if ".lora_" not in key}
    missing, unexpected = learner.network.backbone.model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith((".A", ".B", ".remainder")) for key in missing)
    tasks = [replace(t, train=Given(ref["train_x"][t.index], ref["train_y"][t.index])) for t in manager]
    return tasks, learner


def watch_steps(learner, monkeypatch):
    """(losses, learning rates of the groups) of every step from now on."""
    losses, rates = [], []
    loss, make_optimizer = type(learner).loss, learner.make_optimizer

    def watched(net, images, targets):
        value = loss(learner, net, images, targets)
        losses.append(value.item())
        rates.append([group["lr"] for group in learner.optimizer_seen.param_groups])
        return value

    def remember():
        optimizer, scheduler = make_optimizer()
        learner.optimizer_seen = optimizer
        return optimizer, scheduler

    monkeypatch.setattr(learner, "loss", watched, raising=False)
    monkeypatch.setattr(learner, "make_optimizer", remember, raising=False)
    return losses, rates


@pytest.fixture
def float64():
    """Heads are made task by task, in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parity
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", STAGES)
def test_whole_tasks(name, tmp_path, monkeypatch):
    """README: loss and products 1e-10, projectors and logits 1e-9."""
    ref = reference(f"inflora/{name}")
    in_stored_order(monkeypatch)
    tasks, learner = stage_learner(tmp_path, ref, **STAGES[name])
    losses, rates = watch_steps(learner, monkeypatch)
    width = learner.network.feature_dim

    def close(ours, key, atol):
        np.testing.assert_allclose(np.asarray(ours.detach()), ref[key], rtol=0, atol=atol, err_msg=key)

    for t, task in enumerate(tasks):
        begin(learner, task)
        reduction = torch.stack([layer.A for layer in learner.layers])
        close(3 * reduction.mT @ reduction, f"task{t}/A_projector", 1e-9)
        signs = (reduction.detach() * torch.from_numpy(ref[f"task{t}/A_k"])).sum(dim=2, keepdim=True).sign()
        close(reduction * signs, f"task{t}/A_k", 1e-9)
        head = learner.network.head.heads[-1]
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(ref[f"init/classifier_pool.{t}.weight"]))
            head.bias.copy_(torch.from_numpy(ref[f"init/classifier_pool.{t}.bias"]))
        frozen = [layer.weight.detach().clone() for layer in learner.layers]
        losses.clear(), rates.clear()
        fit(learner, task)
        np.testing.assert_allclose(losses, ref["loss_per_step"][t].reshape(-1), rtol=0, atol=1e-10)
        expected = ref["lr_per_step"][t].reshape(len(losses), -1)
        np.testing.assert_allclose(np.array(rates)[:, -expected.shape[1] :], expected, rtol=1e-14)
        learner.after_task(task)
        change = torch.stack([layer.weight.detach() - w for layer, w in zip(learner.layers, frozen, strict=True)])
        close(change[:, width : 2 * width], f"task{t}/delta_Wk", 1e-10)
        close(change[:, 2 * width :], f"task{t}/delta_Wv", 1e-10)
        assert not change[:, :width].any()
        close(head.weight, f"task{t}/head_weight", 1e-10)
        close(head.bias, f"task{t}/head_bias", 1e-10)
        np.testing.assert_array_equal(learner.subspace.columns, ref[f"task{t}/memory_dim"])
        np.testing.assert_array_equal(learner.subspace.retain, ref[f"task{t}/is_retain"].astype(bool))
        close(learner.subspace.projector(), f"task{t}/memory_projector", 1e-9)
        test = torch.from_numpy(ref["test_x"][: t + 1].astype(np.float64)).flatten(0, 1)
        close(learner.network.features(test), f"task{t}/test_features", 1e-9)
        close(learner.predict(test, {}), f"task{t}/test_logits", 1e-9)


@pytest.mark.parity
def test_lagging_cosine():  # README: 1e-15
    ref = reference("inflora/cosine_schedule")
    for key in (key for key in ref if key.startswith("epoch_lr_K")):
        epochs = int(key.removeprefix("epoch_lr_K"))
        rates = [float(ref["base_lr"]) * lagging_cosine(epoch, epochs) for epoch in range(epochs)]
        np.testing.assert_allclose(rates, ref[key], rtol=0, atol=1e-15)


def test_lagging_cosine_of_one_epoch_is_constant():
    assert lagging_cosine(0, 1) == 1.0


@pytest.mark.parity
def test_what_trains_is_what_gets_a_gradient(tmp_path):
    """trainable_names: the reference marks by substring, so task 1 also marks branches 10, 11, ..."""
    ref = reference("inflora/trainable_names")
    count = len(ref["receives_gradient"])
    data = write_stream(tmp_path / "many.npz", classes=2 * count, train=2, test=1)
    blocks = {int(number) for number in re.findall(r"blocks\.(\d+)\.", "|".join(ref["receives_gradient"]))}
    backbone = tiny_values(tmp_path)["backbone"] | {"depth": max(blocks) + 1}
    manager, learner = build_tiny(tmp_path, "inflora", dataset=data, backbone=backbone, epochs=0, rank=2)
    for task in manager:
        begin(learner, task)
        marked = set()
        for name, parameter in learner.network.named_parameters():
            if parameter.requires_grad and name.endswith(".B"):
                block = name.split("blocks.")[1].split(".")[0]
                marked |= {f"image_encoder.blocks.{block}.attn.lora_B_{x}.{task.index}.weight" for x in "kv"}
            elif parameter.requires_grad:
                assert name.startswith("head.heads.")
                marked.add(name.replace("head.heads", "classifier_pool"))
        assert marked == set(str(ref["receives_gradient"][task.index]).split("|"))
        learner.after_task(task)


def test_upstream_and_default_agree_where_the_reference_has_no_defect(tmp_path):
    scores = []
    for upstream in (False, True):
        manager, learner = build_tiny(tmp_path, "inflora", upstream=upstream, lamb=0.8, lame=0.8, **QUICK)
        for task in manager:
            learn(learner, task)
        scores.append({name: value.detach().clone() for name, value in learner.network.named_parameters()})
    # the same branch rows, found by two decompositions
    for name in scores[0]:
        if name.endswith(".weight"):
            torch.testing.assert_close(scores[0][name], scores[1][name], rtol=0, atol=1e-4)


def test_exhausted_memory_warns_and_stops_adapting(tmp_path, caplog):
    """lamb = lame = 1: after two tasks nothing is free, so the third branch must not move anything."""
    manager, learner = build_tiny(tmp_path, "inflora", lamb=1.0, lame=1.0, **QUICK)
    caplog.set_level("INFO")
    for task in manager[:2]:
        learn(learner, task)
    assert "the subspace leaves too few directions for a branch of rank 4" in caplog.text
    assert "free for new branches" in caplog.text and "retain" in caplog.text
    before = [layer.weight.detach().clone() for layer in learner.layers]
    caplog.clear()
    learn(learner, manager[2])
    assert "the task's inputs reach too few free directions" in caplog.text
    used = [int(layer.A.detach().any(dim=1).sum()) for layer in learner.layers]
    assert min(used) < 4
    for layer, weight, rows in zip(learner.layers, before, used, strict=True):
        assert rows or torch.equal(layer.weight, weight)


def test_epoch_line_tells_what_the_memory_holds(tmp_path):
    manager, learner = build_tiny(tmp_path, "inflora", **QUICK)
    learn(learner, manager[0])
    numbers = learner.after_epoch(1)
    width = learner.subspace.width
    assert numbers["memory_columns"] == int(learner.subspace.columns.sum()) > 0
    assert 0 <= numbers["least_free"] < width
    assert build_tiny(tmp_path, "inflora", subspace="none", **QUICK)[1].after_epoch(1) == {}


def test_network_stays_in_evaluation_mode(tmp_path):
    _, learner = build_tiny(tmp_path, "inflora", **QUICK)
    learner.train()
    assert learner.training and not any(module.training for module in learner.network.modules())


def test_heads_have_a_rate_of_their_own_when_asked(tmp_path):
    manager, learner = build_tiny(tmp_path, "inflora", init_lr=0.3, fc_lrate=0.7, lrate=0.1, scheduler="constant")
    for task, rates in ((manager[0], [0.3, 0.7]), (manager[1], [0.1, 0.7])):
        begin(learner, task)
        optimizer, _ = learner.make_optimizer()
        assert [group["lr"] for group in optimizer.param_groups] == rates
        assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
            p.numel() for p in learner.parameters() if p.requires_grad
        )


def test_a_fresh_final_norm_is_frozen(tmp_path):
    manager, learner = build_tiny(tmp_path, "inflora", fresh_final_norm=True)
    begin(learner, manager[0])
    norm = learner.network.backbone.model.norm
    assert norm.eps == 1e-5 and bool((norm.weight == 1).all()) and not norm.weight.requires_grad


@pytest.mark.parametrize(
    "rule, score",
    [("max", lambda v: v.amax(1)), ("mean", lambda v: v.mean(1)), ("sum_softmax", lambda v: v.softmax(2).sum(1).log())],
)
def test_domains_get_a_head_each_and_vote(tmp_path, rule, score):
    data = write_stream(tmp_path / "domains.npz", domains=3)
    manager, learner = build_tiny(
        tmp_path, "inflora", dataset=data, increment=None, shuffle=False, domain_reduce=rule, **QUICK
    )
    for task in manager:
        learn(learner, task)
    assert [head.out_features for head in learner.network.head.heads] == [6, 6, 6]
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        logits, scores = learner.network(images), learner.predict(images, {})
    assert scores.shape == (5, 6)
    torch.testing.assert_close(scores, score(logits.reshape(5, 3, 6)))
    correct = evaluate(learner, list(manager)).main
    assert 100 * correct[0].sum() / sum(len(task.test) for task in manager) > 60  # chance is 17


def test_alignment_trains_all_heads_and_they_stay(tmp_path, monkeypatch):
    manager, learner = build_tiny(
        tmp_path, "inflora", ca_epochs=2, ca_samples=16, ca_lrate=0.05, ca_with_logit_norm=0.2, upstream=True, **QUICK
    )
    given = []
    align = alignment.align
    monkeypatch.setattr(alignment, "align", lambda *args, **keys: given.append((args, keys)) or align(*args, **keys))
    learn(learner, manager[0])
    assert not given and len(learner.gaussians) == 2
    for task in manager[1:]:
        begin(learner, task)
        fit(learner, task)
        before = learner.network.head.stacked()[0].detach().clone()
        learner.after_task(task)
        moved = (learner.network.head.stacked()[0].detach() - before).norm(dim=1)
        assert bool((moved > 1e-4).all())
    (weight, _, sizes, gaussians, settings), keys = given[-1]
    assert len(weight) == 6 and sizes == [2, 2, 2] and gaussians.labels.tolist() == list(range(6))
    assert (settings.epochs, settings.lrate, settings.samples, settings.tau) == (2, 0.05, 16, 0.2)
    expected = [0.9 + 0.1 * (c // 2 + 1) / 3 for c in range(6)]
    np.testing.assert_allclose(keys["mean_factor"], expected)


def test_alignment_of_domains_trains_the_combined_score(tmp_path):
    data = write_stream(tmp_path / "domains.npz", domains=2)
    manager, learner = build_tiny(
        tmp_path, "inflora", dataset=data, increment=None, shuffle=False, ca_epochs=2, ca_samples=16, **QUICK
    )
    for task in manager:
        learn(learner, task)
    assert learner.gaussians.labels.tolist() == [*range(6), *range(6)]
    correct = evaluate(learner, list(manager)).main
    assert 100 * correct[0].sum() / sum(len(task.test) for task in manager) > 60


def test_state_counts_what_the_method_keeps(tmp_path):
    """Key and value weights with their remainder (2 x 2 D^2 a layer), the memory, one head; the branch's B."""
    manager, learner = build_tiny(tmp_path, "inflora", **QUICK)
    learn(learner, manager[0])
    width, layers = learner.network.feature_dim, len(learner.layers)
    memory = sum(b.numel() * b.element_size() for b in learner.subspace.buffers())
    branches = 4 * layers * (2 * 2 * width * width + 2 * width * 4)
    head = 4 * 2 * (width + 1)
    scale = 4  # of the head
    assert stored_bytes(learner) == memory + branches + head + scale
    assert expected_bytes(learner, [manager[0]]) == 0
    assert expected_bytes(build_tiny(tmp_path, "inflora", ca_epochs=1)[1], [manager[0]]) > 0


@pytest.mark.parametrize("keys", [{}, {"subspace": "gpm", "blocks": (0,), "ca_epochs": 2}, {"subspace": "none"}])
def test_stopped_inside_task_two_and_resumed_gives_the_same_digits(tmp_path, monkeypatch, keys):
    config = config_from(tiny_values(tmp_path, "inflora", seed=3, train_transform="pad_crop", **(QUICK | keys)), "test")
    trainer.run(config, tmp_path / "whole", resume=False)

    step_done = trainer.SeedRun.step_done

    def stop(run, fit_state):
        if run.record.task == 1 and fit_state.epoch == 1 and fit_state.step == 2:
            run.stop.requested = True
        step_done(run, fit_state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SeedRun, "step_done", stop)
        with pytest.raises(Interrupted):
            trainer.run(config, tmp_path / "cut", resume=False)
    trainer.run(config, tmp_path / "cut", resume=True)

    states = [_final_state(tmp_path / name / "seed3") for name in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, states[1][name]), name


def _final_state(folder: Path):
    return checkpoint.load(folder / "checkpoint" / "last.pt")[1]["learner"]["module"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"subspace": "none", "lamb": 0.9}, '"lamb" has no effect unless "subspace" is "dualgpm" or "gpm"'),
        ({"lamb": 0.9, "lame": 0.8}, "the share that is kept must not fall"),
        ({"lamb": 1.5}, '"lamb" must be'),
        ({"ca_lrate": 0.1}, '"ca_lrate" has no effect unless "ca_epochs" is given'),
        ({"subspace": "dual"}, '"subspace" must be'),
    ],
)
def test_contradictions_are_named(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_from(tiny_values(tmp_path, "inflora", **keys), "test")


LAMB = 0.99


WIDE = {"name": "vit", "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def after_three_tasks(tmp_path, **keys):
    """(learner, moments of the first task's inputs, key and value weights after the first task and after the last)."""
    data = write_stream(tmp_path / "claim.npz", train=12)
    manager, learner = build_tiny(tmp_path, "inflora", dataset=data, backbone=WIDE, rank=4, epochs=6, **keys)
    learn(learner, manager[0])
    moments, before = learner._input_moments(manager[0]).double(), key_value(learner)
    for task in manager[1:]:
        learn(learner, task)
    return learner, moments, before, key_value(learner)


def first_left_out(moments: torch.Tensor, share: float) -> torch.Tensor:
    """(L,): share of the direction with which the first task's memory would have reached `share` (it stops before)."""
    values = torch.linalg.eigvalsh(moments).flip(1)
    shares = values / values.sum(dim=1, keepdim=True)
    kept = (shares.cumsum(dim=1) < share).sum(dim=1, keepdim=True)
    return shares.gather(1, kept)[:, 0]


@pytest.mark.parametrize("memory", ["dualgpm", "gpm"])
def test_outputs_on_old_inputs_move_less_than_the_threshold_allows(tmp_path, memory):
    _, moments, before, after = after_three_tasks(tmp_path, subspace=memory, energy="paper", lamb=LAMB, lame=LAMB)
    assert bool(((after - before).norm(dim=(1, 2)) > 1e-3).all())  # something was trained
    limit = 1 - LAMB + first_left_out(moments, LAMB)
    assert bool((hit(before, after, moments) <= limit).all())


def test_plain_lora_moves_them_clearly_more(tmp_path):
    results = {}
    for memory, keys in (("dualgpm", {"energy": "paper", "lamb": LAMB, "lame": LAMB}), ("none", {})):
        _, moments, before, after = after_three_tasks(tmp_path, subspace=memory, **keys)
        results[memory] = hit(before, after, moments), change(before, after, moments)
        limit = 1 - LAMB + first_left_out(moments, LAMB)
    assert bool((results["none"][0] > 2 * limit).all())
    assert bool((results["none"][1] > 5 * results["dualgpm"][1]).all())


def test_without_the_memory_the_same_branches_would_interfere(tmp_path, monkeypatch):
    """The test sees a broken projection: with an empty memory the later branches lie in the old inputs."""
    from models.inflora.subspace import GPM

    monkeypatch.setattr(GPM, "update", lambda *_: None)
    learner, moments, before, after = after_three_tasks(tmp_path, energy="paper", lamb=LAMB, lame=LAMB)
    assert bool((allowed(learner, moments) > 0.999).all())
    assert bool((hit(before, after, moments) > 1 - LAMB + first_left_out(moments, LAMB)).all())
