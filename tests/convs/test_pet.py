"""LAE's modules in chosen blocks: the reference's features, gradients and starts."""

import math
import re

import pytest
import timm
import torch

from convs.pet import add_pet
from tests.conftest import reference
from tests.convs.vits import check_forward, group, numbers, stored_vit
from utils.errors import ConfigError

SIZES = {"prefix": "key", "adapter": "down.bias", "lora": "key_A"}


def named(model, kind: str, blocks: list[int], size: int) -> dict[str, torch.nn.Parameter]:
    """The parameters under the fixtures' names, blocks.{i}.{what}."""
    parameters = add_pet(model, kind, blocks, size)
    model.double()
    return {re.sub(r"attn\.(qkv\.|adapter\.)?", "", name): parameter for name, parameter in parameters.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["prefix", "adapter", "lora", "prefix_clamp"])
def test_forward_and_gradients_of_the_reference(name):
    arrays, kind = reference(f"lae/{name}_forward"), name.removesuffix("_clamp")
    blocks = numbers(arrays, r"params/blocks\.(\d+)\.")
    size = len(arrays[f"params/blocks.{blocks[0]}.{SIZES[kind]}"])
    model = stored_vit(arrays)
    check_forward(model, named(model, kind, blocks, size), arrays, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["prefix", "adapter", "lora"])
def test_starts_of_the_reference(kind):
    """Zeros and ones alike, drawn numbers in the same range."""
    arrays = reference(f"lae/{kind}_forward")
    blocks = numbers(arrays, r"init/blocks\.(\d+)\.")
    model = stored_vit(arrays)
    size = len(arrays[f"init/blocks.{blocks[0]}.{SIZES[kind]}"])
    ours, theirs = named(model, kind, blocks, size), group(arrays, "init/")
    assert ours.keys() == theirs.keys()
    bound = 0.01 if kind == "prefix" else 1 / math.sqrt(model.embed_dim)
    for name, parameter in ours.items():
        stored = theirs[name]
        if stored.unique().numel() == 1:
            assert torch.equal(parameter, stored.view_as(parameter)), name
        else:
            assert 0.8 * bound < parameter.abs().max() <= bound and stored.abs().max() <= bound, name
            assert (parameter.min() >= 0) == (stored.min() >= 0), name


@pytest.mark.parametrize(
    ("kind", "size", "count"), [("prefix", 10, 76_810), ("adapter", 5, 42_270), ("lora", 5, 76_810)]
)
def test_numbers_of_a_vit_b(kind, size, count):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert sum(p.numel() for p in add_pet(model, kind, range(5), size).values()) == count


def test_other_networks_and_blocks_are_refused():
    with torch.device("meta"):
        with pytest.raises(ConfigError, match="block 2 of a backbone with 2 blocks"):
            add_pet(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2), "lora", [0, 2], 5)
        with pytest.raises(ConfigError, match="no plain attention in its blocks"):
            add_pet(timm.create_model("eva02_tiny_patch14_224", num_classes=0), "prefix", [0], 5)
