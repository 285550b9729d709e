"""SLCA and SLCA++: two whole tasks of the reference through the learner's hooks, its schedules, and our own rules."""

import json

import numpy as np
import pytest
import torch

import main
import models.parts.alignment as alignment
import trainer
from data.stream import Task
from models.parts.alignment import Draws, align
from models.parts.costs import expected_bytes
from models.parts.evaluation import evaluate
from models.parts.loop import begin, fit, learn
from models.slca import LIGHT
from tests.conftest import build_tiny, reference, tiny_values
from tests.convs.test_lora import renamed
from tests.stages import ExactRuntime, Given, stored_task
from utils.errors import ConfigError

LR = 0.01


FACTOR = {"slca": 0.01, "slcapp": 0.1}


PAGE = {"optimizer": "sgd", "momentum": 0.9, "lrate": LR, "normalize": "none"}  # what both methods' page says


def vit(size: int, patch: int, dim: int, depth: int, heads: int) -> dict:
    return {"name": "vit", "img_size": size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads}


class Stage:
    """A stored stage: a learner in its starting state and the tasks with the stored images."""

    def __init__(self, model_name: str, tmp_path, monkeypatch):
        self.name = model_name
        self.arrays = arrays = reference(f"slca/stage_{model_name}")
        starts = [k for k in arrays if k.startswith("task") and k.endswith("_losses")]
        self.sizes = [len(arrays[f"task{t}_trained_fc/heads.{t}.0.weight"]) for t in range(len(starts))]
        milestones = arrays["milestones"].tolist()
        schedule = {"scheduler": "multistep", "milestones": milestones}
        if model_name == "slcapp":
            schedule = {
                "scheduler": "cosine",
                "min_lr": LR * FACTOR[model_name] * 0.1 ** len(milestones),
                "lora_rank": int(arrays["lora_rank"]),
                "fc_scale_mu": float(arrays["mu"]),
                "sce_a": float(arrays["sce"][0]),
                "sce_b": float(arrays["sce"][1]),
            }
        _, self.learner = build_tiny(
            tmp_path, model_name, backbone=vit(*arrays["arch"].tolist()), upstream=True,
            epochs=int(arrays["epochs"]), batch_size=int(arrays["batch"]), bcb_lrscale=FACTOR[model_name],
            weight_decay=float(arrays["weight_decay"]), ca_epochs=int(arrays["ca_epochs"]),
            ca_with_logit_norm=float(arrays["tau"]), ca_samples=arrays["ca_eps"].shape[1], **PAGE, **schedule,
        )  # fmt: skip
        self.learner.runtime = ExactRuntime("cpu", "fp32", num_workers=0)
        self.alignment_losses: list[torch.Tensor] = []
        monkeypatch.setattr(alignment, "align", self._align)

    def _align(self, *args, **keys):
        keys.pop("generator")
        aligned = align(*args, **keys, draws=self._draws)
        self.alignment_losses.append(aligned.losses)
        return aligned

    def _draws(self, epoch: int) -> Draws:
        arrays, classes = self.arrays, sum(self.sizes)
        rows = slice(epoch * classes, (epoch + 1) * classes)
        uniform = torch.from_numpy(arrays["ca_uniform"][rows]) if "ca_uniform" in arrays else torch.empty(0)
        return Draws(torch.from_numpy(arrays["ca_eps"][rows]), uniform, torch.from_numpy(arrays["ca_perm"][epoch]))

    def half(self, half: str, first: int, last: int) -> Given:
        labels = self.arrays[f"y_{half}"]
        rows = np.flatnonzero((labels >= first) & (labels < last))
        return Given(torch.from_numpy(self.arrays[f"x_{half}"]).float()[rows], labels[rows])

    def task(self, index: int) -> Task:
        known, total = sum(self.sizes[:index]), sum(self.sizes[: index + 1])
        train, test = self.half("train", known, total), self.half("test", known, total)
        return stored_task(index, self.sizes, train, test)

    def load_network(self, prefix: str) -> None:
        self.learner.network.load_state_dict(self.network(prefix), strict=False)

    def network(self, prefix: str) -> dict[str, torch.Tensor]:
        """The stored network under our names, without the MLP factors, which the reference never trains."""
        start = len(prefix) + 1
        names = {key: key[start:] for key in self.arrays if key.startswith(f"{prefix}/") and ".mlp.lora_" not in key}
        return {ours(name): torch.from_numpy(self.arrays[key]) for key, name in names.items() if "scales" not in name}

    def train(self, task: Task) -> list[float]:
        """Every epoch over the stored images in stored order, by the learner's loss and optimiser."""
        learner, losses = self.learner, []
        learner.train()
        learner.stage = learner.stages(task)[0]
        optimizer, scheduler = learner.make_optimizer()
        images, labels = task.train.images, torch.from_numpy(task.train.labels)
        for _ in range(learner.stage.epochs):
            size = learner.config.batch_size
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                optimizer.zero_grad(set_to_none=True)
                loss = learner.loss(learner.network, x, y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            scheduler.step()
        return losses

    def check_heads(self, prefix: str, atol: float) -> None:
        for name, value in self.learner.network.head.state_dict().items():
            if name.startswith("heads."):
                stored = self.arrays[f"{prefix}/{name.replace('.weight', '.0.weight').replace('.bias', '.0.bias')}"]
                np.testing.assert_allclose(value.numpy(), stored, atol=atol, rtol=0, err_msg=f"{prefix} {name}")
        if self.name == "slcapp":
            scales = [
                self.arrays[f"{prefix}/scales.{t}.weight"][0] for t in range(len(self.learner.network.head.sizes))
            ]
            np.testing.assert_allclose(self.learner.network.head.scales.numpy(), scales, atol=1e-6, rtol=0)


def ours(name: str) -> str:
    """A parameter of the reference's network under our name."""
    if name.startswith("fc."):
        return "head." + name[3:].replace(".0.weight", ".weight").replace(".0.bias", ".bias")
    return "backbone.model." + renamed(name.removeprefix("convnet."))


@pytest.mark.parity
@pytest.mark.parametrize("model_name", ["slca", "slcapp"])
def test_two_tasks_of_the_reference(model_name, tmp_path, monkeypatch):
    stage = Stage(model_name, tmp_path, monkeypatch)
    arrays, learner = stage.arrays, stage.learner
    for index in range(len(stage.sizes)):
        task = stage.task(index)
        begin(learner, task)
        if index == 0:
            stage.load_network("task0_start")
        else:
            keys = {f"fc.{k.split('/', 1)[1]}": k for k in arrays if k.startswith(f"task{index}_start/heads.")}
            state = {ours(name): torch.from_numpy(arrays[key]) for name, key in keys.items()}
            learner.network.load_state_dict(state, strict=False)
        np.testing.assert_allclose(stage.train(task), arrays[f"task{index}_losses"], atol=1e-5, rtol=0)
        stage.check_heads(f"task{index}_trained_fc", atol=1e-6)
        learner.after_task(task)
        stage.check_heads(f"task{index}_aligned_fc", atol=4e-5)
        test = stage.half("test", 0, task.total_classes)
        with torch.no_grad():
            logits = learner.predict(test.images, {})
        np.testing.assert_allclose(logits.numpy(), arrays[f"task{index}_test_logits"], atol=4e-4, rtol=0)
        top1 = 100 * (logits.argmax(dim=1).numpy() == test.labels).mean()
        assert top1 == pytest.approx(float(arrays[f"task{index}_top1"]), abs=0.005 + 1e-9)
    losses = torch.cat(stage.alignment_losses).flatten().numpy()
    np.testing.assert_allclose(losses, arrays["ca_losses"], atol=3e-5, rtol=0)
    np.testing.assert_allclose(learner.gaussians.means.numpy(), arrays["class_means"], atol=1e-5, rtol=0)
    covs = learner.gaussians.dense_covariances().numpy()
    np.testing.assert_allclose(covs, arrays["class_covs"], atol=1e-5, rtol=0)

    learner.network.head.recall()
    final = learner.network.state_dict()
    for name, value in stage.network("final").items():
        np.testing.assert_allclose(final[name].numpy(), value.numpy(), atol=1e-6, rtol=0, err_msg=name)
    assert torch.equal(learner.network.head.scales, torch.ones(len(stage.sizes)))


MILESTONES = {"slca_cifar": 1, "slca_imgnetr": 1, "slca_mocov3": 1, "slcapp_cifar": 1, "slcapp_imgnetr": 1,
              "slcapp_cub": 1, "slcapp_mocov3": 2, "slcapp_full_backbone": 1}  # fmt: skip


STEPS = {"slca_cifar": [18], "slca_imgnetr": [40], "slca_mocov3": [80]}


@pytest.mark.parity
@pytest.mark.parametrize("name", MILESTONES)
def test_groups_and_schedules_of_the_reference(name, tmp_path):
    arrays = reference("slca/schedules")
    tasks = sorted({key.split("/")[1] for key in arrays if key.startswith(f"{name}/")}, key=int)
    assert tasks
    model_name = name.split("_")[0]
    stored = {k: v for k, v in arrays.items() if k.startswith(f"{name}/")}
    blocks = {n.split(".")[2] for k, v in stored.items() if "/group" in k for n in v if ".blocks." in n}
    keys = {"scheduler": "multistep", "milestones": STEPS[name]} if model_name == "slca" else {
        "scheduler": "cosine", "min_lr": LR * FACTOR[model_name] * 0.1 ** MILESTONES[name],
        "lora_rank": 0 if name.endswith("full_backbone") else 2,
    }  # fmt: skip
    epochs, decay = len(stored[f"{name}/0/lr"]), float(stored[f"{name}/0/weight_decay"][0])
    keys |= PAGE | {"backbone": vit(16, 8, 16, len(blocks), 2), "weight_decay": decay, "epochs": epochs}
    manager, learner = build_tiny(tmp_path, model_name, **keys)
    for index in map(int, tasks):
        begin(learner, manager[index])
        optimizer, scheduler = learner.make_optimizer()
        where = f"{name}/{index}"
        rates = []
        for _ in range(epochs):
            rates.append([entry["lr"] for entry in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        np.testing.assert_allclose(rates, stored[f"{where}/lr"], atol=1e-12, rtol=0)
        for key in ("weight_decay", "momentum"):
            found = [entry[key] for entry in optimizer.param_groups]
            np.testing.assert_allclose(found, stored[f"{where}/{key}"], atol=1e-12, rtol=0)
        names = {id(p): n for n, p in learner.network.named_parameters()}
        for number, entry in enumerate(optimizer.param_groups):
            expected = {ours(n) for n in stored[f"{where}/group{number}"]}
            assert {names[id(p)] for p in entry["params"]} == expected


def test_trained_parameters_of_vit_b_are_those_of_the_paper():
    """270,336 of SLCA++ at rank 4: 147,456 in branches, the rest norms, biases and the class token."""
    import timm

    from convs.lora import add_lora

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        add_lora(model, rank=4)
    counted = {n: p.numel() for n, p in model.named_parameters() if any(part in n for part in LIGHT)}
    assert sum(size for name, size in counted.items() if "lora" in name) == 147_456
    assert sum(counted.values()) == 270_336


@pytest.mark.parametrize("model_name", ["slca", "slcapp"])
def test_the_next_task_starts_from_the_heads_before_alignment(model_name, tmp_path, monkeypatch):
    manager, learner = build_tiny(tmp_path, model_name)
    for task in manager[:2]:
        begin(learner, task)
        trained = [value.clone() for value in learner.network.head.stacked()]
        learner.after_task(task)
    assert not torch.equal(learner.network.head.stacked()[0], trained[0])
    assert (learner.network.head.scales[0] > 1) == (model_name == "slcapp")
    begin(learner, manager[2])
    for now, before in zip(learner.network.head.stacked(), trained, strict=True):
        assert torch.equal(now[: len(before)], before)
    assert torch.equal(learner.network.head.scales, torch.ones(3))


@pytest.mark.parametrize("model_name", ["slca", "slcapp"])
def test_before_alignment_a_run_is_the_run_without_alignment(model_name, tmp_path):
    scores = {}
    for ca_epochs in (0, 2):
        manager, learner = build_tiny(tmp_path, model_name, ca_epochs=ca_epochs, ca_samples=16 if ca_epochs else None)
        images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        scores[ca_epochs] = []
        for task in manager:
            begin(learner, task)
            fit(learner, task)
            with torch.no_grad():
                scores[ca_epochs].append(learner.eval().predict(images, {}))
            learner.after_task(task)
    for without, before in zip(scores[0], scores[2], strict=True):
        assert torch.equal(without, before)


def test_true_tasks_are_counted_unless_upstream(tmp_path, monkeypatch):
    """Tasks of 3, 1 and 2 classes: label // 2 would call the classes 0, 0, 1, 1, 2, 2."""
    seen = {}

    def spy(*args, mean_factor, ages, **keys):
        seen["ages"] = ages.tolist()
        return align(*args, mean_factor=mean_factor, ages=ages, **keys)

    monkeypatch.setattr(alignment, "align", spy)
    for upstream, ages in ((False, [2, 2, 2, 1, 0, 0]), (True, [2, 2, 1, 1, 0, 0])):
        manager, learner = build_tiny(
            tmp_path, "slca", task_sizes=[3, 1, 2], increment=None, upstream=upstream, epochs=0, ca_epochs=1
        )
        for task in manager:
            begin(learner, task)
            learner.after_task(task)
        assert seen["ages"] == ages


def test_a_frozen_backbone_trains_only_the_head(tmp_path):
    manager, learner = build_tiny(tmp_path, "slca", bcb_lrscale=0)
    before = {k: v.clone() for k, v in learner.network.backbone.state_dict().items()}
    begin(learner, manager[0])
    assert len(learner.param_groups()) == 1
    fit(learner, manager[0])
    assert all(torch.equal(v, before[k]) for k, v in learner.network.backbone.state_dict().items())


def test_without_alignment_nothing_is_stored(tmp_path):
    manager, learner = build_tiny(tmp_path, "slca", ca_epochs=0)
    for task in manager[:2]:
        learn(learner, task)
    assert learner.gaussians is None and expected_bytes(learner, manager[:]) == 0
    assert "alignment" not in learner.runtime.stopwatch.seconds


@pytest.mark.parametrize("storage", ["full", "diag", "low_rank", "shared"])
def test_planned_statistics_are_what_the_state_holds(storage, tmp_path):
    from tools.plan import plan

    manager, learner = build_tiny(tmp_path, "slca", cov_storage=storage, epochs=0, ca_epochs=1, ca_samples=8)
    planned = expected_bytes(learner, manager[:])
    for task in manager:
        learn(learner, task)
    state = learner.state_dict()
    held = sum(v.numel() * v.element_size() for k, v in state.items() if k.startswith("gaussians."))
    assert held == planned
    assert f"{planned:,} after the last" in plan(learner.config)


@pytest.mark.parametrize("reduce", ["max", "mean", "sum_softmax"])
def test_domains_have_heads_of_their_own_and_vote(reduce, tmp_path):
    from tests.conftest import write_stream

    dataset = write_stream(tmp_path / "domains.npz", classes=3, domains=2)
    manager, learner = build_tiny(
        tmp_path, "slca", dataset=dataset, shuffle=False, increment=None, domain_reduce=reduce, ca_epochs=2
    )
    for task in manager:
        learn(learner, task)
    assert learner.network.head.sizes == [3, 3]
    assert learner.gaussians.labels.tolist() == [0, 1, 2] * 2 and learner.gaussians.tasks.tolist() == [0] * 3 + [1] * 3
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        first, second = learner.network(images).split(3, dim=1)
        expected = {
            "max": torch.maximum(first, second),
            "mean": (first + second) / 2,
            "sum_softmax": (first.softmax(1) + second.softmax(1)).log(),
        }
        assert torch.allclose(learner.predict(images, {}), expected[reduce], atol=1e-5)


def test_domains_can_share_one_head(tmp_path):
    from tests.conftest import write_stream

    dataset = write_stream(tmp_path / "domains.npz", classes=3, domains=3)
    manager, learner = build_tiny(
        tmp_path, "slcapp", dataset=dataset, shuffle=False, increment=None, domain_head="shared"
    )
    for task in manager:
        learn(learner, task)
    assert learner.network.head.sizes == [3] and len(learner.gaussians) == 9
    assert evaluate(learner, manager[:]).main.shape == (3, 3)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"lora_mlp": True}, '"lora_mlp" has no effect unless "lora_rank" is given'),
        ({"cov_rank": 8}, '"cov_rank" has no effect'),
        ({"bcb_lrscal": 0.1}, 'did you mean "bcb_lrscale"'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build_tiny(tmp_path, "slca", **keys)


class Stopped(BaseException):
    """Stands for a kill that nothing may catch."""


def numbers(folder) -> dict:
    result = json.loads((folder / "seed1993" / "result.json").read_text())
    return {key: result[key] for key in ("acc", "acc_task_il", "curve", "finished", "parameters")}


@pytest.mark.parametrize("model_name", ["slca", "slcapp"])
@pytest.mark.parametrize("after", [1, 2])
def test_stopped_after_a_task_and_resumed(model_name, after, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    values = tiny_values(tmp_path, model_name, optimizer="sgd", lrate=0.05, ca_epochs=2, ca_samples=16)
    path.write_text(json.dumps(values))
    arguments = ["--config", str(path), "--output"]
    assert main.main([*arguments, str(tmp_path / "whole")]) == 0

    save, done = trainer.SeedRun.save, []

    def save_and_stop(self, phase, *state):
        save(self, phase, *state)
        if phase == "start":  # a task is finished: what comes next is the start of another
            done.append(self.record.done)
            if len(done) == after:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SeedRun, "save", save_and_stop)
        with pytest.raises(Stopped):
            main.main([*arguments, str(tmp_path / "cut")])
    assert main.main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
