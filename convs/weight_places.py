"""Which key of a backbone gives a tensor of a weight file its place, or takes it away."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

PATCHES = "patch_embed.proj.weight"
# name of a tensor -> (backbone key where the file has it and the backbone not, where the backbone has it alone)
_KEYS: tuple[tuple[str, str, str], ...] = (
    (r"\.ls[12]\.gamma$|\.gamma(_[12])?$", '"init_values": 1e-5', '"init_values": null'),
    (r"^fc_norm\.", '"fc_norm": true', '"fc_norm": false'),
    (r"^norm\.", '"fc_norm": false', '"fc_norm": true'),
    (r"^norm_pre\.", '"pre_norm": true', '"pre_norm": false'),
    (r"^cls_token$", '"class_token": true', '"class_token": false, "global_pool": "avg"'),
    (r"^dist_token$", '"name": "deit_base_distilled_patch16_224" or another distilled one', "a network without one"),
    (r"^reg_token$", '"reg_tokens": {registers}, "no_embed_class": true', '"reg_tokens": 0'),
    (r"^pos_embed$", '"pos_embed": "learn"', '"pos_embed": "none"'),
    (r"\.attn\.(q|k|v)_bias$|relative_position_bias_table$|^rel_pos_bias\.", '"name": a BEiT of timm, as '
     '"beit_base_patch16_224"', '"name": a plain ViT, as "vit_base_patch16_224"'),
    (r"\.attn\.qkv\.bias$", '"qkv_bias": true', '"qkv_bias": false'),
    (r"\.attn\.proj\.bias$|\.mlp\.fc[12]\.bias$", '"proj_bias": true', '"proj_bias": false'),
    (r"\.attn\.[qk]_norm\.", '"qk_norm": true', '"qk_norm": false'),
    (r"\.attn\.norm\.", '"scale_attn_norm": true', '"scale_attn_norm": false'),
    (r"\.mlp\.norm\.", '"scale_mlp_norm": true', '"scale_mlp_norm": false'),
    (r"^patch_embed\.proj\.bias$", '"pre_norm": false', '"pre_norm": true'),
    (r"^attn_pool\.", '"global_pool": "map"', '"global_pool": "token"'),
)  # fmt: skip


def hints(keys: Sequence[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor], missing: bool) -> str:
    """ " (set "init_values": 1e-5 in the backbone)", or "" where no key is known.

    keys: names that the file alone has, the backbone alone (missing), or both in another shape.
    """
    theirs, ours = _depth(state), _depth(own)
    registers = state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].dim() == 3 else 0
    found: dict[str, None] = {}
    for key in keys:
        block = re.match(r"blocks\.(\d+)\.", key)
        if block and theirs != ours and int(block[1]) >= min(theirs, ours):
            found[f'"depth": {theirs}'] = None
        elif key in own and key in state:
            found[_of_shape(key, own[key], state[key])] = None
        else:
            pattern = next((pattern for pattern in _KEYS if re.search(pattern[0], key)), None)
            if pattern is not None:
                found[pattern[2 if missing else 1].format(registers=registers)] = None
    ways = [way for way in found if way]
    text = f"set {', '.join(ways[:3])} in the backbone" if ways else ""
    if PATCHES in keys and PATCHES in own and PATCHES in state and own[PATCHES].shape[:2] == state[PATCHES].shape[:2]:
        text += ', or "resample_patch": true in the config to resample the patch embedding'
    return f" ({text})" if text else ""


def _of_shape(key: str, own: Tensor, theirs: Tensor) -> str:
    """The key that another shape points to."""
    if own.dim() != theirs.dim():
        return ""
    if key == PATCHES and own.shape[:2] == theirs.shape[:2]:
        return f'"patch_size": {theirs.shape[-1]}'
    if key in ("cls_token", "norm.weight", "patch_embed.proj.bias") and own.shape[-1] != theirs.shape[-1]:
        return f'"embed_dim": {theirs.shape[-1]}'
    if key == "reg_token":
        return f'"reg_tokens": {theirs.shape[1]}'
    return ""


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
