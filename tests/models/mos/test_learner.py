"""MOS: whole runs of the reference with and without its defects, its answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import models.parts.alignment as alignment
from convs.adapter_sets import TENSORS, share
from models.factory import config_from
from models.parts.alignment import Draws, align
from models.parts.loop import learn
from tests.conftest import build_tiny, in_processes, reference, tiny_values
from tests.convs.vits import BRANCHED, adapter_parameters, bottleneck_of, close, fill, group
from tests.models.properties import check_dropout, check_standing_still
from tests.models.stored_runs import StoredRun
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent.parent
RUNS = {
    "run": {"full_head": True},
    "run_variance": {"full_head": True, "covariance": "diag"},
    "run_upstream": {"upstream": True},
}


class MosRun(StoredRun):
    """With the reference's draws in the alignment."""

    def __init__(self, name: str, tmp_path, monkeypatch):
        stored = reference(f"mos/{name}")
        keys = RUNS[name] | {
            "adapter_dropout": 0.0, "bottleneck": bottleneck_of(stored),
            "reg": stored["reg"].item(), "adapter_momentum": stored["momentum"].item(),
            "ca_epochs": int(stored["ca_epochs"]), "ca_lrate": stored["ca_lr"].item(),
        }  # fmt: skip
        super().__init__(f"mos/{name}", "mos", tmp_path, monkeypatch, **keys)
        self.ca_losses = torch.empty(0)
        monkeypatch.setattr(alignment, "align", self.align)

    def align(self, *args, generator, **keys):
        index, classes = self.learner.task.index, self.learner.task.total_classes
        eps, perm = (torch.from_numpy(self.arrays[f"{name}/{index}"]) for name in ("eps", "perm"))
        eps = eps.unflatten(0, (-1, classes))
        aligned = align(*args, **keys, draws=lambda epoch: Draws(eps[epoch], torch.empty(0), perm[epoch]))
        self.ca_losses = aligned.losses.flatten()
        return aligned

    def start(self, index: int) -> None:
        self.ca_losses = torch.empty(0)
        if index == 0:
            stored = group(self.arrays, "start/")
            self.learner.network.head.set_stacked(stored.pop("head.weight"), stored.pop("head.bias"))
            fill(adapter_parameters(self.model), stored)


@pytest.mark.parity
@pytest.mark.parametrize("name", list(RUNS))
def test_whole_run_of_the_reference(name, tmp_path, monkeypatch):
    """README: 1e-9; alignment and everything behind it 1e-8."""
    run = MosRun(name, tmp_path, monkeypatch)
    arrays, learner = run.arrays, run.learner
    trained: dict[str, torch.Tensor] = {}
    learner.after_stage = lambda task: trained.update(
        {k: v.detach().clone() for k, v in adapter_parameters(run.model).items()}
        | dict(zip(("head.weight", "head.bias"), (p.clone() for p in learner.network.head.stacked()), strict=True))
    )
    for task in run.tasks:
        index, atol = task.index, 1e-9 if task.index < 2 else 1e-8
        losses = run.learn(task, run.start)
        close(torch.tensor(losses, dtype=torch.float64), arrays[f"losses/{index}"], atol, "losses")
        for key, value in group(arrays, f"tuned/{index}/").items():
            close(trained[key], value, atol, key)
        for key, value in group(arrays, f"after_statistics/{index}/").items():
            close(adapter_parameters(run.model)[key], value, atol, key)
        close(run.ca_losses, arrays[f"ca_losses/{index}"], 1e-8)
        weight, bias = learner.network.head.stacked()
        close(weight, arrays[f"head.weight/{index}"], 1e-8)
        close(bias, arrays[f"head.bias/{index}"], 1e-8)
        close(learner.class_means.exact_means, arrays[f"prototypes/{index}"], 1e-8)
        scores = "scores_converged" if f"scores_converged/{index}" in arrays else "scores"
        close(run.predict(task), arrays[f"{scores}/{index}"], 1e-8)
    close(learner.gaussians.means, arrays["means"], 1e-8)
    covs = learner.gaussians.dense_covariances()
    close(covs.diagonal(dim1=1, dim2=2) if arrays["covs"].ndim == 2 else covs, arrays["covs"], 1e-8)


@pytest.mark.parametrize("upstream", [False, True])
def test_dropout_and_copies(upstream, tmp_path):
    check_dropout(tmp_path, "mos", upstream=upstream)
    check_standing_still(tmp_path, "mos", upstream=upstream)


def test_prototypes_measured_again_are_the_same(tmp_path):
    manager, learner = build_tiny(tmp_path, "mos", adapter_dropout=0.1, epochs=1, optimizer=None)
    for task in manager[:2]:
        learn(learner, task)
    means = learner.class_means.exact_means.clone()
    learner.class_means.sums.zero_(), learner.class_means.counts.zero_()
    learner.eval()
    for task in manager[:2]:
        learner.class_means.update(
            lambda images: learner.network.subspaces(images, 0, 1)[0], task.train.view("test"), learner.runtime, 256
        )
    assert torch.equal(learner.class_means.exact_means, means)


class Transient:
    """The public code's evaluation: with every test batch each stored set but the first is merged L times, for good,
    and block l of the pass runs with l + 1 of these merges."""

    def __init__(self, run: MosRun):
        self.run, self.adapters, self.batches = run, run.learner.adapters, {}
        self.momentum = run.learner.config.adapter_momentum

    def put(self, trained, merges: dict[int, list[int]]) -> None:
        """merges: per set how often each block's has been merged since it was trained."""
        for block, (adapter, tensors) in enumerate(zip(self.adapters, trained, strict=True)):
            for name, tensor in zip(TENSORS, tensors, strict=True):
                moved = tensor.clone()
                for index, counts in merges.items():
                    mean = tensor[:index].mean(dim=0)
                    moved[index] = torch.lerp(tensor[index], mean, share(self.momentum, counts[block]))
                setattr(adapter, f"kept_{name}", moved)

    def scores(self, task) -> torch.Tensor:
        run, learner, depth = self.run, self.run.learner, len(self.adapters)
        trained = [[tensor.clone() for tensor in adapter.kept] for adapter in self.adapters]
        found = []
        for adapter in self.adapters:
            adapter.converged = False
        with torch.no_grad():
            for images in run.test_images(task).split(learner.config.batch_size):
                done = {index: self.batches.get(index, 0) for index in range(1, task.index + 1)}
                self.put(
                    trained, {index: [depth * n + block + 1 for block in range(depth)] for index, n in done.items()}
                )
                found.append(learner.predict(images, learner.frozen(images, learner.frozen_names)))
                self.batches |= {index: n + 1 for index, n in done.items()}
        self.put(trained, {index: [depth * n] * depth for index, n in self.batches.items()})
        for index in self.batches:
            for key, value in group(run.arrays, f"after_test/{task.index}/{index}/").items():
                block, tensor = int(key.split(".")[1]), BRANCHED[key.split("adapter.")[1]]
                close(getattr(self.adapters[block], f"kept_{tensor}")[index], value, 1e-8, key)
        self.put(trained, {})
        for adapter in self.adapters:
            adapter.converged = True
        return torch.cat(found)


@pytest.mark.parity
def test_the_public_code_s_evaluation_replayed(tmp_path, monkeypatch):
    """Not offered, since predictions would depend on the batch: what it comes to is `scores_converged`."""
    run = MosRun("run_upstream", tmp_path, monkeypatch)
    transient = Transient(run)
    for task in run.tasks:
        run.learn(task, run.start)
        close(transient.scores(task), run.arrays[f"scores/{task.index}"], 1e-8)


def test_a_merge_draws_the_adapter_to_the_mean_of_its_copies(tmp_path):
    """In the second task alone, after the step; momentum 1 leaves nothing of it."""
    manager, learner = build_tiny(
        tmp_path, "mos", adapter_momentum=1.0, epochs=1, ca_epochs=0, ca_samples=None, optimizer=None
    )
    learn(learner, manager[0])
    first = learner.adapters[0].up_w.clone()
    assert first.any()
    learn(learner, manager[1])
    torch.testing.assert_close(learner.adapters[0].up_w, first)
    assert learner.adapters[0].copies == 2 and learner.merging is None


def test_upstream_brings_its_quirks_unless_a_key_is_named(tmp_path):
    config = config_from(tiny_values(tmp_path, "mos", upstream=True), "test")
    assert (config.merge, config.full_head) == ("pass", True)
    assert config_from(tiny_values(tmp_path, "mos", upstream=True, merge="step"), "test").merge == "step"


def test_samples_of_the_alignment_follow_the_batch(tmp_path):
    manager, learner = build_tiny(tmp_path, "mos", batch_size=6, ca_samples=None)
    assert learner.config.alignment(manager[0]).samples == 30


@pytest.mark.parametrize("full", [False, True])
def test_rows_of_the_head(full, tmp_path):
    manager, learner = build_tiny(tmp_path, "mos", full_head=full, epochs=1, bottleneck=4, ca_epochs=1, optimizer=None)
    learn(learner, manager[0])
    assert learner.network.head.num_classes == (6 if full else 2)
    assert learner.predict(None, learner.frozen(torch.rand(3, 3, 16, 16), learner.frozen_names)).shape == (3, 2)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """The regulariser matches every row of a batch with every other, also with those of the other process."""
    values = tiny_values(tmp_path, "mos", adapter_dropout=0.0, batch_size=5, lrate=0.1, epochs=2, optimizer=None)
    folders = in_processes(tmp_path, values)
    losses = [[json.loads(line)["loss"] for line in (folder / "epochs.jsonl").open()] for folder in folders]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert one["acc"] == two["acc"]


def test_the_published_name_of_the_covariances_still_acts(tmp_path):
    values = tiny_values(tmp_path, "mos")
    assert config_from(values | {"covariance": "diag"}, "test").cov_storage == "diag"
    assert config_from(values | {"covariance": "full", "cov_storage": "full"}, "test").cov_storage == "full"
    with pytest.raises(ConfigError, match='"covariance" contradicts "cov_storage": "low_rank": drop one of the two'):
        config_from(values | {"covariance": "diag", "cov_storage": "low_rank"}, "test")
