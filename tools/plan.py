"""The tasks, the class order, parameters, images, memory of a run, from its set-up on a few images. Trains nothing."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

import trainer
from data.loading import Batch
from data.stream import DataManager, Task
from models.base import Learner
from models.factory import load_config
from models.parts.costs import expected_bytes, stored_bytes
from models.parts.loop import begin
from models.parts.peaks import held_bytes, peaks, shortage
from models.parts.remarks import remarks
from models.parts.stages import Stage
from utils.config import RunConfig
from utils.errors import ConfigError, reason
from utils.runtime import Runtime

COMMAND = "plan"
HELP = "what a config will run, as `--config FILE --check` prints it"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", type=Path, metavar="FILE", help="experiment")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override keys")


def main(options: argparse.Namespace) -> int:
    for config in [load_config(str(path), options.set) for path in options.config]:
        print(plan(config))
    return 0


def plan(config: RunConfig) -> str:
    """The plan of a run as text. Raises UserError for whatever would stop the run before its first step."""
    first = config.with_seed(config.seeds[0])
    manager, learner = trainer.prepare(first, Runtime.of(config))
    task = replace(manager[0], train=manager[0].train.first(8))
    begin(learner, task)
    _try_networks(first, manager, learner)
    return "\n".join(_lines(config, manager, learner, task))


def _try_networks(config: RunConfig, manager: DataManager, learner: Learner) -> None:
    """Two images through each network that the run will make, in training and in evaluation. learner: at the beginning
    of its first task. Raises ConfigError naming the network that refuses them."""
    if learner.stage is not None:
        learner.make_optimizer()
    pixels = _pixels(learner, manager)
    _try(learner, pixels)
    for task in manager[1 : config.architectures]:
        _try(trainer.seeded_learner(config, learner.runtime, task), pixels)
    learner.eval()


def _pixels(learner: Learner, manager: DataManager) -> Tensor:
    """Two images of the first task, on the device."""
    view = manager[0].train.first(2).view("train")
    images, _ = view.__getitems__(Batch(torch.arange(len(view)).numpy()))
    return learner.runtime.to_device(images[:, :3], torch.zeros(len(images), dtype=torch.int64))[0]


def _try(learner: Learner, pixels: Tensor) -> None:
    try:
        for training in (True, False):
            learner.train(training)
            with torch.no_grad(), learner.runtime.autocast():
                learner.features(pixels)
    except (RuntimeError, ValueError, AssertionError) as error:
        sentence = f"{learner.network.backbone.info.name} refuses images of {pixels.shape[-1]} px"
        why = f"{type(error).__name__}: {reason(error)}"
        raise ConfigError("backbone", [f"{sentence} ({why}): choose another image_size"]) from None


def _lines(config: RunConfig, manager: DataManager, learner: Learner, task: Task) -> list[str]:
    info, data = learner.network.backbone.info, manager.data
    trainable = [p for p in learner.parameters() if p.requires_grad] if learner.stage is not None else []
    total = sum(p.numel() for p in learner.parameters())
    order = ", ".join(str(c) for c in manager.class_order[:12]) + (", ..." if len(manager.class_order) > 12 else "")
    recipes = ", ".join(f"{mode} {name}" for mode, name in config.recipes.items())
    known = ["stream       the number of tasks has to be known beforehand"] if learner.needs_num_tasks else []
    lines = [
        f"learner      {config.model_name}, seeds {', '.join(map(str, config.seeds))}",
        f"data         {data.name}: {len(data.train)} training and {len(data.test)} test "
        f"images, {data.num_classes} classes, sha256 {data.digest[:12]}",
        f"tasks        {_tasks(manager)}",
        *known,
        *(f"note         {remark}" for remark in remarks(config, manager)),
        f"images       {manager.image_size} px, {recipes}, normalize {config.normalize}",
        f"backbone     {info.name}, {info.feature_dim} features; {info.report}",
        f"class order  {order}",
        f"parameters   total {total:,}, trainable {sum(p.numel() for p in trainable):,}, "
        f"stored after task 1 {stored_bytes(learner) / 2**20:.1f} MiB",
        *_statistics_line(learner, manager),
        *_memory_lines(learner, manager, trainable),
        "task  classes  train images  test images  epochs",
    ]
    for task in manager:
        learner.task, learner.data = task.info, task
        stages = learner.stages(task)
        what = f"{task.classes.start}-{task.classes.stop - 1}" if task.domain is None else task.domain
        lines.append(
            f"{task.index + 1:>4}  {what:>7}  {_images(learner, task, stages):>12}  {len(task.test):>11}  "
            f"{_epochs(stages):>6}"
        )
    return lines


def _images(learner: Learner, task: Task, stages: Sequence[Stage]) -> int:
    """Of an epoch of the first stage; of the task where nothing is trained."""
    learner.stage = stages[0] if stages else None
    return len(learner.train_data(task)) if stages else len(task.train)


def _epochs(stages: Sequence[Stage]) -> str:
    return " + ".join(str(stage.epochs) for stage in stages) or "0"


def _tasks(manager: DataManager) -> str:
    """How the stream adds up: "196 classes: 20 + 8 x 20 + 16 = 196"."""
    if manager.domain_incremental:
        return f"{len(manager)} domains of {manager.data.num_classes} classes: {', '.join(manager.data.domain_names)}"
    runs = [(size, len(list(same))) for size, same in groupby(manager.task_sizes[1:])]
    terms = [str(manager.task_sizes[0]), *(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)]
    return f"{manager.data.num_classes} classes: {' + '.join(terms)} = {sum(manager.task_sizes)}"


def _statistics_line(learner: Learner, manager: DataManager) -> list[str]:
    first, last = (expected_bytes(learner, manager[:count]) for count in (1, len(manager)))
    return [f"statistics   {first:,} bytes after task 1, {last:,} after the last"] if last else []


def _memory_lines(learner: Learner, manager: DataManager, trainable: list[nn.Parameter]) -> list[str]:
    """The peak of each stage, and which the device has no room for."""
    needed, lines = peaks(learner, manager[:], _pixels(learner, manager)), []
    if learner.stage is None:
        lines.append(f"about {_weights(learner) / 2**20:.0f} MiB of weights; nothing is trained in task 1")
    else:
        training = _memory_bytes(learner, learner.stage, trainable)
        needed = {"training": training - _weights(learner) + held_bytes(learner, manager[:])} | needed
        learner.eval()
    sizes = {"training": "batch_size", "statistics": "test_batch_size", "evaluation": "test_batch_size"}
    for stage, size in needed.items():
        batches = f" with batches of {getattr(learner.config, sizes[stage])}" if stage in sizes else ""
        lines.append(f"about {size / 2**20:,.0f} MiB in {stage}{batches}")
    if (short := shortage(needed, learner)) is not None:
        lines.append(f"too little: {short}")
    return [f"memory       {line}" for line in lines]


def _weights(learner: Learner) -> int:
    return sum(p.numel() * p.element_size() for p in learner.parameters())


def _memory_bytes(learner: Learner, stage: Stage, trainable: list[nn.Parameter]) -> int:
    """Weights, gradients, optimiser state, and what a forward pass keeps for the backward pass (measured on up to two
    images, scaled to the batch, or to a part of one that goes through in parts)."""
    slots = 2 if stage.optimizer == "sgd" else 3  # gradient + momentum, or gradient + two moments
    slots += 2 * (learner.config.sam is not None)  # the weights and the gradient of its first pass
    numbers = _weights(learner) + slots * sum(p.numel() * p.element_size() for p in trainable)
    if not trainable:
        return numbers
    assert learner.data is not None
    view = learner.train_data(learner.data)
    count = min(2, len(view))
    images, targets = view.__getitems__(Batch(torch.arange(count).numpy()))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    learner.train()
    own = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), learner.runtime.autocast():
        inputs, labels = learner.prepare(*learner.runtime.to_device(images, targets))
        learner.loss(getattr(learner, stage.module), inputs, labels)
    copies = [c for m in learner.modules() for c in getattr(m, "low_precision", {}).values()]
    own |= {copy.untyped_storage().data_ptr() for copy in copies}
    numbers += sum(copy.numel() * copy.element_size() for copy in copies)
    activations = sum(size for pointer, size in kept.items() if pointer not in own)
    at_once = -(-learner.config.batch_size // getattr(learner.config, "accumulate", 1))
    return numbers + activations * at_once // count
