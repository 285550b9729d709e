"""One run: seed, data, learner, task sequence, evaluation, results, checkpoint."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from convs.backbones import input_size
from models.base import LEARNERS, Learner
from models.parts.loop import Fit, Observer, evaluate, fit
from models.parts.probe import probe
from utils import checkpoint
from utils.config import RunConfig
from utils.data_manager import DataManager, Task
from utils.errors import Interrupted, UserError
from utils.factory import build_learner
from utils.interrupt import StopSignal
from utils.metrics import summarise, summarise_probe
from utils.plots import plot_images, plot_run, plot_seeds
from utils.results import (
    EpochLog,
    curve_text,
    make_folder,
    read_result,
    run_log,
    summarise_seeds,
    summary_table,
    write_json,
    write_text,
)
from utils.runtime import Runtime
from utils.seed import rng_state, seed_everything, set_rng_state

log = logging.getLogger(__name__)


def run(config: RunConfig, folder: Path, resume: bool) -> None:
    """Run every seed of a config below `folder`, then summarise the seeds that are there.

    Raises UserError, TrainingError or Interrupted; what was done until then is saved.
    """
    runtime = Runtime(config.device, config.precision, config.num_workers, config.compile)
    for seed in config.seeds:
        run_seed(config.with_seed(seed), folder / f"seed{seed}", runtime, resume)
    if runtime.is_main:
        _summarise(config, folder)


def prepare(config: RunConfig, runtime: Runtime) -> tuple[DataManager, Learner]:
    """Data first, then the learner, seeded: what both a run and --check begin with."""
    return load_data(config), seeded_learner(config, runtime)


def load_data(config: RunConfig) -> DataManager:
    return DataManager(config, config.image_size or input_size(config.backbone))


def seeded_learner(config: RunConfig, runtime: Runtime) -> Learner:
    seed_everything(torch_seed(config))
    return build_learner(config, runtime)


def torch_seed(config: RunConfig) -> int:
    """The seed of a single-seed config; with "upstream", the constant that some references seed torch with."""
    constant = LEARNERS[config.model_name].upstream_seed
    return constant if config.upstream and constant is not None else config.seeds[0]


def take_up(learner: Learner, task: Task, state: dict[str, Any]) -> None:
    """Make a learner what it was when a checkpoint was written, in that task."""
    learner.task = task
    learner.load_state_dict(state["learner"])
    trainable = set(state["requires_grad"])
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(name in trainable)
    for name, part in learner.parts().items():
        part.load_state_dict(state["parts"][name])


def run_seed(config: RunConfig, folder: Path, runtime: Runtime, resume: bool) -> None:
    """One seed in its own folder. A finished seed is skipped when resuming."""
    _claim(folder, config, resume)
    if (result := read_result(folder)) is not None and result["finished"]:
        log.info("%s: finished, skipped", folder)
        return
    if runtime.is_main:
        make_folder(folder)
        write_json(folder / "config.json", config.model_dump(mode="json"))
    runtime.barrier()
    with run_log(folder, runtime.is_main), StopSignal() as stop:
        SeedRun(config, folder, runtime, stop).run()


class SeedRun:
    """The task sequence of one seed, and everything that has to survive a kill."""

    def __init__(self, config: RunConfig, folder: Path, runtime: Runtime, stop: StopSignal):
        self.config, self.folder, self.runtime, self.stop = config, folder, runtime, stop
        runtime.stopwatch.seconds.clear()
        self.manager, self.learner = prepare(config, runtime)
        tasks = len(self.manager)
        self.correct = np.full((2, tasks, tasks), np.nan)  # class-incremental, task known
        self.probed = np.full((tasks, tasks), np.nan)  # correct predictions of the probe
        self.stored_bytes: list[int] = []
        self.trainable: list[int] = []
        self.images_trained, self.peak_memory, self.total_before = 0, 0.0, 0.0
        self.task, self.stage, self.done = 0, "start", 0  # task at work, how far it is, tasks finished
        self.fit_state: dict[str, Any] | None = None
        self.started = self.saved_at = time.perf_counter()
        self.checkpoint = folder / "checkpoint" / "last.pt"
        epoch_lines = self._restore() if self.checkpoint.is_file() else 0
        if runtime.is_main:
            self.epochs = EpochLog(folder / "epochs.jsonl", keep=epoch_lines)

    def run(self) -> None:
        info = self.learner.backbone_info
        log.info("%s on %s, seed %s: %d tasks", self.config.model_name, self.config.dataset, self.config.seed,
                 len(self.manager))  # fmt: skip
        log.info("%s; %s", self.runtime.device, info.report)
        for index in range(self.done, len(self.manager)):
            self._run_task(self.manager[index])
        self._report()

    def _run_task(self, task: Task) -> None:
        learner, self.task = self.learner, task.index
        learner.task = task
        if self.stage == "start":
            learner.restartable = self.restartable
            learner.before_task(task)
            if self.runtime.is_main:
                for name, images in learner.pictures().items():
                    plot_images(images.cpu().numpy(), self.folder / "plots" / f"{name}.png")
        if self.stage in ("start", "fit"):
            self.trainable = self.trainable[: task.index]
            self.trainable.append(learner.trained_numbers())
            resume, self.fit_state = self.fit_state, None
            with self.stop.deferred():
                self.stage = "fit"
                fit(learner, task, Progress(self, task), resume)
                if learner.epochs(task):
                    self._save("fitted")
        learner.after_task(task)
        tested = self.manager.tested_after(task)
        self.correct[:, task.index, : len(tested)] = evaluate(learner, tested)
        if self.config.probe is not None:
            with self.runtime.stopwatch("probe"):
                found = probe(learner, task, self.config.probe, self.config.probe_lrate)
            self.probed[task.index, : task.index + 1] = found
        self.stored_bytes = [*self.stored_bytes[: task.index], learner.stored_bytes()]
        self.done, self.stage = task.index + 1, "start"
        result = self.result()
        log.info("task %d/%d  accuracy %.2f  average %.2f  task known %.2f", task.index + 1, task.num_tasks,
                 result["last_acc"], result["avg_acc"], result["last_acc_task_il"])  # fmt: skip
        self._save("start")

    def result(self) -> dict[str, Any]:
        """What result.json holds, for the tasks done so far."""
        done = self.done
        tested = len(self.manager.tested_after(self.manager[done - 1]))
        counts = np.array([len(task.test) for task in self.manager[:tested]], dtype=float)
        seconds = dict(self.runtime.stopwatch.seconds)
        config, manager, info = self.config, self.manager, self.learner.backbone_info
        return {
            **summarise(self.correct[0, :done, :tested], self.correct[1, :done, :tested], counts),
            **summarise_probe(self.config.probe, self.probed[:done, :done], counts[:done]),
            **self.learner.results(),
            "finished": done == len(manager),
            "tasks": len(manager),
            "task_sizes": manager.task_sizes,
            "domains": list(manager.data.domain_names),
            "class_order": manager.class_order.tolist(),
            "seconds": seconds | {"total": self._total_seconds()},
            "images_per_second": self.images_trained / seconds["train"] if seconds.get("train") else None,
            "peak_memory_mib": max(self.peak_memory, self.runtime.peak_memory_mib()),
            "parameters": {
                "total": sum(p.numel() for p in self.learner.parameters()),
                "trainable": max(self.trainable, default=0),
                "trainable_per_task": self.trainable,
                "stored_bytes_per_task": self.stored_bytes,
            },
            "config": config.model_dump(mode="json"),
            "environment": self.runtime.describe(),
            "data": {
                "name": manager.data.name, "split": manager.data.variant, "hash": manager.data.digest,
                "train": len(manager.data.train), "test": len(manager.data.test),
            },
            "weights": {
                "name": info.report.name, "sha256": info.report.sha256, "matched": info.report.matched,
                "missing": list(info.report.missing), "unexpected": list(info.report.unexpected),
            },
        }  # fmt: skip

    def _total_seconds(self) -> float:
        return self.total_before + time.perf_counter() - self.started

    def _report(self) -> None:
        if not self.runtime.is_main:
            return
        result = self.result()
        write_json(self.folder / "result.json", result)
        plot_run(result, self.folder / "plots")
        log.info("%s", curve_text(result))
        log.info("results in %s", self.folder)

    @contextmanager
    def restartable(self) -> Iterator[Callable[[], None]]:
        """A long stage of `before_task`: a signal is obeyed at its safe points, after saving. What is saved is the
        start of the task, with the progress that the learner's parts hold."""
        with self.stop.deferred():
            yield lambda: self.save_if_due("start")

    def save_if_due(self, stage: str, fit_state: Fit | None = None) -> None:
        """Save by the clock or on a signal, and stop on a signal; all processes agree on both."""
        due = time.perf_counter() - self.saved_at > 60 * self.config.checkpoint_minutes
        stop = self.runtime.any(self.stop.requested)
        if stop or self.runtime.any(due):
            self._save(stage, None if fit_state is None else fit_state.state_dict())
        if stop:
            raise Interrupted("a signal")

    def _save(self, stage: str, fit_state: dict[str, Any] | None = None) -> None:
        """Write the checkpoint, and result.json after a task.

        stage: what a resumed run does next: "start" the next task, go on with "fit", or take up a "fitted" task.
        """
        with self.stop.deferred(), self.runtime.stopwatch("checkpoint"):
            states = self.runtime.gather(rng_state())
            self.saved_at = time.perf_counter()  # in every process: one that is still due makes all of them save
            if not self.runtime.is_main:
                return
            learner = self.learner
            state = {
                "task": self.task,
                "stage": stage,
                "done": self.done,
                "fit": fit_state,
                "learner": learner.state_dict(),
                "parts": {name: part.state_dict() for name, part in learner.parts().items()},
                "requires_grad": [name for name, p in learner.named_parameters() if p.requires_grad],
                "rng": states,
                "correct": torch.from_numpy(self.correct),
                "probed": torch.from_numpy(self.probed),
                "stored_bytes": self.stored_bytes,
                "trainable": self.trainable,
                "images_trained": self.images_trained,
                "peak_memory": max(self.peak_memory, self.runtime.peak_memory_mib()),
                "seconds": dict(self.runtime.stopwatch.seconds),
                "total": self._total_seconds(),
                "epoch_lines": self.epochs.lines,
            }
            if stage == "start":
                write_json(self.folder / "result.json", self.result() | {"finished": False})
            checkpoint.save(state, self.checkpoint)
            if stage == "start" and self.config.keep_checkpoints == "tasks":
                checkpoint.keep(self.checkpoint, f"task{self.done}.pt")

    def _restore(self) -> int:
        """Take up the checkpoint; the number of epoch lines that belong to it."""
        state = checkpoint.load(self.checkpoint)
        self.task, self.stage, self.fit_state = state["task"], state["stage"], state["fit"]
        self.done = state["done"]
        take_up(self.learner, self.manager[self.task], state)
        self.correct, self.probed = state["correct"].numpy(), state["probed"].numpy()
        self.stored_bytes, self.trainable = state["stored_bytes"], state["trainable"]
        self.images_trained, self.peak_memory = state["images_trained"], state["peak_memory"]
        self.runtime.stopwatch.seconds.update(state["seconds"])
        self.total_before = state["total"]
        states = state["rng"]
        set_rng_state(states[self.runtime.rank if self.runtime.rank < len(states) else 0])
        where = {"start": "", "fit": ", in training", "fitted": ", trained"}[self.stage]
        log.info("resumed: %d of %d tasks done%s", self.done, len(self.manager), where)
        return state["epoch_lines"]


class Progress(Observer):
    """Watches `fit`: bar, epoch line, epochs.jsonl, checkpoints by the clock, stopping on a signal."""

    AGREE_EVERY = 20  # steps between agreements of several processes on saving and stopping

    def __init__(self, seed_run: SeedRun, task: Task):
        self.run, self.task = seed_run, task
        self.bar: tqdm | None = None
        self.batches = 0

    def epoch_started(self, batches: int, done: int) -> None:
        self.batches = batches
        # disable=None: no bar where the output is not a terminal
        disable = None if self.run.runtime.is_main else True
        self.bar = tqdm(total=batches, initial=done, leave=False, disable=disable, desc=f"task {self.task.index + 1}")

    def step_done(self, fit_state: Fit) -> None:
        run = self.run
        if self.bar is not None:
            self.bar.update()
        agreed = run.runtime.world == 1 or fit_state.step % self.AGREE_EVERY == 0
        if agreed and fit_state.step < self.batches:  # at the end of the epoch `epoch_done` does it
            run.save_if_due("fit", fit_state)

    def epoch_done(self, fit_state: Fit, numbers: dict[str, float]) -> None:
        run, config, task = self.run, self.run.config, self.task
        if self.bar is not None:
            self.bar.close()
        run.images_trained += len(run.learner.train_data(task))
        if config.eval_every and fit_state.epoch % config.eval_every == 0 and fit_state.epoch < fit_state.epochs:
            tasks = run.manager.tested_after(task)
            numbers["accuracy"] = 100 * evaluate(run.learner, tasks)[0].sum() / sum(len(t.test) for t in tasks)
        left = (fit_state.epochs - fit_state.epoch) * numbers.pop("seconds")
        line = {"task": task.index + 1, "epoch": fit_state.epoch, "epochs": fit_state.epochs, **numbers}
        extra = "".join(f"  {k} {v:.4g}" for k, v in numbers.items() if k not in ("loss", "lr", "images_per_second"))
        log.info("task %d/%d  epoch %d/%d  loss %.4f  lr %.1e  %.0f img/s  eta %s%s", task.index + 1, task.num_tasks,
                 fit_state.epoch, fit_state.epochs, numbers["loss"], numbers["lr"], numbers["images_per_second"],
                 _duration(left), extra)  # fmt: skip
        if run.runtime.is_main:
            run.epochs.append(line)
        run.save_if_due("fit", fit_state)


OUR_FILES = frozenset({"config.json", "train.log", "epochs.jsonl", "result.json", "checkpoint", "plots", "landscape"})


def _claim(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that holds another config, this run's results without --resume, or foreign files.

    A run that ended before its first epoch holds nothing worth keeping: its folder is free.
    """
    if folder.is_dir() and (foreign := sorted({path.name for path in folder.iterdir()} - OUR_FILES)):
        raise UserError(
            f"'{folder}' holds other files ({', '.join(foreign[:3])}). Choose another folder with --output DIR"
        )
    epochs = folder / "epochs.jsonl"
    begun = (folder / "result.json").is_file() or (folder / "checkpoint" / "last.pt").is_file()
    if not begun and not (epochs.is_file() and epochs.stat().st_size):
        return
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' holds a run whose config.json cannot be read ({error}). Restore it, or choose another folder "
            "with --output DIR"
        ) from None
    if differing := config.same_run(saved):
        now = config.model_dump(mode="json")
        shown = ", ".join(f"{key} {saved.get(key)} there, {now.get(key)} now" for key in differing[:5])
        raise UserError(
            f"'{folder}' holds a run with another config ({shown}). Choose another folder with --output DIR"
        )
    if not resume:
        raise UserError(
            f"'{folder}' holds this run already. --resume continues it (and skips what is finished); "
            "--output DIR starts it anew elsewhere"
        )


def _summarise(config: RunConfig, folder: Path) -> None:
    """summary.json, summary.md and the seeds' curves, over all finished seeds of this config in the folder."""
    found = [read_result(path) for path in sorted(folder.glob("seed*")) if path.is_dir()]
    results = [r for r in found if r is not None and r["finished"] and not config.same_run(r["config"])]
    if not results:
        return
    summary = summarise_seeds(results)
    write_json(folder / "summary.json", summary)
    write_text(folder / "summary.md", f"# {config.model_name} on {config.dataset}\n\n{summary_table(summary)}")
    if len(results) > 1:
        plot_seeds(results, folder / "plots" / "seeds.png")
        log.info("mean of %d seeds: last %.2f, average %.2f", len(results), summary["last_acc"]["mean"],
                 summary["avg_acc"]["mean"])  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
