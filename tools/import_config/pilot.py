"""PILOT (exps/*.json), and APER's repository, whose files are older: methods on a pre-trained ViT."""

from collections.abc import Callable
from typing import Any

from tools.import_config.theirs import FT_IN1K, IN21K, MISSING, Theirs, seeds, shuffled, task_sizes
from tools.import_config.toolbox import MEMORY, UNREAD, exemplars, finish_schedule, optimizer, own_keys, schedule

DATA = {name: name for name in ("cifar224", "imagenetr", "imageneta", "cub", "objectnet", "omnibenchmark", "vtab")}
CLASSIC = ("finetune", "icarl", "der", "foster", "memo", "coil")
SESSIONS = ("aper", "ranpac", "fecam")  # what a first session tunes
NAMES = {name: name for name in (
    "simplecil", "slca", *CLASSIC, "ranpac", "fecam", "ease", "mos", "lae", "l2p", "dualprompt", "coda_prompt",
)}  # fmt: skip
NAMES |= {f"{old}_{kind}": "aper" for old in ("aper", "adam") for kind in ("adapter", "ssf", "vpt", "finetune")}
LEFTOVERS = (
    "vpt_type", "prompt_token_num", "ffn_num", "pass", "init_milestones", "init_lr_decay", "use_RP", "M", "min_lr",
    "optimizer", "scheduler", "weight_decay", "tuned_epoch", "init_lr", "init_epoch", "init_epochs", "batch_size",
    "use_old_data", "T", "reinit_optimizer", "resume", "init_weight_decay",
)  # fmt: skip


def convert(theirs: Theirs) -> None:
    name = theirs.get("model_name")
    learner = theirs.named("model_name", NAMES, what="is not here")
    if learner is None:
        return
    theirs.put("model_name", learner)
    theirs.put("dataset", theirs.named("dataset", DATA))
    task_sizes(theirs)
    shuffled(theirs)
    seeds(theirs)
    _backbone(theirs)
    theirs.constant(test_transform="resize_crop_bicubic", normalize="none")
    if learner != "simplecil":
        theirs.constant(train_transform="crop_flip_scale05")
    if learner in CLASSIC:
        _classic(theirs, learner)
    else:
        {**dict.fromkeys(SESSIONS, _first_session), **CONVERT}[learner](theirs, f"{name}")
        theirs.ignore(*MEMORY)
    theirs.ignore(*UNREAD, "get_original_backbone", "freeze", "global_pool")


def _backbone(theirs: Theirs) -> None:
    key = "backbone_type" if "backbone_type" in theirs else "convnet_type"
    kind = str(theirs.get(key)).lower().removeprefix("pretrained_").replace("vit_base_patch16_224", "vit_b16_224")
    if not kind.startswith("vit_b16_224"):
        theirs.refuse(key, "has no counterpart here. Known: the ViT-B/16 of PILOT, with or without in21k")
        return
    theirs.put("backbone", IN21K if "in21k" in kind else FT_IN1K)


def _classic(theirs: Theirs, learner: str) -> None:
    fixed: dict[str, Any] = {"lrate": 1e-3, "weight_decay": 2e-4, "init_weight_decay": 5e-4}
    if learner in ("coil", "foster"):
        fixed = {"lrate": 1e-3, "weight_decay": 5e-4}
    theirs.constant(**fixed)
    if learner == "finetune":
        theirs.constant(mask="new")
    if learner == "icarl":
        theirs.constant(predict="logits")
    kind = theirs.named(
        "scheduler", {"steplr": "multistep", "cosine": "cosine", "constant": "constant"},
        "cosine" if learner == "foster" else "steplr",
    )  # fmt: skip
    theirs.constant(scheduler=kind or "multistep")
    if "tuned_epoch" in theirs:
        theirs.put("epochs", theirs.get("tuned_epoch"))
    schedule(theirs)
    own_keys(theirs, learner)
    exemplars(theirs, learner)
    optimizer(theirs, {"sgd": "sgd", "adam": "adam"})
    theirs.same("min_lr", default=None)
    if theirs.ours["scheduler"] != "cosine":
        theirs.ours.pop("min_lr", None)
    finish_schedule(theirs)


def _epochs(theirs: Theirs, **absent: float) -> None:
    """epochs, lrate, batch_size, weight_decay, min_lr, under the names that the file has. absent: what their code takes
    where the file has none; without one an absent key is a fault."""
    for names, ours in (
        (("tuned_epoch", "init_epochs", "init_epoch", "epochs"), "epochs"), (("init_lr", "lrate", "lr"), "lrate"),
        (("batch_size",), "batch_size"),
    ):  # fmt: skip
        found = [name for name in names if name in theirs]
        theirs.put(ours, theirs.number(found[0] if found else names[0], absent.get(ours, MISSING)))
    for key in ("weight_decay", "min_lr"):
        if key in theirs:
            theirs.put(key, theirs.number(key))


def _no_floor(theirs: Theirs) -> None:
    """The rate is constant: a floor says nothing. No decay is the default of these learners."""
    if theirs.ours.pop("min_lr", None) is not None:
        theirs.without_effect("min_lr")
    if not theirs.ours.get("weight_decay"):
        theirs.ours.pop("weight_decay", None)


def _cosine(theirs: Theirs) -> None:
    kind = theirs.named("scheduler", {"cosine": "cosine", "steplr": "multistep", "constant": "constant"}, "cosine")
    if kind and kind != "cosine":
        theirs.put("scheduler", kind)
        theirs.ours.pop("min_lr", None)
    if kind == "multistep":
        theirs.same(init_milestones="milestones", init_lr_decay="lrate_decay")


def _first_session(theirs: Theirs, name: str) -> None:
    learner = theirs.ours["model_name"]
    theirs.constant(upstream=True if learner == "aper" else "pilot")
    kind = name.partition("_")[2] if learner == "aper" else "adapter"
    if kind == "vpt":
        deep = theirs.named("vpt_type", {"Deep": "vpt_deep", "deep": "vpt_deep", "Shallow": "vpt_shallow"})
        theirs.put("petl", deep)
        theirs.put("prompt_tokens", theirs.get("prompt_token_num"))
    elif learner != "fecam":
        theirs.put("petl", kind)
    if kind == "adapter":
        theirs.put("bottleneck", theirs.get("ffn_num", 64))
    if learner == "ranpac":
        theirs.put("projection", theirs.get("M", 10000) if theirs.flag("use_RP", True) else 0)
    _epochs(theirs)
    _cosine(theirs)
    # "adam" is AdamW in the code of these learners.
    optimizer(theirs, {"sgd": "sgd", "adam": "adamw"})
    theirs.ignore(*LEFTOVERS)


def _simplecil(theirs: Theirs, name: str) -> None:
    theirs.put("test_batch_size", 128)  # fixed in its code, whatever the file says
    theirs.constants.append("test_batch_size")
    theirs.ignore(*LEFTOVERS, "epochs", "lrate", "milestones", "lrate_decay")


def _slca(theirs: Theirs, name: str) -> None:
    """PILOT's form: a batch of 64, its own transforms and backbones."""
    _epochs(theirs, lrate=0.01, batch_size=64)
    theirs.ours.pop("min_lr", None)
    theirs.ours.setdefault("weight_decay", 5e-4)
    theirs.constant(scheduler="multistep")
    theirs.put("milestones", theirs.get("milestones", [18]))
    theirs.same("lrate_decay", default=None)
    theirs.put("bcb_lrscale", theirs.number("bcb_lrscale", 0.01))
    theirs.put("ca_epochs", theirs.get("ca_epochs", 5))
    temperature = theirs.number("ca_with_logit_norm", None)
    if theirs.ours["ca_epochs"]:
        theirs.put("ca_with_logit_norm", temperature if temperature is not None and temperature > 0 else 0.0)
    optimizer(theirs, {"sgd": "sgd"})
    theirs.ignore("model_postfix", "save_before_ca", *LEFTOVERS)


def _ease(theirs: Theirs, name: str) -> None:
    theirs.constant(upstream=True)
    _epochs(theirs)
    _cosine(theirs)
    for key, ours in (("later_epochs", "epochs"), ("later_lr", "lrate")):
        later = theirs.number(key, None)
        if later and "init_cls" in theirs.ours:  # with equal tasks the first values hold throughout
            first = "init_epoch" if ours == "epochs" else "init_lr"
            theirs.ours |= {first: theirs.ours[ours], ours: later}
    theirs.put("bottleneck", theirs.get("ffn_num", 64))
    plain, weigh = theirs.flag("use_init_ptm", False), theirs.flag("use_reweight", True)
    diagonal, again = theirs.flag("use_diagonal", False), theirs.flag("recalc_sim", True)
    alpha, beta = theirs.number("alpha", 0.1), theirs.number("beta", 0.0)
    values = {"use_init_ptm": plain, "use_diagonal": diagonal} | ({} if diagonal else {"recalc_sim": again})
    values |= (
        {"use_reweight": weigh} | ({"alpha": alpha} if weigh else {}) | ({"beta": beta} if plain and weigh else {})
    )
    theirs.ours |= {key: value for key, value in values.items() if value not in (False, None) or key == "recalc_sim"}
    if not weigh:
        theirs.put("use_reweight", False)
    for key in ("use_old_data", "moni_adam"):
        if theirs.flag(key, False):
            theirs.refuse(key, "cannot be imported: it reads images of old classes, or leaves adapters out")
    optimizer(theirs, {"sgd": "sgd", "adam": "adam", "adamw": "adamw"})
    theirs.ignore("adapter_num", *LEFTOVERS)


def _mos(theirs: Theirs, name: str) -> None:
    theirs.constant(upstream=True)
    _epochs(theirs)
    _cosine(theirs)
    theirs.put("bottleneck", theirs.get("ffn_num", 16))
    theirs.same("reg", "adapter_momentum", default=None)
    theirs.put("ensemble", theirs.flag("ensemble", True))
    theirs.put("ca_epochs", theirs.get("crct_epochs", 30))
    theirs.put("ca_lrate", theirs.number("ca_lr", 0.005))
    kinds = {"covariance": "full", "variance": "diag"}
    theirs.put("covariance", theirs.named("ca_storage_efficient_method", kinds, "covariance"))
    optimizer(theirs, {"sgd": "sgd", "adam": "adam", "adamw": "adamw"})
    theirs.ignore("n_centroids", *LEFTOVERS)


def _lae(theirs: Theirs, name: str) -> None:
    theirs.constant(upstream="pilot")
    _epochs(theirs)
    _no_floor(theirs)
    kind = theirs.named("pet_cls", {"Prefix": "prefix", "Adapter": "adapter"}, "Prefix")
    theirs.put("pet", kind)
    sizes = {"prefix": ("prefix_length", "pet_size"), "adapter": ("down_sample_dim", "pet_size")}
    keys = [key for key in (*sizes.get(kind or "", ()), "rank") if key in theirs]
    theirs.put("pet_size", theirs.get(keys[0]) if keys else {"prefix": 10}.get(kind or "", 5))
    theirs.put("adapt_blocks", theirs.get("adapt_blocks", [0, 1, 2, 3, 4]))
    theirs.put("freeze_epochs", theirs.get("num_freeze_epochs", 3))
    theirs.put("ema", theirs.number("ema_decay", 0.9999))
    theirs.constants += [] if "ema_decay" in theirs else ["ema"]
    optimizer(theirs, {"adam": "adam", "sgd": "sgd"})
    if theirs.ours.get("optimizer") == "adam":
        del theirs.ours["optimizer"]
    theirs.ignore("eval_every", "loss_type", *LEFTOVERS)


# Settings of the prompt learners that are the only ones here -> their value.
ONLY: dict[str, tuple[Any, ...]] = {
    "head_type": ("prompt", "token"), "prompt_key": (True,), "same_key_value": (False,), "prompt_pool": (True,),
    "embedding_key": ("cls",), "pull_constraint": (True,), "use_e_prompt": (True,), "use_g_prompt": (True,),
    "use_prefix_tune_for_g_prompt": (True,), "use_prefix_tune_for_e_prompt": (True,),
    "prompt_key_init": ("uniform",),
}  # fmt: skip


def _prompts(theirs: Theirs, name: str) -> None:
    theirs.constant(upstream=True)
    _epochs(theirs)
    _no_floor(theirs)
    for key, allowed in ONLY.items():
        if theirs.get(key, allowed[0]) not in allowed:
            theirs.refuse(key, f"cannot be imported: here it is always {allowed[0]!r}")
    if not theirs.flag("batchwise_prompt", True):
        theirs.put("prompt_selection", "instance")
    coefficient = theirs.number("pull_constraint_coeff", 0.1)
    if coefficient != 0.1:
        theirs.put("pull", coefficient)
    theirs.put("pool_size", theirs.get("size", 10))
    kind = theirs.named("scheduler", {"constant": "constant", "cosine": "cosine"}, "constant")
    if kind == "cosine":
        theirs.put("scheduler", kind)
    optimizer(theirs, {"adam": "adam", "sgd": "sgd"})
    if theirs.ours.get("optimizer") == "adam":
        del theirs.ours["optimizer"]
    theirs.ignore("initializer", "predefined_key", "num_classes", *LEFTOVERS)


def _l2p(theirs: Theirs, name: str) -> None:
    _prompts(theirs, name)
    theirs.put("prompt_length", theirs.get("length", 5))
    theirs.put("top_k", theirs.get("top_k", 5))
    for key in ("use_prompt_mask", "shared_prompt_pool", "shared_prompt_key"):
        if theirs.flag(key, False):
            theirs.refuse(key, "cannot be imported: L2P has neither mask nor transfer here")


def _dualprompt(theirs: Theirs, name: str) -> None:
    _prompts(theirs, name)
    theirs.put("g_blocks", theirs.get("g_prompt_layer_idx", [0, 1]))
    theirs.put("g_length", theirs.get("g_prompt_length", 5))
    theirs.put("e_blocks", theirs.get("e_prompt_layer_idx", [2, 3, 4]))
    theirs.put("e_length", theirs.get("length", 5))
    if (top := theirs.get("top_k", 1)) != 1:
        theirs.put("top_k", top)
    for key, ours, usual in (
        ("use_prompt_mask", "task_mask", True), ("shared_prompt_pool", "transfer", True),
        ("shared_prompt_key", "transfer_keys", False),
    ):  # fmt: skip
        if (value := theirs.flag(key, usual)) != usual:
            theirs.put(ours, value)


def _coda(theirs: Theirs, name: str) -> None:
    theirs.constant(upstream=True, train_transform="crop_flip", drop_last=True, blocks=[0, 1, 2, 3, 4])
    if theirs.ours.get("dataset") == "cifar224":
        theirs.constant(test_transform="resize")
    else:
        theirs.constant(test_transform="resize_crop")
    _epochs(theirs)
    _no_floor(theirs)
    pool, length, ortho = theirs.get("prompt_param", [100, 8, 0.0])
    theirs.ours |= {"pool_size": int(pool), "prompt_length": int(length), "ortho": float(ortho)}
    optimizer(theirs, {"adam": "adam"})
    theirs.ours.pop("optimizer", None)
    theirs.ignore("prompt_flag", "schedule", *LEFTOVERS)


CONVERT: dict[str, Callable[[Theirs, str], None]] = {
    "simplecil": _simplecil, "slca": _slca, "ease": _ease, "mos": _mos, "lae": _lae, "l2p": _l2p,
    "dualprompt": _dualprompt, "coda_prompt": _coda,
}  # fmt: skip
