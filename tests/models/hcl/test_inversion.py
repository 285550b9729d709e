"""Inversion against the reference: statistics losses, schedule, label plan and whole trajectories."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.hcl.inversion import (
    Inversion,
    InversionSettings,
    Moments,
    Taps,
    label_plan,
    pool_moments,
    statistics_loss,
    total_variation,
)
from tests.conftest import reference
from tests.models.hcl.nets import stored_network
from utils.errors import ConfigError


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


def indexes(arrays, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]


@pytest.mark.parity
def test_statistics_of_a_batchnorm_layer_s_input():
    arrays = {key: torch.from_numpy(np.array(value)) for key, value in reference("hcl/feature_stats").items()}
    layer = nn.BatchNorm2d(arrays["bn_input"].shape[1]).double().eval()
    layer.running_mean, layer.running_var = arrays["bn_running_mean"], arrays["bn_running_var"]
    net, x = nn.Sequential(layer), arrays["bn_input"].requires_grad_()
    taps = Taps(net, "bn")
    _, found = taps.watch(net, x)
    loss = statistics_loss(found, taps.running())
    loss.backward()
    assert relative(loss.detach(), arrays["bn_loss"]) <= 1e-12
    assert relative(x.grad, arrays["bn_grad"]) <= 1e-12


@pytest.mark.parity
def test_statistics_of_a_convolution_s_output():
    arrays = {key: torch.from_numpy(np.array(value)) for key, value in reference("hcl/feature_stats").items()}
    weight = arrays["conv_weight"]
    layer = nn.Conv2d(weight.shape[1], len(weight), weight.shape[-1], padding=1).double()
    layer.weight.data, layer.bias.data = weight, arrays["conv_bias"]
    net, taps = nn.Sequential(layer), Taps(nn.Sequential(layer), "conv")
    _, targets = taps.watch(net, arrays["conv_ref"])
    targets = {name: (mean.detach(), var.detach()) for name, (mean, var) in targets.items()}
    ((mean, var),) = targets.values()
    assert relative(mean, arrays["conv_ref_mean"]) <= 1e-12 and relative(var, arrays["conv_ref_var"]) <= 1e-12
    x = arrays["conv_input"].requires_grad_()
    loss = statistics_loss(taps.watch(net, x)[1], targets)
    loss.backward()
    assert relative(loss.detach(), arrays["conv_loss"]) <= 1e-12
    assert relative(x.grad, arrays["conv_grad"]) <= 1e-12


@pytest.mark.parity
def test_the_reference_s_rule_sees_one_layer_of_a_vit():
    arrays = reference("hcl/vit_patch_stats")
    sizes = {
        key: int(arrays[key]) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    }
    net = VisionTransformer(**sizes).double().eval()
    net.load_state_dict({key[4:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("net.")})
    taps = Taps(net, "bn_or_conv")
    assert len(taps.layers) == int(arrays["hooked"])
    with torch.no_grad():
        _, targets = taps.watch(net, torch.from_numpy(arrays["ref"]))
    ((mean, var),) = targets.values()
    assert relative(mean, arrays["ref_mean"]) <= 1e-10 and relative(var, arrays["ref_var"]) <= 1e-10
    x = torch.from_numpy(arrays["image"]).requires_grad_()
    logits, found = taps.watch(net, x)
    loss = statistics_loss(found, targets)
    loss.backward()
    assert relative(logits.detach(), arrays["logits"]) <= 1e-10
    assert relative(loss.detach(), arrays["loss"]) <= 1e-10 and relative(x.grad, arrays["grad"]) <= 1e-10


@pytest.mark.parity
def test_schedule():
    arrays = reference("hcl/schedule")
    for index in indexes(arrays, "base_"):
        settings = InversionSettings(
            steps=int(arrays[f"iters_{index}"]), lrate=float(arrays[f"base_{index}"]), feature=0, variation=0, l2=0,
            warmup=int(arrays["warmup"]),
        )  # fmt: skip
        rates = [settings.rate(step) for step in range(settings.steps + 1)]
        assert relative(rates, arrays[f"lr_{index}"]) <= 1e-14


class Stored:
    """A stored inversion: the pool, the recorded permutations, the teacher and the settings."""

    def __init__(self, name: str):
        self.arrays = arrays = reference(f"hcl/{name}")
        self.teacher = stored_network(arrays, "teacher").eval().requires_grad_(False)
        self.pool = torch.from_numpy(arrays["task_images"])
        self.buffer, old = int(arrays["buffer_size"]), int(arrays["task_id"]) * int(arrays["classes_per_task"])
        labels = torch.arange(old).repeat_interleave(self.buffer // old)
        self.labels = labels[torch.from_numpy(arrays["perm_label"])]
        self.start = self.pool[torch.from_numpy(arrays["perm_init"])[: len(labels)]]
        self.taps = Taps(self.teacher, "bn_or_conv")
        self.settings = InversionSettings(
            steps=int(arrays["di_itrs"]), lrate=float(arrays["di_lr"]), feature=float(arrays["di_feature"]),
            variation=float(arrays["di_var"]), l2=float(arrays["di_l2"]), smoothing=0.1,
        )  # fmt: skip

    def targets(self) -> Moments:
        if not self.taps.needs_pass:
            return self.taps.running()
        chosen = torch.from_numpy(self.arrays["perm_stats"])[: 4 * self.buffer]
        with torch.no_grad():
            return self.taps.watch(self.teacher, self.pool[chosen])[1]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["qdi_batchnorm", "qdi_convstats"])
def test_a_whole_inversion(name):
    stored = Stored(name)
    arrays, log, images = stored.arrays, {}, {}
    assert np.array_equal(stored.labels.numpy(), arrays["labels"])
    assert relative(stored.start, arrays["init_images"]) <= 1e-12
    inversion = Inversion(stored.settings)

    def watch(step: int, terms: dict[str, torch.Tensor]) -> None:
        log[step] = terms

    def safe_point() -> None:
        state = inversion.state_dict()
        images[state["step"] - 1] = state["images"].clone()

    final = inversion.run(
        stored.start, stored.labels, stored.teacher, stored.taps, stored.targets(), safe_point=safe_point, watch=watch
    )
    steps = [step for step in arrays["log_step"].tolist() if step in log]
    assert len(arrays["log_step"]) - len(steps) <= 1, "the pass at rate 0 is dropped"
    for ours, theirs in {"ce": "ce", "feature": "feature", "variation": "var", "l2": "l2"}.items():
        values = [float(log[step][ours]) for step in steps]
        assert relative(values, arrays[f"log_{theirs}"][: len(steps)]) <= 1e-9, theirs
    totals = [float(sum(log[step].values())) for step in steps]
    assert relative(totals, arrays["log_total"][: len(steps)]) <= 1e-9
    for step, snap in zip(arrays["snap_step"].tolist(), arrays["snap"], strict=True):
        assert relative(images.get(step, final), snap) <= 1e-7, step
    assert relative(final, arrays["final"]) <= 1e-7


@pytest.mark.parametrize("name", ["qdi_batchnorm", "qdi_convstats"])
def test_an_interrupted_inversion_goes_on_to_the_same_images(name):
    class StopError(Exception):
        pass

    stored = Stored(name)
    arguments = (stored.start, stored.labels, stored.teacher, stored.taps, stored.targets())
    settings = InversionSettings(steps=20, lrate=0.05, feature=0.1, variation=1e-3, l2=1e-3, warmup=5, jitter=2)
    whole = Inversion(settings).run(*arguments, seed=3)
    cut, saved = Inversion(settings), {}

    def stop_after_eleven() -> None:
        if cut.state_dict()["step"] == 11:
            raise StopError

    with pytest.raises(StopError):
        cut.run(*arguments, seed=3, safe_point=stop_after_eleven)
    saved = cut.state_dict()
    again = Inversion(settings)
    again.load_state_dict(saved)
    assert torch.equal(again.run(*arguments, seed=3), whole) and not again.state_dict()
    assert not torch.equal(Inversion(settings).run(*arguments, seed=4), whole), "another seed rolls otherwise"


def test_the_inversion_does_what_it_says():
    """The teacher comes to see the labels, and its layers the statistics."""
    stored = Stored("qdi_batchnorm")
    log = []
    settings = InversionSettings(steps=150, lrate=0.05, feature=0.1, variation=0, l2=0, warmup=10)
    final = Inversion(settings).run(
        stored.start, stored.labels, stored.teacher, stored.taps, stored.targets(), watch=lambda s, t: log.append(t)
    )
    assert log[-1]["ce"] < 0.9 * log[0]["ce"]
    before, after = ((stored.teacher(x).argmax(dim=1) == stored.labels).sum() for x in (stored.start, final))
    assert after > before
    heavy = InversionSettings(steps=150, lrate=0.05, feature=10, variation=0, l2=0, warmup=10)
    log.clear()
    Inversion(heavy).run(
        stored.start, stored.labels, stored.teacher, stored.taps, stored.targets(), watch=lambda s, t: log.append(t)
    )
    assert log[-1]["feature"] < 0.7 * log[0]["feature"]


def test_total_variation_by_hand():
    """A 2x2 image 0 1 / 2 4: right 1, 2; lower 2, 3; lower right 4; lower left 1."""
    image = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None]
    assert total_variation(image).item() == pytest.approx(5**0.5 + 13**0.5 + 4 + 1)


def test_label_plan():
    generator = torch.Generator().manual_seed(0)
    assert label_plan(14, 4, generator).sort().values.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    few = label_plan(3, 5, generator).tolist()
    assert len(set(few)) == 3 and set(few) <= set(range(5))


def test_pooled_moments_are_those_of_the_union():
    one, two = torch.randn(30, 4).double(), torch.randn(10, 4).double() + 2
    moments = [{"tap": (x.mean(dim=0), x.var(dim=0, correction=0))} for x in (one, two, torch.cat([one, two]))]
    pooled = pool_moments(moments[0], moments[1], 0.25)
    for ours, theirs in zip(pooled["tap"], moments[2]["tap"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tokens_of_a_vit_are_counted_without_the_class_token():
    torch.manual_seed(0)
    net = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=0).eval()
    taps = Taps(net, "auto")
    x = torch.randn(3, 3, 16, 16)
    _, found = taps.watch(net, x)
    assert set(found) == {"norm", "norm:class", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))}
    z = x
    for layer in (net.patch_embed, net._pos_embed, net.norm_pre, net.blocks):
        z = layer(z)
    torch.testing.assert_close(found["norm"][0], z[:, 1:].mean(dim=(0, 1)))
    torch.testing.assert_close(found["norm"][1], z[:, 1:].flatten(0, 1).var(dim=0, correction=0))
    torch.testing.assert_close(found["norm:class"][0], z[:, 0].mean(dim=0))
    _, scale_free = Taps(net, "ln", ln_norm=True).watch(net, x)
    torch.testing.assert_close(scale_free["norm"][0], F.layer_norm(z[:, 1:], (8,), eps=1e-6).mean(dim=(0, 1)))


def test_hooks_are_gone_after_a_pass_that_failed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(RuntimeError):
        Taps(net, "bn").watch(net, torch.randn(2, 5, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match='"bn" finds no layer'):
        Taps(nn.Linear(2, 2), "bn")


@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [
        ("bn", nn.BatchNorm2d(4), (3, 4, 5, 2)),
        ("ln", nn.LayerNorm(4), (3, 5, 4)),
        ("conv", nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)), (3, 4, 5, 2)),
    ],
    ids=["maps", "tokens", "changed in place"],
)
def test_moments_and_their_gradient_are_those_of_var_mean(kind, layer, shape):
    torch.manual_seed(0)
    net, x = nn.Sequential(layer).double().eval(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = (layer[0](x) if kind == "conv" else x).movedim(1 if kind != "ln" else -1, -1).flatten(0, -2)
    var, mean = torch.var_mean(rows, dim=0, correction=0)
    expected = torch.autograd.grad((mean.cos() * var.sin()).sum(), x)
    output, found = Taps(net, kind).watch(net, x)
    ((own_mean, own_var),) = found.values()
    torch.testing.assert_close((own_mean, own_var), (mean, var))
    gradient = torch.autograd.grad((own_mean.cos() * own_var.sin()).sum() + 0 * output.sum(), x)
    torch.testing.assert_close(gradient, expected)
