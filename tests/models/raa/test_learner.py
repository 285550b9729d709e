"""RAA: whole tasks of the reference through the learner, its variants, its state, its answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import models.parts.alignment as alignment
import models.raa.learner as raa
from convs.adapters import BranchedAdapter
from models.factory import config_from
from models.parts.alignment import Draws, align
from models.parts.costs import expected_bytes, num_trainable
from models.parts.evaluation import evaluate
from models.parts.loop import begin, fit, learn
from models.parts.losses import margin_cross_entropy
from models.parts.optim import SAM
from models.raa.shift import mean_shift
from tests.conftest import build_tiny, reference, tiny_values, write_stream
from tests.stages import ExactRuntime, Given, in_stored_order
from utils.errors import ConfigError

TENSORS = ("down_w", "down_b", "up_w", "up_b")
STAGES = {"task_stages_sam": 1e-10, "task_stages_plain": 1e-10, "incremental_run": 1e-5}


class GivenMasks(torch.nn.Module):
    """An adapter's dropout with stored keep-masks; a frozen branch asks before the others do."""

    def __init__(self, stage: "Stage", layer: int):
        super().__init__()
        self.stage, self.layer, self.taken = stage, layer, 0

    def forward(self, hidden):
        if not self.training:
            return hidden
        replicas, batch, tokens, _ = hidden.shape
        stored = self.stage.masks[self.stage.step, self.stage.part, self.layer]  # (rows, tokens, b)
        stored = stored[: (self.stage.branches + 1) * batch].unflatten(0, (self.stage.branches + 1, batch))
        mask = stored[self.taken : self.taken + replicas, :, :tokens]
        self.taken = (self.taken + replicas) % self.stage.branches
        return hidden * mask / 0.9


class Stage:
    """A stored run: the real learner in the reference's starting state, fed its images, alphas, masks and draws."""

    def __init__(self, name: str, tmp_path, monkeypatch):
        self.arrays = arrays = reference(f"raa/{name}")
        self.atol = STAGES[name]
        self.hp = {key[3:]: value.item() for key, value in arrays.items() if key.startswith("hp.")}
        self.branches, self.sizes = int(self.hp["adapter_num"]), arrays["sizes"].tolist()
        self.exact = arrays["timm.norm.weight"].dtype == np.float64
        size, patch, width, depth, heads = arrays["arch"].tolist()
        manager, learner = build_tiny(
            tmp_path, "raa", dataset=write_stream(tmp_path / "s.npz", classes=sum(self.sizes), size=size),
            backbone={"name": "vit", "img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth,
                      "num_heads": heads},
            task_sizes=self.sizes, increment=None, shuffle=False, image_size=size, optimizer="sgd", lrate=0.01,
            upstream=True, frozen_decay=False, shift_pairs="aligned", normalize=None, shift=bool(self.hp["ssca"]),
            batch_size=self.hp["batch_size"], weight_decay=self.hp["weight_decay"], ca_lrate=self.hp["init_lr"],
            init_epoch=self.hp["init_epochs"], epochs=self.hp["inc_epochs"], ca_epochs=self.hp["ca_epochs"],
            branches=self.branches, bottleneck=self.hp["ffn_num"], scale=self.hp["scale"], margin=self.hp["margin"],
            loss_weight=self.hp["loss_weight"], test_batch_size=self.hp["batch_size"],
            sam={"rho": self.hp["rho"]} if self.hp["perturb"] else None,
        )  # fmt: skip
        if not self.hp["perturb"]:
            learner.config = learner.config.model_copy(update={"sam": None})
        self.learner = learner.double() if self.exact else learner
        self.learner.runtime = ExactRuntime("cpu", "fp32", num_workers=0)
        self.load(manager)
        in_stored_order(monkeypatch)
        monkeypatch.setattr(type(learner.network), "mixtures", self.mixtures)
        monkeypatch.setattr(raa, "margin_cross_entropy", self.loss)
        monkeypatch.setattr(raa, "mean_shift", self.shift)
        monkeypatch.setattr(alignment, "align", self.align)
        for layer, adapter in enumerate(learner.adapters):
            adapter.dropout = GivenMasks(self, layer)

    def load(self, manager) -> None:
        arrays, model = self.arrays, self.learner.network.backbone.model
        state = {key[5:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("timm.")}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all(".adapter." in key for key in missing)
        for layer, adapter in enumerate(self.learner.adapters):
            for name in TENSORS:
                getattr(adapter, name).data.copy_(torch.from_numpy(arrays[f"init.adapter{layer}.{name}"]))
        self.tasks = [replace(task, train=self.images("train", task.classes)) for task in manager]

    def images(self, half: str, classes: range) -> Given:
        """Class by class in ascending label, in file order within a class."""
        labels = self.arrays[f"y_{half}"]
        rows = np.concatenate([np.flatnonzero(labels == label) for label in classes])
        given = Given(self.arrays[f"x_{half}"][rows], labels[rows])
        given.images = (given.images if self.exact else given.images.float()) / 255
        return given

    def begin(self, index: int) -> None:
        """Take up the recordings of a task."""
        arrays = self.arrays
        shape = arrays[f"t{index}.drop_mask_shape"]
        bits = np.unpackbits(arrays[f"t{index}.drop_mask_bits"], count=int(np.prod(shape)))
        self.masks = torch.from_numpy(bits.reshape(shape)).to(torch.get_default_dtype())
        self.alphas = torch.from_numpy(arrays[f"t{index}.alpha"])
        self.index, self.passes, self.losses = index, -1, []

    @property
    def step(self) -> int:
        return self.passes // self.alphas.shape[1]

    @property
    def part(self) -> int:
        return self.passes % self.alphas.shape[1]

    def mixtures(self, like):
        self.passes += 1
        return self.alphas[self.step, self.part]

    def loss(self, *args, **keys):
        value = margin_cross_entropy(*args, **keys)
        self.losses.append(value.item())
        return value

    def shift(self, means, before, after, sigma):
        found = mean_shift(means, before, after, sigma)
        self.close(before, f"t{self.index}.emb_old")
        self.close(after, f"t{self.index}.emb_new")
        self.close(means, f"t{self.index}.means_before_shift")
        self.close(found, f"t{self.index}.gap")
        return found

    def align(self, weight, *args, generator, **keys):
        if not self.hp["ca"]:
            return align(weight, *args[:-1], replace(args[-1], epochs=0), **keys)
        self.close(weight, f"t{self.index}.heads_before_ca")
        eps, perm = (torch.from_numpy(self.arrays[f"t{self.index}.{name}"]) for name in ("ca_eps", "ca_perm"))
        np.testing.assert_allclose(eps.sum(dim=(1, 2)), self.arrays[f"t{self.index}.ca_seed_eps_sum"], rtol=1e-4)
        return align(weight, *args, **keys, draws=lambda epoch: Draws(eps, torch.empty(0), perm[epoch].long()))

    def close(self, found, key: str, atol: float | None = None) -> None:
        found = np.asarray(found.detach())
        np.testing.assert_allclose(found, self.arrays[key], atol=atol or self.atol, rtol=0, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("name", STAGES)
def test_whole_tasks_of_the_reference(name, tmp_path, monkeypatch):
    """README: 1e-10; the float32 run 1e-5, 1e-4 on losses."""
    stage = Stage(name, tmp_path, monkeypatch)
    arrays, learner = stage.arrays, stage.learner
    for task in stage.tasks:
        index = task.index
        stage.begin(index)
        begin(learner, task)
        learner.network.head.blocks[-1].data.copy_(torch.from_numpy(arrays[f"init.head{index}"]))
        fit(learner, task)
        steps, passes = arrays[f"t{index}.loss"].shape
        assert stage.passes == steps * passes - 1 and passes == (2 if stage.hp["perturb"] else 1)
        parts = np.array(stage.losses).reshape(steps, passes, 2)
        atol = stage.atol if stage.exact else 1e-4
        np.testing.assert_allclose(parts, arrays[f"t{index}.loss_parts"], atol=atol, rtol=0)
        total = learner.config.loss_weight * parts[..., 0] + parts[..., 1]
        np.testing.assert_allclose(total, arrays[f"t{index}.loss"], atol=3 * atol, rtol=0)
        learner.after_task(task)
        for layer, adapter in enumerate(learner.adapters):
            for tensor in TENSORS:
                stage.close(getattr(adapter, tensor), f"t{index}.adapter{layer}.{tensor}")
        stage.close(learner.network.head.weight, f"t{index}.heads")
        stage.close(learner.gaussians.means, f"t{index}.class_means")
        covs = learner.gaussians.dense_covariances()
        stage.close(covs.diagonal(dim1=1, dim2=2), f"t{index}.class_cov_diag")
        stage.close(covs[-1], f"t{index}.class_cov_last")
        labels = arrays["y_test"]
        seen = labels < task.total_classes
        images = torch.from_numpy(arrays["x_test"][seen]).to(learner.network.head.weight.dtype) / 255
        with torch.no_grad():
            logits = learner.predict(images, {})
        stage.close(logits, f"t{index}.test_logits")
        top1 = 100 * (logits.argmax(dim=1).numpy() == labels[seen]).mean()
        assert top1 == pytest.approx(arrays["top1"][index], abs=0.005 + 1e-9)


@pytest.mark.parity
def test_total_loss_of_the_reference(tmp_path):
    arrays = {key[6:]: value for key, value in reference("raa/angular_loss").items() if key.startswith("total_")}
    logits = torch.from_numpy(arrays["logits"]).requires_grad_()
    known, classes = int(arrays["known"]), logits.shape[1]
    _, learner = build_tiny(
        tmp_path, "raa", branches=int(arrays["K"]), loss_weight=float(arrays["weight"]), scale=float(arrays["s"]),
        margin=float(arrays["m"]),
    )  # fmt: skip
    manager, _ = build_tiny(tmp_path, "raa", dataset=write_stream(tmp_path / "t.npz", classes=classes),
                            task_sizes=[known, classes - known], increment=None)  # fmt: skip
    learner.task = manager[1]
    labels = torch.from_numpy(arrays["labels"]) - known
    loss = learner.loss(lambda prefix: logits, None, labels)
    loss.backward()
    np.testing.assert_allclose(loss.item(), arrays["loss"], atol=1e-12, rtol=0)
    np.testing.assert_allclose(logits.grad.numpy(), arrays["grad"], atol=1e-12, rtol=0)


def test_the_task_in_parts(tmp_path):
    """Merge and freeze: after a task branch 0 is the mean; from the second task on it does not move in training."""
    manager, learner = build_tiny(tmp_path, "raa", branches=3, epochs=2, ca_epochs=0)
    for task in manager[:2]:
        begin(learner, task)
        start = [p.detach().clone() for a in learner.adapters for p in a.parameters()]
        fit(learner, task)
        trained = [p.detach().clone() for a in learner.adapters for p in a.parameters()]
        moved = torch.stack([(x != y).flatten(1).any(dim=1) for x, y in zip(start, trained, strict=True)]).any(dim=0)
        assert moved.tolist() == [task.index == 0, True, True]
        learner.after_task(task)
        for now, then in zip((p for a in learner.adapters for p in a.parameters()), trained, strict=True):
            assert torch.allclose(now[0], then.mean(dim=0), atol=1e-7) and torch.equal(now[1:], then[1:])
        numbers = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        share = sum(p[0].numel() for a in learner.adapters for p in a.parameters()) if task.index else 0
        assert num_trainable(learner) == numbers - share


@pytest.mark.parametrize("sam", [{"rho": 0.05}, None])
def test_a_frozen_branch_decays_only_when_asked(sam, tmp_path):
    """Weight decay alone moves it: after n steps of a constant rate it is shorter, in its own direction."""
    for frozen_decay in (False, True):
        manager, learner = build_tiny(
            tmp_path, "raa", epochs=2, ca_epochs=0, optimizer="sgd", weight_decay=0.1, sam=sam,
            frozen_decay=frozen_decay,
        )  # fmt: skip
        if sam is None:
            learner.config = learner.config.model_copy(update={"sam": None})
        learn(learner, manager[0])
        before = learner.adapters[0].down_w[0].detach().clone()
        begin(learner, manager[1])
        fit(learner, manager[1])
        after = learner.adapters[0].down_w[0].detach()
        ratio = after / before
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), atol=1e-4)
        assert bool(ratio.mean() < 0.9999) == frozen_decay and torch.equal(after, before) != frozen_decay


def test_old_heads_have_no_gradient_but_decay(tmp_path):
    manager, learner = build_tiny(tmp_path, "raa", epochs=1, ca_epochs=0, optimizer="sgd", weight_decay=0.1)
    learn(learner, manager[0])
    old = learner.network.head.blocks[0].detach().clone()
    begin(learner, manager[1])
    fit(learner, manager[1])
    ratio = learner.network.head.blocks[0].detach() / old
    assert (ratio < 1).all() and torch.allclose(ratio, ratio.mean().expand_as(ratio), atol=1e-5)


VARIANTS = {
    "parameter amalgam": {"amalgam": "parameter"},
    "branches without amalgam": {"amalgam": "none"},
    "plain SAM": {"sam": {"rho": 0.05, "damping": 0}},
    "SSIAT": {"branches": 1, "loss_weight": 1.0},
    "three branches": {"branches": 3},
    "never frozen": {"freeze": False},
    "reference": {"upstream": True, "train_transform": "pad_crop", "normalize": "half"},
    "arcface": {"margin_kind": "arcface", "margin": 0.1},
    "no shift": {"shift": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn(variant, tmp_path):
    """Flat colours, three tasks of two classes, 24 test images: chance is 4 right, 12 with the task known."""
    manager, learner = build_tiny(tmp_path, "raa", **VARIANTS[variant])
    for task in manager:
        learn(learner, task)
    correct = evaluate(learner, manager[:]).main
    assert correct[1].sum() > 14 and correct[0].sum() > 6
    learner.stage = learner.stages(manager[-1])[0]
    assert isinstance(learner.make_optimizer()[0], SAM)


def test_amalgam_and_branches_weigh_in_the_loss(tmp_path):
    """By hand: K = 2 replicas with weight 3 as one mean, the amalgam with weight 1."""
    manager, learner = build_tiny(tmp_path, "raa", loss_weight=3.0, margin=0.2, scale=5.0)
    learner.task = manager[1]
    cosines = torch.rand(6, 4) * 2 - 1
    labels = torch.tensor([0, 1])
    found = learner.loss(lambda prefix: cosines, None, labels)
    z = 5 * (cosines[:, 2:] - 0.2 * torch.eye(2)[[0, 1, 0, 1, 0, 1]])
    each = torch.nn.functional.cross_entropy(z, labels.repeat(3), reduction="none")
    assert torch.allclose(found, 3 * each[:4].mean() + each[4:].mean())


def test_the_prefix_is_computed_once_a_step(tmp_path):
    """The first block's attention runs once for all replicas and both passes; every other block twice."""
    manager, learner = build_tiny(tmp_path, "raa", epochs=1)
    begin(learner, manager[0])
    calls = [0, 0]
    for layer, block in enumerate(learner.network.blocks):
        block.attn.register_forward_hook(lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    fit(learner, manager[0])
    steps = -(-len(manager[0].train) // learner.config.batch_size)
    assert calls == [steps, 2 * steps]


@pytest.mark.parametrize(("pairs", "passes"), [("aligned", 2), ("upstream", 3)])
def test_feature_passes_of_a_later_task(pairs, passes, tmp_path, monkeypatch):
    """Aligned pairs share the pass after training with the statistics."""
    manager, learner = build_tiny(tmp_path, "raa", shift_pairs=pairs, train_transform="pad_crop", epochs=0)
    learn(learner, manager[0])
    seen = []
    extract = raa.extract_features

    def spy(features, view, *args, **keys):
        seen.append(extract(features, view, *args, **keys))
        return seen[-1]

    monkeypatch.setattr(raa, "extract_features", spy)
    learn(learner, manager[1])
    assert len(seen) == passes and len(learner.before) == 0
    same_rows = torch.equal(seen[0][1], seen[1][1])
    assert same_rows == (pairs == "aligned")


def test_the_shift_reaches_old_means_alone(tmp_path, monkeypatch):
    moved = torch.full((2, 16), 0.5, dtype=torch.float64)
    monkeypatch.setattr(raa, "mean_shift", lambda means, *_: moved)
    manager, learner = build_tiny(tmp_path, "raa", epochs=0, ca_samples=8)
    learn(learner, manager[0])
    before = learner.gaussians.means.clone()
    learn(learner, manager[1])
    assert torch.equal(learner.gaussians.means[:2], before + 0.5) and len(learner.gaussians) == 4


def test_tasks_of_classes_in_the_alignment(tmp_path, monkeypatch):
    """Tasks of 3, 1 and 2 classes: label // 2 is wrong for class 2 and class 3."""
    for rule, tasks in (("true", [0, 0, 0, 1, 2, 2]), ("upstream", [0, 0, 1, 1, 2, 2])):
        seen = {}

        def spy(*args, mean_factor, seen=seen, **keys):
            seen["factor"] = mean_factor
            return align(*args, mean_factor=mean_factor, **keys)

        monkeypatch.setattr(alignment, "align", spy)
        manager, learner = build_tiny(
            tmp_path, "raa", task_sizes=[3, 1, 2], increment=None, alignment_task_index=rule, epochs=0, ca_epochs=1
        )
        for task in manager:
            learn(learner, task)
        expected = 0.9 + 0.1 * (torch.tensor(tasks).double() + 1) / 3
        assert torch.allclose(seen["factor"], expected)


def test_without_alignment_nothing_is_stored(tmp_path):
    manager, learner = build_tiny(tmp_path, "raa", ca_epochs=0, epochs=1)
    for task in manager[:2]:
        learn(learner, task)
    assert learner.gaussians is None and learner.before is None and expected_bytes(learner, manager[:]) == 0


def test_planned_statistics_are_what_the_state_holds(tmp_path):
    manager, learner = build_tiny(tmp_path, "raa", epochs=0, ca_epochs=1, ca_samples=8)
    planned = expected_bytes(learner, manager[:])
    for task in manager:
        learn(learner, task)
    held = sum(v.numel() * v.element_size() for k, v in learner.state_dict().items() if k.startswith("gaussians."))
    assert held == planned


def test_upstream_brings_the_reference_s_quirks_unless_a_key_is_named(tmp_path):
    values = tiny_values(tmp_path, "raa", normalize=None, upstream=True)
    config = config_from(values, "test")
    assert (config.shift_pairs, config.alignment_task_index, config.frozen_decay, config.normalize) == (
        "upstream", "upstream", True, "none",
    )  # fmt: skip
    config = config_from(values | {"frozen_decay": False, "shift_pairs": "aligned"}, "test")
    assert (config.shift_pairs, config.alignment_task_index, config.frozen_decay) == ("aligned", "upstream", False)
    plain = config_from(tiny_values(tmp_path, "raa"), "test")
    assert (plain.shift_pairs, plain.alignment_task_index, plain.frozen_decay) == ("aligned", "true", False)
    single = config_from(tiny_values(tmp_path, "raa", branches=1), "test")
    assert (single.amalgam, single.freeze) == ("none", False)


def test_trained_parameters_of_vit_b_are_those_of_the_reference():
    """2,379,264 in the first task, half of it later."""
    adapters = [BranchedAdapter(768, 64, 2) for _ in range(12)]
    numbers = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    assert numbers == 2_379_264 and sum(p[1:].numel() for a in adapters for p in a.parameters()) == 1_189_632


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"branches": 1, "amalgam": "upstream"}, '"amalgam" has nothing to mix with "branches": 1'),
        ({"branches": 1, "freeze": True}, '"freeze" would leave nothing to train'),
        ({"freeze": False, "frozen_decay": True}, '"frozen_decay" has no effect unless "freeze" is true'),
        ({"shift": False, "shift_pairs": "aligned"}, '"shift_pairs" has no effect unless "shift" is true'),
        ({"ca_epochs": 0, "ca_lrate": 0.1}, '"ca_lrate" has no effect unless "ca_epochs" is given and not 0'),
        ({"amalgam": "output"}, '"amalgam" must be "upstream" | "parameter" | "none", got "output"'),
        ({"adapter_num": 2}, 'unknown key "adapter_num": it is called "branches" here'),
        ({"ffn_num": 64}, 'unknown key "ffn_num": it is called "bottleneck" here'),
        ({"perturb": True}, 'unknown key "perturb": it is called "sam" here'),
        ({"use_RP": True}, 'unknown key "use_RP": its reference implementation never reads it'),
        ({"shift_pair": "aligned"}, 'did you mean "shift_pairs"'),
        ({"scale": 0}, '"scale" must be number > 0, got 0'),
        ({"backbone": "resnet18", "image_size": 32}, "has no plain transformer blocks; choose a ViT of timm"),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "raa", **keys)
    assert sentence in str(caught.value)
