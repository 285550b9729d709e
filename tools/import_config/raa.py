"""RAA's repository (exps_jsons/*.json): adapter -> raa, simplecil -> simplecil."""

from tools.import_config.theirs import FT_IN1K, IN21K, Theirs, seeds, shuffled, task_sizes

ADAPTED = {
    "pretrained_vit_b16_224_in21k_adapter": IN21K,
    "vit_base_patch16_224_in21k_adapter": IN21K,
    "pretrained_vit_b16_224_adapter": FT_IN1K,
    "vit_base_patch16_224_adapter": FT_IN1K,
}
PLAIN = {name.removesuffix("_adapter"): tag for name, tag in ADAPTED.items()}
DATA = {name: name for name in ("cifar224", "cub", "imagenetr", "imageneta", "vtab", "objectnet", "omnibenchmark")} | {
    "cars196_224": "cars"
}
# Read by nothing: of the first upload, of later ones, of the toolbox below.
UNREAD = (
    "device", "prefix", "use_RP", "M", "pass", "vpt_type", "prompt_token_num", "ADC", "ADC_epoch", "alpha",
    "sample_limit", "aug_weight", "memory_size", "memory_per_class", "fixed_memory",
)  # fmt: skip
TRAINING = (
    "init_lr", "weight_decay", "min_lr", "optimizer", "tuned_epoch", "init_epochs", "init_epoch", "inc_epochs",
    "epochs", "ffn_num", "scheduler", "momentum", "model_name", "perturb", "rho", "ca", "ca_epochs", "ssca", "scale",
    "margin", "loss_weight", "adapter_num", "eta",
)  # fmt: skip


def convert(theirs: Theirs) -> None:
    if theirs.get("model_name") == "simplecil":
        _simplecil(theirs)
    else:
        _raa(theirs)


def transforms(data: str | None) -> dict[str, str]:
    """Of their data module, by data set."""
    if data == "cars":
        return {"train_transform": "resize300_crop_flip", "test_transform": "resize_crop_bicubic",
                "normalize": "imagenet"}  # fmt: skip
    return {"train_transform": "crop_flip_scale05", "test_transform": "resize_crop_bicubic", "normalize": "none"}


def _dataset(theirs: Theirs) -> str | None:
    value = theirs.get("dataset")
    found = DATA.get(value.lower()) if isinstance(value, str) else None
    if found is None and value is not None:
        theirs.refuse("dataset", f"has no counterpart here. Known: {', '.join(DATA)}")
    theirs.put("dataset", found)
    return found


def _simplecil(theirs: Theirs) -> None:
    theirs.put("model_name", "simplecil")
    data = _dataset(theirs)
    task_sizes(theirs)
    shuffled(theirs)
    theirs.put("backbone", theirs.named("convnet_type", PLAIN))
    theirs.put("test_batch_size", theirs.get("batch_size"))
    fixed = transforms(data)
    del fixed["train_transform"]  # class means are taken from images under the test transform
    theirs.constant(**fixed)
    seeds(theirs)
    theirs.ignore(*UNREAD, *TRAINING)


def _raa(theirs: Theirs) -> None:
    if theirs.get("model_name") != "adapter":
        theirs.refuse("model_name", 'is no learner of theirs: it must be "adapter" or "simplecil"')
    theirs.put("model_name", "raa")
    theirs.constant(upstream=True)
    data = _dataset(theirs)
    task_sizes(theirs, short=False)
    shuffled(theirs)
    seeds(theirs, alone=False)
    theirs.put("backbone", theirs.named("convnet_type", ADAPTED))
    theirs.constant(**transforms(data))
    theirs.same("batch_size", "margin", "loss_weight", init_epochs="init_epoch", inc_epochs="epochs")
    theirs.put("scale", theirs.number("scale") or 20.0)  # 0 counts as absent in their code
    decay, floor = theirs.number("weight_decay", None), theirs.number("min_lr", None)
    theirs.put("weight_decay", 5e-4 if decay is None else decay)
    theirs.put("min_lr", 1e-8 if floor is None else floor)
    theirs.put("bottleneck", theirs.get("ffn_num"))
    _replicas(theirs)
    _rates(theirs)
    theirs.ignore(*UNREAD)


def _replicas(theirs: Theirs) -> None:
    if theirs.get("adapter_num") not in (2, None):
        theirs.refuse("adapter_num", "would run with wrong replica borders in their code, which has 2 adapters always")
    theirs.put("branches", 2)


def _rates(theirs: Theirs) -> None:
    """Their `init_lr` is the alignment's; only AdamW reads it too. The rate of SGD stands in their code."""
    rate, perturb, rho = theirs.number("init_lr"), theirs.flag("perturb"), theirs.number("rho", None)
    optimizer = theirs.get("optimizer")
    if optimizer == "adam":
        theirs.put("optimizer", "adamw")
        theirs.put("lrate", rate)
        if perturb:
            theirs.refuse("optimizer", 'works in their code with "perturb": false only')
    elif optimizer == "sgd":
        theirs.constant(lrate=0.01)
    elif optimizer is not None:
        theirs.refuse("optimizer", "has no counterpart here. Known: sgd, adam")
    if perturb and rho is None:
        theirs.fault('missing key "rho": "perturb": true needs it')
    theirs.ours["sam"] = {"rho": rho, "damping": 25} if perturb else None
    if perturb:
        theirs.constants.append("sam.damping")
    else:
        theirs.without_effect("rho")
    epochs, shift = theirs.number("ca_epochs"), theirs.flag("ssca")
    if not theirs.flag("ca"):
        epochs = 0
    theirs.put("ca_epochs", epochs)
    if epochs:
        theirs.ours |= {"shift": shift, "ca_lrate": rate}
    else:
        theirs.without_effect("ca_epochs", "ssca", *(["init_lr"] if optimizer == "sgd" else []))
