"""The first task once: a run begins behind the first task of another one, where that task would have been the same.

Everything that acts in the first task has to be equal: data, class order, classes of the task, backbone, weights, seed,
precision, and every key but those of later tasks. The rest of a run then draws what it would have drawn.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.stream import DataManager
from utils import checkpoint
from utils.config import INIT, MACHINE_KEYS, WRITTEN, RunConfig
from utils.errors import UserError
from utils.folders import read_result, seed_folder
from utils.record import Record
from utils.runtime import Runtime

KEPT = "task1.pt"
# Keys that say what comes after the first task, or in how many parts.
LATER = frozenset({"increment", "init_cls", "task_sizes", *INIT.values(), *INIT})


def place(config: RunConfig) -> Path:
    """The folder of the seed that `init_from` stands for: itself, or the same seed below it.

    Raises UserError where there is none, or where it kept no checkpoint after its first task.
    """
    assert config.init_from is not None
    named = Path(config.init_from).expanduser()
    folder = named if (named / "config.json").is_file() else seed_folder(named, config.seeds[0])
    if not (folder / "config.json").is_file():
        raise UserError(f"\"init_from\": '{named}' holds no run of seed {config.seeds[0]}")
    if not (folder / "checkpoint" / KEPT).is_file():
        raise UserError(
            f"\"init_from\": '{folder}' kept no checkpoint after its first task: "
            '"keep_checkpoints": "first" in its config keeps it'
        )
    return folder


def fingerprint(config: RunConfig) -> str:
    """Equal for single-seed configs that say the same of the first task; data and weights are not looked at."""
    values = config.model_dump(mode="json")
    kept = {key: value for key, value in values.items() if key not in MACHINE_KEYS | LATER}
    kept |= {later: _of_first(values, first, later) for later, first in INIT.items()}
    first = config.task_sizes[0] if config.task_sizes else config.init_cls or config.increment
    return json.dumps([kept, first, config.seeds[0]], sort_keys=True)


def load(config: RunConfig, manager: DataManager, runtime: Runtime, needs_num_tasks: bool) -> dict[str, Any]:
    """The other run's checkpoint after its first task.

    Raises UserError with every reason why that task is not this run's.
    """
    folder = place(config)
    identity, state = checkpoint.load(folder / "checkpoint" / KEPT)
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result = read_result(folder) or {}
    faults = list(_faults(config, theirs, manager, runtime, identity, state, result, needs_num_tasks))
    if faults:
        told = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"\"init_from\": the first task of '{folder}' is another one than this run's:\n{told}")
    return state


def _faults(
    config: RunConfig,
    theirs: Mapping[str, Any],
    manager: DataManager,
    runtime: Runtime,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    result: Mapping[str, Any],
    needs_num_tasks: bool,
) -> Iterator[str]:
    ours = config.model_dump(mode="json")
    for key in sorted((set(ours) | set(theirs)) - MACHINE_KEYS - LATER - {WRITTEN}):
        if ours.get(key) != theirs.get(key):
            yield f'"{key}" is {json.dumps(theirs.get(key))} there, {json.dumps(ours.get(key))} here'
    for later, first in INIT.items():
        there, here = (_of_first(values, first, later) for values in (theirs, ours))
        if there != here:
            yield f'"{later}" of the first task is {json.dumps(there)} there, {json.dumps(here)} here'
    if theirs.get("seed") != ours["seed"]:
        yield f"its seed is {theirs.get('seed')}, this one is {ours['seed']}"
    if identity.get("data") != manager.data.digest:
        yield "its data are others"
    info = state["learner"]["task"]
    if list(info["sizes"])[:1] != list(manager[0].sizes[:1]):
        yield f"it has {info['sizes'][0]} classes, this one {manager[0].sizes[0]}"
    if result and result["class_order"] != manager.class_order.tolist():
        yield "its class order is another one"
    if needs_num_tasks and info["num_tasks"] != len(manager):
        yield f"the learner knows the number of tasks beforehand: {info['num_tasks']} there, {len(manager)} here"
    precision = result.get("environment", {}).get("precision")
    if precision is not None and precision != runtime.describe()["precision"]:
        yield f"it was computed in {precision}, this run is in {runtime.describe()['precision']}"
    if state["record"]["done"] != 1:
        yield f"its checkpoint is of {state['record']['done']} tasks"


def _of_first(values: Mapping[str, Any], first: str, later: str) -> Any:
    """A key of the schedule in the first task."""
    return values.get(later) if values.get(first) is None else values.get(first)


def take_over(record: Record, state: Mapping[str, Any]) -> None:
    """What the other run measured in its first task, in a record of this run's number of tasks."""
    tasks, classes = record.correct.shape[-1], record.by_class.shape[-1]
    theirs = Record.empty(1, 1)
    theirs.load_state_dict({**state, "fit": None})
    taken = Record.empty(tasks, classes)
    taken.add(0, theirs.scores, theirs.correct[:, :, 0, :1], theirs.by_class)
    taken.probed[0, 0] = theirs.probed[0, 0]
    values = theirs.state_dict() | {name: taken.state_dict()[name] for name in ("correct", "by_class", "probed")}
    record.load_state_dict({name: _copied(value) for name, value in values.items()})


def _copied(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def copy_epochs(config: RunConfig, folder: Path) -> None:
    """epochs.jsonl of the first task, for the lines of this run to follow."""
    source = place(config) / "epochs.jsonl"
    if source.is_file():
        shutil.copyfile(source, folder / "epochs.jsonl")
