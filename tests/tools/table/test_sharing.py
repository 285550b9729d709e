"""Which jobs wait for another one's first task."""

import json
from pathlib import Path

from tests.made_results import SIMPLECIL, made_config
from tools.table.jobs import Job, job_of
from tools.table.sharing import behind, divide, shared_task
from tools.table.spec import read_table


def job(tmp_path: Path, name: str, first_task: str | None) -> Job:
    return Job(name, ("program",), tmp_path / name, tmp_path / f"{name}.log", first_task)


def keep(job: Job, name: str = "task1.pt") -> None:
    (job.folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (job.folder / "checkpoint" / name).touch()


def test_one_of_several_keeps_its_first_task_and_the_others_wait(tmp_path):
    jobs = [job(tmp_path, "a", "x"), job(tmp_path, "b", "x"), job(tmp_path, "c", "y"), job(tmp_path, "d", None)]
    at_once, waiting = divide(jobs, jobs)
    assert [entry.name for entry in at_once] == ["a", "c", "d"]
    assert at_once[0].command == ("program", "--set", 'keep_checkpoints="first"')
    assert at_once[1].command == ("program",)
    assert [(entry.name, leader.name) for entry, leader in waiting] == [("b", "a")]
    assert behind(jobs[1], jobs[0]).command == ("program",), "the leader failed: from the start"
    keep(jobs[0])
    assert behind(jobs[1], jobs[0]).command == ("program", "--set", f'init_from="{tmp_path / "a"}"')


def test_a_finished_job_that_kept_it_leads_and_one_that_has_begun_goes_on(tmp_path):
    done, begun, fresh = (job(tmp_path, name, "x") for name in ("done", "begun", "fresh"))
    keep(done)
    keep(begun, "last.pt")
    at_once, waiting = divide([done, begun, fresh], [begun, fresh])
    assert [entry.name for entry in at_once] == ["begun"]
    assert [(entry.name, leader.name) for entry, leader in waiting] == [("fresh", "done")]


def test_what_the_first_task_has_in_common():
    base = {"model_name": "finetune", "init_cls": 4, "increment": 2, "epochs": 2}
    first = shared_task(made_config(**base), 1)
    assert first == shared_task(made_config(**(base | {"increment": 3})), 1)
    assert first == shared_task(made_config(**(base | {"epochs": 5, "init_epoch": 2, "device": "cpu"})), 1)
    assert first != shared_task(made_config(**(base | {"epochs": 3})), 1)
    assert first != shared_task(made_config(**(base | {"init_cls": 6})), 1)
    assert first != shared_task(made_config(**base), 2)
    session = {"epochs": 2, "bottleneck": 4, "precision": "fp32"}
    ranpac = shared_task(made_config(model_name="ranpac", **session), 1993)
    assert ranpac == shared_task(made_config(model_name="aper", upstream=True, **session), 1993)
    assert ranpac == shared_task(made_config(model_name="fecam", petl="adapter", **session), 1993)
    assert ranpac != shared_task(made_config(model_name="ranpac", upstream=True, **session), 1993), "torch seed 1"
    assert ranpac != shared_task(made_config(model_name="ranpac", **(session | {"bottleneck": 8})), 1993)
    assert shared_task(made_config(model_name="ranpac", petl="none"), 1993) is None
    assert shared_task(made_config(model_name="inflora", rank=2), 1) is None, "its lame grows with the tasks to come"


def test_jobs_of_a_table_share(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SIMPLECIL | {"init_cls": 4}))
    rows = [{"name": str(step), "config": "a.json", "set": {"increment": step}} for step in (2, 3)]
    (tmp_path / "t.json").write_text(json.dumps({"title": "t", "protocol": "p", "rows": rows}))
    jobs = [job_of(row.name, row.experiment, 1993) for row in read_table(tmp_path / "t.json", tmp_path / "runs").rows]
    at_once, waiting = divide(jobs, jobs)
    assert len(at_once) == len(waiting) == 1
