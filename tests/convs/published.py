"""A small network's weights under the names that publishers give them: the inverse of convs/weight_layouts.py."""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.conftest import TINY_VIT

SIZES = {key: value for key, value in TINY_VIT.items() if key != "name"}
State = dict[str, Any]


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The network with numbers drawn for every parameter and statistic: many start at 0 or 1, which hides a mix-up."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 0.4 + 0.05)
    return model.eval()


def vit(**changes: Any) -> VisionTransformer:
    return filled(VisionTransformer(num_classes=0, **(SIZES | changes)))


def named(state: State, *rules: tuple[str, str]) -> State:
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def apart(state: State, names: tuple[str, str, str]) -> State:
    """attn.qkv.* as three."""
    found = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            found |= {key.replace("qkv", name): part for name, part in zip(names, value.chunk(3), strict=True)}
        else:
            found[key] = value
    return found


def transformers_vit(state: State) -> State:
    return named(
        apart(state, ("query", "key", "value")),
        (r"^(cls_token)$", r"embeddings.\1"),
        (r"^dist_token$", "embeddings.distillation_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"\.attn\.proj", ".attention.output.dense"),
        (r"\.attn\.(query|key|value)", r".attention.attention.\1"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"\.mlp\.fc1", ".intermediate.dense"),
        (r"\.mlp\.fc2", ".output.dense"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
    )


def transformers_5(state: State) -> State:
    """Names since transformers 5."""
    return named(
        state,
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.relative", ".relative"),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)", r".attention.\1_proj"),
        (r"\.attention\.output\.dense", ".attention.o_proj"),
        (r"\.intermediate\.dense", ".mlp.fc1"),
        (r"\.output\.dense", ".mlp.fc2"),
    )


def transformers_dinov2(state: State) -> State:
    return named(
        apart(dinov2_registers(state), ("query", "key", "value")),
        (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"\.attn\.proj", ".attention.output.dense"),
        (r"\.attn\.(query|key|value)", r".attention.attention.\1"),
        (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
    )


def transformers_clip(state: State) -> State:
    state = named(
        apart(state, ("q_proj", "k_proj", "v_proj")),
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"\.attn\.proj", ".self_attn.out_proj"),
        (r"\.attn\.(.)_proj", r".self_attn.\1_proj"),
        (r"\.norm([12])", r".layer_norm\1"),
        (r"^blocks\.", "encoder.layers."),
    )
    state["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
    state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][0]
    text = {"text_model.embeddings.token_embedding.weight": torch.rand(5, 4), "logit_scale": torch.tensor(1.0)}
    text |= {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.rand(4, 4)}
    extra = {"vision_model.embeddings.position_ids": torch.arange(5), "visual_projection.weight": torch.rand(4, 16)}
    return under("vision_model.", state) | text | extra


def clip(state: State) -> State:
    """OpenAI's and OpenCLIP's names, with a text tower at the top."""
    state = named(
        state,
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj", ".attn.out_proj"),
        (r"\.norm([12])", r".ln_\1"),
        (r"\.fc1", ".c_fc"),
        (r"\.fc2", ".c_proj"),
        (r"^blocks\.", "transformer.resblocks."),
    )
    state["class_embedding"] = state["class_embedding"].flatten()
    state["positional_embedding"] = state["positional_embedding"][0]
    text = {"positional_embedding": torch.rand(7, 4), "transformer.resblocks.0.attn.in_proj_weight": torch.rand(12, 4)}
    text |= {
        "token_embedding.weight": torch.rand(9, 4),
        "ln_final.weight": torch.rand(4),
        "logit_scale": torch.rand(()),
    }
    return under("visual.", state | {"proj": torch.rand(16, 4)}) | text | {"text_projection": torch.rand(4, 4)}


def torchvision_vit(state: State) -> State:
    return named(
        state,
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^patch_embed\.proj", "conv_proj"),
        (r"^norm\.", "encoder.ln."),
        (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
        (r"\.attn\.proj", ".self_attention.out_proj"),
        (r"\.norm([12])", r".ln_\1"),
        (r"\.fc1", ".0"),
        (r"\.fc2", ".3"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
    ) | {"heads.head.weight": torch.rand(5, 16), "heads.head.bias": torch.rand(5)}


def dinov2_registers(state: State) -> State:
    """timm's form (positions for patches alone) -> DINOv2's: one for the class token too, none for registers."""
    state = dict(state) | {"mask_token": torch.rand(1, 16)}
    if "reg_token" in state:
        own = torch.rand_like(state["cls_token"])
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - own
        state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    return state


def in_chunks(state: State) -> State:
    return named(state, (r"^blocks\.(\d+)\.", r"blocks.\1.\1."))


def moco_v2(state: State) -> State:
    other = {key: torch.rand(value.shape) for key, value in state.items()}
    system = under("module.encoder_q.", state | {"fc.0.weight": torch.rand(4, 4), "fc.2.bias": torch.rand(4)})
    system |= under("module.encoder_k.", other) | {"module.queue": torch.rand(4, 8), "module.queue_ptr": torch.zeros(1)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": system, "optimizer": {"state": {0: {"m": torch.rand(3)}}}}


def mae(state: State) -> State:
    decoder = {"decoder_embed.weight": torch.rand(4, 16), "decoder_pos_embed": torch.rand(1, 5, 4)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.rand(4), "mask_token": torch.rand(1, 1, 4)}
    return {"model": state | decoder | {"decoder_norm.weight": torch.rand(4), "decoder_pred.bias": torch.rand(4)}}


def transformers_beit(state: State) -> State:
    """timm's BEiT -> transformers': no bias of the keys."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.qkv.weight"):
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            found |= {key.replace("qkv", name): part for name, part in parts}
        else:
            found[
                re.sub(r"\.attn\.([qv])_bias", lambda m: f".attn.{ {'q': 'query', 'v': 'value'}[m[1]] }.bias", key)
            ] = value
    return named(
        found,
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"\.attn\.relative", ".attention.attention.relative_position_bias.relative"),
        (r"\.attn\.proj", ".attention.output.dense"),
        (r"\.attn\.(query|key|value)", r".attention.attention.\1"),
        (r"\.gamma_", ".lambda_"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"\.mlp\.fc1", ".intermediate.dense"),
        (r"\.mlp\.fc2", ".output.dense"),
        (r"^fc_norm\.", "pooler.layernorm."),
        (r"^blocks\.", "encoder.layer."),
    )


BEIT = SIZES | {"init_values": 0.1, "use_abs_pos_emb": False, "use_rel_pos_bias": True}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}


def beit(**changes: Any) -> Beit:
    return filled(Beit(num_classes=0, **(BEIT | changes)))


def distilled(**changes: Any) -> VisionTransformerDistilled:
    return filled(VisionTransformerDistilled(num_classes=0, **(SIZES | changes)))


Write = Callable[[State], Any]  # timm's names -> what is saved
