"""InfLoRA's repository (configs/*.json) -> inflora."""

from tools.import_config.theirs import IN21K, Theirs, first_task, seeds, shuffled, task_sizes

# model_name -> what it fixes; a variant of ours is a set of keys.
FIRST_FIVE = [0, 1, 2, 3, 4]
VARIANTS = {
    "InfLoRA": {"subspace": "dualgpm"},
    "InfLoRAb5": {"subspace": "gpm", "blocks": FIRST_FIVE},
    "InfLoRA_CA": {"subspace": "gpm"},
    "InfLoRA_CA1": {"subspace": "gpm"},
    "InfLoRA_domain": {"subspace": "gpm"},
    "InfLoRAb5_domain": {"subspace": "gpm", "blocks": FIRST_FIVE},
}
DATA = {
    "cifar100": "cifar224", "ImageNet_R": "imagenetr", "ImageNet_A": "imageneta", "cub": "cub",
    "domainnet": "domainnet", "cifar10": "cifar10",
}  # fmt: skip
CLASSES = {"cifar224": 100, "imagenetr": 200, "imageneta": 200, "cub": 200, "domainnet": 345, "cifar10": 10}
MILESTONES = {"cifar224": [18], "cub": [18], "domainnet": [4]}  # of the *_domain learners, by data set
UNREAD = ("prefix", "memory_size", "memory_per_class", "fixed_memory", "EPSILON", "device", "num_workers", "data_path")
FIXED = {"net_type": "sip", "embd_dim": 768, "num_heads": 12}


def convert(theirs: Theirs) -> None:
    model = theirs.get("model_name")
    fixed = theirs.named("model_name", VARIANTS) or {}
    two_rates = model == "InfLoRA_CA1" or str(model).endswith("_domain")
    theirs.put("model_name", "inflora")
    data = theirs.named("dataset", DATA)
    theirs.put("dataset", data)
    for key, only in FIXED.items():
        if theirs.get(key, only) != only:
            theirs.refuse(key, f"cannot be imported: their published runs have {only!r}, a ViT-B/16")
    theirs.constant(backbone=IN21K, **fixed)
    task_sizes(theirs)
    shuffled(theirs)
    seeds(theirs)
    _check_sessions(theirs, data)
    theirs.same("batch_size", "epochs", "lrate", "weight_decay", "rank", "lamb", "lame")
    if two_rates:
        theirs.ignore("init_epoch", "init_lr", "init_weight_decay")
    else:
        theirs.same("init_epoch", "init_lr", "init_weight_decay", default=None)
    _schedule(theirs, str(model), data, two_rates)
    _alignment(theirs, str(model), data)
    theirs.constant(**transforms(data))
    first_task(theirs)
    theirs.ignore(*UNREAD, "init_lr_decay")
    if "data_path" in theirs:
        theirs.notes.append("data_path: a place on a machine; --data-root DIR, its parent, names it here")


def transforms(data: str | None) -> dict[str, str]:
    """Of their data module, by data set."""
    if data in ("imageneta", "cub"):
        return {"train_transform": "crop_flip_scale05", "test_transform": "resize_crop_bicubic", "normalize": "none"}
    test = "resize" if data in ("cifar224", "cifar10") else "resize_crop"
    return {"train_transform": "crop_flip", "test_transform": test, "normalize": "none"}


def _check_sessions(theirs: Theirs, data: str | None) -> None:
    """The number of tasks follows here; theirs crashes, or scales lame otherwise, where it is another one."""
    said, first, step = theirs.get("total_sessions", None), theirs.get("init_cls"), theirs.get("increment")
    if "total_sessions" in theirs:
        theirs.ignored.append("total_sessions")
    if data is None or not all(isinstance(value, int) for value in (said, first, step)) or step < 1:
        return
    tasks = 1 + max(0, -(-(CLASSES[data] - first) // step))
    if said != tasks:
        theirs.refuse("total_sessions", f"does not fit init_cls and increment, which make {tasks} tasks")


def _schedule(theirs: Theirs, model: str, data: str | None, two_rates: bool) -> None:
    optimizer = theirs.get("optim")
    decay, heads = theirs.get("lrate_decay", None), theirs.get("fc_lrate", None)
    used = optimizer == "sgd" and two_rates
    theirs.ignored += [key for key in ("lrate_decay", "fc_lrate") if key in theirs and not used]
    if optimizer not in ("adam", "sgd"):
        if optimizer is not None:
            theirs.refuse("optim", "has no counterpart here. Known: adam, sgd")
        return
    theirs.put("optimizer", optimizer)
    theirs.constant(scheduler="multistep" if used else "cosine_lagging" if optimizer == "adam" else "cosine")
    if model == "InfLoRAb5" and optimizer == "sgd":
        theirs.constant(init_weight_decay=0.0)
    if not used:
        return
    theirs.put("lrate_decay", decay)
    theirs.put("fc_lrate", heads)
    if model == "InfLoRA_CA1":
        theirs.constant(milestones=[18])
    elif data in MILESTONES:
        theirs.constant(milestones=MILESTONES[data])
    elif data is not None:
        theirs.refuse("dataset", f"has no milestones in the code of {model}")


def _alignment(theirs: Theirs, model: str, data: str | None) -> None:
    if not model.startswith("InfLoRA_CA"):
        return
    plain = model == "InfLoRA_CA" and data == "cifar224"
    theirs.constant(ca_epochs=5, ca_with_logit_norm=0.0 if plain else 0.1)
    if model == "InfLoRA_CA1" and data == "cifar224":
        theirs.constant(fresh_final_norm=True)
