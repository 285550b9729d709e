"""Prompts: the reference's features and gradients, and that empty prompts change nothing."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from convs.prompts import PrefixAttention, PromptTokens, add_prompts, compensated_attention, embed
from tests.conftest import reference
from tests.convs.vits import close, stored_vit
from utils.errors import ConfigError

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
VARIANTS = [
    {}, {"qk_norm": True}, {"init_values": 0.1}, {"reg_tokens": 2}, {"no_embed_class": True}, {"pre_norm": True},
    {"scale_attn_norm": True}, {"qkv_bias": False}, {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg"},
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_vpt_of_the_reference(depth):
    arrays = reference(f"aper/vpt_{depth}_forward")
    model = stored_vit(arrays)
    found = add_prompts(model, depth, arrays["params/prompt"].shape[1], "zeros")
    model.double()
    tokens = [prompt.tokens for prompt in found]
    features = model(torch.from_numpy(arrays["x"]))
    close(features, arrays["features_at_zero"], 1e-11)
    (features * torch.from_numpy(arrays["weight"])).sum().backward()
    grads = torch.stack([token.grad for token in tokens])
    close(grads, arrays["grad_at_zero"], 1e-9 * grads.abs().max().item())
    close(grads, grads[:, :1].expand_as(grads), 1e-9 * grads.abs().max().item())  # they stay equal for ever
    for token, stored in zip(tokens, torch.from_numpy(arrays["params/prompt"]), strict=True):
        token.data.copy_(stored)
        token.grad = None
    features = model(torch.from_numpy(arrays["x"]))
    close(features, arrays["features"], 1e-11)
    (features * torch.from_numpy(arrays["weight"])).sum().backward()
    close(torch.stack([token.grad for token in tokens]), arrays["grads/prompt"], 1e-11)


@pytest.mark.parity
def test_starts_of_tokens():
    assert PromptTokens(5, 64, 16, "zeros").tokens.abs().max().item() == reference("aper/init")["vpt/abs_max"]
    drawn = PromptTokens(500, 768, 16).tokens
    bound = math.sqrt(6 / (3 * 16**2 + 768))
    assert bound * 0.99 < drawn.abs().max() <= bound and abs(drawn.std() / bound * math.sqrt(3) - 1) < 0.01


@pytest.mark.parametrize(("depth", "numbers"), [("deep", 46_080), ("shallow", 3_840)])
def test_numbers_of_a_vit_b(depth, numbers):
    with torch.device("meta"):
        found = add_prompts(timm.create_model("vit_base_patch16_224", num_classes=0), depth, 5, "zeros")
    assert sum(prompt.tokens.numel() for prompt in found) == numbers


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_tokens_that_are_never_cut_early(depth, variant):
    """Each block over the whole sequence, prompts cut off its output; and switched off, the ViT itself."""
    model = VisionTransformer(**VIT, **variant).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    plain = model(images)
    found = add_prompts(model, depth, 3, "uniform")
    model.double()
    x = embed(model, images)
    count = x.shape[1]
    for block in model.blocks:
        if block.prompt is not None:
            x = torch.cat([x[:, :count], block.prompt.tokens.expand(2, -1, -1)], dim=1)
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    expected = model.forward_head(model.norm(x[:, :count]))
    torch.testing.assert_close(model(images), expected, atol=1e-12, rtol=0)
    assert not torch.allclose(expected, plain, atol=1e-6)
    for prompt in found:
        prompt.active = False
    assert torch.allclose(model(images), plain, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_slots_are_bit_equal_to_timm(variant):
    model = VisionTransformer(**VIT, **variant).eval()
    names, images = list(model.state_dict()), torch.rand(2, 3, 16, 16)
    before = model(images)
    for block in model.blocks:
        block.attn = PrefixAttention(block.attn)
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), before)
    assert torch.equal(
        model.blocks(embed(model, images)), model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    )


def test_prefixes_are_keys_and_values_in_front_of_the_tokens():
    model = VisionTransformer(**VIT).double().eval()
    attention = PrefixAttention(model.blocks[0].attn)
    x, pk, pv = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 16), (2, 4, 8), (2, 2, 4, 8)))
    attention.prefix = pk, pv
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    k, v = torch.cat([pk.expand(2, -1, -1, -1), k], dim=2), torch.cat([pv, v], dim=2)
    weights = (q @ k.mT / math.sqrt(8)).softmax(dim=-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=0)
    attention.fused_attn = False
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=0)
    with pytest.raises(NotImplementedError, match="do not go together"):
        attention(x, is_causal=True)


def test_compensation_by_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64)
    pk, pv = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    pk[0] = 100 * pk[0, :1]  # some sums are below the clamp
    weights = torch.cat([q @ k.mT, q @ pk.mT], dim=-1).div(math.sqrt(8)).softmax(dim=-1)
    own, prefix = weights.split([5, 3], dim=-1)
    assert (prefix.sum(dim=-1) < 1e-12).any() and (prefix.sum(dim=-1) > 1e-3).any()
    expected = own @ v + prefix / prefix.sum(dim=-1, keepdim=True).clamp(min=1e-12) @ pv
    for fused in (True, False):
        torch.testing.assert_close(compensated_attention(q, k, v, pk, pv, fused), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_stand_between_class_token_and_patches(variant):
    model = VisionTransformer(**VIT, **variant).eval()
    images, tokens = torch.rand(2, 3, 16, 16), torch.randn(1, 3, 16)
    model.norm_pre = torch.nn.Identity()
    plain, longer = embed(model, images), embed(model, images, tokens)
    first = model.num_prefix_tokens
    assert torch.equal(torch.cat([longer[:, :first], longer[:, first + 3 :]], dim=1), plain)
    positioned = model.cls_token is not None and not model.no_embed_class
    expected = tokens + model.pos_embed[:, :1] if positioned else tokens
    assert torch.equal(longer[:, first : first + 3], expected.expand(2, -1, -1))


def test_a_network_without_plain_blocks_is_refused():
    with torch.device("meta"), pytest.raises(ConfigError, match="no plain transformer blocks; choose a ViT"):
        add_prompts(timm.create_model("resnet18", num_classes=0), "deep", 3, "zeros")
