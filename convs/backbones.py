"""Any timm model, a bundled small one, or a network for small images, as a feature extractor of known width.

`backbone` in a config is a full timm tag ("vit_base_patch16_224.augreg_in21k"), a bundled network ("small_vit"), a name
of convs/small.py ("small_lenet"; random weights unless `weights` names a file), or an object
{"name": "vit" | timm architecture, ...constructor arguments}; `weights` is a file, "random", or absent (the tag's own).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convs import hub
from convs.cast_once import cast_frozen_once
from convs.small import SMALL
from convs.weights import ASKED, RANDOM, LoadReport, WeightOptions, load_weights
from utils.errors import ConfigError, UserError, WeightsError, did_you_mean
from utils.storage import expanded

BUNDLED = Path(__file__).resolve().parent.parent / "data"
SMALL_SIZE = 32  # pixels a side, of bundled networks and those of convs/small.py
# name -> constructor and arguments; weights: BUNDLED/<name>.safetensors, made by exps/pretrain
NAMED: Mapping[str, Mapping[str, Any]] = {
    "small_vit": {"name": "vit", "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "small_convnext": {
        "name": "convnext_atto", "patch_size": 4, "depths": (1, 1, 1, 1), "dims": (48, 64, 96, 128),
        "ls_init_value": None,
    },
    "small_swin": {
        "name": "swin_tiny_patch4_window7_224", "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 64,
        "depths": (2, 2), "num_heads": (2, 4),
    },
}  # fmt: skip


@dataclass(frozen=True)
class BackboneInfo:
    """mean, std: what the backbone's own recipe subtracts from pixels in [0, 1]."""

    name: str
    feature_dim: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    report: LoadReport


class Backbone(nn.Module):
    """images (B, 3, s, s) -> features (B, D): what the model's own classifier would read.

    A ViT can be run in two halves, `forward` = `encode` of `embed`: what is put into it may read or add tokens between.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo):
        super().__init__()
        self.model, self.info = model, info

    @property
    def feature_dim(self) -> int:
        return self.info.feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, s, s), normalised -> tokens (B, N, D) that enter the first block: patches with positions, behind
        class and register tokens.

        Raises ConfigError when the model is no ViT of timm.
        """
        vit = self._vit()
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D), as `embed` gives them -> features (B, D): the blocks, the final norm, the pooling."""
        vit = self._vit()
        return self.pool(vit.blocks(tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) that have left the last block -> features (B, D)."""
        vit = self._vit()
        return vit.forward_head(vit.norm(tokens))

    def _vit(self) -> Any:
        if not isinstance(self.model, VisionTransformer):
            raise ConfigError(
                "backbone", [f"{type(self.model).__name__} has no tokens to work on; choose a ViT of timm"]
            )
        return self.model


def bundled_file(name: str) -> Path:
    """The weights of a network of NAMED."""
    return BUNDLED / f"{name}.safetensors"


def make_backbone(
    spec: str | Mapping[str, Any], weights: str | None, image_size: int | None, options: WeightOptions = ASKED
) -> Backbone:
    """The feature extractor that a config names, weights loaded. options: how its weight file is read.

    Raises UserError for an unknown or ambiguous name or wrong constructor arguments, WeightsError for the weights.
    """
    model: Any = _construct(spec, image_size, pretrained=weights is None)
    name = spec if isinstance(spec, str) else str(spec["name"])
    if weights == "random" or (weights is None and name in SMALL):
        report = RANDOM
    elif weights is not None:
        report = load_weights(model, weight_file(weights), options)
    elif name in NAMED:
        report = load_weights(model, bundled_file(name))
    elif isinstance(spec, str):
        report = LoadReport(name, None, 1.0)
    else:
        report = RANDOM
    cast_frozen_once(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    info = BackboneInfo(
        name=name,
        feature_dim=int(model.num_features),
        image_size=image_size or input_size(spec),
        mean=(0.5,) * 3 if name in NAMED else tuple(cfg.get("mean", (0.0,) * 3)),
        std=(0.5,) * 3 if name in NAMED else tuple(cfg.get("std", (1.0,) * 3)),
        report=report,
    )
    return Backbone(model, info)


class BackboneMaker:
    """What a learner's `build` receives: called without arguments it makes the run's own backbone, with them another.

    restoring: every weight will come from a checkpoint, so no weight file is looked for: it need not be there.
    fused_attention: leave it to torch's fused kernels; without, two products and a softmax.
    """

    def __init__(
        self,
        spec: str | Mapping[str, Any],
        weights: str | None,
        image_size: int | None,
        options: WeightOptions = ASKED,
        restoring: bool = False,
        fused_attention: bool = True,
    ):
        self._own = spec, weights, image_size
        self._options, self._restoring, self._fused = options, restoring, fused_attention

    def __call__(
        self,
        spec: str | Mapping[str, Any] | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        options: WeightOptions = ASKED,
    ) -> Backbone:
        """Raises UserError for a name that is not known or weights that do not fit."""
        name, file, size = self._own if spec is None else (spec, weights, image_size)
        how = self._options if spec is None else options
        backbone = make_backbone(name, "random" if self._restoring else file, size, how)
        layer: Any
        for layer in backbone.modules() if not self._fused else ():
            if hasattr(layer, "fused_attn"):  # as timm's attentions name it
                layer.fused_attn = False
        return backbone


def weight_file(text: str) -> Path:
    """Raises WeightsError for a home directory of nobody."""
    try:
        return expanded(text)
    except UserError as error:
        raise WeightsError(f"weights {error}") from None


def renew_final_norm(backbone: Backbone) -> None:
    """Put a fresh LayerNorm (weight 1, bias 0, eps 1e-5) in the place of the one that a ViT's features leave by.

    Raises ConfigError when the model has none.
    """
    model = backbone.model
    name = next((n for n in ("fc_norm", "norm") if isinstance(getattr(model, n, None), nn.LayerNorm)), None)
    if name is None:
        raise ConfigError("fresh_final_norm", [f"{type(model).__name__} has no final LayerNorm: set it to false"])
    setattr(model, name, nn.LayerNorm(backbone.feature_dim))


def _split(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and constructor arguments of a config's backbone."""
    if isinstance(spec, str):
        return spec, {}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("backbone", ['an object needs "name": "vit" or a timm architecture'])
    return name, arguments


def input_size(spec: str | Mapping[str, Any]) -> int:
    """Pixels a side that a backbone expects, known without building it.

    Raises ConfigError for an unknown name.
    """
    name, arguments = _split(spec)
    if isinstance(size := arguments.get("img_size"), int):
        return size
    if name in NAMED or name in SMALL:
        return SMALL_SIZE
    if name == "vit":
        return 224  # timm's own default
    _check_name(name, pretrained=False)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(cfg.input_size[-1]) if cfg is not None else 224


def _construct(spec: str | Mapping[str, Any], image_size: int | None, pretrained: bool) -> nn.Module:
    """The timm model without its classifier."""
    name, arguments = _split(spec)
    pretrained &= isinstance(spec, str) and name not in NAMED
    if name in SMALL:
        if arguments:
            raise ConfigError("backbone", [f'"{name}" takes no arguments, got {", ".join(arguments)}'])
        return SMALL[name](image_size or input_size(spec))
    if name in NAMED:
        name, own = _split(NAMED[name])
        arguments = own | arguments
    if image_size is not None and not arguments.get("img_size"):
        arguments |= _size_argument(name, image_size)
    try:
        if name == "vit":
            return VisionTransformer(num_classes=0, **arguments)
        _check_name(name, pretrained)
        if pretrained and (file := hub.cached(name)) is not None:
            arguments = {**arguments, "pretrained_cfg_overlay": {"file": str(file)}}
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError("backbone", [f'"{name}" does not accept {arguments}: {error}']) from None
    except Exception as error:  # noqa: BLE001 - the hub raises its own, changing, types; constructors, anything
        if not pretrained:
            raise ConfigError("backbone", [f'"{name}" cannot be built with {arguments}: {error!r}']) from None
        raise WeightsError(
            f"the weights of '{name}' could not be downloaded ({str(error).splitlines()[0][:200]}). Without a network, "
            'fetch the file on another machine and name it: "weights": FILE (.npz, .pth or .safetensors)'
        ) from None


def _size_argument(name: str, image_size: int) -> dict[str, int]:
    """Transformers fix their grid at construction; convolutional networks take any size."""
    architecture = name.partition(".")[0]
    return {"img_size": image_size} if architecture == "vit" or "vit" in architecture or "swin" in architecture else {}


def _check_name(name: str, pretrained: bool) -> None:
    """A bare architecture name means different files under different timm versions: ask for the tag."""
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, [*timm.list_models(), *NAMED, *SMALL, "vit"])
        raise ConfigError("backbone", [f'unknown backbone "{name}"{near or ": see `python main.py list`"}'])
    tags = [full for full in timm.list_pretrained(f"{architecture}.*") if full.startswith(architecture + ".")]
    if dot and name not in tags:
        near = did_you_mean(name, tags)
        raise ConfigError("backbone", [f'"{architecture}" has no weights tagged "{tag}"{near}{_tag_list(tags)}'])
    if pretrained and not dot:
        raise ConfigError(
            "backbone",
            [
                f'"{name}" names no weights: which file it means has changed between timm versions'
                f'{_tag_list(tags)}; or give "weights": FILE or "random"'
            ],
        )


def _tag_list(tags: list[str]) -> str:
    return f". Full tags: {', '.join(tags)}" if tags else ". timm has no weights for it"
