"""The first session, which APER, RanPAC and FeCAM begin with: in the first task alone, something of a ViT is tuned.

    L = CE(sigma cos(f(x), w), y),     SGD over (what is tuned, w, sigma) in one group, weight decay on all of it

Afterwards the network never changes: a method is then what it measures of a task's images, and the features of a test
image are computed once in a whole stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import CosineHead
from convs.prompts import PromptInit
from convs.tuned import Petl, TunedNetwork
from data.stream import Task
from models.base import Learner
from models.parts.optim import group
from models.parts.stages import Stage, stage_of
from utils.config import INIT, Count, Rate, RunConfig, TrainConfig
from utils.keys import key, redefault

TRAINING = frozenset(TrainConfig.model_fields) - frozenset(RunConfig.model_fields)
TOKENS = ("vpt_deep", "vpt_shallow")
FEATURES = "features"  # the frozen name


class FirstSession(Learner):
    """What the methods share; each adds `_measure`, and scores."""

    class Config(TrainConfig):
        batch_size: Count = redefault(TrainConfig, "batch_size", 48)
        petl: Petl = key("adapter", "what the first session tunes; none: there is no first session")
        bottleneck: Count = key(64, "width of an adapter", only={"petl": "adapter"})
        adapter_scale: Rate = key(0.1, "factor of the adapters", only={"petl": "adapter"})
        adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = key(
            0.1, "behind an adapter's ReLU", only={"petl": "adapter"}
        )
        prompt_tokens: Count = key(5, "tokens of a prompt", only={"petl": TOKENS})
        prompt_init: PromptInit = key(
            "uniform",
            "start of the tokens; zeros, as the references have it, makes those of a block one token for ever",
            only={"petl": TOKENS},
        )

        def implied(self) -> dict[str, Any]:
            zeros = {"prompt_init": "zeros"} if self.upstream and self.petl in TOKENS else {}
            return super().implied() | zeros

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            for name, first in INIT.items():
                if self.names(first):
                    yield first, f'has no effect: {self.model_name} trains in the first task alone; call it "{name}"'
            if self.petl == "none":
                for name in sorted(TRAINING):
                    if self.names(name):
                        yield name, 'has no effect with "petl": "none", which trains nothing: drop the key'

    needs_images = False
    # What the training of the session reads: equal in another learner with one, it can be taken from there.
    session_keys: ClassVar[frozenset[str]] = TRAINING | {
        "petl", "bottleneck", "adapter_scale", "adapter_dropout", "prompt_tokens", "prompt_init",
    }  # fmt: skip
    network: TunedNetwork

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = TunedNetwork(
            make_backbone(),
            lambda width: CosineHead(width, init="uniform", learn_scale=True),
            config.normalize,
            config.petl,
            bottleneck=config.bottleneck,
            scale=config.adapter_scale,
            dropout=config.adapter_dropout,
            tokens=config.prompt_tokens,
            prompt_init=config.prompt_init,
            keep_plain=self._reads_plain_features,
        )

    _reads_plain_features = False

    def before_task(self, task: Task) -> None:
        if task.index == 0:
            self.network.head.grow(task.total_classes)

    def stages(self, task: Task) -> Sequence[Stage]:
        stage = stage_of(self.config, task, name="first session")
        return (stage,) if task.index == 0 and stage.epochs and self.config.petl != "none" else ()

    def param_groups(self) -> list[dict[str, Any]]:
        assert self.stage is not None
        trained = [*self.network.tuned_parameters(), *self.network.head.parameters()]
        return [group(trained, self.stage.lrate, self.stage.weight_decay)]

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), targets)

    def after_task(self, task: Task) -> None:
        self.eval()
        if task.index == 0:
            self.network.finish(merge=not self._reads_plain_features)
        self._measure(task)

    def _measure(self, task: Task) -> None:
        """Take what scores need from the task's images."""
        raise NotImplementedError

    @property
    def frozen_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Features, once nothing of the network trains any more."""
        return () if any(p.requires_grad for p in self.network.tuned_parameters()) else (FEATURES,)

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return {FEATURES: self.features(images)}

    def _features(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        """Stored, or computed."""
        if FEATURES in frozen:
            return frozen[FEATURES]
        assert images is not None
        return self.features(images)
