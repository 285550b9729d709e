"""Branches on key and value, folding, and input moments."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from models.inflora.kv_lora import InputMoments, KeyValueLoRA, add_kv_lora
from tests.conftest import TINY_VIT, reference
from utils.errors import ConfigError

VIT = {key: value for key, value in TINY_VIT.items() if key != "name"}


def vit(**keys) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(num_classes=0, **(VIT | keys)).eval()


def random_branch(layer: KeyValueLoRA, scale: float = 0.1) -> None:
    layer.start(torch.randn_like(layer.A))
    with torch.no_grad():
        layer.B.normal_(std=scale)


@pytest.fixture
def ref() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in reference("inflora/lora_attention").items()}


def reference_attention(ref) -> Attention:
    width = ref["x"].shape[2]
    attention = Attention(width, num_heads=int(ref["num_heads"]), qkv_bias=True).double()
    attention.load_state_dict({
        "qkv.weight": ref["qkv_weight"], "qkv.bias": ref["qkv_bias"],
        "proj.weight": ref["proj_weight"], "proj.bias": ref["proj_bias"],
    })  # fmt: skip
    attention.qkv = KeyValueLoRA(attention.qkv, 2 * int(ref["rank"]))
    return attention


def start(layer: KeyValueLoRA, ref, task: int) -> None:
    """The fixture's key and value branch have an A each: A = [A_k; A_v], B_k = [B_k, 0], B_v = [0, B_v]."""
    rank = int(ref["rank"])
    layer.start(torch.cat([ref["A_k"][task], ref["A_v"][task]]))
    with torch.no_grad():
        layer.B[0, :, :rank] = ref["B_k"][task]
        layer.B[1, :, rank:] = ref["B_v"][task]


@pytest.mark.parity
def test_attention_with_branches(ref):  # README: 1e-12
    attention, rank, width = reference_attention(ref), int(ref["rank"]), ref["x"].shape[2]
    layer, frozen = attention.qkv, attention.qkv.weight.detach().clone()
    torch.testing.assert_close(attention(ref["x"]), ref["out_task_none"], rtol=0, atol=1e-12)
    for task in range(int(ref["n_tasks"])):
        start(layer, ref, task)
        layer.B.grad, tokens = None, ref["x"].clone().requires_grad_()
        out = attention(tokens)
        (out * ref["grad_out"]).sum().backward()
        torch.testing.assert_close(out, ref[f"out_task{task}"], rtol=0, atol=1e-12)
        torch.testing.assert_close(tokens.grad, ref[f"grad_x_task{task}"], rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.B.grad[0, :, :rank], ref[f"grad_Bk_task{task}"], rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.B.grad[1, :, rank:], ref[f"grad_Bv_task{task}"], rtol=0, atol=1e-12)
        layer.fold()
    change = layer.weight.detach() - frozen
    assert not change[:width].any()
    torch.testing.assert_close(change[width : 2 * width], ref["delta_Wk_all"], rtol=0, atol=1e-12)
    torch.testing.assert_close(change[2 * width :], ref["delta_Wv_all"], rtol=0, atol=1e-12)


@pytest.mark.parity
def test_moments_after_each_batch(ref):  # README: 1e-12
    layer = reference_attention(ref).qkv
    moments = InputMoments([layer])
    for batch, expected in enumerate(ref["mom_after_each_batch"]):
        moments.add(layer, ref[f"mom_x{batch}"])
        torch.testing.assert_close(moments.mean()[0], expected, rtol=0, atol=1e-12)
    assert int(moments.tokens) == int(ref["mom_tokens_seen"])


def test_a_new_branch_changes_nothing_until_it_is_trained():
    model, images = vit(), torch.randn(3, 3, 16, 16)
    before = model(images)
    for layer in add_kv_lora(model, "all", 4):
        layer.start(torch.randn_like(layer.A))
    assert torch.equal(model(images), before)


def test_folding_keeps_the_function_and_ends_the_branch():
    model, images = vit(), torch.randn(3, 3, 16, 16)
    layers = add_kv_lora(model, "all", 4)
    for layer in layers:
        random_branch(layer)
    before = model(images)
    for layer in layers:
        layer.fold()
        assert not layer.B.any()
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)


def test_many_folds_lose_nothing_to_rounding():
    """300 branches, each below half the spacing of W's numbers: adding them one by one in float32 changes nothing."""
    qkv = nn.Linear(8, 24)
    nn.init.constant_(qkv.weight, 1.0)
    layer, tasks, step = KeyValueLoRA(qkv, 1), 300, 2.0**-26
    assert 1.0 + np.float32(step) == np.float32(1.0)
    for _ in range(tasks):
        layer.start(torch.ones_like(layer.A))
        with torch.no_grad():
            layer.B.fill_(step)
        layer.fold()
    exact = torch.full((16, 8), 1 + tasks * step, dtype=torch.float64)
    assert torch.equal(layer.weight.detach()[8:], exact.float())
    assert torch.equal(layer.weight.detach()[:8], torch.ones(8, 8))


def test_only_branches_train_and_names_stay():
    model = vit()
    names = set(model.state_dict())
    model.requires_grad_(False)
    layers = add_kv_lora(model, (0,), 3)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["blocks.0.attn.qkv.B"]
    assert len(layers) == 1 and names <= set(model.state_dict())


def test_gradients_are_those_of_the_dense_form():
    torch.manual_seed(0)
    layer = KeyValueLoRA(nn.Linear(6, 18).double(), 2)
    random_branch(layer, 1.0)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, b: torch.func.functional_call(layer, {"B": b}, t), (tokens, layer.B))
    dense = layer.weight.detach().clone()
    dense[6:] += layer.B.detach().flatten(0, 1) @ layer.A.detach()
    torch.testing.assert_close(layer(tokens), nn.functional.linear(tokens, dense, layer.bias))


def test_under_autocast_the_branch_takes_part_in_bfloat16():
    layer = KeyValueLoRA(nn.Linear(8, 24), 2)
    random_branch(layer, 1.0)
    tokens = torch.randn(4, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tokens)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.B.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(tokens), rtol=0.05, atol=0.05)


def test_moments_equal_the_plain_sum_and_stop_after_the_last_layer():
    model, images, seen = vit(depth=3), torch.randn(5, 3, 16, 16), []
    tokens = []
    with torch.no_grad():  # what enters the projections, by hand
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks[:2]:
            tokens.append(block.norm1(x).flatten(0, 1))
            x = block(x)
    layers = add_kv_lora(model, (0, 1), 2)
    for i in range(3):
        model.blocks[i].mlp.register_forward_hook(lambda *_, i=i: seen.append(i))
    moments = InputMoments(layers)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for part in (images[:2], images[2:]):
            moments.add(model, part)
    assert seen == [0, 0]  # block 1 ends at its attention, block 2 is not entered
    for mean, h in zip(moments.mean(), tokens, strict=True):
        torch.testing.assert_close(mean, h.T @ h / len(h))
    assert model(images).shape == (5, 16)  # the hooks are gone


def test_moments_are_summed_in_full_precision_under_autocast():
    model, images = vit(), torch.randn(4, 3, 16, 16)
    layers = add_kv_lora(model, (0,), 2)
    sums = []
    for dtype in (None, torch.bfloat16):
        moments = InputMoments(layers)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            moments.add(lambda tokens: layers[0](tokens), images.flatten(2).unfold(2, 16, 16)[:, 0])
        sums.append(moments.mean())
    assert sums[1].dtype == torch.float32
    assert torch.equal(*sums)


def test_blocks_are_taken_in_order_and_once():
    model = vit(depth=3)
    layers = add_kv_lora(model, (2, 0, 2), 2)
    assert layers == [model.blocks[0].attn.qkv, model.blocks[2].attn.qkv]


@pytest.mark.parametrize(
    "backbone, blocks, rank, message",
    [
        (nn.Conv2d(3, 3, 3), "all", 2, "choose a ViT of timm"),
        (vit(), (0, 2), 2, "block 2 of a backbone with 2 blocks"),
        (vit(), "all", 17, "17 exceeds the width of the backbone, 16"),
    ],
)
def test_backbones_without_room_for_branches_are_refused(backbone, blocks, rank, message):
    with pytest.raises(ConfigError, match=message):
        add_kv_lora(backbone, blocks, rank)
