"""One run: seeds, data, learner, task sequence, evaluation, results, checkpoints."""

import logging
import time
from contextlib import ExitStack, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from convs.backbones import input_size
from data.splits import cache_root
from data.stream import DataManager, Task, TaskInfo
from models.base import Learner
from models.factory import build_learner
from models.parts import first_task
from models.parts.costs import num_trainable, stored_bytes
from models.parts.drift import following, noted, say
from models.parts.evaluation import evaluate
from models.parts.frozen_store import FrozenStore
from models.parts.gradient import refuse_accumulation
from models.parts.loop import FitState, Observer, Position, learn
from models.parts.predictions import Predictions
from models.parts.probe import probe
from models.parts.remarks import check_processes, refuse_stream, remarks
from models.parts.state import learner_state, restore
from utils import checkpoint
from utils.config import RunConfig
from utils.errors import Interrupted
from utils.folders import (
    as_begun,
    claim,
    draw,
    refuse_foreign,
    refuse_other_inputs,
    seed_folder,
    sound_result,
    summarise,
)
from utils.interrupt import StopSignal
from utils.metrics import accuracy_by_class, summarise_probe, summarise_scores
from utils.plots import plot_images, plot_run
from utils.record import Record
from utils.results import EpochLog, curve_text, duration, make_folder, run_log, write_json
from utils.runtime import Runtime
from utils.seed import rng_state, seed_everything, set_rng_state
from utils.storage import held
from utils.trackers import open_trackers
from utils.version import VERSION, commit

log = logging.getLogger(__name__)


def run(config: RunConfig, folder: Path, resume: bool) -> None:
    """Run every seed of a config below `folder`, then summarise the seeds that are there.

    Raises UserError, TrainingError or Interrupted; what was done until then is saved.
    """
    runtime = Runtime.of(config)
    check_processes(config, runtime)
    for seed in config.seeds:
        run_seed(config.with_seed(seed), seed_folder(folder, seed), runtime, resume)
    if runtime.is_main:
        summarise(config, folder)


def load_data(config: RunConfig, device: torch.device | None = None) -> DataManager:
    return DataManager(config, config.image_size or input_size(config.backbone), device)


def seeded_learner(config: RunConfig, runtime: Runtime, task: TaskInfo, restoring: bool = False) -> Learner:
    """A learner at the beginning of its stream, or built for `task` so that a state can be restored into it.

    Raises ConfigError for what the config cannot ask of the network.
    """
    seed_everything(config.torch_seed)
    learner = build_learner(config, runtime, task.info, restoring)
    refuse_accumulation(learner)
    return learner


def prepare(config: RunConfig, runtime: Runtime) -> tuple[DataManager, Learner]:
    """Data first, then the learner: what a run, --check and benchmarks begin with.

    Raises ConfigError where the learner does not take the stream.
    """
    manager = load_data(config, runtime.device)
    learner = seeded_learner(config, runtime, manager[0])
    refuse_stream(learner, manager)
    return manager, learner


def run_seed(config: RunConfig, folder: Path, runtime: Runtime, resume: bool) -> None:
    """One seed in its own folder. A finished seed is skipped when resuming."""
    refuse_foreign(folder)
    if runtime.is_main:
        make_folder(folder)
    with held(folder) if runtime.is_main else nullcontext():
        config = as_begun(folder, config)
        claim(folder, config, resume, repair=runtime.is_main)
        runtime.barrier()
        if runtime.is_main:
            write_json(folder / "config.json", config.saved())
        if (result := sound_result(folder, repair=False)) is not None and result["finished"]:
            log.info("%s: finished, skipped", folder)
            if runtime.is_main and not (folder / "plots" / "curve.png").is_file():
                draw(plot_run, result, folder / "plots")  # it was stopped there
            return
        with run_log(folder, runtime.is_main), StopSignal() as stop:
            run = SeedRun(config, folder, runtime, stop)
            if runtime.is_main:
                write_json(folder / "config.json", run.config.saved())  # "auto" is settled
            run.run()


class SeedRun(Observer):
    """The task sequence of one seed: learn, evaluate, save; and what `learn` is watched for: bar, epoch lines,
    checkpoints by the clock, stopping on a signal."""

    AGREE_EVERY = 20  # steps between agreements of several processes on saving and stopping

    def __init__(self, config: RunConfig, folder: Path, runtime: Runtime, stop: StopSignal):
        self.folder, self.runtime, self.stop = folder, runtime, stop
        runtime.begin_run()
        self.manager = load_data(config, runtime.device)
        self.config = config = config.settled(self.manager.augment_on)
        self.record = Record.empty(len(self.manager), self.manager.data.num_classes)
        self.checkpoint = folder / "checkpoint" / "last.pt"
        self.started = self.saved_at = time.perf_counter()
        self.total_before = 0.0
        if getattr(config, "accumulate", 1) > 1:  # what later networks refuse is said before the first is trained
            for later in self.manager[1 : config.architectures]:
                seeded_learner(config, runtime, later)
        self.learner = self._resumed() if self.checkpoint.is_file() else self._fresh()
        refuse_stream(self.learner, self.manager)
        report = self.learner.network.backbone.info.report
        refuse_other_inputs(folder, config, self.manager.data.digest, (report.name, report.sha256))
        self.store = FrozenStore(config.frozen_gib * 2**30, cache_root(config.cache_root) / "frozen")
        if runtime.is_main:
            self.epochs = EpochLog(folder / "epochs.jsonl", self.record.epoch_lines)
        names = config.log_to if runtime.is_main else ()
        done = len(self.record.epoch_lines)
        self.trackers = open_trackers(names, folder, config.model_dump(mode="json"), done)
        self.batches, self.bar, self._points = 0, None, 0
        self._held = ExitStack()  # keeps a signal from cutting what has safe points

    def run(self) -> None:
        log.info("%s on %s, seed %s: %d tasks", self.config.model_name, self.config.dataset, self.config.seed,
                 len(self.manager))  # fmt: skip
        for remark in remarks(self.config, self.manager):
            log.warning("%s", remark)
        log.info("%s; %s", self.runtime.device, self.learner.network.backbone.info.report)
        try:
            for index in range(self.record.done, len(self.manager)):
                self._learn(self.manager[index])
                self._evaluate(self.manager[index])
                self.save("start")
            self._report()
        finally:
            self.trackers.close()

    def _fresh(self) -> Learner:
        learner = seeded_learner(self.config, self.runtime, self.manager[0])
        return learner if self.config.init_from is None else self._behind_first_task(learner)

    def _behind_first_task(self, learner: Learner) -> Learner:
        """As another run left it in its first task, with all that the task measured."""
        state = first_task.begin_behind(learner, self.manager, self.record)
        self._go_on(state)
        return learner

    def _go_on(self, state: dict[str, Any]) -> None:
        """Clocks and generators where a checkpoint left them; the record is taken up already."""
        self.runtime.stopwatch.seconds.update(self.record.seconds)
        self.total_before = self.record.total
        states = state["rng"]
        set_rng_state(states[self.runtime.rank if self.runtime.rank < len(states) else 0], self.runtime.device)

    def _resumed(self) -> Learner:
        """The learner of the checkpoint, and everything else of it taken up."""
        identity, state = checkpoint.load(self.checkpoint)
        learner = seeded_learner(self.config, self.runtime, TaskInfo.from_state(state["learner"]["task"]))
        own = self._identity(learner)
        checkpoint.refuse_other(self.checkpoint, identity, {k: v for k, v in own.items() if k != "weights"})
        restore(learner, state["learner"])
        checkpoint.refuse_other(self.checkpoint, identity, self._identity(learner))  # a run may have several networks
        self.record.load_state_dict(state["record"])
        self._go_on(state)
        where = {"start": "", "fit": ", in training", "fitted": ", trained"}[self.record.phase]
        log.info("resumed: %d of %d tasks done%s", self.record.done, len(self.manager), where)
        return learner

    def _learn(self, task: Task) -> None:
        record, self.record.task = self.record, task.index
        position = Position(record.phase, record.stage, record.fit)
        record.fit = None
        self.runtime.on_safe_point = self._safe_point
        with self._held:
            learn(self.learner, task, self, position)

    def _evaluate(self, task: Task) -> None:
        learner, record, config = self.learner, self.record, self.config
        kept = Predictions() if config.save_predictions else None
        found = evaluate(learner, self.manager.tested_after(task), self.store, keep=None if kept is None else kept.add)
        record.add(task.index, found.names, found.correct, found.by_class)
        record.images_tested += found.images
        record.drift = following(record.drift, task.index, noted(found.drift, found.newest, task.info))
        if config.probe is not None:
            with self.runtime.stopwatch("probe"):
                right = probe(learner, task, config.probe, config.probe_lrate)
            record.probed[task.index, : task.index + 1] = right
        record.stored_bytes = [*record.stored_bytes[: task.index], stored_bytes(learner)]
        record.done, record.stage = task.index + 1, 0
        result = self.result()
        if self.runtime.is_main:
            self.trackers.task(result, len(self.epochs.lines))
        if kept is not None:
            kept.write(self.runtime, self.manager[: task.index + 1], result, self.folder)
        log.info("task %d/%d  accuracy %.2f  average %.2f  task known %.2f", task.index + 1, task.num_tasks,
                 result["last_acc"], result["avg_acc"], result["last_acc_task_il"])  # fmt: skip
        say(record.drift[-1], task.info, found.drift)

    def result(self) -> dict[str, Any]:
        """What result.json holds, for the tasks done so far."""
        record, manager, config = self.record, self.manager, self.config
        done, data = record.done, manager.data
        tested = len(manager.tested_after(manager[done - 1]))
        counts = np.array([len(task.test) for task in manager[:tested]], dtype=float)
        by_class = np.bincount(np.concatenate([t.test.labels for t in manager[:tested]]), minlength=data.num_classes)
        if manager.domain_incremental and manager[0].test is manager[-1].test:
            by_class //= tested  # all domains share one test set
        seconds, report = dict(self.runtime.stopwatch.seconds), self.learner.network.backbone.info.report
        return {
            **summarise_scores(
                record.scores, record.correct[:, :, :done, :tested], counts, manager[done - 1].total_classes
            ),
            **summarise_probe(config.probe, record.probed[:done, :done], counts[:done]),
            **self.learner.report().numbers,
            "finished": done == len(manager),
            "tasks": len(manager),
            "task_sizes": manager.task_sizes,
            "domains": list(data.domain_names),
            "class_order": manager.class_order.tolist(),
            "class_names": manager.class_names,
            "acc_per_class": accuracy_by_class(record.by_class[0], by_class),
            "drift": record.drift,
            "seconds": seconds | {"total": self._total_seconds()},
            "images_per_second": record.images_trained / seconds["train"] if seconds.get("train") else None,
            "images_evaluated": record.images_tested,
            "peak_memory_mib": max(record.peak_memory, self.runtime.peak_memory_mib()),
            "parameters": {
                "total": sum(p.numel() for p in self.learner.parameters()),
                "trainable": max(record.trainable, default=0),
                "trainable_per_task": record.trainable,
                "stored_bytes_per_task": record.stored_bytes,
            },
            "config": config.model_dump(mode="json"),
            "environment": self.runtime.describe(),
            "version": VERSION,
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "data": {
                "name": data.name, "split": data.variant, "hash": data.digest,
                "train": len(data.train), "test": len(data.test),
                "unreadable": {"count": len(manager.unreadable), "files": manager.unreadable},
            },
            "weights": {
                "name": report.name, "sha256": report.sha256, "matched": report.matched,
                "missing": list(report.missing), "unexpected": list(report.unexpected),
                "entry": report.entry or None, "others": list(report.others), "done": list(report.done),
            },
        }  # fmt: skip

    def _total_seconds(self) -> float:
        return self.total_before + time.perf_counter() - self.started

    def _report(self) -> None:
        if not self.runtime.is_main:
            return
        result = self.result()
        write_json(self.folder / "result.json", result)
        log.info("%s", curve_text(result))
        log.info("results in %s", self.folder)
        draw(plot_run, result, self.folder / "plots")

    def _safe_point(self) -> None:
        """In `before_task`: from the first one on a signal is obeyed here, after saving, and nowhere in between."""
        self._held.enter_context(self.stop.deferred())
        self.runtime.on_safe_point = self._later_safe_point
        self._points = 0
        self.save_if_due("start")

    def _later_safe_point(self) -> None:
        """Several processes agree every so many points, as in training."""
        self._points += 1
        if self.runtime.world == 1 or self._points % self.AGREE_EVERY == 0:
            self.save_if_due("start")

    def task_started(self) -> None:
        self.runtime.on_safe_point = None
        self._held.close()
        record = self.record
        record.trainable = [*record.trainable[: record.task], num_trainable(self.learner)]
        if self.runtime.is_main:
            for name, images in self.learner.report().pictures.items():
                draw(plot_images, images.cpu().numpy(), self.folder / "plots" / f"{name}.png")

    def stage_started(self, number: int) -> None:
        """From here to the end of the stage a signal waits for the next step."""
        self.record.phase, self.record.stage = "fit", number
        self._held.enter_context(self.stop.deferred())

    def epoch_started(self, batches: int, done: int) -> None:
        self.batches = batches
        # disable=None: no bar where the output is not a terminal
        disable = None if self.runtime.is_main else True
        self.bar = tqdm(total=batches, initial=done, leave=False, disable=disable, desc=f"task {self.record.task + 1}")

    def step_done(self, fit: FitState) -> None:
        if self.bar is not None:
            self.bar.update()
        agreed = self.runtime.world == 1 or fit.step % self.AGREE_EVERY == 0
        if agreed and fit.step < self.batches:  # at the end of the epoch `epoch_done` does it
            self.save_if_due("fit", fit)

    def epoch_done(self, fit: FitState, numbers: dict[str, float]) -> None:
        task, stage = self.learner.data, self.learner.stage
        assert task is not None and stage is not None
        if self.bar is not None:
            self.bar.close()
        self.record.images_trained += len(self.learner.train_data(task))
        every = self.learner.config.eval_every
        if every and fit.epoch % every == 0 and fit.epoch < fit.epochs:
            tasks = self.manager.tested_after(task)
            right = evaluate(self.learner, tasks, self.store).main[0].sum()
            numbers["accuracy"] = 100 * right / sum(len(t.test) for t in tasks)
        left = (fit.epochs - fit.epoch) * numbers.pop("seconds")
        named = {} if stage.name == "train" else {"stage": stage.name}
        line = {"task": task.index + 1, **named, "epoch": fit.epoch, "epochs": fit.epochs, **numbers}
        extra = "".join(f"  {k} {v:.4g}" for k, v in numbers.items() if k not in ("loss", "lr", "images_per_second"))
        log.info("task %d/%d  %sepoch %d/%d  loss %.4f  lr %.1e  %.0f img/s  eta %s%s", task.index + 1,
                 task.num_tasks, "".join(f"{name}  " for name in named.values()), fit.epoch, fit.epochs,
                 numbers["loss"], numbers["lr"], numbers["images_per_second"], duration(left), extra)  # fmt: skip
        if self.runtime.is_main:
            self.epochs.append(line)
            self.trackers.epoch(line, len(self.epochs.lines))
        self.save_if_due("fit", fit)

    def stage_done(self, number: int) -> None:
        self.save("fitted")
        self._held.close()

    def save_if_due(self, phase: str, fit: FitState | None = None) -> None:
        """Save by the clock or on a signal, and stop on a signal; all processes agree on both."""
        due = time.perf_counter() - self.saved_at > 60 * self.config.checkpoint_minutes
        stop = self.runtime.any(self.stop.requested)
        if stop or self.runtime.any(due):
            self.save(phase, None if fit is None else fit.state_dict())
        if stop:
            raise Interrupted(self.stop.name)

    def save(self, phase: str, fit: dict[str, Any] | None = None) -> None:
        """Write the checkpoint, and result.json after a task. phase: as `Position`."""
        with self.stop.deferred(), self.runtime.stopwatch("checkpoint"):
            states = self.runtime.gather(rng_state(self.runtime.device))
            self.saved_at = time.perf_counter()  # in every process: one that is still due makes all of them save
            self.record.phase = phase
            if not self.runtime.is_main:
                return
            record = self.record
            record.peak_memory = max(record.peak_memory, self.runtime.peak_memory_mib())
            record.seconds, record.total = dict(self.runtime.stopwatch.seconds), self._total_seconds()
            record.epoch_lines = self.epochs.lines
            state = {
                "record": record.state_dict() | {"fit": fit},
                "learner": learner_state(self.learner),
                "rng": states,
            }
            if phase == "start" and record.done:
                write_json(self.folder / "result.json", self.result() | {"finished": False})
            checkpoint.save(state, self.checkpoint, self._identity())
            if (name := first_task.kept_as(self.learner, phase, record)) is not None:
                checkpoint.keep(self.checkpoint, name)

    def _identity(self, learner: Learner | None = None) -> dict[str, Any]:
        """What the checkpoint belongs to."""
        report = (learner or self.learner).network.backbone.info.report
        return {
            "learner": self.config.model_name,
            "seed": self.config.seeds[0],
            "torch_seed": self.config.torch_seed,
            "config": self.config.fingerprint(),
            "data": self.manager.data.digest,
            "weights": report.sha256 or report.name,
        }
