"""The keys of HCL, and what its reference implementation chooses for them."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from data.batched import BATCHED
from models.hcl.inversion import InversionSettings
from models.hcl.inverted_set import InvertedSettings
from models.hcl.networks import entry_faults
from utils.config import Count, Rate, TrainConfig, Whole
from utils.keys import key, redefault

# What `"upstream": true` stands for, where the file does not say otherwise.
UPSTREAM: Mapping[str, Any] = {
    "shuffle": False, "momentum": 0.0, "weight_decay": 0.0, "scheduler": "constant", "statistics": "bn_or_conv",
    "statistics_source": "current", "inversion_start": "current", "select": "slack", "select_on": "test",
    "carry": "last", "reuse": "same_arch", "kd_classes": "all", "mask_unseen": False,
}  # fmt: skip
BUFFER, QDI = {"variant": "distilbuf"}, {"variant": "qdi"}
QDI_KEYS = ("statistics", "inversion")  # what the keys of qdi that UPSTREAM names begin with


class HCLConfig(TrainConfig):
    """The keys of HCL: which variant, which networks, how images are inverted and an epoch is chosen."""

    variant: Literal["distil", "distilbuf", "qdi"] = key(
        "distil", "distillation alone, with a replay buffer, or with inverted images"
    )
    networks: tuple[str | dict[str, Any] | None, ...] | None = key(
        None,
        'backbone of each task: a name, null (the run\'s "backbone" and "weights") or {"name", "weights", '
        '"weights_entry", "resample_patch", "image_size", "optimizer", "lrate", "weight_decay", "momentum", '
        "constructor arguments}; the last serves all later tasks; default: the run's backbone for all",
        min_length=1,
    )
    lrate: Rate = redefault(TrainConfig, "lrate", 0.03)
    epochs: Whole = redefault(TrainConfig, "epochs", 200)
    alpha: Rate = key(3.0, "weight of the distillation; 0: fresh students without a teacher's help")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "of the labels, over all classes")
    temperature: Annotated[float, Field(gt=0)] = key(1.0, "T of the distillation")
    kd_classes: Literal["all", "old"] = key("all", "classes over which teacher and student are compared")
    buffer_weight: Rate = key(0.3, "w, weight of the cross-entropy on the memory", only=BUFFER)
    memory_size: Count = key(200, "images in the memory", only=BUFFER)
    memory_transform: str = key("pad4_crop_flip", "recipe for images from the memory", only=BUFFER)
    synthetic_size: Count = key(200, "inverted images per task, about equally many of each class", only=QDI)
    inversion_steps: Whole = key(500, "steps of the inversion", only=QDI)
    inversion_lrate: Rate = key(0.03, "peak rate of the inversion, in units of normalised pixels", only=QDI)
    inversion_feature: Rate = key(0.2, "w_f, weight of the layer statistics", only=QDI)
    inversion_variation: Rate = key(0.003, "w_v, weight of the total variation", only=QDI)
    inversion_l2: Rate = key(0.003, "w_2, weight of the images' norm", only=QDI)
    inversion_warmup: Count = key(100, "steps in which the rate rises", only=QDI)
    inversion_start: Literal["current", "noise"] = key(
        "current", "images of the new task (Quick Deep Inversion) or noise (DeepInversion)", only=QDI
    )
    inversion_jitter: Whole = key(0, "pixels by which images are rolled before the teacher", only=QDI)
    statistics: Literal["auto", "bn", "conv", "ln", "bn_or_conv", "none"] = key(
        "auto", "whose statistics are matched; auto: BatchNorm and LayerNorm layers, else convolutions", only=QDI
    )
    statistics_source: Literal["previous", "current"] = key(
        "previous",
        "targets of layers without running statistics: the teacher's task, or the new one",
        only=QDI,
    )
    statistics_ln: Literal["auto", "in", "norm"] = key(
        "auto", "LayerNorm's input as it is or normalised; auto: normalised for pre-trained networks", only=QDI
    )
    statistics_norm: Literal["sum", "per_layer_mean"] = key("sum", "of the layers' terms", only=QDI)
    select: Literal["last", "best", "slack"] = key(
        "best", "epoch whose network a task ends with; slack: the last that did not fall by more than slack"
    )
    slack: Rate = key(0.2, "points by which an epoch may fall", only={"select": "slack"})
    select_on: Literal["val", "test"] = key(
        "val",
        'images that select reads; val: the share "validation" of the training images (default 0.1)',
        only={"select": ("best", "slack")},
    )
    carry: Literal["last", "selected"] = key(
        "selected",
        "weights that the next task goes on from where the architecture stays",
        only={"select": ("best", "slack"), "reuse": ("same_arch", "matching")},
    )
    reuse: Literal["none", "same_arch", "matching"] = key(
        "same_arch",
        "weights handed on: none, all where the architecture stays, also matching tensors else",
    )
    teacher_mode: Literal["eval", "train"] = key(
        "eval", "train: the teacher's BatchNorm goes by the batch and drifts, its dropout drops"
    )
    mask_unseen: bool = key(True, "leave classes that have not come yet out of predictions")
    upstream: bool = key(
        False,
        "the reference's choices for all keys that are not given: natural order, bare SGD at a constant "
        "rate, BatchNorm or current convolution statistics, slack on the test images, a teacher in training mode "
        "(qdi), predictions among all classes, also those to come",
    )

    def implied(self) -> dict[str, Any]:
        values = dict(UPSTREAM) if self.upstream else {}
        if self.variant != "qdi":
            values = {name: value for name, value in values.items() if not name.startswith(QDI_KEYS)}
        elif self.upstream:
            values["teacher_mode"] = "train"
        chosen = [
            getattr(self, name) if self.names(name) else values.get(name, getattr(self, name))
            for name in ("select", "select_on")
        ]
        return super().implied() | values | ({"validation": 0.1} if chosen[0] != "last" and chosen[1] == "val" else {})

    @property
    def architectures(self) -> int:
        return len(self.networks or ()) or 1

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.memory_transform not in BATCHED:
            yield "memory_transform", f'"{self.memory_transform}" is unknown: `list` shows the transforms'
        if self.validation == 0 and self.select != "last" and self.select_on == "val":
            yield "validation", 'is 0, but epochs are chosen on it: give a share, or "select": "last"'
        for sentence in entry_faults(self.networks or ()):
            yield "networks", sentence

    def inverted_set(self) -> InvertedSettings:
        """The keys of qdi."""
        inversion = InversionSettings(
            steps=self.inversion_steps,
            lrate=self.inversion_lrate,
            feature=self.inversion_feature,
            variation=self.inversion_variation,
            l2=self.inversion_l2,
            warmup=self.inversion_warmup,
            jitter=self.inversion_jitter,
            per_layer=self.statistics_norm == "per_layer_mean",
            smoothing=self.smoothing,
        )
        return InvertedSettings(
            self.synthetic_size,
            self.inversion_start,
            self.statistics,
            self.statistics_source,
            self.statistics_ln,
            inversion,
        )
