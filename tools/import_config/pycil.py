"""PyCIL (exps/*.json): the classic learners from scratch. Schedules stand in its code, not in its files."""

from typing import Any

from tools.import_config.theirs import Theirs, seeds, shuffled, task_sizes
from tools.import_config.toolbox import UNREAD, exemplars, finish_schedule, optimizer, own_keys, schedule

FIRST: dict[str, Any] = {"init_epoch": 200, "init_lr": 0.1, "init_milestones": [60, 120, 170],
                         "init_weight_decay": 5e-4, "init_lr_decay": 0.1}  # fmt: skip


def _later(epochs: int, *milestones: int) -> dict[str, Any]:
    return {
        "epochs": epochs, "lrate": 0.1, "milestones": list(milestones), "lrate_decay": 0.1, "weight_decay": 2e-4,
        "batch_size": 128,
    }  # fmt: skip


# Learner -> what its module fixes.
SCHEDULES: dict[str, dict[str, Any]] = {
    "finetune": FIRST | _later(80, 40, 70),
    "replay": FIRST | _later(70, 30, 50),
    "icarl": FIRST | _later(170, 80, 120),
    "wa": FIRST | _later(170, 60, 100, 140),
    "lwf": FIRST | {"init_milestones": [60, 120, 160]} | _later(250, 60, 120, 180, 220),
    "ewc": FIRST | _later(180, 70, 120, 150),
    "bic": _later(170, 60, 100, 140),
    "der": FIRST | _later(170, 80, 120, 150),
    "memo": FIRST | _later(170, 80, 120, 150),
    "gem": FIRST | _later(100, 30, 60, 80),
    "coil": _later(160, 80, 120) | {"weight_decay": 5e-4},
    "foster": {"init_epoch": 200, "epochs": 170, "compression_epochs": 130, "lrate": 0.1, "weight_decay": 5e-4,
               "batch_size": 128},
}  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    "finetune": {"mask": "new"},
    "icarl": {"predict": "logits"},
    "ewc": {"fisher": "batch"},
    "bic": {"split_ratio": 0.1},
    "der": {"align": True},
    "memo": {"align": True, "train_base": True},
    "coil": {"exemplars": {"total": 2000}},
}
BACKBONES = {
    "resnet32": "small_resnet32",
    "cosine_resnet32": "small_cosine_resnet32",
    "memo_resnet32": "small_resnet32",
}
DATA = {"cifar100": "cifar100"}
REFUSED = {
    "cifar10": "is normalised by std 0.2023, 0.1994, 0.2010 in their code, which has no name here",
    "imagenet100": "has a crop with colour jitter in their code that has no recipe here",
    "imagenet1000": "has a crop with colour jitter in their code that has no recipe here",
}


def convert(theirs: Theirs) -> None:
    learner = theirs.named("model_name", {name: name for name in SCHEDULES}, what="is not here")
    if learner is None:
        return
    theirs.put("model_name", learner)
    data = theirs.get("dataset")
    if data in REFUSED:
        theirs.refuse("dataset", REFUSED[data])
    else:
        theirs.put("dataset", theirs.named("dataset", DATA))
    task_sizes(theirs)
    shuffled(theirs)
    seeds(theirs)
    theirs.put("backbone", theirs.named("convnet_type", BACKBONES))
    theirs.constant(train_transform="pad_crop_flip_jitter", normalize="cifar")
    theirs.constant(**SCHEDULES[learner], **FIXED.get(learner, {}))
    theirs.constant(scheduler=_scheduler(theirs, learner))
    schedule(theirs)
    own_keys(theirs, learner)
    if learner == "coil":
        theirs.ignore("memory_size", "memory_per_class", "fixed_memory")  # 2000 in its code
    else:
        exemplars(theirs, learner)
    optimizer(theirs, {"sgd": "sgd"})
    finish_schedule(theirs)
    theirs.ignore(*UNREAD)


def _scheduler(theirs: Theirs, learner: str) -> str:
    if learner == "foster":
        theirs.ignore("scheduler")
        return "cosine"
    return theirs.named("scheduler", {"steplr": "multistep", "cosine": "cosine"}, "steplr") or "multistep"
