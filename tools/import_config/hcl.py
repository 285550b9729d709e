"""HCL's repository (configs/*/*.yaml and flags of the command line) -> hcl."""

from tools.import_config.theirs import Theirs

# Data set -> (ours, classes a task, normalisation, networks of the tasks under --hcl).
DATA = {
    "seq-cifar10": ("cifar10", 2, "cifar10", ["lenet", "resnet18", "densenet", "senet", "regnet"]),
    "seq-cifar100": ("cifar100", 5, "cifar10",
                     [*["lenet"] * 2, *["alexnet"] * 2, *["vgg16"] * 2, *["inception"] * 2, *["resnet18"] * 2,
                      *["resnext"] * 2, *["densenet"] * 2, *["senet"] * 2, *["regnet"] * 4]),
    "seq-tinyimg": ("tinyimagenet", 20, "tinyimagenet",
                    [*["lenet"] * 2, *["resnet18"] * 2, *["resnext"] * 2, *["senet"] * 2, *["regnet"] * 2]),
}  # fmt: skip
NETWORKS = {name: f"small_{name}" for name in ("lenet", "alexnet", "vgg16", "inception", "resnet18")} | {
    "resnext": "small_resnext29",
    "densenet": "small_densenet121",
    "senet": "small_senet18",
    "regnet": "small_regnetx_200mf",
}
SEEDS = [1993, 1996, 1997]
INVERSION = {
    "train.di_itrs": "inversion_steps", "train.di_lr": "inversion_lrate", "train.di_feature": "inversion_feature",
    "train.di_var": "inversion_variation", "train.di_l2": "inversion_l2",
}  # fmt: skip
UNREAD = (
    "train.optimizer.momentum", "train.optimizer.weight_decay", "train.warmup_*", "train.final_lr",
    "train.num_epochs", "train.knn_*", "dataset.num_workers", "model.name", "model.proj_layers", "name", "logger",
    "logger.*", "eval", "eval.*",
)  # fmt: skip


def convert(theirs: Theirs) -> None:
    theirs.put("model_name", "hcl")
    variant = theirs.get("model.cl_model")
    if variant not in ("distil", "distilbuf", "qdi"):
        theirs.refuse("model.cl_model", "is no learner of theirs. Known: distil, distilbuf, qdi")
    theirs.put("variant", variant)
    theirs.constant(upstream=True)
    if "--cl_default" not in theirs.flags:
        theirs.notes.append("flags: --cl_default is taken as given, without it their learners have no classifier")
    name = theirs.get("dataset.name")
    if name in DATA:
        data, increment, normalize, _ = DATA[name]
        theirs.put("dataset", data)
        theirs.constant(increment=increment, normalize=normalize)
    else:
        theirs.refuse("dataset.name", f"has no counterpart here. Known: {', '.join(DATA)}")
    theirs.put("image_size", theirs.get("dataset.image_size"))
    theirs.constant(train_transform="pad4_crop_flip_colour")
    _networks(theirs, name)
    _training(theirs)
    _of_the_variant(theirs, variant)
    if "--validation" in theirs.flags:
        theirs.ours |= {"validation": 0.1, "evaluate_on": "val", "select_on": "val"}
    seed = theirs.get("seed", None)
    theirs.put("seed", SEEDS if seed is None else seed)
    if seed is None:
        theirs.constants.append("seed")
    theirs.ignore(*UNREAD)


def _networks(theirs: Theirs, data: str) -> None:
    backbone = theirs.get("model.backbone", None)
    if "--hcl" in theirs.flags:
        if "model.backbone" in theirs:
            theirs.ignored.append("model.backbone")
        if data in DATA:
            names = [NETWORKS[name] for name in DATA[data][3]]
            theirs.constant(networks=names, backbone=names[0])
        return
    if backbone not in NETWORKS:
        theirs.refuse("model.backbone", f"has no twin here. Known: {', '.join(NETWORKS)}")
    else:
        theirs.put("backbone", NETWORKS[backbone])


def _training(theirs: Theirs) -> None:
    optimizer = theirs.get("train.optimizer.name")
    if optimizer == "sgd":
        pass  # the default
    elif optimizer in ("adam", "adamw"):
        theirs.put("optimizer", optimizer)
    elif optimizer is not None:
        theirs.refuse("train.optimizer.name", "has no counterpart here. Known: sgd, adam")
    for key, ours in (
        ("train.base_lr", "lrate"), ("train.stop_at_epoch", "epochs"), ("train.batch_size", "batch_size"),
        ("train.alpha", "alpha"),
    ):  # fmt: skip
        theirs.put(ours, theirs.number(key))


def _of_the_variant(theirs: Theirs, variant: str) -> None:
    size = theirs.get("model.buffer_size", None if variant not in ("distilbuf", "qdi") else 200)
    if variant == "distilbuf":
        theirs.put("memory_size", size)
        theirs.constant(buffer_weight=0.3)
    elif variant == "qdi":
        theirs.put("synthetic_size", size)
        for key, ours in INVERSION.items():
            theirs.put(ours, theirs.number(key))
    elif "model.buffer_size" in theirs:
        theirs.ignored.append("model.buffer_size")
    theirs.ignore(*INVERSION)
