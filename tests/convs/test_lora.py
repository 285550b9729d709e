"""Low-rank branches: the reference's attention and MLP, the SVD start, merging, and what they cost."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, VisionTransformer

from convs.lora import LoRALinear, add_lora, lora_layers, right_singular_vectors
from tests.conftest import TINY_VIT, reference
from utils.errors import ConfigError

# The reference's names of branch factors -> ours.
NAMES = {"lora_A": "qkv.lora_A", "lora_B": "qkv.lora_B", "lora_1_A": "fc1.lora_A", "lora_1_B": "fc1.lora_B",
         "lora_2_A": "fc2.lora_A", "lora_2_B": "fc2.lora_B"}  # fmt: skip


def renamed(name: str) -> str:
    """A parameter of the reference's network under our name: the branch's factors stand inside the layer."""
    path, _, last = name.rpartition(".")
    last = NAMES.get(last, last)
    return f"{path}.{last}" if path else last


def small_vit(**keys) -> VisionTransformer:
    return VisionTransformer(num_classes=0, **{k: v for k, v in TINY_VIT.items() if k != "name"} | keys)


class Block(torch.nn.Module):
    """One layer of a block under the path that `add_lora` looks for."""

    def __init__(self, name: str, layer: torch.nn.Module):
        super().__init__()
        self.add_module(name, layer)


def fixture_layer(name: str, arrays) -> torch.nn.Module:
    """timm's attention or MLP in float64 with the branches and parameters of a fixture."""
    dim = arrays["x"].shape[2]
    if name == "lora_attn":
        layer, path, targets = Attention(dim, int(arrays["heads"]), qkv_bias=True), "attn", ["attn.qkv"]
    else:
        hidden = len(arrays["params/fc1.weight"])
        layer, path, targets = Mlp(dim, hidden), "mlp", ["mlp.fc1", "mlp.fc2"]
    rank = min(value.shape[0] for key, value in arrays.items() if key.startswith("params/") and key.endswith("_A"))
    block = Block(path, layer)
    add_lora(torch.nn.Sequential(block), rank, float(arrays["scale"]), targets)
    state = {renamed(key[7:]): torch.from_numpy(value) for key, value in arrays.items() if key.startswith("params/")}
    layer.double().load_state_dict(state, strict=True)
    return layer


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lora_attn", "lora_mlp"])
def test_outputs_and_gradients_of_the_reference(name):
    arrays = reference(f"slca/{name}")
    layer = fixture_layer(name, arrays)
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), arrays["y"], atol=1e-10, rtol=0)
    (y * torch.from_numpy(arrays["w"])).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), arrays["grad_x"], atol=1e-10, rtol=0)
    gradients = dict(layer.named_parameters())
    for key in (key for key in arrays if key.startswith("grads/")):
        ours = gradients[renamed(key[6:])].grad.numpy()
        np.testing.assert_allclose(ours, arrays[key], atol=1e-10, rtol=0, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lora_attn", "lora_mlp"])
def test_svd_start_of_the_reference(name):
    arrays = reference(f"slca/{name}")
    layer = fixture_layer(name, arrays)
    for branch in lora_layers(layer):
        branch.start_from_svd()
    state = layer.state_dict()
    for key in (key for key in arrays if key.startswith("after_init/")):
        ours, theirs = state[renamed(key[11:])].numpy(), arrays[key]
        if key.endswith("_A"):  # each row is unique up to its sign
            ours, theirs = ours.T @ ours, theirs.T @ theirs
        np.testing.assert_allclose(ours, theirs, atol=1e-10, rtol=0, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_features_of_the_reference(kind):
    arrays = reference("slca/vit_forward")
    size, patch, dim, depth, heads, rank = arrays["arch"].tolist()
    model = small_vit(img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads)
    model.norm = torch.nn.LayerNorm(dim)
    if kind == "lora":
        add_lora(model, rank, targets=("attn.qkv", "mlp.fc1", "mlp.fc2"))
    start = len(f"{kind}_params/")
    state = {renamed(k[start:]): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(f"{kind}_params/")}
    model.load_state_dict(state, strict=True)
    features = model.double().eval()(torch.from_numpy(arrays["x"]))
    np.testing.assert_allclose(features.detach().numpy(), arrays[f"{kind}_features"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_singular_vectors_are_those_of_the_svd(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = right_singular_vectors(weight, 3), torch.linalg.svd(weight).Vh[:3]
    assert torch.allclose((ours * theirs).sum(dim=1).abs(), torch.ones(3), atol=1e-5)


def test_singular_vectors_are_nearer_to_the_exact_ones_than_a_float32_svd():
    weight = torch.randn(300, 80, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(weight.double()).Vh[:4]

    def error(vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors.double()
        return (vectors * (vectors * exact).sum(dim=1, keepdim=True).sign() - exact).abs().max()

    assert error(right_singular_vectors(weight, 4)) <= error(torch.linalg.svd(weight).Vh[:4])


def test_a_branch_starts_as_the_identity_whatever_its_start():
    torch.manual_seed(0)
    model, images = small_vit().eval(), torch.rand(2, 3, 16, 16)
    before = model(images)
    add_lora(model, rank=3, targets=("attn.qkv", "mlp.fc1", "mlp.fc2"))
    assert torch.equal(model(images), before)
    for layer in lora_layers(model):
        layer.start_from_svd()
    assert torch.equal(model(images), before)


def test_merging_gives_the_same_features_and_can_be_undone():
    torch.manual_seed(0)
    model, images = small_vit().eval(), torch.rand(2, 3, 16, 16)
    add_lora(model, rank=3)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    features, state = model(images), {k: v.clone() for k, v in model.state_dict().items()}
    for layer in lora_layers(model):
        layer.merge()
        layer.merge()
    assert torch.allclose(model(images), features, atol=1e-5)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    for layer in lora_layers(model):
        layer.unmerge()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], atol=1e-6), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"])
def test_any_timm_vit_takes_branches_in_every_block(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        add_lora(model, rank=2, targets=("attn.qkv", "mlp.fc1", "mlp.fc2"))
    assert len(list(lora_layers(model))) == 3 * len(model.blocks)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"no linear layers called attn\.qkv"):
        add_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), rank=2)


def test_no_dense_product_is_kept_for_the_backward_pass():
    layer = LoRALinear(torch.nn.Linear(64, 96), rank=2, scale=0.8).requires_grad_(False)
    layer.lora_A.requires_grad_(True)
    layer.lora_B.requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.rand(3, 64, requires_grad=True)).sum().backward()
    dense = [shape for shape in kept if sorted(shape) == [64, 96]]
    assert len(dense) == 1, "the frozen weight itself, and no B A beside it"
    assert layer.weight.grad is None
