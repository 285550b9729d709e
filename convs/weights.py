"""Weight files into a backbone: what a file holds must be what the backbone has, but for a short list, and is said.

`weight_files` reads, `weight_layouts` renames, `positions` fits; here is decided what may be missing, left over, or
another shape.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from convs.positions import fit_positions
from convs.weight_files import read_states
from convs.weight_layouts import find_network
from convs.weight_places import hints
from utils.errors import WeightsError, reason
from utils.files import told

# What a file may hold beside the trunk: heads, decoders, what only pre-training needs, copies, text towers.
HEADS = re.compile(
    r"^(head|heads|head_dist|\w+_head|fc|classifier|last_linear|last_layer|pre_logits|predictor|projector|pooler)(\.|$)"
)
BESIDE = re.compile(
    r"^(decoder\w*|mask_token|masked_embed|lm_head|logit_scale|prototypes|queue\w*|(\w+_)?ema(_\w+)?|n_averaged)(\.|$)"
)
# Constants that a constructor makes, and counters: they may be in either without the other.
CONSTANTS = re.compile(
    r"(^|\.)(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask|position_ids)$"
)


@dataclass(frozen=True)
class WeightOptions:
    """entry: which network of a file, the key "weights_entry". resample_patch: resample a patch embedding of another
    size."""

    entry: str | None = None
    resample_patch: bool = False


@dataclass(frozen=True)
class LoadReport:
    """What a weight file brought. matched: share of the backbone's numbers that the file holds in the right shape.

    entry: the names that lead to the network in the file; others: those of networks that were not taken. done: what
    was changed to make it fit, in words.
    """

    name: str
    sha256: str | None
    matched: float
    missing: tuple[str, ...] = field(default=())
    unexpected: tuple[str, ...] = field(default=())
    entry: str = ""
    others: tuple[str, ...] = field(default=())
    done: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        parts = [f"weights {self.name}: {100 * self.matched:.1f} % matched"]
        if self.matched:
            parts.append(f"missing {len(self.missing)}, unexpected {len(self.unexpected)}")
        if self.others:
            others = ", ".join(f'"{name}"' for name in self.others)
            parts.append(f'entry "{self.entry}" (weights_entry; also there: {others})')
        parts += self.done
        if self.sha256:
            parts.append(f"sha256 {self.sha256[:12]}")
        return ", ".join(parts)


RANDOM = LoadReport("random", None, 0.0)
ASKED = WeightOptions()


def load_weights(backbone: nn.Module, path: Path, options: WeightOptions = ASKED) -> LoadReport:
    """Fill `backbone` (timm parameter names) from a file.

    Position embeddings of another grid are resampled. Raises WeightsError when the file is missing or damaged, when it
    has a tensor of the trunk that the backbone has no place for, or in another shape, when it lacks one, or when one
    is not finite; then nothing is loaded.
    """
    own = backbone.state_dict()
    states = read_states(path)
    with told("weights", path, WeightsError, "a network's weights", "choose the backbone that the file was made for"):
        found = find_network(states, own, options.entry, path)
    state = {key: value for key, value in found.state.items() if key in own or not HEADS.match(key)}
    _check_kinds(path, state, own)
    done: list[str] = []
    try:
        state, said = fit_positions(state, own, backbone)
    except (ValueError, RuntimeError) as error:  # RuntimeError: tokens of another shape
        raise WeightsError(f"weights '{path}' do not fit the backbone: {reason(error)}") from None
    done += [said] if said else []
    state = _fit_patches(state, own, options, done)
    usable = {key: state[key].to(own[key].dtype) for key in own if key in state and state[key].shape == own[key].shape}
    report = LoadReport(
        name=path.name,
        sha256=sha256(path),
        matched=sum(own[key].numel() for key in usable) / sum(value.numel() for value in own.values()),
        missing=tuple(key for key in own if key not in usable and not CONSTANTS.search(key)),
        unexpected=tuple(key for key in state if key not in own and not CONSTANTS.search(key)),
        entry=found.entry,
        others=found.others,
        done=tuple(done),
    )
    if faults := list(_faults(state, own, report)):
        raise WeightsError(_refusal(path, report, faults))
    _check_finite(path, usable)
    backbone.load_state_dict(usable, strict=False)
    return report


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_kinds(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises WeightsError for tensors that hold no plain numbers of the backbone's kind."""
    for key, value in state.items():
        if value.is_meta:
            what = "has a shape and no numbers (a meta tensor): save the network with its numbers"
        elif value.layout != torch.strided or value.is_nested:
            what = "is sparse: save it dense (tensor.to_dense())"
        elif value.is_quantized:
            what = "is quantised: save it as floats (tensor.dequantize())"
        elif value.numel() * value.element_size() > max(64 * value.untyped_storage().nbytes(), 1 << 26):
            what = "repeats few numbers to many (an expanded view): save the numbers themselves (tensor.clone())"
        elif key in own and not CONSTANTS.search(key) and _kind(value) != _kind(own[key]):
            kinds = f"holds {_word(value)}, the backbone {_word(own[key])}"
            what = f"{kinds}: save the weights in the type in which they were trained"
        else:
            continue
        raise WeightsError(f"weights '{path}': {key} {what}")


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _word(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fit_patches(
    state: dict[str, Tensor], own: Mapping[str, Tensor], options: WeightOptions, done: list[str]
) -> dict[str, Tensor]:
    """With the patch embedding of the backbone's size, where that was asked for; what was done is added to `done`."""
    key = "patch_embed.proj.weight"
    theirs, ours = state.get(key), own.get(key)
    if not options.resample_patch:
        return state
    if theirs is None or ours is None or theirs.dim() != 4 or ours.dim() != 4 or theirs.shape == ours.shape:
        done.append("resample_patch: nothing to resample")
        return state
    if theirs.shape[:2] != ours.shape[:2]:
        return state
    from timm.layers import resample_patch_embed

    old, new = list(theirs.shape[2:]), list(ours.shape[2:])
    done.append(f"patch embedding resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} pixels")
    return state | {key: resample_patch_embed(theirs.float(), new)}


def _faults(state: Mapping[str, Tensor], own: Mapping[str, Tensor], report: LoadReport):
    """Sentences: what the file has and the backbone has no place for, what it lacks, what has another shape."""
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    left = [key for key in report.unexpected if not BESIDE.match(key)]
    missing = [key for key in report.missing if key not in state]
    if left:
        yield f"the backbone has no place for {_some(left)}{hints(left, own, state, missing=False)}"
    if missing:
        yield f"missing: {_some(missing)}{hints(missing, own, state, missing=True)}"
    if wrong:
        key = wrong[0]
        many = f"{len(wrong)} entries have" if len(wrong) > 1 else "1 entry has"
        text = f"{many} another shape, first {key}: file {list(state[key].shape)}, backbone "
        yield text + f"{list(own[key].shape)}{hints(wrong, own, state, missing=False)}"


def _check_finite(path: Path, usable: Mapping[str, Tensor]) -> None:
    for key, value in usable.items():
        if value.is_floating_point() and not (finite := torch.isfinite(value)).all():
            count = int((~finite).sum())
            raise WeightsError(
                f"weights '{path}': {key} holds {count:,} of {value.numel():,} numbers that are NaN or infinite: the "
                "file is damaged, or its training failed. Choose another"
            )


def _refusal(path: Path, report: LoadReport, faults: list[str]) -> str:
    much = report.matched >= 0.5
    share = f" match only {100 * report.matched:.1f} % of the backbone's numbers" if not much else ""
    entry = f' (entry "{report.entry}")' if report.entry and report.others else ""
    text = f"weights '{path}'{entry}{share or ' do not fit the backbone'}: {'; '.join(faults)}"
    return f"{text}. Choose the backbone that the file was made for"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
