"""Weight files into a backbone: read, rename, fit, and report what matched.

Kinds: Google's AugReg archives (.npz, Flax layout), .pth / .pt / .bin (torch, loaded without executing pickled code),
.safetensors. State dicts may be nested ("model", "state_dict", ...) and prefixed ("module.base_encoder.", ...), as
MoCo v3, DINO and iBOT publish them; head entries are dropped. Of two networks in one file the one that its authors
evaluate is taken: base_encoder before momentum_encoder, teacher before student.
"""

import argparse
import hashlib
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import WeightsError, did_you_mean

REQUIRED = 0.95
NESTED = ("model", "state_dict", "model_state_dict", "teacher", "student", "network")
PREFIXES = ("module.", "base_encoder.", "momentum_encoder.", "backbone.", "encoder.", "model.", "_orig_mod.")
HEAD = re.compile(r"^(head|fc_norm_head|pre_logits|predictor|projector|fc|classifier)\.|^head$")


@dataclass(frozen=True)
class LoadReport:
    """What a weight file brought. matched: share of the backbone's numbers that the file holds in the right shape."""

    name: str
    sha256: str | None
    matched: float
    missing: tuple[str, ...] = field(default=())
    unexpected: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        sha = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        left = f", missing {len(self.missing)}, unexpected {len(self.unexpected)}" if self.matched else ""
        return f"weights {self.name}: {100 * self.matched:.1f} % matched{left}{sha}"


RANDOM = LoadReport("random", None, 0.0)


def load_weights(backbone: nn.Module, path: Path) -> LoadReport:
    """Fill `backbone` (timm parameter names) from a file.

    Position embeddings of another length are resampled. Raises WeightsError when the file is missing, damaged, made
    for another width, or matches less than 95 % of the backbone's numbers.
    """
    own = backbone.state_dict()
    state = strip(read_state(path), own)
    state = _fit_positions(state, own, backbone)
    wrong = {key: state[key].shape for key in own if key in state and state[key].shape != own[key].shape}
    usable = {key: state[key] for key in own if key in state and key not in wrong}
    total = sum(value.numel() for value in own.values())
    report = LoadReport(
        name=path.name,
        sha256=sha256(path),
        matched=sum(own[key].numel() for key in usable) / total,
        missing=tuple(key for key in own if key not in usable),
        unexpected=tuple(key for key in state if key not in own),
    )
    if report.matched < REQUIRED:
        raise WeightsError(_refusal(path, report, wrong, own))
    backbone.load_state_dict(usable, strict=False)
    return report


def read_state(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file, as they stand in it (an AugReg archive: renamed to timm's names)."""
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise WeightsError(f"weights '{path}': no such file{near}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return from_flax({key: archive[key] for key in archive.files})
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Whole DINO and iBOT checkpoints hold their command line: a Namespace is a bag of plain values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights '{path}' hold more than tensors and plain values, and loading them could run foreign code: "
            f"refused ({_first_line(error)}). Save the bare state dict, or convert the file to .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - zipfile, json, struct and torch raise many types for damaged files
        kinds = ".npz, .pth, .pt, .bin or .safetensors"
        raise WeightsError(f"weights '{path}' cannot be read as {kinds} ({_first_line(error)})") from None
    return _unnest(state, path)


def strip(state: Mapping[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """Drop wrapper prefixes that every backbone entry carries, and the entries of heads. What the backbone has itself
    stays: timm counts the final norm of ConvNeXt and others to the head (`head.norm`).

    Where a file holds a whole self-supervised system, the part called base_encoder (MoCo v3) or backbone is taken.
    """
    state = dict(state)
    while chosen := next((p for p in PREFIXES if _is_wrapper(p, state)), None):
        state = {key[len(chosen) :]: value for key, value in state.items() if key.startswith(chosen)}
    return {key: value for key, value in state.items() if key in own or not HEAD.match(key)}


def from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Google's ViT archive -> timm names: kernels [in, out] are transposed, per-head q, k, v stacked to qkv.

    query/key/value kernels (D, H, d) -> (D, H d) transposed; out kernel (H, d, D) -> (H d, D) transposed;
    convolution kernels HWIO -> OIHW.
    """
    known = {_FLAX_WRAPPER.sub("", key): torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
    if "embedding/kernel" not in known:
        return known
    state = {
        "cls_token": known["cls"],
        "pos_embed": known["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": known["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": known["embedding/bias"],
        "norm.weight": known["Transformer/encoder_norm/scale"],
        "norm.bias": known["Transformer/encoder_norm/bias"],
    }
    depth = len({key.split("/")[1] for key in known if key.startswith("Transformer/encoderblock_")})
    for block in range(depth):
        state |= _flax_block(known, f"Transformer/encoderblock_{block}/", f"blocks.{block}.")
    return state


_FLAX_WRAPPER = re.compile(r"^(opt/target/|params/)")  # of archives that hold the optimiser as well


def _flax_block(known: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    attention, mlp = source + "MultiHeadDotProductAttention_1/", source + "MlpBlock_3/"
    parts = ("query", "key", "value")
    kernels = [known[f"{attention}{part}/kernel"].flatten(1).T for part in parts]
    biases = [known[f"{attention}{part}/bias"].flatten() for part in parts]
    state = {
        "attn.qkv.weight": torch.cat(kernels),
        "attn.qkv.bias": torch.cat(biases),
        "attn.proj.weight": known[f"{attention}out/kernel"].flatten(0, 1).T,
        "attn.proj.bias": known[f"{attention}out/bias"],
    }
    for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
        state |= {
            f"{ours}.weight": known[f"{source}{theirs}/scale"],
            f"{ours}.bias": known[f"{source}{theirs}/bias"],
        }
    for ours, theirs in (("mlp.fc1", "Dense_0"), ("mlp.fc2", "Dense_1")):
        state |= {
            f"{ours}.weight": known[f"{mlp}{theirs}/kernel"].T,
            f"{ours}.bias": known[f"{mlp}{theirs}/bias"],
        }
    return {target + key: value for key, value in state.items()}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fit_positions(state: dict[str, Tensor], own: Mapping[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Resample the position embedding of a ViT for another image size (bicubic, class token apart)."""
    key = "pos_embed"
    if key not in state or key not in own or state[key].shape == own[key].shape or state[key].dim() != 3:
        return state
    if state[key].shape[-1] != own[key].shape[-1]:
        return state  # another width: the refusal says so
    from timm.layers import resample_abs_pos_embed

    grid = list(backbone.patch_embed.grid_size)
    extra = own[key].shape[1] - grid[0] * grid[1]
    return state | {key: resample_abs_pos_embed(state[key].float(), new_size=grid, num_prefix_tokens=extra)}


def _unnest(state: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((name for name in NESTED if isinstance(state.get(name), dict)), None)
        if inner is None:
            raise WeightsError(
                f"weights '{path}' hold no tensors; entries: {', '.join(map(str, list(state)[:6])) or 'none'}. "
                "Expected a state dict, bare or under one of " + ", ".join(NESTED)
            )
        state = state[inner]
    if not isinstance(state, dict):
        raise WeightsError(f"weights '{path}' hold a {type(state).__name__}, expected a state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _is_wrapper(prefix: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the backbone stands below `prefix`: its entries there, and none of its entries at the top."""
    below = any(key.startswith(prefix) for key in state)
    at_top = any(key.startswith(("patch_embed.", "blocks.", "conv1.", "stem.", "layer1.", "stages.")) for key in state)
    return below and not at_top


def _refusal(path: Path, report: LoadReport, wrong: Mapping[str, torch.Size], own: Mapping[str, Tensor]) -> str:
    text = f"weights '{path}' match only {100 * report.matched:.1f} % of the backbone (95 % are needed)"
    if wrong:
        key, shape = next(iter(wrong.items()))
        text += f"; {len(wrong)} entries have another shape, first {key}: file {list(shape)}, backbone "
        text += f"{list(own[key].shape)}. Choose the backbone that the file was made for"
    else:
        text += f"; missing: {_some(report.missing)}; not used: {_some(report.unexpected)}"
    return text


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "none"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
