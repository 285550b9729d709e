"""EWC: its Fishers and its penalty against the references."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models.ewc as ewc
from convs.backbones import make_backbone
from convs.heads import LinearHead
from convs.network import Network
from models.ewc import Springs, batch_square, sum_of_squares
from models.parts.loop import learn
from tests.conftest import TINY_VIT, build_tiny, reference
from tests.models.classic_runs import WholeRun, schedule


class OneLayer(nn.Module):
    """The fixtures' backbone: tanh of one layer."""

    def __init__(self, arrays):
        super().__init__()
        self.backbone = nn.ModuleDict({"a": nn.Linear(*reversed(arrays["start/backbone.a.weight"].shape))})
        self.head = nn.Linear(*reversed(arrays["start/head.weight"].shape))
        state = {key[6:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("start/")}
        self.load_state_dict(state)

    def forward(self, images):
        return self.head(torch.tanh(self.backbone["a"](images.flatten(1))))


@pytest.mark.parity
def test_online_form_of_the_reference():
    """Losses, weights, Fisher, anchor: 2e-6. Its divisor counts a partial last batch as full."""
    arrays = reference("classic/ewc_online")
    network, springs, names = OneLayer(arrays), Springs(), arrays["names"].tolist()
    parameters = {name: network.get_parameter(name) for name in names}
    images = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2).float() / 255
    labels, size = torch.from_numpy(arrays["y_train"]), int(arrays["batch_size"])
    tasks = sorted({int(key.split("/")[0]) for key in arrays if key.endswith("/fisher")})
    for task in tasks:
        optimizer = torch.optim.SGD(network.parameters(), lr=float(arrays["lr"]))
        batches = [torch.from_numpy(rows[rows >= 0]) for rows in arrays[f"{task}/batches"]]
        for step, rows in enumerate(batches):
            ce = F.cross_entropy(network(images[rows]), labels[rows])
            loss = ce + float(arrays["e_lambda"]) * springs.penalty(parameters) if task else ce
            optimizer.zero_grad()
            loss.backward()
            if task:
                springs.pull(parameters, float(arrays["e_lambda"]))
            optimizer.step()
            np.testing.assert_allclose(ce.item(), arrays[f"{task}/losses"][step], atol=2e-6)
            flat = torch.cat([p.detach().flatten() for p in parameters.values()])
            np.testing.assert_allclose(flat, arrays[f"{task}/step"][step], atol=2e-6)
        rows = torch.cat(batches)
        fisher = sum_of_squares(network, parameters, images[rows], labels[rows], weighted=True)
        fisher = {name: value / (len(batches) * size) for name, value in fisher.items()}
        springs.update(fisher, parameters, keep=float(arrays["gamma"]), add=1.0)
        for kind in ("fisher", "anchor"):
            flat = torch.cat([getattr(springs, kind)[name].flatten() for name in names])
            np.testing.assert_allclose(flat, arrays[f"{task}/{kind}"], atol=2e-6)


def vit() -> Network:
    torch.manual_seed(0)
    network = Network(make_backbone(TINY_VIT, "random", None), LinearHead, "half").eval()
    network.head.grow(3)
    return network


@pytest.mark.parametrize("weighted", [False, True])
def test_squares_of_single_images(monkeypatch, weighted):
    """As image by image with autograd, in parts of any size."""
    network = vit()
    network.backbone.model.patch_embed.requires_grad_(False)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    images, targets = torch.rand(5, 3, 16, 16), torch.tensor([0, 2, 1, 1, 0])
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for image, target in zip(images, targets, strict=True):
        loss = F.cross_entropy(network(image[None]), target[None])
        for name, square in batch_square(loss, parameters).items():
            expected[name] += square * (torch.exp(-loss.detach()) if weighted else 1)
    monkeypatch.setattr(ewc, "NUMBERS_AT_ONCE", 2 * sum(p.numel() for p in parameters.values()))
    with torch.no_grad():
        found = sum_of_squares(network, parameters, images, targets, weighted)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-4)


def test_squares_are_of_32_bits_under_autocast():
    """CUDA's batched backward pass of attention refuses what a mixed forward pass leaves."""
    network = vit()
    parameters = dict(network.named_parameters())
    images, targets = torch.rand(3, 3, 16, 16), torch.tensor([0, 2, 1])
    plain = sum_of_squares(network, parameters, images, targets, weighted=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = sum_of_squares(network, parameters, images, targets, weighted=True)
    assert all(torch.equal(mixed[name], plain[name]) for name in plain)


def test_springs_by_hand():
    """First rows merge, new ones take the new Fisher; numbers without dimensions whole."""
    springs = Springs()
    weights = {"rows": torch.tensor([[1.0], [2.0]]), "scale": torch.tensor(3.0)}
    springs.update({"rows": torch.tensor([[4.0], [8.0]]), "scale": torch.tensor(1.0)}, weights, keep=0.0, add=1.0)
    grown = {"rows": torch.tensor([[2.0], [2.0], [9.0]]), "scale": torch.tensor(5.0)}
    assert springs.penalty(grown) == 4 * 1 + 8 * 0 + 1 * 4
    leaves = {name: value.clone().requires_grad_() for name, value in grown.items()}
    (3 * leaves["rows"]).sum().backward()  # the other one has no gradient yet
    springs.pull(leaves, factor=0.5)
    assert leaves["rows"].grad.tolist() == [[3 + 4.0], [3.0], [3.0]] and leaves["scale"].grad == 2.0
    new = {"rows": torch.tensor([[2.0], [2.0], [2.0]]), "scale": torch.tensor(5.0)}
    springs.update(new, grown, keep=0.75, add=0.25)
    torch.testing.assert_close(springs.fisher["rows"], torch.tensor([[3.5], [6.5], [2.0]]))
    assert springs.fisher["scale"] == 2.0 and springs.penalty(grown) == 0
    again = Springs()
    again.load_state_dict(springs.state_dict())
    assert again.penalty(grown) == 0 and torch.equal(again.fisher["rows"], springs.fisher["rows"])
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    squares = batch_square((3 * used).sum(), {"used": used, "unused": unused})
    assert squares["used"].tolist() == [9, 9] and squares["unused"].tolist() == [0, 0]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ewc", "ewc_loose", "ewc_bn"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    """With the Fisher pass of the reference: its batches, the merged Fisher, the anchor."""
    keys = lambda s: schedule(s) | {"lamda": float(s["lamda"]), "fisher": "batch", "fishermax": s["fishermax"]}  # noqa: E731
    run = WholeRun(f"classic/{name}_run", "ewc", tmp_path, keys)
    arrays, learner = run.arrays, run.learner

    def given_batches(view, function, runtime, batch_size, shuffle):
        images = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(arrays["y_train"])
        for rows in arrays[f"t{learner.task.index}/fisher_batches"]:
            function(images[rows[rows >= 0]], labels[rows[rows >= 0]])

    def compare_end(task):
        WholeRun.compare_end(run, task)
        for kind, held in (("fisher", learner.springs.fisher), ("anchor", learner.springs.anchor)):
            for parameter, value in run.keys(f"t{task.index}/{kind}/").items():
                np.testing.assert_allclose(held[run.named(parameter)[1]], value, atol=run.atol, err_msg=kind)

    monkeypatch.setattr(ewc, "for_each_batch", given_batches)
    run.compare_end = compare_end
    run.run(monkeypatch)


@pytest.mark.parametrize("fisher", ["sample", "online"])
def test_springs_hold(fisher, tmp_path):
    """The stiffer, the less the weights move."""
    moved = []
    for lamda in (0.0, 100.0):
        keys = {"optimizer": "sgd", "lrate": 0.005, "lamda": lamda, "fisher": fisher}
        manager, learner = build_tiny(tmp_path, "ewc", **keys)
        learn(learner, manager[0])
        before = {name: value.clone() for name, value in learner.springs.anchor.items()}
        weights = {name: value.clone() for name, value in learner.springs.fisher.items()}
        learn(learner, manager[1])
        after = dict(learner.network.named_parameters())
        pairs = ((weights[n], after[n][: len(v)] if v.dim() else after[n], v) for n, v in before.items())
        moved.append(sum((f * (a - b).square()).sum().item() for f, a, b in pairs))
    assert moved[1] < 0.7 * moved[0]


def test_a_penalty_that_diverges_is_warned_of(tmp_path, caplog):
    manager, learner = build_tiny(tmp_path, "ewc", optimizer="sgd", lrate=0.01, lamda=1e7)
    with caplog.at_level(logging.WARNING):
        learn(learner, manager[0])
    assert "SGD diverges on this penalty" in caplog.text
