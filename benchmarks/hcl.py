"""python -m benchmarks.hcl: HCL's expensive parts against the straightforward form of the same computation.

qdi step     32 new and 200 synthetic images: a teacher in training mode inside the graph, asked about both, against one
             without gradient whose answer to the synthetic images is kept. Losses must agree.
Inversion    a step on a batch of images: a teacher whose weights collect gradients, against a frozen one.
Image pool   images of a task that are augmented for an inversion: three views of each, against those that are read.

Times are processor seconds, the contenders taking turns, least of the rounds: other programs on the machine disturb
them less than the clock's.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loading import View
from data.stream import DataManager
from models.factory import build_learner, config_from
from models.hcl.inversion import Inversion, InversionSettings, Taps, statistics_loss, total_variation
from models.hcl.learner import HCL
from models.parts.loop import begin
from models.parts.losses import distillation
from utils.runtime import Runtime

BATCH, CLASSES = 32, 10


def hcl(network: str, images: int, task_images: int | None = None) -> HCL:
    """A learner in its second task, with a teacher and, if asked, random synthetic images."""
    config = config_from(
        {
            "model_name": "hcl", "variant": "qdi", "upstream": True, "dataset": "digits", "increment": 2,
            "backbone": network, "networks": [network, network], "reuse": "none", "synthetic_size": 200, "alpha": 1.0,
            "inversion_steps": 1, "num_workers": 0,
        },
        source="benchmark",
    )  # fmt: skip
    torch.manual_seed(0)
    tasks = DataManager(config, image_size=32)
    learner = build_learner(config, Runtime("cpu", "fp32", num_workers=0), tasks[0].info)
    assert isinstance(learner, HCL)
    begin(learner, tasks[0])
    learner.task, learner.data = tasks[1].info, tasks[1]
    learner.stage = learner.stages(tasks[1])[0]
    learner.teacher.update()
    if images:
        learner.synthetic.targets.ask(learner.teacher, torch.rand(images, 3, 32, 32))
    if task_images is not None:
        rows = np.resize(tasks[1].train.rows, task_images)
        larger = replace(tasks[1].train, rows=rows, labels=np.zeros(task_images, dtype=np.int64))
        learner.data = replace(tasks[1], train=larger)
    return learner


def least(contenders: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Processor seconds and the last value of each."""
    seconds: dict[str, float] = {}
    values = {name: contender() for name, contender in contenders.items()}
    for _ in range(rounds):
        for name, contender in contenders.items():
            started = time.process_time()
            values[name] = contender()
            seconds[name] = min(seconds.get(name, float("inf")), time.process_time() - started)
    return seconds, values


def qdi_step(network: str, synthetic: int, rounds: int) -> None:
    learner = hcl(network, synthetic)
    learner.train()
    made, images = learner.synthetic.targets.images, torch.rand(BATCH, 3, 32, 32)
    targets = torch.randint(CLASSES, (BATCH,))
    assert made is not None and learner.teacher.network is not None
    students = {name: copy.deepcopy(learner.network) for name in ("graph", "ours")}
    teacher = copy.deepcopy(learner.teacher.network).requires_grad_().train()
    optimizers = {name: torch.optim.SGD(student.parameters(), 0.03) for name, student in students.items()}

    def step(name: str, loss: Tensor) -> Tensor:
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    def graph() -> Tensor:
        student = students["graph"]
        logits, synthetic_logits = student(images), student(made)
        taught = distillation(synthetic_logits, teacher(made)) + distillation(logits, teacher(images))
        return step("graph", F.cross_entropy(logits, targets, label_smoothing=0.1) + taught)

    def ours() -> Tensor:
        inputs, labels = learner.prepare(images, targets)
        return step("ours", learner.loss(students["ours"], inputs, labels))

    seconds, losses = least({"graph": graph, "ours": ours}, rounds)
    difference = float((losses["graph"] - losses["ours"]).abs() / losses["graph"].abs())
    if difference > 1e-4:
        raise SystemExit(f"qdi step, {network}: the losses differ by {difference:.1e} after {rounds + 1} steps")
    print(f"qdi step     {network}, {BATCH} + {synthetic} images: {1e3 * seconds['graph']:.0f} ms with a graph through "
          f"the teacher, {1e3 * seconds['ours']:.0f} ms ours, {seconds['graph'] / seconds['ours']:.2f} times faster; "
          f"loss after {rounds + 1} steps differs by {difference:.0e}")  # fmt: skip


def inversion_step(network: str, count: int, rounds: int) -> None:
    learner = hcl(network, 0)
    frozen = learner.teacher.network
    assert frozen is not None
    frozen.eval()
    trainable = copy.deepcopy(frozen).requires_grad_()
    settings = InversionSettings(steps=2, lrate=0.03, feature=0.2, variation=0.003, l2=0.003, smoothing=0.1, warmup=2)
    start, labels = torch.rand(count, 3, 32, 32), torch.arange(count) % 2
    targets = Taps(frozen, "bn").running()

    def straightforward() -> Tensor:
        return steps(trainable, Taps(trainable, "bn"))

    def steps(teacher: nn.Module, taps: Taps) -> Tensor:
        images = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], betas=(0.5, 0.9))
        for step in range(settings.steps + 1):  # the last one at rate 0
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            logits, found = taps.watch(teacher, images)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.2 * statistics_loss(found, targets)
            loss = loss + 0.003 * total_variation(images) + 0.003 * images.norm()
            optimizer.zero_grad()
            teacher.zero_grad()
            loss.backward()
            optimizer.step()
        return images.detach()

    def ours() -> Tensor:
        return Inversion(settings).run(start, labels, frozen, Taps(frozen, "bn"), targets)

    seconds, images = least({"trainable": straightforward, "frozen": ours}, rounds)
    # Ours leaves out the pass at rate 0, one of 501 in a real inversion: compare step by step.
    theirs, own = seconds["trainable"] / (settings.steps + 1), seconds["frozen"] / settings.steps
    difference = float((images["trainable"] - images["frozen"]).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"inversion, {network}: the images differ by {difference:.1e}")
    print(f"inversion    {network}, {count} images: {theirs:.2f} s a step with a trainable teacher, {own:.2f} s ours, "
          f"{theirs / own:.2f} times faster; images differ by {difference:.0e}")  # fmt: skip


def pool(network: str, task_images: int) -> None:
    learner = hcl(network, 0, task_images)
    read: list[int] = []
    fetch = View.__getitems__

    def counted(view: View, batch):
        read.append(len(batch.rows))
        return fetch(view, batch)

    View.__getitems__ = counted  # type: ignore[method-assign]
    try:
        learner.synthetic.make(learner.teacher, learner.data, pretrained=False)
    finally:
        View.__getitems__ = fetch  # type: ignore[method-assign]
    every = 3 * task_images
    print(f"image pool   {network} as teacher, {task_images} images a task: {every} views, ours {sum(read)}, "
          f"{every / sum(read):.0f} times fewer")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--synthetic", type=int, default=200, help="images of the large networks' steps")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads")
    qdi_step("small_lenet", 200, 4 * given.rounds)
    qdi_step("small_resnet18", given.synthetic, max(2, given.rounds // 2))
    inversion_step("small_resnet18", given.synthetic, max(2, given.rounds // 2))
    pool("small_resnet18", 10_000)
    pool("small_lenet", 10_000)
