"""Seeds that are missing, each run by a program of its own: the command line with --resume, so a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import Interrupted, UserError
from utils.folders import read_result, seed_folder

if TYPE_CHECKING:  # a job travels to other machines, which need not import all learners to start a program
    from tools.table.spec import Experiment

MAIN = Path(__file__).resolve().parent.parent.parent / "main.py"
SUPERVISE = Path(__file__).resolve().parent / "supervise.py"
FINISHED, STOPPED = 0, 3  # exit statuses of main.py
POLL = 0.2  # seconds between two looks at the jobs


@dataclass(frozen=True)
class Job:
    """One seed of one experiment. log: what its program prints. first_task: equal where two jobs could share theirs."""

    name: str
    command: tuple[str, ...]
    folder: Path
    log: Path
    first_task: str | None = None

    def with_set(self, **keys: Any) -> "Job":
        """The same with further keys of the config."""
        sets = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        return replace(self, command=(*self.command, "--set", *sets))

    @property
    def result(self) -> dict[str, Any] | None:
        return read_result(self.folder)

    def last_line(self) -> str:
        """Of its log; a sentence where there is none."""
        try:
            lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        except OSError:
            return "it left no log"
        return next((line for line in reversed(lines) if line), "its log is empty")


@dataclass
class Outcome:
    """status: exit status of the program, None when the job was never started."""

    job: Job
    status: int | None
    seconds: float = 0.0


def job_of(name: str, experiment: "Experiment", seed: int) -> Job:
    """`--resume` on a fresh folder starts it; the program that is stopped half way goes on where it was."""
    from tools.table.sharing import shared_task

    sets = [f"{key}={json.dumps(value)}" for key, value in experiment.set.items()]
    command = (sys.executable, str(MAIN), "--config", str(experiment.file), *(["--set", *sets] if sets else []),
               "--seed", str(seed), "--output", str(experiment.folder), "--resume")  # fmt: skip
    log = experiment.folder / "jobs" / f"seed{seed}.log"
    first_task = shared_task(experiment.config, seed)
    return Job(f"{name}, seed {seed}", command, seed_folder(experiment.folder, seed), log, first_task)


def missing(jobs: Iterable[Job]) -> list[Job]:
    """Those that are not finished, each folder once."""
    found: dict[Path, Job] = {}
    for job in jobs:
        result = job.result
        if result is None or not result.get("finished"):
            found.setdefault(job.folder, job)
    return list(found.values())


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int
    started: float = field(default_factory=time.perf_counter)


Told = Callable[[Outcome | Job], None]


def run_local(jobs: Sequence[Job], told: Told, at_once: int = 1, devices: Sequence[str] = ()) -> list[Outcome]:
    """Run jobs side by side on this machine. devices: values of CUDA_VISIBLE_DEVICES, one a place; empty: no GPU is
    dealt out. told: called with a job that starts and with the outcome of one that ends.

    Raises Interrupted on SIGINT or SIGTERM, when every program has saved what it had and ended.
    """
    waiting, running, outcomes = list(jobs), list[_Running](), list[Outcome]()
    with _Stop() as stop:
        while waiting or running:
            while waiting and len(running) < at_once and not stop.asked:
                taken = {entry.slot for entry in running}
                slot = min(set(range(at_once)) - taken)
                job = waiting.pop(0)
                running.append(_Running(job, start(job, environment(slot, at_once, devices)), slot))
                told(job)
            if stop.asked:
                waiting = []
                stop.pass_on([entry.process for entry in running])
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                outcome = Outcome(entry.job, entry.process.returncode, time.perf_counter() - entry.started)
                outcomes.append(outcome)
                told(outcome)
            if running:
                time.sleep(POLL)
    if stop.asked:
        raise Interrupted(stop.asked)
    return outcomes


class _Stop:
    """While active, SIGINT and SIGTERM are noted and passed on once to the programs, as SIGTERM."""

    def __init__(self) -> None:
        self.asked = ""
        self._told = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.asked:
            self._told = False  # a second one: the programs stop the hard way
        self.asked = signal.Signals(number).name

    def pass_on(self, processes: Sequence[subprocess.Popen]) -> None:
        if not self._told:
            for process in processes:
                process.terminate()
            self._told = True


def environment(slot: int, at_once: int, devices: Sequence[str]) -> dict[str, str]:
    """Of one program: its GPU, and its share of the cores where several run."""
    values = dict(os.environ)
    if devices:
        values["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    if at_once > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        values.setdefault("OMP_NUM_THREADS", str(max(1, cores // at_once)))
    return values


def start(job: Job, variables: dict[str, str]) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C reaches it once, through us, under a supervisor that stops it when we are
    killed the hard way."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-S", "-E", str(SUPERVISE), str(os.getpid()), *job.command]
    with job.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables,
            start_new_session=True,
        )  # fmt: skip


def gpus() -> list[str]:
    """Those that this program may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()] if torch.cuda.device_count() else []
    return [str(number) for number in range(torch.cuda.device_count())]


class Call:
    """A job for submitit: runs its program, and is asked again when the cluster takes the machine away."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> int:
        # Under another name than `self.job`: the object travels, an open program does not.
        process = start(self.job, dict(os.environ))
        _PROCESSES.append(process)
        return process.wait()

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        for process in _PROCESSES:
            process.terminate()
            process.wait()
        return DelayedSubmission(Call(self.job))


_PROCESSES: list[subprocess.Popen] = []


def executor(cluster: str, folder: Path, parameters: dict[str, Any]) -> Any:
    """Of submitit. Raises UserError where the package is missing."""
    try:
        import submitit
    except ImportError:
        raise UserError(f'--launcher {cluster} needs the package "submitit": pip install submitit') from None
    made = submitit.AutoExecutor(folder=folder, cluster=cluster)
    made.update_parameters(**parameters)
    return made


def run_submitted(jobs: Sequence[Job], told: Told, made: Any, at_once: int | None = None) -> list[Outcome]:
    """Run jobs through an executor of submitit. at_once: how many are submitted at a time; None: all, as one array,
    which the cluster deals out.

    Raises Interrupted on SIGINT or SIGTERM; what was submitted goes on.
    """
    begun = time.perf_counter()
    waiting, running, outcomes = list(jobs), list[tuple[Any, Job]](), list[Outcome]()
    with _Stop() as stop:
        while waiting or running:
            if stop.asked:
                raise Interrupted(stop.asked)
            room = len(waiting) if at_once is None else at_once - len(running)
            if waiting and room > 0:
                some, waiting = waiting[:room], waiting[room:]
                with made.batch():
                    running += [(made.submit(Call(job)), job) for job in some]
                for job in some:
                    told(job)
            for handle, job in [entry for entry in running if entry[0].done()]:
                running.remove((handle, job))
                status = handle.result() if handle.exception() is None else 1
                outcomes.append(Outcome(job, status, time.perf_counter() - begun))
                told(outcomes[-1])
            if running:
                time.sleep(POLL)
    return outcomes
