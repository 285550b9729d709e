"""Pools of prompts, and the ViTs that read them: L2P, DualPrompt, CODA-Prompt on any timm ViT, unforked and frozen.

B images, N tokens, D width, H heads, d = D / H, M entries of a pool, n tokens of an entry, k entries chosen.

Every image goes through twice: without prompts, for its query q (the class token behind the final norm), and with them.
The patch embedding is shared, and the query pass needs no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import Backbone
from convs.heads import Head
from convs.network import Network
from convs.prompts import PrefixAttention, insert
from utils.errors import ConfigError


class Asked(NamedTuple):
    """An image as the prompted pass reads it. tokens (B, N, D): patches and class token with positions, before the
    first norm; query (B, D)."""

    tokens: Tensor
    query: Tensor


def choose(similarity: Tensor, count: int, vote: bool) -> Tensor:
    """similarity (B, M) -> (B, k): the `count` nearest entries of each image; vote: those that are chosen most often in
    the batch, the lower entry first, for all of its images. Reads nothing back."""
    chosen = similarity.topk(count, dim=1).indices
    if not vote:
        return chosen
    entries = similarity.shape[1]
    votes = torch.zeros(entries, dtype=torch.int64, device=similarity.device)
    votes.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
    order = votes * entries + torch.arange(entries - 1, -1, -1, device=similarity.device)
    return order.topk(count).indices.expand(len(chosen), -1)


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """(B, D), (M, D) -> (B, M)."""
    return F.normalize(query, dim=1, eps=1e-6) @ F.normalize(keys, dim=1, eps=1e-6).T


class PromptedNetwork(Network):
    """A frozen ViT that answers a query, and a head of full width behind the prompted pass."""

    def __init__(self, backbone: Backbone, head: Callable[[int], Head], normalize: str):
        super().__init__(backbone, head, normalize)
        backbone._vit()
        backbone.requires_grad_(False)

    @property
    def vit(self) -> Any:
        return self.backbone.model

    def train(self, mode: bool = True) -> "PromptedNetwork":
        """The frozen ViT stays in evaluation mode, whatever its dropout rates."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def ask(self, images: Tensor, query: Tensor | None = None) -> Asked:
        """(B, 3, s, s) in [0, 1] -> tokens and query; the query is computed unless it is given."""
        vit = self.vit
        tokens = vit.patch_drop(vit._pos_embed(vit.patch_embed(self.normalise(images))))
        return Asked(tokens, self._class_feature(vit.blocks(vit.norm_pre(tokens))) if query is None else query)

    def features(self, images: Tensor) -> Tensor:
        """(B, D): what the head reads."""
        raise NotImplementedError

    def _class_feature(self, tokens: Tensor) -> Tensor:
        """Tokens behind the last block -> (B, D): the class token; without one, what the ViT pools."""
        vit = self.vit
        x = vit.norm(tokens)
        return vit.forward_head(x, pre_logits=True) if vit.cls_token is None else vit.fc_norm(x[:, 0])


class TokenPool(PromptedNetwork):
    """L2P: the tokens of k entries between class token and patches, all with the class token's position; the head reads
    their mean behind the final norm. Entries and keys start uniform in [-1, 1]."""

    def __init__(
        self, backbone: Backbone, head: Callable[[int], Head], normalize: str, entries: int, length: int, count: int
    ):
        super().__init__(backbone, head, normalize)
        width = backbone.feature_dim
        self.count = count
        self.prompts = nn.Parameter(torch.empty(entries, length, width).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(entries, width).uniform_(-1, 1))

    def forward(self, asked: Asked, vote: bool = False) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(logits (B, C), pull ()): the mean over images of the cosines to the keys in use, summed over entries."""
        similarity = cosines(asked.query, self.keys)
        chosen = choose(similarity, self.count, vote)
        return self.head(self.prompted(asked, chosen)), similarity.gather(1, chosen).sum(dim=1).mean()

    def prompted(self, asked: Asked, chosen: Tensor) -> Tensor:
        """Entries chosen (B, k) -> (B, D)."""
        vit, rows = self.vit, self.prompts[chosen].flatten(1, 2)  # (B, k n, D)
        x = vit.norm(vit.blocks(insert(vit, asked.tokens, rows)))
        first = vit.num_prefix_tokens
        return vit.fc_norm(x[:, first : first + rows.shape[1]].mean(dim=1))

    def features(self, images: Tensor) -> Tensor:
        asked = self.ask(images)
        return self.prompted(asked, choose(cosines(asked.query, self.keys), self.count, vote=False))


class PrefixNetwork(PromptedNetwork):
    """Prefixes for keys and values in the attention of some blocks; the head reads the class token."""

    def __init__(self, backbone: Backbone, head: Callable[[int], Head], normalize: str, blocks: Sequence[int]):
        super().__init__(backbone, head, normalize)
        self.attentions: dict[int, PrefixAttention] = {}
        for index in sorted(set(blocks)):
            block = self.vit.blocks[index]
            if type(block.attn).__name__ != "Attention":
                raise ConfigError(
                    "backbone", [f"{type(block.attn).__name__} takes no prefixes; choose a plain ViT of timm"]
                )
            block.attn = PrefixAttention(block.attn).eval()
            self.attentions[index] = block.attn
        heads = self.vit.blocks[0].attn
        self.shape = heads.num_heads, heads.head_dim

    def with_prefixes(self, tokens: Tensor, prefixes: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """tokens as `Asked` holds them, {block: key and value (B or 1, H, P, d)} -> (B, D)."""
        vit = self.vit
        try:
            for index, pair in prefixes.items():
                self.attentions[index].prefix = pair
            return self._class_feature(vit.blocks(vit.norm_pre(tokens)))
        finally:
            for attention in self.attentions.values():
                attention.prefix = None


class DualPrefixes(PrefixNetwork):
    """DualPrompt: one G-prompt for all images in some blocks, entries of a pool in others; all start in U(-1, 1).

    A block of both lists takes G and uses up no set of E: sets 0, 1, ... go to E's other blocks in ascending order.
    """

    def __init__(
        self, backbone: Backbone, head: Callable[[int], Head], normalize: str, *, g_blocks: Sequence[int],
        g_length: int, e_blocks: Sequence[int], e_length: int, entries: int, count: int, reshaped: bool,
    ):  # fmt: skip
        super().__init__(backbone, head, normalize, [*g_blocks, *e_blocks])
        self.count, self.reshaped = count, reshaped
        self.g_blocks = sorted(set(g_blocks))
        self.e_blocks = [index for index in sorted(set(e_blocks)) if index not in self.g_blocks]
        sets = len(set(e_blocks))
        self.g_prompt = nn.Parameter(torch.empty(len(self.g_blocks), 2, g_length, *self.shape).uniform_(-1, 1))
        self.e_prompts = nn.Parameter(torch.empty(sets, 2, entries, e_length, *self.shape).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(entries, backbone.feature_dim).uniform_(-1, 1))

    def forward(self, asked: Asked, vote: bool = False, entries: range | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(logits (B, C), pull ()). entries: for all images, whatever the keys say."""
        similarity = cosines(asked.query, self.keys)
        chosen = self.chosen(similarity, vote, entries)
        pull = similarity.gather(1, chosen).sum(dim=1).mean()
        return self.head(self.prompted(asked, chosen)), pull

    def chosen(self, similarity: Tensor, vote: bool, entries: range | None) -> Tensor:
        """(B, k)."""
        if entries is None:
            return choose(similarity, self.count, vote)
        return torch.arange(entries.start, entries.stop, device=similarity.device).expand(len(similarity), -1)

    def prompted(self, asked: Asked, chosen: Tensor) -> Tensor:
        """Entries chosen (B, k) -> (B, D)."""
        prefixes = {
            index: (pair[0].transpose(0, 1), pair[1].transpose(0, 1))
            for index, pair in zip(self.g_blocks, self.g_prompt, strict=True)
        }
        laid = self.laid_out(chosen)  # (E, B, 2, P, H, d)
        for index, rows in zip(self.e_blocks, laid, strict=False):
            prefixes[index] = (rows[:, 0].transpose(1, 2), rows[:, 1].transpose(1, 2))
        return self.with_prefixes(asked.tokens, prefixes)

    def laid_out(self, chosen: Tensor) -> Tensor:
        """Entries chosen (B, k) -> (E, B, 2, k n, H, d). `reshaped`: the published ports do not move the axes, so keys,
        values and rows of the batch mix."""
        raw = self.e_prompts[:, :, chosen].flatten(3, 4)  # (E, 2, B, k n, H, d)
        if not self.reshaped:
            return raw.transpose(1, 2)
        return raw.flatten(1, 2).unflatten(1, (len(chosen), 2))

    def features(self, images: Tensor) -> Tensor:
        asked = self.ask(images)
        return self.prompted(asked, choose(cosines(asked.query, self.keys), self.count, vote=False))


class Components(nn.Module):
    """CODA-Prompt's components of one block: prompts P (M, n, D), keys K and attention A (M, D); all start at 0."""

    def __init__(self, entries: int, length: int, width: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(entries, length, width))
        self.keys = nn.Parameter(torch.zeros(entries, width))
        self.attention = nn.Parameter(torch.zeros(entries, width))

    def rows(self, first: int, last: int) -> list[Tensor]:
        """P, K, A of the rows up to `last`; in training those before `first` are held."""
        held = first if self.training else 0
        return [
            torch.cat([rows[:held].detach(), rows[held:last]]) for rows in (self.prompts, self.keys, self.attention)
        ]

    def forward(self, query: Tensor, first: int, last: int) -> Tensor:
        """query (B, D) -> prefix (B, n, D): sum_k cos(q * A_k, K_k) P_k over the rows up to `last`."""
        prompts, keys, attention = self.rows(first, last)
        square = (query * query) @ (attention * attention).T  # |q * A_k|^2
        # Clamped before the root, which has no slope at 0.
        weights = query @ (attention * F.normalize(keys, dim=1)).T / square.clamp(min=1e-24).sqrt()  # (B, r)
        return torch.tensordot(weights, prompts.to(weights.dtype), dims=1)

    def penalty(self, first: int, last: int) -> Tensor:
        """o(K) + o(A) + o(P), o(X) = mean of (X X^T - I)^2 over the rows in use, as they are."""
        total = self.keys.new_zeros(())
        for rows in self.rows(first, last):
            gram = rows.flatten(1) @ rows.flatten(1).T
            total = total + (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().mean()
        return total

    @torch.no_grad()
    def start(self, first: int, last: int, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
        """New rows first .. last-1, by Gram-Schmidt against all before them."""
        for rows in (self.keys, self.attention, self.prompts):
            flat = rows.flatten(1)
            flat[first:last] = new_rows(flat[:first], draw(flat[first:last]))


def new_rows(old: Tensor, draws: Tensor) -> Tensor:
    """old (r, F), draws (m, F) normal -> (m, F): each draw less its projections on all rows before it, the classical
    form, old rows as they are and new ones not yet normalised; at the end the new ones get length 1."""
    rows = torch.cat([old, torch.zeros_like(draws)])
    for index, v in enumerate(draws, start=len(old)):
        before = rows[:index]
        shares = (before @ v) / before.square().sum(dim=1)
        rows[index] = v - shares @ before
    return F.normalize(rows[len(old) :], dim=1)


class CodaPrefixes(PrefixNetwork):
    """CODA-Prompt: in each of some blocks a weighted sum of all components, half of it keys, half values."""

    def __init__(
        self, backbone: Backbone, head: Callable[[int], Head], normalize: str, blocks: Sequence[int], entries: int,
        length: int,
    ):  # fmt: skip
        super().__init__(backbone, head, normalize, blocks)
        width = backbone.feature_dim
        self.components = nn.ModuleDict({str(index): Components(entries, length, width) for index in self.attentions})

    def forward(self, asked: Asked, first: int, last: int) -> Tensor:  # type: ignore[override]
        """Logits (B, C) with the components up to `last`, those before `first` held in training."""
        return self.head(self.prompted(asked, first, last))

    def prompted(self, asked: Asked, first: int, last: int) -> Tensor:
        """(B, D)."""
        prefixes = {}
        for index in self.attentions:
            rows = self.components[str(index)](asked.query, first, last).unflatten(2, self.shape).transpose(1, 2)
            half = rows.shape[2] // 2
            prefixes[index] = (rows[:, :, :half], rows[:, :, half:])
        return self.with_prefixes(asked.tokens, prefixes)

    def penalty(self, first: int, last: int) -> Tensor:
        return torch.stack([parts.penalty(first, last) for parts in self.components.values()]).sum()  # type: ignore[operator]
