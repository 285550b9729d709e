"""TensorBoard and Weights & Biases: fed from the records that epochs.jsonl and result.json hold, after each epoch and
task, never inside a step. Both packages are optional."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from utils.errors import UserError
from utils.results import is_number

log = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Where numbers go beside the result folder."""

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        """A line of epochs.jsonl, its number from 1."""

    def task(self, result: Mapping[str, Any], epochs: int) -> None:
        """result.json after a task; epochs: lines until then."""

    def close(self) -> None:
        """What is buffered is written."""


class Trackers:
    """Several at once. One that fails, for want of a network or of room, is left out from then on: it stops no run."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        self._each(lambda tracker: tracker.epoch(line, number))

    def task(self, result: Mapping[str, Any], epochs: int) -> None:
        self._each(lambda tracker: tracker.task(result, epochs))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001 - packages of others may raise anything
                log.warning("%s takes no more records: %s: %s", type(tracker).__name__, type(error).__name__, error)
                self._trackers.remove(tracker)


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any], done: int) -> Trackers:
    """done: lines of epochs.jsonl that an interrupted run goes on behind.

    Raises UserError naming the package that is missing.
    """
    made: list[Tracker] = []
    for name in names:
        try:
            made.append(TensorBoard(folder, done) if name == "tensorboard" else WeightsAndBiases(folder, config))
        except ImportError as error:
            raise UserError(
                f'"log_to": "{name}" needs the package "{PACKAGES[name]}" ({error}): pip install {PACKAGES[name]}'
            ) from None
    return Trackers(made)


def epoch_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers of an epoch's line; task, stage and epoch are places, not measurements."""
    places = ("task", "epoch", "epochs")
    return {f"epoch/{key}": float(value) for key, value in line.items() if key not in places and is_number(value)}


def task_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What a task changed: accuracies under every score, forgetting, seconds by phase, memory, stored bytes."""
    found = {f"task/{key}": float(value) for key, value in result.items() if is_number(value) and key != "tasks"}
    found |= {f"seconds/{key}": float(value) for key, value in result["seconds"].items()}
    stored = result["parameters"]["stored_bytes_per_task"]
    return found | ({"task/stored_bytes": float(stored[-1])} if stored else {})


class TensorBoard:
    """Event files in the seed's folder. An interrupted run's lines behind the checkpoint are purged."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        for name, value in epoch_numbers(line).items():
            self._writer.add_scalar(name, value, number)

    def task(self, result: Mapping[str, Any], epochs: int) -> None:
        for name, value in task_numbers(result).items():
            self._writer.add_scalar(name, value, len(result["curve"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run a seed; the same one again when it is resumed. WANDB_MODE=offline keeps it in the seed's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        identity = hashlib.sha256(f"{folder.resolve()}".encode()).hexdigest()[:16]
        self._run = wandb.init(project="palimpsest", name="/".join(folder.parts[-3:]), id=identity, resume="allow",
                               dir=str(folder), config=dict(config), reinit=True)  # fmt: skip
        self._run.define_metric("epoch/*", step_metric="line")
        self._run.define_metric("task/*", step_metric="tasks_done")
        self._run.define_metric("seconds/*", step_metric="tasks_done")

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        self._run.log({"line": number, **epoch_numbers(line)})

    def task(self, result: Mapping[str, Any], epochs: int) -> None:
        self._run.log({"tasks_done": len(result["curve"]), "line": epochs, **task_numbers(result)})

    def close(self) -> None:
        self._run.finish()
