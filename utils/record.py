"""Where a seed stands and what it has measured: everything of a run that a checkpoint holds beside the learner.

Letters: S scores, T tasks, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch


@dataclass
class Record:
    """task: at work, from 0. phase, stage, fit: where in it, as `models.parts.loop.Position` says; done: tasks that are
    finished. scores: names of what is scored. correct (S, 3, T, T): [s, k, t, i], right predictions after task t on
    task i, by kind; NaN where nothing was evaluated. by_class (S, C): after the last task done. probed (T, T): of the
    probe. stored_bytes, trainable: after, and in, each task. images_tested: read by evaluations so far. total: seconds.
    epoch_lines: the text of epochs.jsonl, which is repaired from it.
    drift: of each task, as models/parts/drift.py notes it.

    A new number is one more field: state_dict and load_state_dict go over all of them.
    """

    correct: np.ndarray
    by_class: np.ndarray
    probed: np.ndarray
    task: int = 0
    phase: str = "start"
    stage: int = 0
    fit: dict[str, Any] | None = None
    done: int = 0
    scores: list[str] = field(default_factory=lambda: ["logits"])
    stored_bytes: list[int] = field(default_factory=list)
    trainable: list[int] = field(default_factory=list)
    images_trained: int = 0
    images_tested: int = 0
    peak_memory: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    epoch_lines: list[str] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def empty(cls, tasks: int, classes: int) -> "Record":
        return cls(np.full((1, 3, tasks, tasks), np.nan), np.zeros((1, classes)), np.full((tasks, tasks), np.nan))

    def add(self, task: int, names: Sequence[str], correct: np.ndarray, by_class: np.ndarray) -> None:
        """What an evaluation after a task found: correct (S, 3, tasks tested), by_class (S, C)."""
        if len(names) != len(self.correct):
            self.correct = np.full((len(names), *self.correct.shape[1:]), np.nan)
        self.scores, self.by_class = list(names), by_class
        self.correct[:, :, task, : correct.shape[2]] = correct

    def state_dict(self) -> dict[str, Any]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for entry in fields(self):
            if entry.name not in state:  # a checkpoint of an older version
                continue
            value = state[entry.name]
            setattr(self, entry.name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)
