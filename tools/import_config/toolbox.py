"""What the configs of PyCIL and of PILOT share: schedules of two kinds of task, exemplars, the classic learners."""

from tools.import_config.theirs import Theirs, first_task

UNREAD = ("prefix", "device", "num_workers", "pretrained", "drop", "drop_path", "csv_name", "debug", "data_path")
MEMORY = ("memory_size", "memory_per_class", "fixed_memory")
SCHEDULE = {
    "init_epoch": "init_epoch", "init_epochs": "init_epoch", "init_lr": "init_lr",
    "init_weight_decay": "init_weight_decay", "init_milestones": "init_milestones", "init_lr_decay": "init_lr_decay",
    "epochs": "epochs", "inc_epochs": "epochs", "boosting_epochs": "epochs", "lrate": "lrate", "lr": "lrate",
    "weight_decay": "weight_decay", "milestones": "milestones", "lrate_decay": "lrate_decay",
    "batch_size": "batch_size",
}  # fmt: skip
OWN = {
    "foster": {
        "beta1": "beta1", "beta2": "beta2", "oofc": "oofc", "lambda_okd": "lambda_okd", "wa_value": "wa_value",
        "is_teacher_wa": "align_teacher", "is_student_wa": "align_student", "T": "temperature",
        "compression_epochs": "compression_epochs",
    },
    "memo": {"alpha_aux": "alpha_aux", "train_base": "train_base", "t_max": "t_max"},
    "coil": {"sinkhorn": "sinkhorn", "norm_term": "norm_term", "reg_term": "reg_term", "T": "temperature"},
    "icarl": {"T": "temperature"},
    "bic": {"T": "temperature", "split_ratio": "split_ratio"},
    "lwf": {"T": "temperature", "lamda": "lamda"},
    "ewc": {"lamda": "lamda", "fishermax": "fishermax"},
}  # fmt: skip
KEEPS_IMAGES = ("replay", "icarl", "wa", "bic", "der", "foster", "memo", "gem", "coil")


def exemplars(theirs: Theirs, learner: str) -> None:
    """Their three keys as one; ignored where the learner keeps no images."""
    if learner not in KEEPS_IMAGES:
        theirs.ignore(*MEMORY)
        return
    size = "memory_per_class" if theirs.flag("fixed_memory", False) else "memory_size"
    theirs.put("exemplars", {"per_class" if size == "memory_per_class" else "total": theirs.get(size)})
    theirs.ignore(*MEMORY)


def schedule(theirs: Theirs) -> None:
    """The keys of a schedule that the file names, over those that are fixed in code and stand there already."""
    for key, ours in SCHEDULE.items():
        if key in theirs:
            theirs.put(ours, theirs.get(key) if "milestones" in key else theirs.number(key))
            if ours in theirs.constants:
                theirs.constants.remove(ours)


def finish_schedule(theirs: Theirs) -> None:
    """Milestones that lie behind the last epoch never act: the rate is constant then."""
    ours = theirs.ours
    if ours.get("scheduler") == "multistep":
        later, first = ours.get("epochs", 0), ours.get("init_epoch", ours.get("epochs", 0))
        reached = [m for m in ours.get("milestones") or () if m < later]
        reached += [m for m in ours.get("init_milestones") or () if m < first]
        if not reached:
            ours["scheduler"] = "constant"
    if ours.get("scheduler") != "multistep":
        for key in ("milestones", "init_milestones", "lrate_decay", "init_lr_decay"):
            ours.pop(key, None)
            theirs.without_effect(key)
            if key in theirs.constants:
                theirs.constants.remove(key)
    if ours.get("scheduler") != "cosine":
        ours.pop("t_max", None)
    first_task(theirs)


def own_keys(theirs: Theirs, learner: str) -> None:
    """Keys of one learner."""
    for key, ours in OWN.get(learner, {}).items():
        if key in theirs:
            theirs.put(ours, theirs.get(key))
    if learner == "foster" and not (theirs.ours.get("align_teacher") or theirs.ours.get("align_student")):
        theirs.ours.pop("wa_value", None)  # read in alignment alone
        theirs.without_effect("wa_value")
    if theirs.ours.get("compression_epochs") == theirs.ours.get("epochs"):
        theirs.ours.pop("compression_epochs", None)
    if learner == "coil":
        theirs.ignore("calibration_term")  # replaced before it is ever read
    theirs.ignore("T")  # of learners that distil nothing
    if learner == "memo" and theirs.flag("train_adaptive", False):
        theirs.refuse("train_adaptive", "cannot be imported: old specialised blocks are frozen here")


def optimizer(theirs: Theirs, names: dict[str, str], default: str = "sgd") -> None:
    """names: of theirs -> ours."""
    if "optimizer" in theirs:
        theirs.put("optimizer", theirs.named("optimizer", names))
    elif default != "sgd":
        theirs.put("optimizer", default)
