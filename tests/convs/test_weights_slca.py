"""The weight files that SLCA names, in their official key layout and made small, load completely."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from convs.backbones import make_backbone
from tests.conftest import TINY_VIT

SIZES = {key: value for key, value in TINY_VIT.items() if key != "name"}


def source() -> VisionTransformer:
    torch.manual_seed(3)
    return VisionTransformer(num_classes=5, **SIZES)


def flax_archive(model: VisionTransformer, heads: int) -> dict[str, np.ndarray]:
    """The layout of Google's AugReg archives: [in, out] kernels, one kernel each for query, key and value."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    width = model.embed_dim
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "pre_logits/kernel": np.zeros((width, width), np.float32),
        "pre_logits/bias": np.zeros(width, np.float32),
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for block in range(len(model.blocks)):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        for part, weight, bias in zip(
            ("query", "key", "value"),
            np.split(state[ours + "attn.qkv.weight"], 3),
            np.split(state[ours + "attn.qkv.bias"], 3),
            strict=True,
        ):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for name, norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{norm}/scale"] = state[f"{ours}{name}.weight"]
            arrays[f"{theirs}{norm}/bias"] = state[f"{ours}{name}.bias"]
        for name, dense in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{dense}/kernel"] = state[f"{ours}mlp.{name}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{dense}/bias"] = state[f"{ours}mlp.{name}.bias"]
    return arrays


def moco_system(model: VisionTransformer) -> dict:
    """The file of a whole MoCo v3 training run: two encoders with projectors for heads, a predictor, an optimiser."""
    backbone = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    projector = {"head.0.weight": torch.zeros(7, model.embed_dim), "head.1.running_mean": torch.zeros(7)}
    state = {f"module.base_encoder.{k}": v for k, v in (backbone | projector).items()}
    state |= {f"module.momentum_encoder.{k}": v + 1 for k, v in (backbone | projector).items()}
    state |= {"module.predictor.0.weight": torch.zeros(3, 3)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def moco_backbone(model: VisionTransformer) -> dict:
    """The converted file that SLCA names: timm's names under "model", without a head."""
    return {"model": {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}}


@pytest.mark.parametrize("layout", ["augreg npz", "moco system", "moco backbone"])
def test_loads_completely(layout, tmp_path):
    model = source()
    if layout == "augreg npz":
        path = tmp_path / "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
        np.savez(path, **flax_archive(model, TINY_VIT["num_heads"]))
    else:
        path = tmp_path / "mocov3-vit-base-300ep.pth"
        torch.save((moco_system if layout == "moco system" else moco_backbone)(model), path)
    backbone, info = make_backbone(TINY_VIT, str(path), None)
    assert info.report.matched == 1 and not info.report.missing and not info.report.unexpected
    images = torch.rand(2, 3, TINY_VIT["img_size"], TINY_VIT["img_size"])
    model.reset_classifier(0)
    assert torch.allclose(backbone.eval()(images), model.eval()(images), atol=1e-6)
