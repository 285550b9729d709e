"""The accuracies of a finished run again, from its folder and the data set."""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np

import trainer
from models.factory import saved_config
from models.parts.evaluation import Evaluation, evaluate
from predictor import restored
from utils.errors import UserError
from utils.folders import finished_result, single_seed
from utils.metrics import summarise_scores

COMMAND = "evaluate"
HELP = "the accuracies of a finished run again, from its folder and the data set"

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a seed, or of a run with one")
    parser.add_argument("--data", metavar="NAME", help="another data set with the same classes; default: the run's own")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parser.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the run's")


def main(options: argparse.Namespace) -> int:
    seed = single_seed(options.run)
    result = finished_result(seed)
    given = {"dataset": options.data, "data_root": options.data_root, "device": options.device}
    config = saved_config(seed / "config.json", {key: value for key, value in given.items() if value is not None})
    manager = trainer.load_data(config)
    check_data(manager, result, seed, other=options.data is not None)
    learner = restored(config, seed / "checkpoint" / "last.pt")
    found = evaluate(learner, manager.tested_after(manager[-1]))
    counts = np.array([len(task.test) for task in manager], dtype=float)
    print(text(found, counts, manager.data.num_classes, result if options.data is None else None))
    return 0


def check_data(manager: trainer.DataManager, result: dict[str, Any], seed: Path, other: bool) -> None:
    """Raises UserError where the data set is not the run's, or, when another one was asked for, has other classes."""
    digest, then = manager.data.digest, result["data"]["hash"]
    if not other and digest != then:
        raise UserError(
            f"the data are not those of the run in '{seed}': sha256 {digest[:12]} now, {then[:12]} then. "
            "--data NAME evaluates on other data"
        )
    if manager.class_names != result["class_names"]:
        raise UserError(f"{manager.data.name} has other classes than the run in '{seed}', or in another order")


def text(found: Evaluation, counts: np.ndarray, classes: int, result: dict[str, Any] | None) -> str:
    """A line per score; classes: those that can be answered. result: of the run, to say whether they are its own."""
    lines = []
    for name, correct in zip(found.names, found.correct, strict=True):
        numbers = summarise_scores([name], correct[None, :, None], counts, classes)
        key = "last_acc" if name == found.names[0] else f"last_acc_{name}"
        own = ""
        top = f"  top five {numbers['last_acc_top5']:.2f}" if "last_acc_top5" in numbers else ""
        if result is not None:
            same = numbers["last_acc"] == result[key]
            own = "  as the run's result.json" if same else f"  but {result[key]} in the run's result.json"
        tasks = "  ".join("-" if value is None else f"{value:.2f}" for value in numbers["acc"][0])
        lines += [
            f"{name:<8} accuracy {numbers['last_acc']:.2f}  task known {numbers['last_acc_task_il']:.2f}{top}{own}",
            f"{'':<8} by task  {tasks}",
        ]
    return "\n".join(lines)
