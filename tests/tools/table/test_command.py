"""The table command on made-up results, and its jobs on programs that end at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import main
from tests.made_results import SIMPLECIL, made_config, write_seed
from tools.table.command import sweep_lines
from tools.table.jobs import Job, environment, job_of, missing, run_local
from tools.table.rows import settle
from tools.table.spec import read_table
from utils import plots
from utils.errors import ConfigError, Interrupted, UserError

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "table"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with exps/a.json, exps/t.json and results below runs/; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exps" / "tables").mkdir(parents=True)
    (tmp_path / "exps" / "a.json").write_text(json.dumps(SIMPLECIL | {"seed": [1993, 1996, 1997]}))
    source = {"kind": "paper table", "source": "a paper, table 1"}
    write_table(tmp_path, [
        {"name": "within", "config": "../a.json",
         "published": [{**source, "last_acc": {"mean": 90.6, "std": 0.4}, "avg_acc": {"mean": 94.9}, "n": 3},
                       {"kind": "secondary text", "source": "another text", "last_acc": {"mean": 88.0}}]},
        {"name": "below", "config": "../a.json", "set": {"normalize": "half"}, "seeds": [1993],
         "published": [{**source, "kind": "shipped log", "last_acc": {"mean": 93.0}, "seeds": [1993],
                        "curve": [99.0, 97.5, 93.0]}]},
        {"name": "not & run", "config": "../a.json", "set": {"test_batch_size": 8}, "published": []},
        {"name": "theirs_100%", "published": [{**source, "last_acc": {"mean": 91.0, "std": 0.2}}]},
    ])  # fmt: skip
    for seed, last in ((1993, 90.0), (1996, 90.5), (1997, 91.0)):
        write_seed(tmp_path / "runs" / "a", made_config(), seed, curve=(99.0, 95.0, last))
    write_seed(tmp_path / "runs" / "a+normalize=half", made_config(normalize="half"), 1993)
    return tmp_path


def write_table(folder: Path, rows: list, **keys) -> Path:
    path = folder / "exps" / "tables" / "t.json"
    values = {"title": "Made-up numbers", "protocol": "3 tasks of 2 classes", "rows": rows, **keys}
    path.write_text(json.dumps(values))
    return path


def table(*arguments: str) -> int:
    return main.main(["table", "exps/tables/t.json", *arguments])


@pytest.mark.parametrize("form, suffix", [("text", "txt"), ("markdown", "md"), ("csv", "csv"), ("latex", "tex")])
def test_golden_file(project, capsys, form, suffix):
    """All columns and verdicts in every form; PALIMPSEST_GOLDEN=1 writes the files anew."""
    assert table("--format", form, "--write", f"out.{suffix}") == 0
    printed, file = capsys.readouterr().out, GOLDEN / f"table.{suffix}"
    if os.environ.get("PALIMPSEST_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(printed)
    assert printed == file.read_text() == (project / f"out.{suffix}").read_text()


def test_rows_seeds_and_overrides_are_chosen(project, capsys):
    assert table("--rows", "within", "--seeds", "1996", "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("within,last_acc,1,1996,90.5,")
    assert table("--rows", "within", "--set", "normalize=half", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("within,last_acc,1,1993,90.0,")


def test_figures_are_written(project):
    assert table("--figure", "curves.pdf", "--differences", "out/bars.svg") == 0
    assert (project / "curves.pdf").stat().st_size > 1000 and "<svg" in (project / "out" / "bars.svg").read_text()


@pytest.mark.parametrize("arguments, told", [
    (["--rows", "withn"], 'did you mean "within"'),
    (["--write", "x.doc"], "a table is written as"),
    (["--figure", "x.docx"], "a figure is written as"),
    (["--jobs", "0", "--run"], "--jobs must be at least 1"),
    (["--set", "seed=3"], "give --seeds"),
    (["--set", "no_such_key=3"], 'unknown key "no_such_key"'),
])  # fmt: skip
def test_wrong_arguments_are_answered_before_anything_runs(project, capsys, arguments, told):
    assert table(*arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("change, told", [
    ({"rows": []}, "rows"),
    ({"title": 3}, "title"),
    ({"rows": [{"name": "x", "config": "../nothing.json"}]}, "no such file"),
    ({"rows": [{"name": "x", "config": "../a.json", "set": {"epochs": 3}}]}, "epochs"),
    ({"rows": [{"name": "x", "published": [{"kind": "hearsay", "source": "y"}]}]}, "kind"),
    ({"rows": [{"name": "x", "published": [{"kind": "paper table", "last_acc": {"mean": 1}}]}]}, "source"),
    ({"rows": [{"name": "x", "seeds": [1]}]}, 'need "config"'),
    ({"rows": [{"name": "x", "confg": "../a.json"}]}, "confg"),
    ({"rows": [{"name": "x"}, {"name": "x"}]}, 'two rows are called "x"'),
])  # fmt: skip
def test_faults_of_a_table_file_are_named(project, change, told):
    path = write_table(project, [{"name": "x", "config": "../a.json"}])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        read_table(path, Path("runs"))
    assert told in str(caught.value)


def test_a_folder_with_another_config_is_not_counted(project, capsys):
    for seed in (1993, 1996, 1997):
        write_seed(project / "runs" / "a", made_config(normalize="cifar"), seed)
    assert table("--rows", "within") == 0
    out = capsys.readouterr().out
    assert "cannot compare: 'runs/a/seed1993' holds another config (normalize differ): within." in out


def test_missing_data_are_said(project, capsys):
    write_table(project, [{"name": "x", "config": "../a.json", "set": {"dataset": "cub"}}])
    assert table("--data-root", str(project / "nowhere")) == 0
    assert "cannot compare: data missing: folder" in capsys.readouterr().out
    assert table("--data-root", str(project / "nowhere"), "--run") == 1
    assert "not run: x: data missing" in capsys.readouterr().out
    assert not (project / "runs" / "a+dataset=cub").exists(), "no program is started for it"


def test_folders_tell_what_is_set(project):
    write_table(project, [{"name": "x", "config": "../a.json", "set": {"normalize": "half", "image_size": 32}},
                          {"name": "y", "config": "../a.json", "set": {"device": "cpu"}},
                          {"name": "z", "config": "../a.json",
                           "set": {"backbone": {"name": "vit", "img_size": 32, "patch_size": 8}}}])  # fmt: skip
    rows = read_table(project / "exps" / "tables" / "t.json", Path("runs")).rows
    assert rows[0].experiment.folder == Path("runs/a+image_size=32+normalize=half")
    assert rows[1].experiment.folder == Path("runs/a"), "a machine key is another way to the same run"
    assert rows[2].experiment.folder.name.startswith("a+backbone=name-vit-,-img_size-32")


def test_a_sweep_takes_the_best_point_by_the_validation_part(project, capsys):
    """The test accuracies of the points say otherwise, and are never looked at."""
    write_table(project, [{"name": "x", "config": "../a.json", "grid": {"normalize": ["half", "cifar"]}}])
    row = read_table(project / "exps" / "tables" / "t.json", Path("runs")).rows[0]
    assert [experiment.config.evaluate_on for _, experiment in row.grid] == ["val", "val"]
    assert table() == 0
    assert "the sweep is at 0 of 2 points" in capsys.readouterr().out
    for (point, experiment), last in zip(row.grid, (80.0, 85.0), strict=True):
        write_seed(experiment.folder, experiment.config, 1993, curve=(99.0, last))
        write_seed(project / "runs" / f"a+normalize={point['normalize']}", made_config(**point), 1993,
                   curve=(99.0, 90.0 if point["normalize"] == "half" else 70.0))  # fmt: skip
    assert table("--seeds", "1993", "--format", "csv") == 0
    assert "x,last_acc,1,1993,70.0," in capsys.readouterr().out
    assert table("--seeds", "1993", "1996") == 0
    out = capsys.readouterr().out
    assert 'x: normalize "cifar" of 2 points, by 85.00 on the validation part.' in out
    assert "x: not finished: seed 1996." in out


@pytest.mark.parametrize(
    ("grid", "best", "edges"),
    [
        ({"image_size": [16, 32, 64]}, 0, ["image_size"]),
        ({"image_size": [16, 64, 32]}, 1, ["image_size"]),
        ({"image_size": [16, 32, 64]}, 1, []),
        ({"image_size": [32]}, 0, []),
        ({"normalize": ["half", "cifar"]}, 0, []),
        ({"image_size": [16, 32, 64], "class_order_seed": [1, 2]}, 2, ["class_order_seed"]),
        ({"image_size": [16, 32], "class_order_seed": [1, 2]}, 3, ["image_size", "class_order_seed"]),
    ],
)
def test_a_best_point_at_the_edge_of_a_sweep_is_said_and_sweeps_are_drawn(grid, best, edges, project, capsys):
    write_table(project, [{"name": "x", "config": "../a.json", "grid": grid}])
    row = read_table(project / "exps" / "tables" / "t.json", Path("runs")).rows[0]
    figure, is_drawn = project / "sweeps.svg", len(grid.get("image_size", ())) > 1
    assert table("--sweeps", str(figure)) == 2
    words = "no row has a finished point" if is_drawn else "no row has a grid with two numbers or more"
    assert words in capsys.readouterr().err
    for number, (_, experiment) in enumerate(row.grid):
        assert sum(sweep.chosen is not None for sweep in lines_of(project)) == 0, "the sweep is not finished"
        write_seed(experiment.folder, experiment.config, 1993, curve=(99.0, 85.0 if number == best else 80.0))
    point = row.grid[best][0]
    numbers = {key: point[key] for key in grid if key != "normalize" and len(grid[key]) > 1}
    assert {sweep.key: sweep.chosen for sweep in lines_of(project) if sweep.chosen is not None} == numbers
    assert table("--sweeps", str(figure)) == (0 if is_drawn else 2)
    assert figure.exists() == is_drawn
    if is_drawn:
        drawn = figure.read_text()
        assert all(key in drawn for key in grid) and ("x (class_order_seed 2)" in drawn) == ("class_order_seed" in grid)
    assert table() == 0
    words = f", at the edge of the sweep over {' and '.join(edges)}." if edges else "."
    assert f"by 85.00 on the validation part{words}" in capsys.readouterr().out


def lines_of(project: Path):
    return sweep_lines(settle(read_table(project / "exps" / "tables" / "t.json", Path("runs")), Path("runs")))


@pytest.mark.parametrize(("values", "scale"), [([1, 2], "linear"), ([1e-5, 1e-2], "log"), ([0, 1e-5, 1e-2], "symlog")])
def test_the_axis_of_a_sweep_fits_its_values(values, scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_sweeps([plots.Sweep("key", "row", [(value, 50.0) for value in values])], "title", tmp_path / "x.png")
    assert drawn[0].axes[0].get_xscale() == scale


def test_what_cannot_be_drawn_hides_nothing(project, capsys):
    """The table is printed, the other figure drawn, and then each figure that is empty is named."""
    write_table(project, [{"name": "x", "config": "../a.json", "grid": {"image_size": [16, 32]}}])
    point = read_table(project / "exps" / "tables" / "t.json", Path("runs")).rows[0].grid[0][1]
    write_seed(point.folder, point.config, 1993, curve=(99.0, 80.0))
    sweeps, curves = project / "sweeps.svg", project / "curves.svg"
    assert table("--sweeps", str(sweeps), "--figure", str(curves)) == 2
    out, err = capsys.readouterr()
    assert "the sweep is at 1 of 2 points" in out and "no row has a finished seed" in err
    assert sweeps.is_file() and not curves.exists()
    assert table("--sweeps", str(sweeps), "--figure", str(sweeps)) == 2
    assert "is named twice" in capsys.readouterr().err


def job(tmp_path: Path, name: str, code: str) -> Job:
    return Job(name, (sys.executable, "-c", code), tmp_path / name, tmp_path / f"{name}.log")


def test_a_job_that_fails_is_named_and_does_not_stop_the_others(tmp_path):
    told = []
    jobs = [job(tmp_path, "bad", "print('one'); print('no such data'); raise SystemExit(2)"),
            job(tmp_path, "good", "print('fine')"), job(tmp_path, "silent", "raise SystemExit(1)")]  # fmt: skip
    outcomes = run_local(jobs, told.append, at_once=2)
    by_name = {outcome.job.name: outcome for outcome in outcomes}
    assert {name: outcome.status for name, outcome in by_name.items()} == {"bad": 2, "good": 0, "silent": 1}
    assert by_name["bad"].job.last_line() == "no such data"
    assert by_name["silent"].job.last_line() == "its log is empty"
    assert len(told) == 6


def test_a_signal_stops_the_programs_and_waits_for_them(tmp_path):
    code = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(3)))\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "time.sleep(60)"
    )

    def interrupt():
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    outcomes = []
    with pytest.raises(Interrupted):
        run_local([job(tmp_path, "long", code), job(tmp_path, "never", "print(1)")], outcomes.append)
    assert (tmp_path / "saved").exists() and not (tmp_path / "never.log").exists()


def test_a_stopped_table_says_that_the_same_command_goes_on(project, capsys, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("SIGINT")

    monkeypatch.setattr("tools.table.command.run_local", stopped)
    assert table("--rows", "not & run", "--run", "--device", "cpu") == 3
    assert "stopped by SIGINT: what was begun is saved, and the same command goes on" in capsys.readouterr().out


def test_programs_save_when_the_command_is_killed_the_hard_way(tmp_path):
    """However often the kernel tells of it: once for every thread of the command."""
    inner = (
        "import signal, sys, time, pathlib\n"
        f"told = pathlib.Path({str(tmp_path / 'told')!r})\n"
        "def note(*_):\n    told.write_text(told.read_text() + 'x' if told.exists() else 'x')\n"
        "signal.signal(signal.SIGTERM, note)\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "end = time.time() + 30\n"
        "while time.time() < end and not told.exists(): time.sleep(0.02)\n"
        "time.sleep(0.6)\n"
        f"pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
    )
    outer = (
        "import threading, time, sys\n"
        f"sys.path.insert(0, {str(Path(main.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from tools.table.jobs import Job, start\n"
        "[threading.Thread(target=time.sleep, args=(60,), daemon=True).start() for _ in range(5)]\n"
        f"start(Job('x', (sys.executable, '-c', {inner!r}), Path('x'), Path({str(tmp_path / 'log')!r})), {{}})\n"
        "time.sleep(60)"
    )
    command = subprocess.Popen([sys.executable, "-c", outer])
    wait_for(tmp_path / "begun")
    command.kill()
    command.wait()
    wait_for(tmp_path / "saved")
    assert (tmp_path / "told").read_text() == "x"


def wait_for(path: Path) -> None:
    for _ in range(1500):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


def test_gpus_are_dealt_out_and_cores_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [environment(slot, 4, ["2", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["2", "5", "2", "5"]
    assert "OMP_NUM_THREADS" not in environment(0, 1, [])
    assert int(environment(0, 2, [])["OMP_NUM_THREADS"]) >= 1


def test_jobs_are_the_command_line_with_resume_and_finished_ones_are_skipped(project):
    rows = read_table(project / "exps" / "tables" / "t.json", Path("runs")).rows
    jobs = [job_of(row.name, row.experiment, seed) for row in rows if row.experiment for seed in row.seeds]
    todo = missing([*jobs, *jobs])
    assert [found.name for found in todo] == [f"not & run, seed {seed}" for seed in (1993, 1996, 1997)]
    assert todo[0].command[1:] == (
        str(Path(main.__file__).resolve()), "--config", "exps/a.json", "--set", "test_batch_size=8", "--seed", "1993",
        "--output", "runs/a+test_batch_size=8", "--resume",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, None])
def test_submitit_runs_jobs_by_its_local_executor(tmp_path, at_once):
    pytest.importorskip("submitit")
    from tools.table.jobs import executor, run_submitted

    jobs = [job(tmp_path, "bad", "print('no'); raise SystemExit(2)"), job(tmp_path, "good", "print('yes')")]
    made = executor("local", tmp_path / "submitit", {"timeout_min": 5})
    outcomes = run_submitted(jobs, lambda _: None, made, at_once)
    assert {outcome.job.name: outcome.status for outcome in outcomes} == {"bad": 2, "good": 0}
    assert "yes" in (tmp_path / "good.log").read_text()


def test_submitit_that_is_missing_is_named(tmp_path, monkeypatch):
    from tools.table.jobs import executor

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        executor("slurm", tmp_path, {})
