"""Rows whose first task is the same train it once: one of them keeps its checkpoint, the others begin behind it."""

from collections.abc import Sequence

from models.factory import learner_class
from models.parts.first_task import fingerprint, kept_below, session_keys
from tools.table.jobs import Job
from utils.config import RunConfig


def shared_task(config: RunConfig, seed: int) -> str | None:
    """What two jobs have in common whose first task is the same; None where it cannot be shared: the learner knows how
    many tasks will come, or all tasks are domains."""
    if config.increment is None and config.task_sizes is None:
        return None
    learner = learner_class(config.model_name)
    if learner.needs_num_tasks:
        return None
    shared = session_keys(learner)
    if shared and getattr(config, "petl", "none") == "none":
        return None
    return fingerprint(config.with_seed(seed), shared)


def divide(jobs: Sequence[Job], todo: Sequence[Job]) -> tuple[list[Job], list[tuple[Job, Job]]]:
    """(jobs to run at once, [(job, the one whose first task it waits for)]).

    jobs: all of the table, since one that is finished may have kept its first task. A job that has begun goes on.
    """
    at_once: list[Job] = []
    waiting: list[tuple[Job, Job]] = []
    leaders: dict[str, Job] = {}
    for job in jobs:
        if job.first_task is not None and kept_below(job.folder):
            leaders.setdefault(job.first_task, job)
    wanted = [job.first_task for job in todo if job.first_task is not None and not begun(job)]
    for job in todo:
        kind = job.first_task
        if kind is None or begun(job):
            at_once.append(job)
        elif kind in leaders:
            waiting.append((job, leaders[kind]))
        elif wanted.count(kind) > 1:
            leaders[kind] = job
            at_once.append(job.with_set(keep_checkpoints="first"))
        else:
            at_once.append(job)
    return at_once, waiting


def begun(job: Job) -> bool:
    return (job.folder / "checkpoint" / "last.pt").is_file()


def behind(job: Job, leader: Job) -> Job:
    """The job, beginning behind the leader's first task where that was kept; else from the start."""
    return job.with_set(init_from=str(leader.folder)) if kept_below(leader.folder) else job
