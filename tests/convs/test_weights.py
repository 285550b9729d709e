"""Weight files in the exact key layouts in which they are published, made small: every number arrives."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from convs.backbones import make_backbone
from convs.weights import load_weights
from tests.conftest import TINY_VIT
from tools.check_weights import fingerprint, probe_images
from utils.errors import WeightsError

ARGUMENTS = {key: value for key, value in TINY_VIT.items() if key != "name"}


WIDTH, HEADS = TINY_VIT["embed_dim"], TINY_VIT["num_heads"]


def vit(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(num_classes=0, **ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts many at 0 or 1, which would hide a mix-up
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in vit(1).state_dict().items()}


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def projection_head(prefix: str) -> dict:
    names = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "last_layer.weight_g", "last_layer.weight_v")
    return {f"{prefix}head.{name}": torch.randn(3, 3) for name in names}


def flax(state: dict[str, torch.Tensor], head: bool = True) -> dict[str, np.ndarray]:
    """The archive of google-research/vision_transformer: kernels [in, out], heads apart, HWIO convolutions."""
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for block in range(TINY_VIT["depth"]):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        weights, biases = state[f"{ours}attn.qkv.weight"].chunk(3), state[f"{ours}attn.qkv.bias"].chunk(3)
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(WIDTH, HEADS, WIDTH // HEADS)
            arrays[f"{attention}{part}/bias"] = bias.reshape(HEADS, WIDTH // HEADS)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(HEADS, WIDTH // HEADS, WIDTH)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for here, there in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{there}/scale"] = state[f"{ours}{here}.weight"]
            arrays[f"{theirs}{there}/bias"] = state[f"{ours}{here}.bias"]
        for here, there in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{there}/kernel"] = state[f"{ours}mlp.{here}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{there}/bias"] = state[f"{ours}mlp.{here}.bias"]
    if head:
        arrays |= {"head/kernel": torch.randn(WIDTH, 30), "head/bias": torch.randn(30)}
        arrays |= {"pre_logits/kernel": torch.randn(WIDTH, WIDTH), "pre_logits/bias": torch.randn(WIDTH)}
    return {key: value.numpy() for key, value in arrays.items()}


def moco(state: dict) -> dict:
    """A checkpoint of the MoCo v3 training script: both encoders with their projectors, and a predictor."""
    other = {key: torch.randn_like(value) for key, value in state.items()}
    system = with_prefix("module.base_encoder.", state) | with_prefix("module.momentum_encoder.", other)
    for encoder in ("base_encoder", "momentum_encoder"):
        system |= {f"module.{encoder}.head.{name}": torch.randn(3) for name in ("0.weight", "1.bias", "1.running_mean")}
    system |= {f"module.predictor.{name}": torch.randn(3) for name in ("0.weight", "1.weight", "3.weight")}
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": system,
        "optimizer": {"state": {}},
        "scaler": {"scale": 1.0},
    }


def dino(state: dict) -> dict:
    """A checkpoint of the DINO training script; iBOT's has the same shape."""
    other = {key: torch.randn_like(value) for key, value in state.items()}
    return {
        "student": with_prefix("module.backbone.", other) | projection_head("module."),
        "teacher": with_prefix("backbone.", state) | projection_head(""),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_base", patch_size=16, lr=1e-3, output_dir="."),
        "dino_loss": {"center": torch.randn(1, 8)},
    }


def ibot_student(state: dict) -> dict:
    masked = {"module.backbone.masked_embed": torch.randn(1, WIDTH)}
    return {"student": with_prefix("module.backbone.", state) | masked | projection_head("module."), "epoch": 3}


TORCH_LAYOUTS = {
    "plain": lambda state: state,
    "plain with a classifier": lambda state: state | {"head.weight": torch.randn(5, WIDTH)},
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state, "epoch": 3},
    "data parallel": lambda state: with_prefix("module.", state),
    "compiled": lambda state: with_prefix("_orig_mod.", state),
    "moco v3": moco,
    "moco v3, converted": lambda state: {"model": with_prefix("module.base_encoder.", state)},
    "dino": dino,
    "dino backbone": lambda state: state,
    "dino teacher": lambda state: {"teacher": with_prefix("module.backbone.", state) | projection_head("module.")},
    "ibot": dino,
    "ibot teacher": lambda state: {"state_dict": with_prefix("backbone.", state) | projection_head("")},
    "ibot teacher, bare": lambda state: {"state_dict": state | projection_head("")},
    "ibot student": ibot_student,
}


def assert_complete(model, published, report, unexpected: tuple[str, ...] = ()):
    assert (report.matched, report.missing, report.unexpected) == (1.0, (), unexpected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, published[key]), key


@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_torch_files_load_completely(tmp_path, published, layout, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(TORCH_LAYOUTS[layout](published), path)
    model = vit(2)
    report = load_weights(model, path)
    assert_complete(model, published, report, ("masked_embed",) if layout == "ibot student" else ())
    assert len(report.sha256) == 64


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("head", [True, False])
def test_augreg_archives_load_completely(tmp_path, published, head, prefix):
    np.savez(tmp_path / "B_16.npz", **with_prefix(prefix, flax(published, head)))
    model = vit(2)
    assert_complete(model, published, load_weights(model, tmp_path / "B_16.npz"))


def test_timm_safetensors_load_completely(tmp_path, published):
    state = published | {"head.weight": torch.randn(5, WIDTH), "head.bias": torch.randn(5)}
    save_file(state, tmp_path / "model.safetensors")
    model = vit(2)
    assert_complete(model, published, load_weights(model, tmp_path / "model.safetensors"))


def test_the_network_computes_what_the_published_one_does(tmp_path, published):
    np.savez(tmp_path / "B_16.npz", **flax(published))
    source, model = vit(1), vit(2)
    load_weights(model, tmp_path / "B_16.npz")
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(source.eval()(images), model.eval()(images))


def test_another_resolution_is_resampled(tmp_path, published):
    torch.save(published, tmp_path / "a.pth")
    model = VisionTransformer(num_classes=0, **(ARGUMENTS | {"img_size": 32}))
    report = load_weights(model, tmp_path / "a.pth")
    assert report.matched == 1.0 and model.pos_embed.shape == (1, 17, WIDTH)
    assert torch.equal(model.pos_embed[:, 0], published["pos_embed"][:, 0])


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, published, new_format):
    harm = tmp_path / "harm"
    state = {"state_dict": published, "args": Malicious(harm)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match="could run foreign code: refused .*Save the bare state dict"):
        load_weights(vit(2), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Malicious(harm)))
    with pytest.raises(WeightsError):
        load_weights(vit(2), tmp_path / "b.pth")
    assert not harm.exists()


def test_an_archive_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", cls=np.array([Malicious(tmp_path / "harm")], dtype=object))
    with pytest.raises(WeightsError, match="Object arrays cannot be loaded"):
        load_weights(vit(2), tmp_path / "a.npz")
    assert not (tmp_path / "harm").exists()


def test_files_that_do_not_fit_say_why(tmp_path, published):
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(vit(2), tmp_path / "none.pth")
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="hold no tensors; entries: epoch, note"):
        load_weights(vit(2), tmp_path / "a.pth")
    half = {key: value for key, value in published.items() if not key.startswith("blocks.1")}
    torch.save(half, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="do not fit the backbone: missing: blocks.1.norm1.weight"):
        load_weights(vit(2), tmp_path / "b.pth")
    wide = VisionTransformer(num_classes=0, **(ARGUMENTS | {"embed_dim": 32})).state_dict()
    torch.save(wide, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="another shape, first .*: file .*, backbone "):
        load_weights(vit(2), tmp_path / "c.pth")
    (tmp_path / "d.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot be read "):
        load_weights(vit(2), tmp_path / "d.safetensors")


def test_fingerprint_is_that_of_the_weights_not_of_the_file(tmp_path, published, capsys):
    import main

    np.savez(tmp_path / "a.npz", **flax(published))
    torch.save(moco(published), tmp_path / "b.pth")
    other = published | {"norm.bias": published["norm.bias"] + 1e-3}
    torch.save(other, tmp_path / "c.pth")
    found = []
    for name in ("a.npz", "b.pth", "c.pth"):
        backbone = '{"name": "vit", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'
        assert main.main(["check-weights", str(tmp_path / name), "--backbone", backbone]) == 0
        out = capsys.readouterr().out
        assert "matched      100.00 % of the backbone's numbers" in out
        found.append(next(line for line in out.splitlines() if line.startswith("fingerprint")))
    assert found[0] == found[1] != found[2]


def test_fingerprint_does_not_depend_on_threads_or_state():
    images = probe_images(16)
    assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    assert round(255 * float(images.sum())) == 402_976  # whole numbers: the same in every version
    threads = torch.get_num_threads()
    first = fingerprint(vit(1), 16)
    torch.set_num_threads(1)
    torch.manual_seed(9)
    assert fingerprint(vit(1).train(), 16) == first
    torch.set_num_threads(threads)


def test_check_weights_needs_a_backbone(tmp_path, capsys):
    import main

    with pytest.raises(SystemExit, match="2"):
        main.main(["check-weights", str(tmp_path / "a.pth")])
    assert "--backbone" in capsys.readouterr().err
    assert main.main(["check-weights", str(tmp_path / "a.pth"), "--backbone", "vit_base_patch16_224"]) == 2
    assert "no such file" in capsys.readouterr().err


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
    backbone = make_backbone(TINY_VIT, str(path), None)
    report = backbone.info.report
    assert report.matched == 1 and not report.missing and not report.unexpected
    images = torch.rand(2, 3, TINY_VIT["img_size"], TINY_VIT["img_size"])
    model.reset_classifier(0)
    assert torch.allclose(backbone.eval()(images), model.eval()(images), atol=1e-6)
