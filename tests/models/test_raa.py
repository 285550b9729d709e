"""RAA: whole tasks of the reference through the learner, its variants, its state, its answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import models.parts.loop as loop
import models.raa as raa
from convs.adapters import BranchedAdapter
from models.parts.alignment import Draws, align
from models.parts.loop import evaluate, fit
from models.parts.losses import margin_cross_entropy
from models.parts.optim import SAM
from models.parts.shift import mean_shift
from tests.conftest import build_tiny, reference, tiny_values, write_stream
from tests.models.test_contract import learn
from tests.models.test_inflora import ExactRuntime, Given, in_order
from utils.errors import ConfigError
from utils.factory import config_from

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
        monkeypatch.setattr(loop, "training_batches", in_order)
        monkeypatch.setattr(type(learner.network), "_mixtures", self.mixtures)
        monkeypatch.setattr(raa, "margin_cross_entropy", self.loss)
        monkeypatch.setattr(raa, "mean_shift", self.shift)
        monkeypatch.setattr(raa, "align", self.align)
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
        learner.task = task
        learner.before_task(task)
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
            logits = learner.predict(images)
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
