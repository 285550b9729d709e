"""What --check prints: the tasks, the class order, parameters, images, memory. Trains nothing."""

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.data_manager import Batch, DataManager

if TYPE_CHECKING:
    from models.base import Learner


def plan(learner: "Learner", manager: DataManager) -> str:
    """The plan of a run as text, from the first task's set-up on a few images."""
    config, task, info = learner.config, manager[0], learner.backbone_info
    learner.task = replace(task, train=task.train.first(8))
    learner.before_task(learner.task)
    trainable = [p for p in learner.parameters() if p.requires_grad] if learner.epochs(task) else []
    total = sum(p.numel() for p in learner.parameters())
    order = ", ".join(str(c) for c in manager.class_order[:12]) + (", ..." if len(manager.class_order) > 12 else "")
    lines = [
        f"learner      {config.model_name}, seeds {', '.join(map(str, config.seeds))}",
        f"data         {manager.data.name}: {len(manager.data.train)} training and {len(manager.data.test)} test "
        f"images, {manager.data.num_classes} classes, sha256 {manager.data.digest[:12]}",
        f"tasks        {_tasks(manager)}",
        f"images       {manager.image_size} px, train {config.train_transform}, test {config.test_transform}, "
        f"normalize {config.normalize}",
        f"backbone     {info.name}, {info.feature_dim} features; {info.report}",
        f"class order  {order}",
        f"parameters   total {total:,}, trainable {sum(p.numel() for p in trainable):,}, "
        f"stored after task 1 {learner.stored_bytes() / 2**20:.1f} MiB",
        *_statistics_line(learner, manager),
        f"memory       about {_memory_mib(learner, trainable):.0f} MiB in training with batches of {config.batch_size}",
        "task  classes  train images  test images  epochs",
    ]
    for task in manager:
        learner.task = task
        what = f"{task.classes.start}-{task.classes.stop - 1}" if task.domain is None else task.domain
        lines.append(
            f"{task.index + 1:>4}  {what:>7}  {len(learner.train_data(task)):>12}  {len(task.test):>11}  "
            f"{learner.epochs(task):>6}"
        )
    return "\n".join(lines)


def _tasks(manager: DataManager) -> str:
    """How the stream adds up: "196 classes: 20 + 8 x 20 + 16 = 196"."""
    if manager.domain_incremental:
        return f"{len(manager)} domains of {manager.data.num_classes} classes: {', '.join(manager.data.domain_names)}"
    runs = [(size, len(list(same))) for size, same in groupby(manager.task_sizes[1:])]
    terms = [str(manager.task_sizes[0]), *(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)]
    return f"{manager.data.num_classes} classes: {' + '.join(terms)} = {sum(manager.task_sizes)}"


def _statistics_line(learner: "Learner", manager: DataManager) -> list[str]:
    first, last = (learner.statistics_bytes(manager[:count]) for count in (1, len(manager)))
    return [f"statistics   {first:,} bytes after task 1, {last:,} after the last"] if last else []


def _memory_mib(learner: "Learner", trainable: list[torch.nn.Parameter]) -> float:
    """Weights, gradients, optimiser state, and what a forward pass keeps for the backward pass (measured on up to two
    images, scaled to the batch)."""
    numbers = sum(p.numel() * p.element_size() for p in learner.parameters())
    slots = 2 if learner.config.optimizer == "sgd" else 3  # gradient + momentum, or gradient + two moments
    slots += 2 * (learner.config.sam is not None)  # the weights and the gradient of its first pass
    numbers += slots * sum(p.numel() * p.element_size() for p in trainable)
    if trainable:
        view = learner.train_data(learner.task)
        count = min(2, len(view))
        images, targets = view.__getitems__(Batch(torch.arange(count).numpy()))
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        learner.train()
        own = {p.untyped_storage().data_ptr() for p in learner.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            learner.runtime.autocast(),
        ):
            inputs, labels = learner.prepare(*learner.runtime.to_device(images, targets))
            learner.loss(learner.network, inputs, labels)
        copies = [c for m in learner.modules() if (c := getattr(m, "low_precision", None)) is not None]
        own |= {copy.untyped_storage().data_ptr() for copy in copies}
        numbers += sum(copy.numel() * copy.element_size() for copy in copies)
        activations = sum(size for pointer, size in kept.items() if pointer not in own)
        numbers += activations * learner.config.batch_size // count
    return numbers / 2**20
