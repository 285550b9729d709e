"""What L2P, DualPrompt and CODA-Prompt cost beside a bare ViT: python -m benchmarks.prompts --threads 1

step   the learner's step on tokens that lie ready (the query pass counts apart) over a bare one: the same frozen ViT,
       the same number of extra tokens or prefixes in the same blocks as plain parameters, the same head, Adam
query  the query pass over a plain forward pass
test   an evaluation pass with and without stored queries, over a plain forward pass and over one with the extra tokens

Random weights: times do not depend on them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inflora import show, times
from benchmarks.raa import vit
from convs.prompt_pool import Asked
from models.factory import config_from
from models.parts.loop import begin
from trainer import prepare
from utils.runtime import Runtime

CLASSES, SEED = 10, 0
LEARNERS: dict[str, dict[str, Any]] = {
    "l2p": {},
    "dualprompt": {},
    "coda_prompt": {"pool_size": 100},
}
PREFIXES: dict[str, dict[int, int]] = {  # block: length, as the learners' defaults have it
    "l2p": {},
    "dualprompt": {0: 5, 1: 5, 2: 5, 3: 5, 4: 5},
    "coda_prompt": {0: 4, 1: 4, 2: 4, 3: 4, 4: 4},
}
TOKENS = {"l2p": 25, "dualprompt": 0, "coda_prompt": 0}


class BareAttention(nn.Module):
    """timm's attention with a prefix that all images share."""

    def __init__(self, attention: nn.Module, length: int):
        super().__init__()
        self.attention, self.heads = attention, attention.num_heads
        self.prefix = nn.Parameter(torch.rand(2, 1, self.heads, length, attention.head_dim))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.attention.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        pk, pv = self.prefix.expand(2, batch, -1, -1, -1)
        y = F.scaled_dot_product_attention(q, torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2))
        return self.attention.proj(y.transpose(1, 2).reshape(batch, tokens, width))


def learner_of(name: str, arguments: argparse.Namespace, folder: Path) -> Any:
    """At the start of its first task."""
    data = folder / "stream.npz"
    if not data.is_file():
        labels = np.arange(10 * CLASSES)
        pixels = np.random.RandomState(SEED).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
        np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    values = {
        "model_name": name, "dataset": f"npz:{data}", "increment": CLASSES, "shuffle": False, "weights": "random",
        "backbone": {"name": "vit", **vit(arguments)}, "num_workers": 0, "image_size": arguments.size,
        **LEARNERS[name],
    }  # fmt: skip
    manager, learner = prepare(config_from(values, "benchmark"), Runtime("cpu", "fp32", num_workers=0))
    begin(learner, manager[0])
    return learner


def bare_step(name: str, arguments: argparse.Namespace, asked: Asked, targets: Tensor) -> Callable[[], object]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(num_classes=10 * CLASSES, **vit(arguments)).eval().requires_grad_(False)  # type: ignore[arg-type]
    tokens = nn.Parameter(torch.rand(1, TOKENS[name], arguments.width))
    for index, length in PREFIXES[name].items():
        model.blocks[index].attn = BareAttention(model.blocks[index].attn, length)
    model.head.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad] + ([tokens] if TOKENS[name] else [])
    optimizer = torch.optim.Adam(trained, lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x = torch.cat([asked.tokens[:, :1], tokens.expand(len(asked.tokens), -1, -1), asked.tokens[:, 1:]], dim=1)
        x = model.norm(model.blocks(x))
        pooled = x[:, 1 : 1 + TOKENS[name]].mean(dim=1) if TOKENS[name] else x[:, 0]
        F.cross_entropy(model.head(pooled), targets).backward()
        optimizer.step()

    return step


def our_step(learner: Any, asked: Asked, targets: Tensor) -> Callable[[], object]:
    learner.train()
    optimizer, _ = learner.make_optimizer()
    net = learner.runtime.wrap(learner.network)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        learner.loss(net, asked, targets).backward()
        optimizer.step()

    return step


@torch.inference_mode()
def measure_test(name: str, learner: Any, images: Tensor, repeats: int) -> None:
    network = learner.network.eval()
    model, query = network.vit, network.ask(images).query
    tokens = torch.rand(len(images), TOKENS[name], network.backbone.feature_dim)
    plain = network.normalise(images)

    def with_tokens() -> Tensor:
        x = model._pos_embed(model.patch_embed(plain))
        return model.norm(model.blocks(torch.cat([x[:, :1], tokens, x[:, 1:]], dim=1)))

    found = times(
        {
            "plain": lambda: model.forward_features(plain),
            "plain with tokens": with_tokens,
            "query": lambda: network.ask(images),
            "test": lambda: learner.predict(images, learner.frozen(images, ("query",))),
            "test, stored query": lambda: learner.predict(images, {"query": query}),
        },
        repeats,
    )
    pairs = [("query", "plain"), ("test", "plain"), ("test", "plain with tokens"), ("test, stored query", "plain")]
    show(f"{name}, evaluation", found, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads", flush=True)
    torch.manual_seed(SEED)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size)
    targets = torch.randint(0, CLASSES, (arguments.batch,))
    with TemporaryDirectory() as folder:
        for name in arguments.learners:
            learner = learner_of(name, arguments, Path(folder))
            asked = learner.network.ask(images)
            steps = {"bare": bare_step(name, arguments, asked, targets), name: our_step(learner, asked, targets)}
            show(f"{name}, step, batch {arguments.batch}", times(steps, arguments.repeats), [(name, "bare")])
            measure_test(name, learner, images, arguments.repeats)


if __name__ == "__main__":
    main()
