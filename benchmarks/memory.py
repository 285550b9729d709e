"""What a learner keeps, by class and by task: python -m benchmarks.memory [LEARNER ...]

A network with the width of a ViT-B/16 and images of 16 px, so that a pass costs next to nothing; default keys, nothing
is trained: what is stored has its sizes all the same. Networks of 5 and 6 blocks are measured, and 12 follow from them.
Five tasks of 2, 2, 5, 3 and 4 classes:

    bytes(t) - bytes(t - 1) = A + B classes(t)        A, B from tasks 3 and 4; task 5 says whether it is so

`stored_bytes` is measured, what a result file calls stored_bytes_per_task; images are left out and counted as papers
count them, at 224 px and a byte a number.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.asked import add_learners
from data.stream import DataManager
from models.base import LEARNERS, Learner
from models.factory import build_learner, config_from, learner_class
from models.parts.costs import answering, stored_bytes, tensor_bytes
from models.parts.exemplars import ExemplarSet
from models.parts.loop import learn
from models.parts.memory import ImageMemory
from utils.config import RunConfig
from utils.errors import ConfigError
from utils.runtime import Runtime

VIT_B = {"name": "vit", "img_size": 16, "patch_size": 8, "embed_dim": 768, "num_heads": 12}
DEPTH, DEPTHS = 12, (5, 6)  # asked for, and measured
SIZES, IMAGES = [2, 2, 5, 3, 4], 3  # classes a task, training images a class
IMAGE = 3 * 224**2
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "inflora +CA": ("inflora", {"ca_epochs": 1, "ca_samples": 2}),
    "hcl, QDI": ("hcl", {"variant": "qdi", "synthetic_size": 4, "inversion_steps": 1}),
    "slca, low_rank": ("slca", {"cov_storage": "low_rank"}),
    "slca, shared": ("slca", {"cov_storage": "shared"}),
}


def stream(path: Path) -> str:
    """Noise in the form of images."""
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(sum(SIZES)), IMAGES)
    pixels = rng.randint(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[::IMAGES], y_test=labels[::IMAGES])
    return f"npz:{path}"


def config_of(name: str, keys: dict[str, Any], dataset: str, depth: int) -> RunConfig:
    """Default keys, of which those of training are as small as they may be."""
    fields = learner_class(name).Config.model_fields
    values = {
        "model_name": name, "dataset": dataset, "backbone": VIT_B | {"depth": depth}, "weights": "random",
        "task_sizes": SIZES, "device": "cpu", "precision": "fp32", "num_workers": 0,
    } | {field: 0 for field in fields if field.endswith("epochs")}  # fmt: skip
    if fields.get("ca_epochs") and fields["ca_epochs"].default:
        values |= {"ca_epochs": 1, "ca_samples": 2}
    values |= keys
    while True:
        try:
            return config_from(values, "benchmark")
        except ConfigError as error:
            for fault in error.faults:
                key = fault.split('"')[1]
                values |= {key: 1}
                if "no effect" in fault:
                    del values[key]


def images_kept(learner: Learner) -> tuple[int, int]:
    """(bytes of images in the count of now, how many there will be in a long stream)."""
    now = most = 0
    for part in answering(learner):
        if isinstance(part, ExemplarSet):
            now, most = now + part.stored_bytes(), most + (part.config.exemplars.total or 0)
        elif isinstance(part, ImageMemory):
            now, most = now + tensor_bytes(part.images), most + part.capacity
    return now, most


def measured(name: str, keys: dict[str, Any], depth: int) -> tuple[np.ndarray, int]:
    """(bytes beside images after each task, images in a long stream) of a network of so many blocks."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, keys, stream(Path(folder) / "stream.npz"), depth)
        manager = DataManager(config, image_size=16)
        torch.manual_seed(0)
        learner = build_learner(config, Runtime("cpu", "fp32", num_workers=0), manager[0].info)
        found, most = [], 0
        for task in manager:
            learn(learner, task)
            images, most = images_kept(learner)
            found.append(stored_bytes(learner) - images)
    return np.array(found), most


HEADS = ["bytes a class", "bytes a task", "whatever the stream", "images, as papers count them"]


def figures(name: str) -> list[str]:
    """The cells of a learner, or of one of the `VARIANTS`, as `HEADS` names them."""
    (one, most), (two, _) = (measured(*VARIANTS.get(name, (name, {})), depth) for depth in DEPTHS)
    found = one + (DEPTH - DEPTHS[0]) * (two - one)
    steps = np.diff(found)
    by_class = (steps[2] - steps[1]) / (SIZES[3] - SIZES[2])
    by_task = steps[1] - by_class * SIZES[2]
    rest = found[1] - 2 * by_task - by_class * sum(SIZES[:2])  # from the second task on, which brings a teacher
    shown = [f"{round(value):,}" for value in (by_class, by_task, rest)]
    if round(steps[3] - by_task - by_class * SIZES[4]):  # classes times tasks, or what the data decide
        shown = ["", f"{min(steps[1:]):,} to {max(steps[1:]):,}", f"{found[1]:,} after task 2"]
    kept = f"{most:,} ({most * IMAGE / 1e6:,.0f} MB)" if most else ""
    return [*shown, kept]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_learners(parse, VARIANTS)
    options = parse.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    print(f"| {' | '.join(['learner', *HEADS])} |\n{'|---' * (1 + len(HEADS))}|")
    for name in options.learners or [*LEARNERS, *VARIANTS]:
        print(f"| {' | '.join([name, *figures(name)])} |", flush=True)


if __name__ == "__main__":
    main()
