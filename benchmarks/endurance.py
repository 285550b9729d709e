"""Many seeds and long streams: python -m benchmarks.endurance [--seeds N] [--tasks N] [LEARNER ...]

Memory of one process over many seeds of a run (resident, MiB), and seconds a task of every learner on a stream of
one-class tasks, evaluation apart: what grows with the number of seeds or tasks shows. The tests' tiny network and
stream; one thread.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import trainer
from benchmarks.asked import add_learners
from data.stream import DataManager
from models.base import LEARNERS
from models.factory import build_learner, config_from
from models.parts.evaluation import evaluate
from models.parts.frozen_store import FrozenStore
from models.parts.loop import learn
from tests.conftest import TINY_VIT, tiny_values, write_stream
from utils.runtime import Runtime


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def seeds(count: int, folder: Path) -> str:
    """Memory after a tenth of the seeds, and at the end; libraries and caches are there by then."""
    values = tiny_values(folder, "slca", epochs=1, seed=list(range(count)))
    config, found = config_from(values, "endurance"), []
    for seed in config.seeds:
        single = config.with_seed(seed)
        trainer.run_seed(single, folder / "out" / f"seed{seed}", Runtime.of(single), resume=False)
        found.append(resident())
    early, late = np.median(found[count // 10 : count // 5]), np.median(found[-count // 10 :])
    return f"{count} seeds of slca: {early:.0f} MiB early, {late:.0f} MiB at the end, {100 * (late / early - 1):+.1f} %"


def stream(name: str, tasks: int, folder: Path) -> str:
    """Seconds of the second tenth of the tasks and of the last one."""
    if "class" not in LEARNERS[name].streams:
        return ""
    data = write_stream(folder / f"{tasks}.npz", classes=tasks, train=4, test=1)
    values = tiny_values(folder, name, dataset=data, increment=1, epochs=1)
    if "exemplars" in LEARNERS[name].Config.model_fields:
        values["exemplars"] = {"total": 2 * tasks}
    if name == "coda_prompt":
        values |= {"pool_size": tasks, "backbone": TINY_VIT | {"embed_dim": 2 * tasks}}  # its rows are orthogonal
    config = config_from(values, "endurance")
    manager = DataManager(config, image_size=16)
    torch.manual_seed(0)
    learner, store = build_learner(config, Runtime("cpu", "fp32", 0), manager[0].info), FrozenStore(1e9)
    learnt, tested = [], []
    for task in manager:
        started = time.perf_counter()
        learn(learner, task)
        middle = time.perf_counter()
        evaluate(learner, manager[: task.index + 1], store)
        learnt.append(middle - started)
        tested.append(time.perf_counter() - middle)
    tenth = max(1, tasks // 10)
    shown = [
        1000 * np.median(times[part])
        for times in (learnt, tested)
        for part in (slice(tenth, 2 * tenth), slice(-tenth, None))
    ]
    return (
        f"| {name} | " + " | ".join(f"{value:.0f}" for value in shown) + f" | {sum(learnt):.1f} | {sum(tested):.1f} |"
    )


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    add_learners(parse)
    parse.add_argument("--seeds", type=int, default=50)
    parse.add_argument("--tasks", type=int, default=100)
    given = parse.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.seeds:
            print(seeds(given.seeds, Path(folder)), flush=True)
        if given.tasks:
            head = ["ms a task, early", "late", "ms an evaluation, early", "late", "seconds in all", "of evaluations"]
            print(f"| {' | '.join([f'learner, {given.tasks} tasks of one class', *head])} |")
            print("|---|---|---|---|---|---|---|")
            for name in given.learners or LEARNERS:
                print(stream(name, given.tasks, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
