"""The first task once: a run begins behind the first task of another one, where that task would have been the same.

Two things can be taken. The whole task, of the same learner: everything that acts in it has to be equal, data, class
order, classes of the task, backbone, weights, seed, precision, and every key but those of later tasks. Or the training
of a first session alone, which learners share that begin with one (`session_keys`): what each measures afterwards is
its own. Either way the rest of a run draws what it would have drawn.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.stream import DataManager
from models.parts.loop import begin
from models.parts.state import restore
from utils import checkpoint
from utils.config import INIT, MACHINE_KEYS, WRITTEN, RunConfig
from utils.errors import UserError
from utils.folders import read_result, seed_folder
from utils.record import Record
from utils.storage import expanded

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner

log = logging.getLogger(__name__)

KEPT = "task1.pt"  # after the first task
SESSION = "session1.pt"  # behind the training of a first session, before anything is measured
# Keys that say what comes after the first task, or in how many parts.
LATER = frozenset({"increment", "init_cls", "task_sizes", *INIT.values(), *INIT})
# Keys that act outside of a first session's training; of `upstream` the torch seed is compared.
BESIDE = frozenset({"model_name", "upstream", "probe", "probe_lrate", "test_batch_size", "dil_eval"})


def session_keys(learner: Any) -> frozenset[str]:
    """Keys of a learner (or its class) that its first session reads; empty where it has none to share."""
    return getattr(learner, "session_keys", frozenset())


def kept_as(learner: "Learner", phase: str, record: Record) -> str | None:
    """Under which name a checkpoint that has just been written is kept, by `keep_checkpoints`."""
    keep = learner.config.keep_checkpoints
    if phase == "start" and record.done > record.task:
        return f"task{record.done}.pt" if keep == "tasks" or (keep == "first" and record.done == 1) else None
    first = phase == "fitted" and record.task == 0 and record.stage == 0
    return SESSION if first and keep == "first" and session_keys(learner) else None


def fingerprint(config: RunConfig, shared: frozenset[str] = frozenset()) -> str:
    """Equal for single-seed configs that say the same of the first task, or, with the keys of a first session, of its
    training; data and weights are not looked at."""
    first = config.task_sizes[0] if config.task_sizes else config.init_cls or config.increment
    seeds = [config.seeds[0], config.torch_seed]
    return json.dumps([_compared(config.model_dump(mode="json"), shared), first, seeds], sort_keys=True)


def _compared(values: Mapping[str, Any], shared: frozenset[str]) -> dict[str, Any]:
    """What of a config acts in the first task; with the keys of a session, in its training."""
    if shared:
        harness = frozenset(RunConfig.model_fields) - MACHINE_KEYS - BESIDE - LATER
        return {key: values.get(key) for key in harness | shared}
    kept = {key: value for key, value in values.items() if key not in MACHINE_KEYS | LATER | {WRITTEN}}
    schedule = {
        f"{later} of the first task": values.get(later) if values.get(first) is None else values[first]
        for later, first in INIT.items()
    }
    return kept | schedule


def begin_behind(learner: "Learner", manager: DataManager, record: Record) -> dict[str, Any]:
    """Make a learner that has just been built, and the record of its run, what the other run left; its checkpoint.

    Raises UserError where there is none, or with every reason why that task is not this run's.
    """
    config = learner.config
    folder = place(config)
    faults: list[str] = []
    for name, shared in ((KEPT, frozenset()), (SESSION, session_keys(learner))):
        path = folder / "checkpoint" / name
        if not path.is_file() or (name == SESSION and not shared):
            continue
        identity, state = checkpoint.load(path)
        found = list(_faults(learner, folder, manager, identity, state, shared))
        if not found:
            _take_over(learner, manager, record, state, whole=name == KEPT)
            log.info("the first task is that of %s", folder)
            return state
        faults = found
    told = "\n".join(f"  - {fault}" for fault in faults)
    raise UserError(f"\"init_from\": the first task of '{folder}' is another one than this run's:\n{told}")


def place(config: RunConfig) -> Path:
    """The folder of the seed that `init_from` stands for: itself, or the same seed below it.

    Raises UserError where there is none, or where it kept no checkpoint of its first task.
    """
    assert config.init_from is not None
    named = expanded(config.init_from)
    folder = named if (named / "config.json").is_file() else seed_folder(named, config.seeds[0])
    if not (folder / "config.json").is_file():
        raise UserError(f"\"init_from\": '{named}' holds no run of seed {config.seeds[0]}")
    if not kept_below(folder):
        raise UserError(
            f"\"init_from\": '{folder}' kept no checkpoint of its first task: "
            '"keep_checkpoints": "first" in its config keeps it'
        )
    return folder


def kept_below(folder: Path) -> bool:
    """Whether a seed's folder has something that another run could begin behind."""
    return any((folder / "checkpoint" / name).is_file() for name in (KEPT, SESSION))


def _faults(
    learner: "Learner",
    folder: Path,
    manager: DataManager,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    shared: frozenset[str],
) -> Iterator[str]:
    config = learner.config
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours, theirs = (_compared(values, shared) for values in (config.model_dump(mode="json"), saved))
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            name, _, of = key.partition(" ")
            yield f'"{name}"{of and " "}{of} is {json.dumps(theirs.get(key))} there, {json.dumps(ours.get(key))} here'
    if saved.get("seed") != config.seed:
        yield f"its seed is {saved.get('seed')}, this one is {config.seed}"
    if identity.get("data") != manager.data.digest:
        yield "its data are others"
    info, result = state["learner"]["task"], read_result(folder) or {}
    if list(info["sizes"])[:1] != list(manager[0].sizes[:1]):
        yield f"it has {info['sizes'][0]} classes, this one {manager[0].sizes[0]}"
    if result and result["class_order"] != manager.class_order.tolist():
        yield "its class order is another one"
    if learner.needs_num_tasks and info["num_tasks"] != len(manager):
        yield f"the learner knows the number of tasks beforehand: {info['num_tasks']} there, {len(manager)} here"
    precision, here = result.get("environment", {}).get("precision"), learner.runtime.describe()["precision"]
    if precision is not None and precision != here:
        yield f"it was computed in {precision}, this run is in {here}"
    if identity.get("torch_seed") != config.torch_seed:
        yield f"torch is seeded with {identity.get('torch_seed')} there, with {config.torch_seed} here"


def _take_over(learner: "Learner", manager: DataManager, record: Record, state: Mapping[str, Any], whole: bool) -> None:
    theirs = Record.empty(1, 1)
    theirs.load_state_dict({**state["record"], "fit": None})
    taken = Record.empty(record.correct.shape[-1], record.by_class.shape[-1])
    if whole:
        restore(learner, state["learner"])
        taken.add(0, theirs.scores, theirs.correct[:, :, 0, :1], theirs.by_class)
        taken.probed[0, 0] = theirs.probed[0, 0]
    else:
        begin(learner, manager[0])
        own = "network."
        values = {name[len(own) :]: v for name, v in state["learner"]["module"].items() if name.startswith(own)}
        learner.network.load_state_dict(values, strict=False)  # a plain copy, of the weights file, may stand beside it
    arrays = {name: taken.state_dict()[name] for name in ("correct", "by_class", "probed")}
    record.load_state_dict(theirs.state_dict() | arrays)
