"""The synthetic set X~ of a task: images of old classes made from a teacher, and what the teacher answers to them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convs.network import Network
from data.loading import extract_features
from data.stream import Task
from models.hcl.fixed_targets import FixedTargets
from models.hcl.inversion import (
    Inversion,
    InversionSettings,
    Kind,
    Moments,
    StoredMoments,
    Taps,
    label_plan,
    pool_moments,
)
from models.parts.teacher import Teacher
from utils.runtime import Runtime
from utils.seed import mix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InvertedSettings:
    """size: images asked for. start: images of the new task, or noise. statistics: which layers are matched. source:
    where the targets of layers without running statistics come from: the teacher's own task ("previous": its images,
    and its X~ for older classes), or images of the new one. ln: what LayerNorm taps read; auto: normalised where the
    network was pre-trained."""

    size: int
    start: Literal["current", "noise"]
    statistics: Kind
    source: Literal["previous", "current"]
    ln: Literal["auto", "in", "norm"]
    inversion: InversionSettings


class InvertedSet:
    """One set per task, from its start on. A part with a state.

    All draws come from (seed, task), and an inversion under way is part of the state, so that a run interrupted in it
    makes the same images.
    """

    def __init__(self, settings: InvertedSettings, seed: int, runtime: Runtime, batch_size: int):
        self.settings, self.seed, self.runtime, self.batch_size = settings, seed, runtime, batch_size
        self.targets = FixedTargets(runtime.device)
        self.moments = StoredMoments(runtime.device)
        self.inversion = Inversion(settings.inversion)

    def __bool__(self) -> bool:
        return bool(self.targets)

    def measure(self, network: Network, task: Task, pretrained: bool) -> None:
        """At the end of a task: what the layers of the network, in eval mode, see in it. Where the synthetic set of
        this task stands for older ones, it counts by their share of the classes."""
        taps = self._taps(network, pretrained)
        if self.settings.source == "current" or not taps.needs_pass:
            return
        with self.runtime.stopwatch("statistics"):
            found = taps.measure(network, task.train.view("test"), self.runtime, self.batch_size)
            if self.targets.images is not None:
                with torch.no_grad():
                    _, old = taps.watch(network, self.targets.images)
                share = task.known_classes / task.total_classes
                found = pool_moments(found, old, share if task.domain is None else task.index / (task.index + 1))
        self.moments.values = found

    def make(self, teacher: Teacher, task: Task, pretrained: bool) -> dict[str, Tensor]:
        """The set of a new task, and the teacher's answer to it; pictures of its start and its end."""
        settings, network, seed = self.settings, teacher.network, mix(self.seed, task.index)
        assert isinstance(network, Network)
        network.eval()
        taps = self._taps(network, pretrained)
        generator, count = torch.Generator().manual_seed(seed), len(task.train)
        for_statistics, for_start = (torch.randperm(count, generator=generator).numpy() for _ in range(2))
        labels = label_plan(settings.size, task.known_classes, generator)
        wanted = for_statistics[: 4 * settings.size if taps.needs_pass and settings.source == "current" else 0]
        read, start = self._pool(network, task, wanted, np.resize(for_start, len(labels)))
        targets = self._targets(taps, network, read)
        if settings.start == "noise":
            start = torch.randn(start.shape, generator=generator).to(start)

        def logits(images: Tensor) -> Tensor:
            with self.runtime.autocast():
                return network.from_normalised(images)

        def watch(step: int, terms: dict[str, Tensor]) -> None:
            if step % 100 == 0:
                values = "  ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
                log.info("task %d/%d  inversion step %d/%d  %s", task.index + 1, task.num_tasks, step,
                         settings.inversion.steps, values)  # fmt: skip

        with self.runtime.stopwatch("inversion"):
            made = self.inversion.run(
                start,
                labels.to(start.device),
                logits,
                taps,
                targets,
                seed,
                safe_point=self.runtime.safe_point,
                watch=watch,
            )
        made = network.pixels(self.runtime.gather(made.cpu())[0].to(start.device))  # one set in all processes
        network.train(teacher.training)
        with self.runtime.autocast():
            self.targets.ask(teacher, made)
        name = f"inversion_task{task.index + 1}"
        return {f"{name}_start": network.pixels(start), f"{name}_made": made}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"targets": self.targets, "moments": self.moments, "inversion": self.inversion}

    def _taps(self, network: Network, pretrained: bool) -> Taps:
        normalised = self.settings.ln == "norm" or (self.settings.ln == "auto" and pretrained)
        return Taps(network, self.settings.statistics, normalised)

    @torch.no_grad()
    def _targets(self, taps: Taps, network: Network, read: Tensor) -> Moments:
        if not taps.needs_pass:
            return taps.running()
        if self.settings.source == "previous":
            return self.moments.values
        return taps.watch(network.from_normalised, read)[1] | taps.running()

    def _pool(self, network: Network, task: Task, *chosen: np.ndarray) -> list[Tensor]:
        """Training images under the training transform, normalised, by position in the task. Each is made once, and
        only those asked for: the reference augments every image of the task three times over."""
        rows = np.unique(np.concatenate(chosen))
        view = task.train.take(rows).view("train")
        flat, _ = extract_features(lambda images: images.flatten(1), view, self.runtime, self.batch_size)
        side = int((flat.shape[1] // 3) ** 0.5)
        images = network.normalise(flat.view(len(rows), 3, side, side))
        return [images[torch.from_numpy(np.searchsorted(rows, part)).to(images.device)] for part in chosen]
