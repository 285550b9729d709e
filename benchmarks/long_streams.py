"""What grows on a long stream: python -m benchmarks.long_streams --json FILE [--figure FILE] [LEARNER ...]

Rendered characters, 100 classes in so many equal tasks, each learner by its own experiment of exps/ with one epoch a
task. Ten times a stream: accuracy over all classes seen, processor seconds of learning a task (the mean since the time
before) and of an evaluation, bytes that the method keeps, resident memory of the process, size of the checkpoint. One
process a stream, one thread. The file is written after each stream, and what it holds already is not run again.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.asked import add_learners, new_file
from benchmarks.endurance import resident
from models.base import LEARNERS
from models.factory import config_from
from models.parts.costs import stored_bytes
from models.parts.evaluation import evaluate
from models.parts.frozen_store import FrozenStore
from models.parts.loop import learn
from models.parts.state import learner_state
from trainer import prepare
from utils import checkpoint
from utils.checking import read_json
from utils.config import RunConfig
from utils.plots import COLOURS, DASHES, new_figure, save
from utils.runtime import Runtime

CLASSES, TIMES = 100, 10
EXPERIMENTS = {
    "aper": "glyphs_adapter", "hcl": "glyphs_distil", "slca": "glyphs_small", "slcapp": "glyphs_small"
}  # fmt: skip
OTHERWISE: Mapping[str, dict[str, Any]] = {
    "hcl": {"backbone": "small_vit", "networks": ["small_vit"], "lrate": 1e-4},  # one architecture for all tasks
    "coda_prompt": {"pool_size": CLASSES},
}
MEASURES = {
    "accuracy": "accuracy (percent)",
    "learning": "processor seconds to learn a task",
    "evaluation": "processor seconds of an evaluation",
    "stored": "kept by the method (MiB)",
    "resident": "memory of the process (MiB)",
    "checkpoint": "checkpoint (MiB)",
}
Measured = dict[str, list[float]]


def config_of(name: str, tasks: int) -> RunConfig:
    """A learner's experiment on characters, in so many tasks."""
    path = Path("exps") / name / f"{EXPERIMENTS.get(name, 'glyphs')}.json"
    values = read_json(path) | OTHERWISE.get(name, {})
    values |= {"increment": CLASSES // tasks, "device": "cpu", "precision": "fp32", "num_workers": 0}
    values |= {key: 1 for key in ("epochs", "init_epoch") if key in values}
    return config_from(values, str(path)).with_seed(1993)


def stream(name: str, tasks: int) -> Measured:
    """`MEASURES`, ten times."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    config = config_of(name, tasks)
    manager, learner = prepare(config, Runtime.of(config))
    store = FrozenStore(1e9)
    found: Measured = {measure: [] for measure in MEASURES}
    with tempfile.TemporaryDirectory() as folder:
        learnt = 0.0
        for task in manager:
            started = time.process_time()
            learn(learner, task)
            learnt += time.process_time() - started
            if (task.index + 1) % (tasks // TIMES):
                continue
            seen, started = manager[: task.index + 1], time.process_time()
            right = evaluate(learner, seen, store).main[0]
            evaluated = time.process_time() - started
            path = Path(folder) / "state.pt"
            checkpoint.save({"learner": learner_state(learner)}, path, {})
            row = {
                "accuracy": 100 * float(right.sum()) / sum(len(one.test) for one in seen),
                "learning": learnt / (tasks // TIMES),
                "evaluation": evaluated,
                "stored": stored_bytes(learner) / 2**20,
                "resident": resident(),
                "checkpoint": path.stat().st_size / 2**20,
            }
            learnt = 0.0
            for measure, value in row.items():
                found[measure].append(value)
    return found


def table(streams: Mapping[str, Mapping[str, Measured]]) -> str:
    """A row a learner and number of tasks: behind a fifth of the stream, and at its end."""
    lines = [f"| learner | tasks | last accuracy | {' | '.join(list(MEASURES.values())[1:])} |"]
    lines.append("|---" * (2 + len(MEASURES)) + "|")
    for tasks, learners in streams.items():
        for name, found in sorted(learners.items()):
            cells = [
                f"{found['accuracy'][-1]:.1f}",
                *(f"{v[1]:.4g} -> {v[-1]:.4g}" for m, v in found.items() if m != "accuracy"),
            ]
            lines.append(f"| {name} | {tasks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(streams: Mapping[str, Mapping[str, Measured]], path: Path) -> None:
    """A column a number of tasks, a row a measure, a line a learner; all but accuracy on a logarithmic axis."""
    figure = new_figure(6.4 * len(streams), 3.2 * len(MEASURES))
    panels = figure.subplots(len(MEASURES), len(streams), squeeze=False, sharex="col", sharey="row")
    names = sorted({name for learners in streams.values() for name in learners})
    for column, (tasks, learners) in enumerate(streams.items()):
        for (measure, label), panel in zip(MEASURES.items(), panels[:, column], strict=True):
            for number, name in enumerate(names):
                if name in learners:
                    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
                    values = learners[name][measure]
                    panel.plot(
                        np.arange(1, TIMES + 1) * (int(tasks) // TIMES),
                        values,
                        dash,
                        color=colour,
                        label=name,
                        linewidth=1.2,
                    )
            panel.set_yscale("linear" if measure == "accuracy" else "log")
            panel.set_ylabel(label if column == 0 else "")
            panel.grid(alpha=0.3)
        panels[0, column].set_title(f"{tasks} tasks of {CLASSES // int(tasks)}")
        panels[-1, column].set_xlabel("tasks learned")
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4 * len(streams))
    save(figure, path, vectors=False)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_learners(parse)
    parse.add_argument("--tasks", nargs="+", default=["50", "100"], choices=("10", "20", "25", "50", "100"))
    parse.add_argument("--json", type=new_file, required=True, metavar="FILE")
    parse.add_argument("--figure", type=new_file, metavar="FILE")
    options = parse.parse_args()
    streams: dict[str, dict[str, Measured]] = read_json(options.json) if options.json.is_file() else {}
    for tasks in options.tasks:
        for name in options.learners or LEARNERS:
            if name in streams.setdefault(tasks, {}):
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                streams[tasks][name] = process.submit(stream, name, int(tasks)).result()
            options.json.write_text(json.dumps(streams))
    print(table(streams))
    if options.figure:
        plot(streams, options.figure)


if __name__ == "__main__":
    main()
