"""The loss around the weights of a finished run, as surfaces, lines and numbers of flatness.

The run's folder gives config, data and weights; nothing in it changes but `landscape/`, which is added. What is varied
and which loss is drawn is the learner's to say (`Learner.landscape`); the arithmetic is surfaces.py.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import trainer
from data.loading import for_each_batch
from data.stream import Task
from models.base import Learner
from models.factory import saved_config
from models.parts.state import restore
from models.parts.varied import Weights
from tools.landscape import surfaces as flat
from tools.landscape.figure import describe, plot_landscape
from tools.landscape.surfaces import Landscape
from utils import checkpoint
from utils.config import RunConfig
from utils.errors import ConfigError, UserError
from utils.folders import finished_result, seeds_below
from utils.results import make_folder, write_json
from utils.runtime import Runtime
from utils.seed import folded, mix
from utils.storage import replace_file

log = logging.getLogger(__name__)

SPHERE_STEPS = 10
NOISE_DRAWS = 20
POWER_ITERATIONS = 20
TRACE_PROBES = 32
FINE = 16  # images at once in derivatives: a Hessian product of ViT-B/16 at 224 px holds some 500 MB for each
KEEP = '"keep_checkpoints": "tasks" in a config keeps them in later runs'


@dataclass(frozen=True)
class Losses:
    """Parts that add up to the mean loss over the images: for values, and finer ones for derivatives."""

    values: list[Callable[[], Tensor]]
    derivatives: list[Callable[[], Tensor]]

    def around(self, weights: Iterable[Weights], tick: Callable[[], object]) -> Landscape:
        return Landscape(self.values, list(weights), tick, self.derivatives)


@dataclass(frozen=True)
class Settings:
    """images: of the task's training images, a fixed subset. grid: points a side. rho: radius of the sphere.
    noise: size of the Gaussian noise relative to each row of the weights. radius: row length of the directions in the
    surface that does not scale with the weights.

    Raises ConfigError with every value that cannot be used.
    """

    images: int = 128
    grid: int = 21
    rho: float = 0.05
    noise: float = 0.1
    radius: float = 0.5

    def __post_init__(self) -> None:
        faults = [f"--images must be at least 1, got {self.images}"] if self.images < 1 else []
        if self.grid < 3 or self.grid % 2 == 0:
            faults.append(
                f"--grid must be an odd number of at least 3, so that the weights themselves are a point: {self.grid}"
            )
        for name in ("rho", "noise", "radius"):
            if not 0 < getattr(self, name) < float("inf"):
                faults.append(f"--{name} must be a number above 0, got {getattr(self, name)}")
        if faults:
            raise ConfigError("landscape", faults)


@dataclass(frozen=True)
class FinishedRun:
    """One seed of a run that is through with its stream, as its folder holds it."""

    folder: Path
    config: RunConfig
    result: dict[str, Any]

    @property
    def tasks(self) -> int:
        return self.result["tasks"]

    def weights_after(self, task: int) -> Path:
        """The checkpoint written after a task (1-based); only the last one is there in every run."""
        return self.folder / "checkpoint" / ("last.pt" if task == self.tasks else f"task{task}.pt")


def run(
    folder: Path,
    settings: Settings,
    tasks: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> None:
    """Draw the landscapes of every seed of a run.

    folder: of a seed, or of a run with its seeds below. tasks: 1-based; default the last. overrides: keys of the
    machine, not of the run (device, data_root). output: where to write instead of beside the run; resume: skip what is
    there. All seeds are looked at before the first is drawn.

    Raises UserError when something is missing, unfinished, or would be overwritten.
    """
    jobs = []
    for seed in seeds_below(folder):
        found = open_run(seed, overrides or {})
        target = (output / seed.resolve().name if output is not None else seed) / "landscape"
        wanted = [task for task in tasks or (found.tasks,) if not _done(target, task, settings, resume)]
        for task in wanted:
            _check_task(found, task)
        jobs.append((found, target, wanted))
    for found, target, wanted in jobs:
        if wanted:
            make_folder(target)
            try:
                SeedLandscape(found, settings).draw(wanted, target)
            finally:
                with suppress(OSError):  # nothing was drawn: leave no empty folder behind
                    target.rmdir()


def open_run(folder: Path, overrides: Mapping[str, Any]) -> FinishedRun:
    """Raises UserError when the run is unfinished or its files cannot be read."""
    return FinishedRun(folder, saved_config(folder / "config.json", overrides), finished_result(folder))


class SeedLandscape:
    """Config, data and learner of a finished seed, rebuilt; fp32, in evaluation mode."""

    def __init__(self, found: FinishedRun, settings: Settings):
        self.run, self.settings = found, settings
        self.runtime = Runtime(found.config.device, "fp32", found.config.num_workers)
        if self.runtime.world > 1:
            raise UserError("landscape runs in one process: start it without torchrun")
        self.learner: Learner
        self.manager = trainer.load_data(found.config)
        if (digest := self.manager.data.digest) != found.result["data"]["hash"]:
            raise UserError(
                f"the data are not those of the run in '{found.folder}': sha256 {digest[:12]} now, "
                f"{found.result['data']['hash'][:12]} then"
            )

    def draw(self, tasks: Sequence[int], target: Path) -> None:
        """task<t>.npz, .png and .json in `target` for each task (1-based)."""
        for number in tasks:
            started = time.perf_counter()
            arrays, numbers = self._measure(number)
            numbers["seconds"] = time.perf_counter() - started
            replace_file(target / f"task{number}.npz", partial(_save_arrays, arrays))
            plot_landscape(arrays, numbers, target / f"task{number}.png")
            write_json(target / f"task{number}.json", numbers)  # last: it says that the others are there
            log.info("%s", "\n".join(describe(numbers)))
            log.info("landscape in %s", target / f"task{number}.png")

    def _measure(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, numbers) of one task."""
        found, images = self.run, self._take_up(number)
        learner = self.learner
        varied = learner.landscape()
        if not varied.weights or not learner.stages(images):
            raise UserError(
                f"{found.config.model_name} trained nothing in task {number} of '{found.folder}': "
                "there are no weights to vary"
            )
        learner.requires_grad_(False)  # the graph is to hold what is varied and nothing else
        losses, branches = self._losses(images), varied.branches
        numbers: dict[str, Any] = {
            "learner": found.config.model_name,
            "dataset": Path(found.config.dataset).name,
            "seed": found.config.seeds[0],
            "task": number,
            "tasks": found.tasks,
            "images": len(images.train),
            "settings": asdict(self.settings),
            "varied": flat.counts_by_module(varied.weights),
            "last_acc": found.result["last_acc"],
            "branches": len(branches),
        }
        with tqdm(total=self._evaluations(number, len(branches)), desc=f"task {number}", disable=None) as bar:
            arrays, more = self._around(number, varied.weights, losses, bar.update)
            numbers |= more
            if len(branches) > 1:
                lines, barriers = self._between_branches(varied.weights, branches, losses, bar.update)
                arrays, numbers = arrays | lines, numbers | barriers
            path, ends = self._path(number, bar.update)  # last: it takes up the weights of another task
        arrays, numbers = arrays | path, numbers | ends
        if wild := [name for name, values in arrays.items() if not np.isfinite(values).all()]:
            raise UserError(
                f"task {number}: the loss is not a number somewhere in {', '.join(wild)}: the steps are too long "
                "(--radius for surface_radius, --rho for sphere, --noise for noise)"
            )
        return arrays, numbers

    def _take_up(self, number: int) -> Task:
        """Make `learner` what it was after a task; that task with the images of its landscape as its training images.

        It is built anew each time, as a resumed run does: only so must a state be able to be loaded.
        """
        task = self.manager[number - 1]
        _, state = checkpoint.load(self.run.weights_after(number))
        self.learner = trainer.seeded_learner(self.run.config, self.runtime, task, restoring=True)
        restore(self.learner, state["learner"])
        self.learner.data = task
        self.learner.stage = next(iter(self.learner.stages(task)), None)
        self.learner.eval()
        chosen = task.train.sample(self.settings.images, mix(self.run.config.seeds[0], task.index))
        return replace(task, train=chosen)

    def _losses(self, task: Task) -> Losses:
        """The learner's loss on the task's training images under the test transform. Each part starts from the same
        random state, should a loss draw numbers."""
        learner, count = self.learner, len(task.train)
        loss = learner.landscape().loss
        batches: list[tuple[Tensor, Tensor]] = []
        size = learner.config.test_batch_size
        for_each_batch(task.train.view("test"), lambda *batch: batches.append(batch), self.runtime, size)

        def part(images: Tensor, targets: Tensor) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(folded(self.run.config.seeds[0], 63))
                return loss(images, targets) * (len(targets) / count)

        small = [
            pair for images, targets in batches for pair in zip(images.split(FINE), targets.split(FINE), strict=True)
        ]
        return Losses([partial(part, *batch) for batch in batches], [partial(part, *batch) for batch in small])

    def _around(
        self, number: int, varied: Mapping[str, Weights], losses: Losses, tick: Callable[[], object]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Surfaces and numbers at the weights after the task."""
        settings = self.settings
        grid = np.linspace(-1, 1, settings.grid)

        def generator(purpose: int) -> torch.Generator:  # each its own: another grid leaves the noise as it is
            return torch.Generator().manual_seed(mix(self.run.config.seeds[0], number, purpose))

        with losses.around(varied.values(), tick) as landscape:
            loss, gradient = landscape.gradient()
            arrays = {"grid": grid}
            for name, radius in (("filter", None), ("radius", settings.radius)):
                first, second = flat.directions(landscape, generator(0), radius)
                arrays[f"surface_{name}"] = flat.surface(landscape, first, second, grid)
            arrays["sphere"] = flat.sphere_increase(landscape, settings.rho, SPHERE_STEPS, generator(1))
            arrays["noise"] = flat.noise_increase(landscape, settings.noise, NOISE_DRAWS, generator(2))
            top, residual = flat.top_eigenvalue(landscape, POWER_ITERATIONS, generator(3))
            arrays["trace"] = flat.trace_samples(landscape, TRACE_PROBES, generator(4))
            return arrays, {
                "loss": loss,
                "gradient_norm": flat.norm(gradient),
                "weights_norm": flat.norm(landscape.start),
                "share_in_zero_rows": flat.share_in_zero_rows(landscape.start),
                "sharpness_1": float(arrays["sphere"][0]),
                f"sharpness_{SPHERE_STEPS}": float(arrays["sphere"][-1]),
                "noise_increase": _mean_and_error(arrays["noise"]),
                "top_eigenvalue": top,
                "top_eigenvalue_residual": residual,
                "trace": _mean_and_error(arrays["trace"]),
            }

    def _between_branches(
        self,
        varied: Mapping[str, Weights],
        branches: Sequence[Mapping[str, Weights]],
        losses: Losses,
        tick: Callable[[], object],
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Lines through every pair of branches, the plane through the first three."""
        points = [[branch[name].value.clone() for name in varied] for branch in branches]
        pairs = list(itertools.combinations(range(len(points)), 2))
        grid = np.linspace(-0.5, 1.5, 2 * self.settings.grid - 1)  # holds 0 and 1
        with losses.around(varied.values(), tick) as landscape:
            lines = np.array([flat.between(landscape, (points[i], points[j]), grid) for i, j in pairs])
            arrays = {"branch_grid": grid, "branch_pairs": np.array(pairs), "branch_lines": lines}
            if len(points) > 2:
                first, second = (flat.subtract(point, points[0]) for point in points[1:3])
                origin = flat.subtract(points[0], landscape.start)
                arrays["plane_grid"] = grid[::2]
                arrays["branch_plane"] = flat.surface(landscape, first, second, grid[::2], (1.0, origin))
        barriers = {f"{i}-{j}": flat.barrier(losses, grid) for (i, j), losses in zip(pairs, lines, strict=True)}
        return arrays, {"barriers": barriers, "barrier": max(barriers.values())}

    def _path(self, number: int, tick: Callable[[], object]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The previous task's loss from the weights after it to those after this task: all of the network moving, and
        all but the head. Outputs that the previous task had not are left out."""
        if reason := self._no_path(number):
            log.info("task %d: no session path: %s", number, reason)
            return {}, {"no_path": reason}
        losses = self._losses(self._take_up(number - 1))
        state = checkpoint.load(self.run.weights_after(number))[1]["learner"]["module"]
        end = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        moves = flat.changes(self.learner.network.state_dict(), end)
        if moves is None:
            return {}, {"no_path": f"tasks {number - 1} and {number} have different networks: no line joins them"}
        grid = np.linspace(0, 1, self.settings.grid)
        arrays = {"path_grid": grid}
        for name, held in (("path", ()), ("path_backbone", ("head.",))):
            chosen = [move for key, move in moves.items() if not key.startswith(held)]
            with losses.around([Weights(tensor) for tensor, _ in chosen], tick) as landscape:
                arrays[name] = flat.line(landscape, [change for _, change in chosen], grid)
        whole, backbone = arrays["path"], arrays["path_backbone"]
        ends = {"start": whole[0], "end": whole[-1], "highest": whole.max(), "end_without_head": backbone[-1]}
        return arrays, {"no_path": None, "path": {name: float(value) for name, value in ends.items()}}

    def _no_path(self, number: int) -> str | None:
        if number == 1:
            return "no task came before the first"
        if not self.run.weights_after(number - 1).is_file():
            return f"the run did not keep the weights after task {number - 1}; {KEEP}"
        return None

    def _evaluations(self, number: int, branches: int) -> int:
        """Losses, gradients and Hessian products to come: the length of the progress bar."""
        grid, pairs = self.settings.grid, branches * (branches - 1) // 2
        around = 2 * grid**2 + SPHERE_STEPS + NOISE_DRAWS + POWER_ITERATIONS + TRACE_PROBES + 3
        between = pairs * (2 * grid - 1) + (grid**2 if branches > 2 else 0)
        return around + between + (0 if self._no_path(number) else 2 * grid)


def _done(target: Path, task: int, settings: Settings, resume: bool) -> bool:
    """Whether the landscape is there already and may be skipped.

    Raises UserError when it is there and was not to be resumed, or with other settings.
    """
    path = target / f"task{task}.json"
    if not path.is_file():
        return False
    if not resume:
        raise UserError(
            f"'{path}' is there already. --resume skips what is there; --output DIR writes to another folder"
        )
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}). Remove it to draw the landscape anew") from None
    if differing := [key for key, value in asdict(settings).items() if before.get(key) != value]:
        shown = ", ".join(f"{key} {before.get(key)} there, {getattr(settings, key)} now" for key in differing)
        raise UserError(f"'{path}' was drawn with other settings ({shown}). Choose another folder with --output DIR")
    log.info("%s: there, skipped", path)
    return True


def _check_task(found: FinishedRun, task: int) -> None:
    """Raises UserError when the run has no such task, or not the weights after it."""
    if not 1 <= task <= found.tasks:
        raise UserError(f"--task {task}: the run in '{found.folder}' has the tasks 1 to {found.tasks}")
    if not (path := found.weights_after(task)).is_file():
        lost = f"--task {task}: '{path}' is missing"
        if task == found.tasks:
            raise UserError(f"{lost}, and with it the weights that the run ended in")
        raise UserError(
            f"{lost}. The run did not keep the weights after each task: without --task the landscape after the last "
            f"one, {found.tasks}, is drawn. {KEEP}"
        )


def _save_arrays(arrays: dict[str, np.ndarray], file: IO[bytes]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own flag shares the keywords with the arrays


def _mean_and_error(samples: np.ndarray) -> dict[str, float]:
    """Mean over random draws, and its standard error."""
    return {"mean": float(samples.mean()), "error": float(samples.std(ddof=1) / np.sqrt(len(samples)))}
