"""Position embeddings of a file into a ViT of another grid, or with other tokens beside the patches."""

from collections.abc import Mapping
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order in which they stand before the patches


def fit_positions(state: dict[str, Tensor], own: Mapping[str, Tensor], backbone: Any) -> tuple[dict[str, Tensor], str]:
    """(state with positions of the backbone's form, what was done in words or "").

    pos_embed (1, T + h w, D) or (1, h w, D): with or without positions for the T tokens. A token without one has
    position 0; positions that the backbone adds to no token are added to the tokens themselves (DINOv2's class token
    before registers): both compute the same. Another grid is resampled (bicubic). Raises ValueError where the grid of
    the file cannot be told.
    """
    theirs, ours = state.get("pos_embed"), own.get("pos_embed")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if theirs is None or ours is None or grid is None or theirs.dim() != 3 or ours.dim() != 3:
        return state, ""
    if theirs.shape[-1] != ours.shape[-1] or _tokens(state) != _tokens(own):
        return state, ""  # another width, other tokens: the refusal says so
    tokens, count, room = _tokens(own), theirs.shape[1], ours.shape[1] - prod(grid)
    with_positions, side = _split(count, room, tokens, grid)
    prefix, patches = theirs[:, :with_positions].float(), theirs[:, with_positions:].float()
    prefix = torch.cat([prefix, prefix.new_zeros(1, sum(tokens) - with_positions, prefix.shape[-1])], dim=1)
    said = ""
    if side != tuple(grid):
        from timm.layers import resample_abs_pos_embed

        patches = resample_abs_pos_embed(patches, new_size=list(grid), old_size=list(side), num_prefix_tokens=0)
        said = f"positions resampled from {side[0]} x {side[1]} to {grid[0]} x {grid[1]}"
    if room == 0 and with_positions:
        shares = torch.split(prefix, list(tokens), dim=1)
        state = state | {
            name: state[name].float() + share for name, share in zip(TOKENS, shares, strict=True) if name in state
        }
        prefix = prefix[:, :0]
    return state | {"pos_embed": torch.cat([prefix[:, :room], patches], dim=1)}, said


def _tokens(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many class, distillation and register tokens there are."""
    return tuple(state[name].shape[1] if name in state and state[name].dim() == 3 else 0 for name in TOKENS)


def _split(count: int, room: int, tokens: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """(positions that belong to tokens, grid of the others) of `count` positions. room: positions of the backbone for
    tokens; so many are tried first."""
    possible = dict.fromkeys((room, sum(tokens), tokens[0] + tokens[1], tokens[0], 0))
    for first in possible:
        if count - first == prod(grid):
            return first, (grid[0], grid[1])
    for first in possible:
        left = count - first
        if left > 0 and isqrt(left) ** 2 == left:
            return first, (isqrt(left), isqrt(left))
    raise ValueError(
        f"its {count} positions are no square grid of patches, with or without the {sum(tokens)} other tokens, and "
        f"not the backbone's {grid[0]} x {grid[1]}: give the backbone the img_size that the file was made for"
    )
