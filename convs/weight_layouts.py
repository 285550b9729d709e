"""State dicts as people publish them -> timm names: which network of a file is meant, where its names begin, what
they are called elsewhere.

Known: timm's own names (also torch.hub DINO and DINOv2 with registers and block chunks, MAE, MoCo v3, iBOT, BEiT, and
convolutional networks), transformers (ViT, DeiT, MAE, Dinov2, BEiT, CLIP), OpenAI's and OpenCLIP's visual towers,
torchvision's ViT. Whatever prefixes stand before them.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convs.weight_files import States
from utils.errors import WeightsError, did_you_mean

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """anchor: a name that only this layout has, where its prefix is found by. also: further ones that must stand
    beside it. rules: patterns and what takes their place, one after another, on names without prefix."""

    anchor: str
    rules: Rules
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """state: one network's tensors by timm names. entry: the names that lead to it in the file. others: those of
    the networks that were not taken."""

    state: dict[str, Tensor]
    entry: str
    others: tuple[str, ...]


_TRANSFORMERS: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.relative|shared)_position_bias\.", "rel_pos_bias."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"(?:\.attention\.attention)?\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
_TRANSFORMERS_CLIP: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
)
_CLIP: Rules = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^proj$", "head"),
)
_TORCHVISION: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)
_TIMM: Rules = (
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
LAYOUTS = (
    Layout("embeddings.patch_embeddings.projection.weight", _TRANSFORMERS),
    Layout("embeddings.patch_embedding.weight", _TRANSFORMERS_CLIP),
    Layout("class_embedding", _CLIP, ("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight")),
    Layout("conv_proj.weight", _TORCHVISION, ("class_token",)),
    Layout("patch_embed.proj.weight", _TIMM),
)
# Of several networks the first of these, and one whose place holds none of the later words, is meant.
PLACES = ("", "model", "state_dict", "model_state_dict", "teacher", "student", "network", "net", "module")
LATER = re.compile(r"(^|[._])(ema|momentum_encoder|encoder_k|student|shadow|averaged?)([._]|$)")
EMA = re.compile(r"(^|[._])(ema|shadow|averaged?)([._]|$)")


def find_network(states: States, own: Collection[str], entry: str | None, path: Path) -> Found:
    """The network that is meant, in timm names. own: names of the backbone. entry: the key "weights_entry".

    Raises WeightsError where the entry is not there, or several networks have the same right to be taken.
    """
    networks = {}
    for place, state in states.items():
        for prefix, layout in _prefixes(state, own).items():
            networks[".".join(part for part in (place, prefix.rstrip(".")) if part)] = place, prefix, layout
    if not networks:  # nothing known: the largest state dict, for a refusal that counts
        place = max(states, key=lambda name: len(states[name]))
        networks = {place: (place, "", Layout("", ()))}
    name = _chosen(list(networks), entry, path)
    place, prefix, layout = networks[name]
    inside = [other for at, other, _ in networks.values() if at == place and other != prefix]
    inside = [other for other in inside if other.startswith(prefix)]
    state = {
        key[len(prefix) :]: value
        for key, value in states[place].items()
        if key.startswith(prefix) and not any(key.startswith(other) for other in inside)
    }
    return Found(_to_timm(state, layout, own), name, tuple(other for other in networks if other != name))


def _prefixes(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Layout]:
    """What stands before the names of each network in a state dict, and the layout of its names."""
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for key in state:
            prefix = key.removesuffix(layout.anchor)
            if (
                prefix != key
                and (not prefix or prefix[-1] == ".")
                and all(prefix + name in state for name in layout.also)
            ):
                found.setdefault(prefix, layout)
    if found:
        return found
    # A convolutional network: the prefixes below which most of the backbone's own names stand.
    counts: Counter[str] = Counter()
    for key in state:
        ends = (index + 1 for index, letter in enumerate(key) if letter == ".")
        counts.update(key[:end] for end in (0, *ends) if key[end:] in own)
    least = max(0.25 * len(own), 0.5 * max(counts.values(), default=0))
    return {prefix: Layout("", ()) for prefix, count in counts.items() if count >= least}


def _chosen(names: list[str], entry: str | None, path: Path) -> str:
    if entry is not None:
        names = [name for name in names if _under(name, entry)] or _no_entry(names, entry, path)
    ranks = {name: (LATER.search(name) is not None, _place(name)) for name in names}
    first = min(ranks.values())
    best = [name for name in names if ranks[name] == first]
    if len(best) > 1:
        raise WeightsError(f"weights '{path}' hold several networks: {_listed(names)}. Say which by \"weights_entry\"")
    return best[0]


def _under(name: str, entry: str) -> bool:
    """Whether an entry's words stand in a network's name, one after another; "ema" and "raw" name kinds."""
    if entry == "raw":
        return EMA.search(name) is None
    return f".{entry.strip('.')}." in f".{name}." or (entry == "ema" and EMA.search(name) is not None)


def _no_entry(names: list[str], entry: str, path: Path) -> list[str]:
    near = did_you_mean(entry, names) or f"; it has {_listed(names)}"
    raise WeightsError(f'weights \'{path}\' have no network under "weights_entry": "{entry}"{near}')


def _listed(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names if name) or "one that is not named: drop the key"


def _place(name: str) -> int:
    first = name.partition(".")[0]
    return PLACES.index(first) if first in PLACES else len(PLACES)


def _to_timm(state: dict[str, Tensor], layout: Layout, own: Collection[str]) -> dict[str, Tensor]:
    for pattern, replacement in layout.rules:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    state = _without_chunks(_with_joined_qkv(state))
    if any(key.endswith(".ls1.gamma") for key in own):  # DeiT III's name of the same
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()}
    if (shared := state.get("rel_pos_bias.relative_position_bias_table")) is not None and not any(
        key.startswith("rel_pos_bias.") for key in own
    ):  # BEiT's pre-training has one table for all blocks, its fine-tuning begins with a copy in each
        tables = [key for key in own if key.endswith(".attn.relative_position_bias_table")]
        if tables:
            state = {key: value for key, value in state.items() if not key.startswith("rel_pos_bias.")}
            state |= dict.fromkeys(tables, shared)
    if (token := state.get("cls_token")) is not None and token.dim() == 1:
        state["cls_token"] = token.view(1, 1, -1)
    if (positions := state.get("pos_embed")) is not None and positions.dim() == 2:
        state["pos_embed"] = positions.unsqueeze(0)
    return state


def _with_joined_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """attn.{q,k,v}.* -> attn.qkv.*; where the keys have no bias (BEiT), attn.q_bias and attn.v_bias."""
    joined = dict(state)
    for key in state:
        if not (match := re.fullmatch(r"(.*\.attn\.)q\.(weight|bias)", key)):
            continue
        names = [f"{match[1]}{part}.{match[2]}" for part in "qkv"]
        present = [name for name in names if name in state]
        if len(present) == 3:
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([state[name] for name in names])
        else:
            joined |= {f"{match[1]}{name.removesuffix('.bias')[-1]}_bias": state[name] for name in present}
        for name in present:
            del joined[name]
    return joined


def _without_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """blocks.<chunk>.<block>.* -> blocks.<block>.*, as DINOv2 stores blocks that were wrapped in groups; blocks
    that are counted anew in each chunk are numbered through."""
    found = {tuple(map(int, m.groups())) for key in state if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    if not found:
        return state
    through = len({block for _, block in found}) == len(found)
    new = {place: place[1] if through else number for number, place in enumerate(sorted(found))}

    def renamed(key: str) -> str:
        match = re.match(r"blocks\.(\d+)\.(\d+)\.", key)
        return f"blocks.{new[int(match[1]), int(match[2])]}.{key[match.end() :]}" if match else key

    return {renamed(key): value for key, value in state.items()}
