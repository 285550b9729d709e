"""One entry of a heterogeneous stream: which network a task trains, from which weights, at which rate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convs.backbones import NAMED, Backbone, BackboneMaker
from convs.weights import ASKED, WeightOptions
from utils.errors import did_you_mean

TRAINING = {"optimizer": str, "lrate": float, "weight_decay": float, "momentum": float}
READING = {"weights_entry": str, "resample_patch": bool}
OWN = {"weights": str, "image_size": int, **READING, **TRAINING}
OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class NetworkEntry:
    """backbone: as the config key, None: the run's own, with its weights. weights: file, "random", or None: those of
    the tag where the name has one, else random. image_size: what the network sees, whatever the data have.
    options: how the file is read, as the keys of the same names. training: the config keys that this entry overrides.
    """

    backbone: str | dict[str, Any] | None
    weights: str | None = None
    image_size: int | None = None
    options: WeightOptions = ASKED
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, value: str | Mapping[str, Any] | None) -> "NetworkEntry":
        """From its place in the config's list."""
        if value is None or isinstance(value, str):
            return cls(value, None if value is None else _weights(value, None))
        spec: dict[str, Any] = {key: item for key, item in value.items() if key not in OWN}
        backbone = spec["name"] if set(spec) == {"name"} else spec
        return cls(
            backbone,
            _weights(backbone, value.get("weights")),
            value.get("image_size"),
            WeightOptions(value.get("weights_entry"), value.get("resample_patch", False)),
            {key: value[key] for key in TRAINING if key in value},
        )

    def same_network(self, other: "NetworkEntry") -> bool:
        """Whether the two name one architecture at one size."""
        return self.backbone == other.backbone and self.image_size == other.image_size

    def make(self, make_backbone: BackboneMaker, data_size: int) -> tuple[Backbone, int | None]:
        """(backbone, size to which the network resizes images; None: it takes them as they are)."""
        if self.backbone is None:
            return make_backbone(), None
        arguments = {"name": self.backbone} if isinstance(self.backbone, str) else self.backbone
        fixed = self.image_size is not None or arguments.get("name") in NAMED or "img_size" in arguments
        size = self.image_size if fixed else data_size
        backbone = make_backbone(self.backbone, self.weights, size, self.options)
        return backbone, backbone.info.image_size if fixed else None


def entry_faults(networks: Sequence[Any]) -> Iterator[str]:
    """Sentences for entries that cannot be read; the types of list and entries are checked elsewhere."""
    for place, value in enumerate(networks):
        if not isinstance(value, dict):
            continue
        where = f"entry {place}"
        if not isinstance(value.get("name"), str):
            near = did_you_mean("name", value)
            yield f'{where} needs "name": a backbone as the key "backbone" takes it{near}'
        for key, kind in OWN.items():
            item = value.get(key)
            number = kind in (int, float)
            if key in READING and item and value.get("weights") in (None, "random"):
                yield f'{where}: "{key}" has no effect without "weights", a file: drop it'
            if kind is bool:
                if not isinstance(item, bool | None):
                    yield f'{where}: "{key}" must be true or false, got {item!r}'
                continue
            right = isinstance(item, int if kind is int else (int, float)) if number else isinstance(item, kind)
            if item is not None and (not right or isinstance(item, bool) or (number and item < 0)):
                yield f'{where}: "{key}" must be {"a number >= 0" if number else "text"}, got {item!r}'
        if value.get("optimizer") not in (None, *OPTIMIZERS) and isinstance(value.get("optimizer"), str):
            near = did_you_mean(value["optimizer"], OPTIMIZERS)
            yield f'{where}: "optimizer" must be one of {", ".join(OPTIMIZERS)}, got "{value["optimizer"]}"{near}'


def copy_matching(source: nn.Module, target: nn.Module) -> int:
    """Copy the entries of `source` that `target` has under the same name in the same shape; how many they are."""
    own, theirs = target.state_dict(), source.state_dict()
    same = {name: theirs[name] for name in own if name in theirs and theirs[name].shape == own[name].shape}
    target.load_state_dict(same, strict=False)
    return len(same)


def _weights(backbone: str | dict[str, Any], given: str | None) -> str | None:
    bare = isinstance(backbone, str) and "." not in backbone and backbone not in NAMED
    return "random" if given is None and bare else given
