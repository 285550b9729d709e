"""SLCA's repository (exps/slca/*.json, exps/slcapp/*.json) -> slca, slcapp."""

from decimal import Decimal
from typing import Any

from tools.import_config.theirs import IN21K, Theirs, seeds, shuffled, task_sizes

DATA = {
    "cifar100_224": "cifar224", "imagenet-r": "imagenetr", "cub200_224": "cub_official", "cars196_224": "cars",
    "imagenet100": "imagenet100", "cifar100": "cifar100", "resisc45": "folder:DIR", "sketch345_224": "folder:DIR",
}  # fmt: skip
REFUSED = {
    "cifar10": "is normalised by std 0.2023, 0.1994, 0.2010 in their code, which has no name here",
    "imagenet1000": "has a transform that has no recipe here, and their code stops at it",
}
MOCO = "pretrained/mocov3-vit-base-300ep.pth"
BACKBONES: dict[str, dict[str, Any]] = {
    "vit-b-p16": {"backbone": IN21K},
    "vit-b-p16-lora": {"backbone": IN21K},
    "vit-b-p16-mocov3": {"backbone": "vit_base_patch16_224", "weights": MOCO},
    "vit-b-p16-lora-mocov3": {"backbone": "vit_base_patch16_224", "weights": MOCO},
}
RESIZED = ("resize300_crop_flip", "resize_crop_bicubic", "imagenet")
TRANSFORMS = {
    "cifar100_224": ("crop_flip_bicubic_jitter", "resize_crop_bicubic", "cifar"),
    "imagenet-r": ("crop_flip_bicubic", "resize_crop_bicubic", "imagenet"),
    "cub200_224": RESIZED, "cars196_224": RESIZED, "resisc45": RESIZED, "sketch345_224": RESIZED,
    "imagenet100": ("crop_flip", "resize_crop", "imagenet"),
    "cifar100": ("pad_crop_flip_jitter", "none", "cifar"),
}  # fmt: skip
UNREAD = (
    "device", "prefix", "model_postfix", "memory_size", "memory_per_class", "fixed_memory", "save_before_ca",
)  # fmt: skip


def convert(theirs: Theirs) -> None:
    model = str(theirs.get("model_name"))
    plus = "slcapp" in model
    if "slca" not in model:
        theirs.refuse("model_name", 'is no learner of theirs: it must contain "slca" or "slcapp"')
    theirs.put("model_name", "slcapp" if plus else "slca")
    _dataset(theirs)
    task_sizes(theirs)
    shuffled(theirs)
    seeds(theirs)
    lora = _backbone(theirs)
    if plus or lora:
        theirs.put("lora_rank", theirs.get("lora_rank") if lora else 0)
    theirs.put("batch_size", 128)
    theirs.constants.append("batch_size")
    rate, scale = theirs.number("lr", 0.01), theirs.number("bcb_lrscale", 0.01)
    theirs.put("epochs", theirs.get("epochs", 20))
    theirs.put("lrate", rate)
    theirs.put("bcb_lrscale", scale)
    _schedule(theirs, plus, rate, scale)
    _alignment(theirs)
    if plus:
        theirs.put("weight_decay", theirs.number("weight_decay", 5e-4))
        theirs.same("sce_a", "sce_b", "fc_scale_mu")
        if not theirs.ours.get("ca_epochs"):
            theirs.ours.pop("fc_scale_mu", None)
            theirs.without_effect("fc_scale_mu")
    else:
        theirs.constant(weight_decay=5e-4)
        theirs.ignore("weight_decay", "sce_a", "sce_b", "fc_scale_mu")
    if not lora:
        theirs.ignore("lora_rank")
    theirs.ignore(*UNREAD)


def _dataset(theirs: Theirs) -> None:
    name = theirs.get("dataset")
    if name in REFUSED:
        theirs.refuse("dataset", REFUSED[name])
        return
    data = theirs.named("dataset", DATA)
    theirs.put("dataset", data)
    if data is None:
        return
    if data == "folder:DIR":
        theirs.notes.append(f'dataset: put the folder of {name} in the place of DIR (it holds "train" and "test")')
    train, test, normalize = TRANSFORMS[name]
    theirs.constant(train_transform=train, test_transform=test, normalize=normalize)


def _backbone(theirs: Theirs) -> bool:
    """Whether it has LoRA branches."""
    kind = str(theirs.get("convnet_type")).lower()
    found = BACKBONES.get(kind)
    if found is None:
        theirs.refuse("convnet_type", f"has no counterpart here. Known: {', '.join(BACKBONES)}")
    theirs.ours |= found or {}
    return "-lora" in kind


def _schedule(theirs: Theirs, plus: bool, rate: float | None, scale: float | None) -> None:
    milestones = theirs.get("milestones", [60, 100, 140])
    if not isinstance(milestones, list):
        theirs.refuse("milestones", "must be a list of epochs")
    elif plus and rate is not None and scale is not None:
        # A cosine down to what their milestones would have left; in decimals, as people write it.
        floor = Decimal(str(rate)) * Decimal(str(scale)) * Decimal("0.1") ** len(milestones)
        theirs.constant(scheduler="cosine")
        theirs.put("min_lr", float(floor))
    elif not plus:
        theirs.constant(scheduler="multistep")
        theirs.put("milestones", milestones)


def _alignment(theirs: Theirs) -> None:
    epochs = theirs.get("ca_epochs", 5)
    temperature = theirs.number("ca_with_logit_norm", None)
    theirs.put("ca_epochs", epochs)
    if epochs:
        theirs.put("ca_with_logit_norm", temperature if temperature is not None and temperature > 0 else 0.0)
    else:
        theirs.without_effect("ca_with_logit_norm")
