"""Weight files as people have them: the network with the loaded file computes what the source network computes."""

import argparse
import pathlib

import numpy as np
import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from convs.weights import WeightOptions, load_weights
from tests.convs import published as at
from tests.convs.published import BEIT, REGISTERS, SIZES, under
from utils.errors import WeightsError

NOISE = {"epoch": 7, "loss": torch.tensor(0.3), "best": np.float64(71.25), "history": np.arange(3)}


def other(state):
    return {key: torch.rand(value.shape) for key, value in state.items()}


def system(state):
    return {"student": under("module.backbone.", other(state)), "teacher": under("backbone.", state), **NOISE}


def options(state):
    args = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/x"), data=pathlib.Path("y"))
    return {"model": state, "args": args, "optimizer": {"state": {0: {"exp_avg": torch.rand(2)}}}, **NOISE}


VIT = {
    "bare": lambda state: state,
    "half": lambda state: {key: value.half() for key, value in state.items()},
    "bfloat16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "double": lambda state: {key: value.double() for key, value in state.items()},
    "classifier": lambda state: state | {"head.weight": torch.rand(5, 16), "head.bias": torch.rand(5)},
    "parameters": lambda state: {key: torch.nn.Parameter(value) for key, value in state.items()},
    "stray tensor and scalars": lambda state: {"state_dict": state, **NOISE},
    "options and optimiser": options,
    "module.": lambda state: under("module.", state),
    "model. in state_dict": lambda state: {"state_dict": under("model.", state)},
    "net.": lambda state: under("net.", state),
    "vit.": lambda state: {"model": under("vit.", state)},
    "backbone.": lambda state: under("backbone.", state) | {"neck.fc.weight": torch.rand(3)},
    "encoder.": lambda state: under("encoder.", state) | {"predictor.blocks.0.weight": torch.rand(3)},
    "module.net.encoder.": lambda state: {"state_dict": under("module.net.encoder.", state)},
    "my_own_name.": lambda state: under("my_own_name.", state),
    "teacher": lambda state: {"teacher": state},
    "teacher and student": system,
    "model_ema alone": lambda state: {"model_ema": state},
    "state_dict_ema alone": lambda state: {"state_dict_ema": under("module.", state)},
    "model before model_ema": lambda state: {"model_ema": other(state), "model": state},
    "lightning": lambda state: {"state_dict": under("ema.", other(state)) | under("net.", state)},
    "deeper": lambda state: {"checkpoint": {"weights": {"state_dict": state}}},
    "mae": at.mae,
    "ibot": lambda state: {"state_dict": state | {"masked_embed": torch.rand(1, 16)}},
    "dinov2": at.dinov2_registers,
    "dinov2 in chunks": lambda state: {"teacher": under("backbone.", at.in_chunks(at.dinov2_registers(state)))},
    "chunks counted anew": lambda state: at.named(state, (r"^blocks\.(\d+)\.", r"blocks.\1.0.")),
    "torchvision": at.torchvision_vit,
    "torchvision, older": lambda state: at.named(at.torchvision_vit(state), (r"\.mlp\.0", ".mlp.linear_1"), (r"\.mlp\.3", ".mlp.linear_2")),  # noqa: E501
    "transformers": at.transformers_vit,
    "transformers 5": lambda state: at.transformers_5(at.transformers_vit(state)),
    "transformers classifier": lambda state: under("vit.", at.transformers_vit(state)) | {"classifier.bias": torch.rand(2)},  # noqa: E501
    "transformers pooler": lambda state: at.transformers_vit(state) | {"pooler.dense.weight": torch.rand(16, 16)},
    "transformers mae": lambda state: under("vit.", at.transformers_vit(state)) | {"decoder.mask_token": torch.rand(2)},
    "transformers dinov2": at.transformers_dinov2,
}  # fmt: skip
CASES = {name: ({}, write) for name, write in VIT.items()} | {
    "dinov2 with registers": (REGISTERS, at.dinov2_registers),
    "dinov2 with registers in chunks": (REGISTERS, lambda state: at.in_chunks(at.dinov2_registers(state))),
    "transformers dinov2 with registers": (REGISTERS, at.transformers_dinov2),
    "clip": ({"pre_norm": True}, at.clip),
    "openclip": ({"pre_norm": True}, lambda state: {"state_dict": under("module.", at.clip(state)), "epoch": 3}),
    "openclip with a tower of timm": (
        {},
        lambda state: under("visual.trunk.", state) | {"logit_scale": torch.rand(())},
    ),
    "transformers clip": ({"pre_norm": True}, at.transformers_clip),
    "fine-tuned mae": ({"global_pool": "avg"}, lambda state: {"model": state | {"head.bias": torch.rand(3)}}),
    "deit III": ({"init_values": 1e-5}, lambda state: at.named(state, (r"\.ls([12])\.gamma", r".gamma_\1"))),
}


def loaded(tmp_path, target, written, options=None, name="weights.pth"):
    torch.save(written, tmp_path / name)
    report = load_weights(target, tmp_path / name, *([options] if options else []))
    return target.eval(), report


@pytest.mark.parametrize("name", CASES)
def test_a_layout_computes_what_its_source_computes(tmp_path, name):
    changes, write = CASES[name]
    source = at.vit(**changes)
    target, report = loaded(tmp_path, VisionTransformer(num_classes=0, **(SIZES | changes)), write(source.state_dict()))
    images = torch.rand(2, 3, 16, 16)
    tolerance = 2e-2 if name in ("half", "bfloat16") else 1e-5
    torch.testing.assert_close(target(images), source(images), rtol=tolerance, atol=tolerance)
    assert report.matched == 1 and not report.missing


@pytest.mark.parametrize(
    ("changes", "write"),
    [
        ({}, lambda state: state | {"mask_token": torch.rand(1, 1, 16)}),
        ({}, at.transformers_beit),
        ({}, lambda state: under("beit.", at.transformers_5(at.transformers_beit(state)))),
        ({"global_pool": "token"}, lambda state: {"model": under("beit.", at.transformers_beit(state))}),
        ({"use_abs_pos_emb": True, "use_rel_pos_bias": False}, lambda state: state),
    ],
)
def test_beit(tmp_path, changes, write):
    source = at.beit(**changes)
    target, _ = loaded(tmp_path, Beit(num_classes=0, **(BEIT | changes)), write(source.state_dict()))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(target(images), source(images))


def test_beit_before_fine_tuning_has_one_table_for_all_blocks(tmp_path):
    source = at.beit()
    state = source.state_dict()
    table = state["blocks.0.attn.relative_position_bias_table"]
    state["blocks.1.attn.relative_position_bias_table"].copy_(table)
    shared = {key: value for key, value in state.items() if "relative_position_bias_table" not in key}
    target, _ = loaded(
        tmp_path, Beit(num_classes=0, **BEIT), shared | {"rel_pos_bias.relative_position_bias_table": table}
    )
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(target(images), source(images))


@pytest.mark.parametrize(
    "write", [lambda state: state, at.transformers_vit, lambda s: under("deit.", at.transformers_vit(s))]
)
def test_a_distilled_deit(tmp_path, write):
    source = at.distilled()
    target, _ = loaded(tmp_path, VisionTransformerDistilled(num_classes=0, **SIZES), write(source.state_dict()))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(target(images), source(images))


@pytest.mark.parametrize(
    "write", [at.moco_v2, lambda s: s, lambda s: under("backbone.", s), lambda s: {"state_dict": s}]
)
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_convolutional_networks(tmp_path, name, write):
    kind = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)} if name == "convnext_atto" else {}
    source = at.filled(timm.create_model(name, num_classes=0, **kind))
    target, report = loaded(tmp_path, timm.create_model(name, num_classes=0, **kind), write(source.state_dict()))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(target(images), source(images))
    assert report.matched == 1


PREFIXES = {"plain": {}, "no class": {"class_token": False, "global_pool": "avg"}, "registers": REGISTERS,
            "registers with positions": {"reg_tokens": 4}, "patches alone": {"no_embed_class": True}}  # fmt: skip


@pytest.mark.parametrize("tokens", PREFIXES)
@pytest.mark.parametrize(("size", "new"), [(32, 16), (16, 48), (24, 40)])
def test_positions_are_resampled_whatever_tokens_stand_beside_them(tmp_path, tokens, size, new):
    """As timm does it itself, for each form of the tokens."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    source = at.vit(**PREFIXES[tokens], img_size=size)
    expected = VisionTransformer(num_classes=0, **(SIZES | PREFIXES[tokens] | {"img_size": new}))
    expected.load_state_dict(checkpoint_filter_fn(source.state_dict(), expected))
    empty = VisionTransformer(num_classes=0, **(SIZES | PREFIXES[tokens] | {"img_size": new}))
    target, report = loaded(tmp_path, empty, source.state_dict())
    torch.testing.assert_close(target.pos_embed, expected.pos_embed)
    assert report.done == (f"positions resampled from {size // 8} x {size // 8} to {new // 8} x {new // 8}",)
    assert report.done[0] in str(report)


@pytest.mark.parametrize("file", ["registers", "registers with positions"])
def test_positions_for_other_tokens_compute_the_same(tmp_path, file):
    """A token without a position has position 0; a position without a place is added to its token."""
    ours = "registers" if file == "registers with positions" else "registers with positions"
    source = at.vit(**(PREFIXES[file] | {"init_values": 1e-5}))
    empty = VisionTransformer(num_classes=0, **(SIZES | PREFIXES[ours] | {"init_values": 1e-5}))
    target, _ = loaded(tmp_path, empty, source.state_dict())
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(target(images), source(images))


def test_a_patch_embedding_is_resampled_only_on_request_and_said(tmp_path):
    from timm.layers import resample_patch_embed

    state = at.vit(patch_size=4).state_dict()
    empty = VisionTransformer(num_classes=0, **SIZES)
    with pytest.raises(
        WeightsError, match=r'patch_embed.proj.weight: file \[16, 3, 4, 4\], .*"patch_size": 4.*"resample_patch": true'
    ):  # noqa: E501
        loaded(tmp_path, empty, state)
    target, report = loaded(tmp_path, empty, state, WeightOptions(resample_patch=True))
    torch.testing.assert_close(
        target.patch_embed.proj.weight, resample_patch_embed(state["patch_embed.proj.weight"], [8, 8])
    )
    assert report.done[-1] == "patch embedding resampled from 4 x 4 to 8 x 8 pixels"
    _, report = loaded(tmp_path, empty, at.vit().state_dict(), WeightOptions(resample_patch=True))
    assert report.done == ("resample_patch: nothing to resample",)


@pytest.mark.parametrize(
    ("entry", "taken"),
    [
        (None, "a"),
        ("model", "a"),
        ("raw", "a"),
        ("model_ema", "b"),
        ("ema", "b"),
        ("model_ema.module", "b"),
        ("teacher", "c"),
    ],
)
def test_weights_entry_chooses_the_network_and_the_report_says_which(tmp_path, entry, taken):
    states = {name: at.filled(at.vit(), seed).state_dict() for seed, name in enumerate("abc")}
    written = {
        "model": states["a"],
        "model_ema": under("module.", states["b"]),
        "teacher": under("backbone.", states["c"]),
    }
    target, report = loaded(tmp_path, VisionTransformer(num_classes=0, **SIZES), written, WeightOptions(entry))
    assert torch.equal(target.norm.weight, states[taken]["norm.weight"])
    names = {"a": "model", "b": "model_ema.module", "c": "teacher.backbone"}
    assert report.entry == names[taken] and set(report.others) == set(names.values()) - {names[taken]}
    assert f'entry "{names[taken]}"' in str(report) and "weights_entry" in str(report)


def test_weights_entry_below_a_state_dict(tmp_path):
    a, b = (at.filled(at.vit(), seed).state_dict() for seed in (1, 2))
    written = {"state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b)}
    empty = VisionTransformer(num_classes=0, **SIZES)
    for entry, state in ((None, a), ("base_encoder", a), ("momentum_encoder", b)):
        target, _ = loaded(tmp_path, empty, written, WeightOptions(entry))
        assert torch.equal(target.norm.weight, state["norm.weight"])


def without(*names):
    return lambda state: {key: value for key, value in state.items() if not key.startswith(names)}


def plus(name, *shape):
    return lambda state: state | {name: torch.rand(shape)}


def damaged(name, value):
    def write(state):
        state[name].view(-1)[3] = value
        return state

    return write


def number(state):
    return dict(enumerate(state.values()))


def sparse(state):
    return state | {"blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].to_sparse()}


def looped(state):
    state = {"note": 1}
    state["model"] = state
    return state


REFUSED = {
    "layer scale": ({"init_values": 1e-5}, lambda s: s, r'no place for blocks.0.ls1.gamma.*set "init_values": 1e-5'),
    "one block of layer scale": ({}, plus("blocks.1.ls1.gamma", 16), "init_values"),
    "fine-tuned mae": ({"global_pool": "avg"}, lambda s: s, r'fc_norm.weight.*"fc_norm": true'),
    "registers": ({"reg_tokens": 3, "no_embed_class": True}, lambda s: s, r'reg_token.*"reg_tokens": 3'),
    "no class token": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, lambda s: s, '"class_token": false'),  # noqa: E501
    "no qkv bias": ({"qkv_bias": False}, lambda s: s, r'missing: blocks.0.attn.qkv.bias.*"qkv_bias": false'),
    "a distillation token": ({}, plus("dist_token", 1, 1, 16), "dist_token.*distilled"),
    "clip": ({"pre_norm": True}, at.clip, r'norm_pre.weight.*"pre_norm": true'),
    "deeper": ({"depth": 3}, lambda s: s, r'blocks.2.norm1.weight.*"depth": 3'),
    "shallower": ({"depth": 1}, lambda s: s, r'missing: blocks.1.norm1.weight.*"depth": 1'),
    "wider": ({"embed_dim": 32}, lambda s: s, r'another shape, first cls_token: file \[1, 1, 32\].*"embed_dim": 32'),
    "another patch": ({"patch_size": 4}, lambda s: s, r'"patch_size": 4'),
    "one tensor of another shape": ({}, plus("norm.weight", 15), r"first norm.weight: file \[15\], backbone \[16\]"),
    "one tensor too few": ({}, without("blocks.0.norm1.bias"), "missing: blocks.0.norm1.bias"),
    "one tensor too many": ({}, plus("blocks.0.attn.gate", 16), "no place for blocks.0.attn.gate"),
    "no square grid": ({}, plus("pos_embed", 1, 8, 16), "8 positions are no square grid.*img_size"),
    "NaN": ({}, damaged("blocks.1.mlp.fc2.weight", float("nan")), "blocks.1.mlp.fc2.weight holds 1 of 1,024 .* NaN"),
    "infinite": ({}, damaged("pos_embed", float("inf")), "pos_embed holds 1 of"),
    "beyond float32": ({}, lambda s: s | {"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)}, "norm.bias holds 16"),  # noqa: E501
    "integer keys": ({}, number, "number their tensors"),
    "integer keys below a name": ({}, lambda s: {"state_dict": number(s)}, 'under "state_dict" number'),
    "sparse": ({}, sparse, "blocks.0.mlp.fc1.weight is sparse.*to_dense"),
    "meta": ({}, lambda s: {k: v.to("meta") for k, v in s.items()}, "cls_token has a shape and no numbers"),
    "whole numbers": ({}, lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "cls_token holds int8.*float32"),
    "complex": ({}, lambda s: {k: v.to(torch.complex64) for k, v in s.items()}, "holds complex64"),
    "an expanded view": ({}, lambda s: s | {"norm.bias": torch.zeros(1).expand(1 << 40)}, "norm.bias repeats few"),
    "itself": ({}, looped, "hold no tensors; entries: note, model"),
    "a list": ({}, lambda s: list(s.values()), "hold a list"),
    "a tensor": ({}, lambda s: s["norm.weight"], "hold a Tensor"),
    "q, k and v of other widths": (
        {}, lambda s: at.transformers_vit(s) | {"encoder.layer.0.attention.attention.key.weight": torch.rand(3, 5)},
        "cannot be read as a network's weights",
    ),
    "a class token of another form": ({"no_embed_class": False}, plus("cls_token", 1, 1, 1, 16), "another shape"),
    "nothing": ({}, lambda s: {}, "hold no tensors; entries: none"),
    "several alike": ({}, lambda s: {"first": s, "second": s | {}}, '"first", "second".*weights_entry'),
    "another kind of network": ({}, lambda s: timm.create_model("resnet10t").state_dict(), "match only 0.0 %"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path, name):
    changes, write, sentence = REFUSED[name]
    written = write(at.vit(**changes).state_dict())
    target = VisionTransformer(num_classes=0, **SIZES)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=sentence) as error:
        loaded(tmp_path, target, written)
    assert len(str(error.value)) < 2000
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_an_unknown_entry_names_those_that_are_there(tmp_path):
    state = at.vit().state_dict()
    with pytest.raises(WeightsError, match='no network under "weights_entry": "model_emma": did you mean "model_ema"'):
        loaded(tmp_path, at.vit(), {"model": state, "model_ema": state}, WeightOptions("model_emma"))
    with pytest.raises(WeightsError, match="drop the key"):
        loaded(tmp_path, at.vit(), state, WeightOptions("teacher"))


def test_a_beit_is_not_a_vit(tmp_path):
    """Its q and v bias stand under other names: 99 % of the numbers would match."""
    for changes in (
        {},
        {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": None, "global_pool": "token"},
    ):
        with pytest.raises(WeightsError, match="attn.q_bias.*beit_base_patch16_224"):
            loaded(tmp_path, at.vit(), at.beit(**changes).state_dict())


def test_the_command_says_which_network_it_took(tmp_path, capsys):
    import main

    a, b = (at.filled(at.vit(patch_size=4), seed).state_dict() for seed in (1, 2))
    torch.save({"model": a, "model_ema": b}, tmp_path / "a.pth")
    backbone = '{"name": "vit", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}'
    words = ["check-weights", str(tmp_path / "a.pth"), "--backbone", backbone]
    assert main.main([*words, "--entry", "model_ema", "--resample-patch"]) == 0
    out = capsys.readouterr().out
    assert (
        "entry        model_ema" in out
        and "also there   model" in out
        and "patch embedding resampled from 4 x 4" in out
    )
    assert main.main(words) == 2
    assert '"resample_patch": true' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights_entry", "resample_patch"])
def test_the_keys_of_weight_files_need_a_weight_file(tmp_path, name):
    from models.factory import config_from
    from tests.conftest import tiny_values
    from utils.errors import ConfigError

    for weights in (None, "random"):
        values = tiny_values(tmp_path, weights=weights) | {name: True if name == "resample_patch" else "ema"}
        with pytest.raises(ConfigError, match=f'"{name}" has no effect'):
            config_from(values, source="test")
