"""Results of runs that never were, in the form that result.json has: for what reads finished runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.factory import config_from
from utils.config import RunConfig
from utils.folders import seed_folder

SIMPLECIL = {"model_name": "simplecil", "dataset": "digits", "increment": 2, "backbone": "small_vit"}


def made_config(**keys: Any) -> RunConfig:
    return config_from(SIMPLECIL | keys, "made")


def made_result(config: RunConfig, seed: int = 1993, curve: Sequence[float] = (99.0, 95.0, 90.0), **keys: Any) -> dict:
    """Its last and average accuracy are the curve's; `keys` replace entries."""
    tasks = len(curve)
    acc = [[curve[t] if i <= t else None for i in range(tasks)] for t in range(tasks)]
    classes = tasks * 2
    values = {
        "scores": ["logits"], "last_acc": curve[-1], "avg_acc": sum(curve) / tasks, "curve": list(curve),
        "curve_task_il": [min(100.0, value + 2) for value in curve], "acc": acc, "acc_task_il": acc,
        "last_acc_task_il": min(100.0, curve[-1] + 2), "avg_acc_task_il": 97.0, "forgetting": 3.0, "bwt": -3.0,
        "finished": True, "tasks": tasks, "task_sizes": [2] * tasks, "domains": [],
        "class_order": list(range(seed % classes, classes)) + list(range(seed % classes)),
        "class_names": [str(number) for number in range(classes)], "acc_per_class": [curve[-1]] * classes,
        "seconds": {"train": 10.0, "eval": 2.0, "total": 13.0}, "peak_memory_mib": 512.0, "images_per_second": 100.0,
        "parameters": {"total": 1000, "trainable": 10, "trainable_per_task": [10] * tasks,
                       "stored_bytes_per_task": [100 * (t + 1) for t in range(tasks)]},
        "config": config.with_seed(seed).model_dump(mode="json"),
        "environment": {"device": "cpu", "precision": "fp32"}, "version": "0.2.0", "commit": "", "date": "2026-11-27",
        "data": {"name": config.dataset, "split": "fixed", "hash": "d" * 64, "train": 1000, "test": 500},
        "weights": {"name": "small_vit", "sha256": "w" * 64, "matched": 1.0, "missing": [], "unexpected": []},
    }  # fmt: skip
    return values | keys


def write_seed(folder: Path, config: RunConfig, seed: int = 1993, **keys: Any) -> Path:
    """config.json and result.json of a finished seed below `folder`."""
    place = seed_folder(folder, seed)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config.with_seed(seed).saved()))
    (place / "result.json").write_text(json.dumps(made_result(config, seed, **keys)))
    return place
