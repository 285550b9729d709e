"""A run folder that was damaged, copied, shared or filled by others: a sentence, and nothing lost."""

import copy
import json
import os
import shutil

import numpy as np
import pytest

import main
import trainer
from tests.conftest import tiny_values
from tests.test_resume import Killed, kill_after
from utils.checkpoint import identity_of

pytestmark = pytest.mark.slow


class Run:
    """A tiny run of two seeds and its command."""

    def __init__(self, folder, capsys):
        self.values = tiny_values(folder, epochs=1, seed=[1, 2], shuffle=False)
        self.config, self.out, self.capsys = folder / "run.json", folder / "out", capsys
        self.data = folder / "stream.npz"

    def __call__(self, *arguments, **keys) -> tuple[int, str]:
        """(exit status, what was printed)."""
        self.config.write_text(json.dumps(self.values | keys))
        if self.capsys is not None:
            self.capsys.readouterr()
        status = main.main(["--config", str(self.config), "--output", str(self.out), *arguments])
        said = "" if self.capsys is None else "".join(self.capsys.readouterr())
        assert "Traceback" not in said
        return status, said

    def cut(self, seeds=2):
        """Killed inside the second task of the last seed."""
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, trainer.SeedRun, "step_done", 12 * (seeds - 1) + 6)
            with pytest.raises(Killed):
                self(checkpoint_minutes=1e-9)

    @property
    def last(self):
        return self.out / "seed2"


@pytest.fixture
def run(tmp_path, capsys):
    return Run(tmp_path, capsys)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(a run cut in its second seed, the numbers of one that was not)."""
    run = Run(tmp_path_factory.mktemp("prepared"), None)
    assert run()[0] == 0
    whole = numbers_of(run.last)
    shutil.rmtree(run.out)
    run.cut()
    return run, whole


@pytest.fixture
def cut(prepared, tmp_path, capsys):
    """A copy of the cut run, whose data are shared."""
    run = copy.copy(prepared[0])
    run.config, run.out, run.capsys = tmp_path / "run.json", tmp_path / "out", capsys
    shutil.copytree(prepared[0].out, run.out)
    return run


DAMAGE = {
    "empty": b"",
    "cut": None,
    "no JSON": b"\x00\xff\x00 not json",
    "another kind of value": b"[1, 2]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["result.json", "config.json", "epochs.jsonl"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_put_aside_and_the_run_goes_on(name, damage, cut, prepared):
    run, path = cut, cut.last / name
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2 - 3] if DAMAGE[damage] is None else DAMAGE[damage])
    status, said = run("--resume", checkpoint_minutes=1e-9)
    assert status == 0
    assert numbers_of(run.last) == prepared[1]
    lines = [json.loads(line) for line in (run.last / "epochs.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == [1, 2, 3]
    if not (name == "epochs.jsonl" and damage in ("empty", "cut")):  # those are repaired without a loss
        assert "put aside as" in said and (run.last / f"{name}.damaged").is_file()


def numbers_of(folder):
    result = json.loads((folder / "result.json").read_text())
    return result["acc"], result["acc_per_class"]


@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_a_neighbour_s_damaged_file_does_not_end_a_run(name, run):
    assert run("--seed", "1")[0] == 0
    (run.out / "seed1" / name).write_text("{")
    status, said = run("--seed", "2")
    assert status == 0 and (name == "config.json" or "put aside as result.json.damaged" in said)


def test_what_others_leave_behind_is_in_nobody_s_way(cut):
    run = cut
    for name in (".DS_Store", "last.pt.tmp", "result.json.tmp", ".write-test", ".nfs0000001", "Thumbs.db", "._x", "a~"):
        (run.last / name).write_text("")
    assert run("--resume", checkpoint_minutes=1e-9)[0] == 0


@pytest.mark.parametrize("name", ["model.pth", "notes.txt", "seed3", "results.csv"])
def test_what_a_user_keeps_there_is_left_alone(name, run):
    run.last.mkdir(parents=True)
    (run.last / name).write_text("mine")
    status, said = run("--seed", "2")
    assert status == 2 and f"holds other files ({name})" in said and os.listdir(run.last) == [name]


@pytest.mark.parametrize("name", ["checkpoint", "plots", "config.json", "result.json", "epochs.jsonl", "."])
def test_a_file_where_a_folder_belongs_and_the_reverse(name, run):
    if name == ".":
        run.out.mkdir()
        run.last.write_text("mine")
    elif "." in name:
        (run.last / name).mkdir(parents=True)
    else:
        run.last.mkdir(parents=True)
        (run.last / name).write_text("mine")
    status, said = run("--seed", "2")
    assert status == 2 and "--output DIR" in said and len(said) < 400


def test_a_copy_under_another_seed_s_number_is_refused(run):
    assert run("--seed", "1")[0] == 0
    shutil.copytree(run.out / "seed1", run.out / "seed7")
    status, said = run("--seed", "2")
    assert status == 2 and "under another number" in said
    status, said = run("--resume", "--seed", "7")
    assert status == 2 and "holds a run of seed 1, not of 7" in said


def other_data(run):
    with np.load(run.data) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["x_train"] = 255 - arrays["x_train"]
    np.savez(run.data, **arrays)


def test_other_data_at_the_same_place_are_refused_on_resume(run):
    run.cut()
    other_data(run)
    before = (run.last / "checkpoint" / "last.pt").read_bytes()
    status, said = run("--resume", checkpoint_minutes=1e-9)
    assert status == 2 and "its data is" in said and "Put the data back" in said
    assert (run.last / "checkpoint" / "last.pt").read_bytes() == before


def test_other_data_between_two_seeds_are_refused(run):
    assert run("--seed", "1")[0] == 0
    other_data(run)
    status, said = run("--seed", "2")
    assert status == 2 and "computed with other data" in said and not (run.last / "result.json").exists()


def test_another_weight_file_of_the_same_name_is_refused(run, tmp_path):
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from tests.conftest import TINY_VIT

    def save(seed):
        torch.manual_seed(seed)
        sizes = {key: value for key, value in TINY_VIT.items() if key != "name"}
        torch.save(VisionTransformer(num_classes=0, **sizes).state_dict(), tmp_path / "vit.pth")

    save(1)
    run.values["weights"] = str(tmp_path / "vit.pth")
    run.cut()
    save(2)
    status, said = run("--resume", checkpoint_minutes=1e-9)
    assert status == 2 and "weights" in said and "Put the weights back" in said


@pytest.mark.parametrize("change", ["learner", "seed", "config"])
def test_another_run_s_checkpoint_is_refused_by_name(change, cut, tmp_path, capsys):
    run = cut
    other = copy.copy(cut)
    other.values = dict(cut.values)
    other.out = tmp_path / "other"
    other.values |= {"learner": {"model_name": "slca", "ca_epochs": 1}, "seed": {}, "config": {"lrate": 0.1}}[change]
    assert other()[0] == 0
    source = other.out / ("seed1" if change == "seed" else "seed2") / "checkpoint" / "last.pt"
    shutil.copy(source, run.last / "checkpoint" / "last.pt")
    status, said = run("--resume", checkpoint_minutes=1e-9)
    assert status == 2 and f"its {change} is" in said
    assert identity_of(run.last / "checkpoint" / "last.pt")["seed"] == (1 if change == "seed" else 2)


def test_a_run_without_its_config_goes_on_where_the_checkpoint_says_that_it_is_this_one(cut):
    run = cut
    (run.last / "config.json").unlink()
    status, said = run("--resume", lrate=0.1, checkpoint_minutes=1e-9, seed=2)
    assert status == 2 and "whose config.json cannot be read" in said
    assert run("--resume", checkpoint_minutes=1e-9)[0] == 0 and (run.last / "config.json").is_file()


@pytest.mark.plots
def test_a_run_stopped_in_its_last_figures_is_finished_on_resume(run, monkeypatch):
    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "plot_run", stop)
        with pytest.raises(Killed):
            run("--seed", "1")
    assert run("--resume", "--seed", "1")[0] == 0
    assert (run.out / "seed1" / "plots" / "curve.png").stat().st_size > 0


def test_a_figure_that_fails_ends_no_run(run, monkeypatch):
    def fail(*arguments):
        raise ValueError("no such backend")

    monkeypatch.setattr(trainer, "plot_run", fail)
    status, said = run("--seed", "1")
    assert status == 0 and "could not be drawn (ValueError: no such backend)" in said
    assert (run.out / "summary.json").is_file()


FULL = ("epochs.jsonl", "last.pt", "result.json", "config.json", "summary.json")


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_sentence_and_nothing_is_left_behind(name, run, prepared, monkeypatch):
    with monkeypatch.context() as patch:
        fill_the_disk(patch, name)
        status, said = run(checkpoint_minutes=1e-9)
        assert status == 2 and "No space left on device" in said and len(said.splitlines()[-1]) < 400
        assert not list(run.out.rglob("*.tmp"))
    assert run("--resume", checkpoint_minutes=1e-9)[0] == 0
    assert numbers_of(run.last) == prepared[1]


def fill_the_disk(patch, name):
    """From the third time that a file of this name is written, but for the summary, which is written once."""
    from pathlib import Path

    from utils import storage

    written = iter(range(1000))

    def refuse(path):
        if path.name == name and next(written) >= (2 if name in ("epochs.jsonl", "last.pt") else 0):
            raise OSError(28, "No space left on device", str(path))

    replace, opened = storage.replace_file, Path.open

    def replaced(path, content):
        def until_full(file):
            file.write(b"half")
            refuse(path)
            file.seek(0)
            file.truncate()
            content(file)

        replace(path, until_full)

    def open_(path, mode="r", *rest, **keys):
        if "a" in mode:
            with opened(path, mode, *rest, **keys) as file:
                file.write('{"ta')
            refuse(path)
            with opened(path, "r+b") as file:
                file.truncate(path.stat().st_size - 4)
        return opened(path, mode, *rest, **keys)

    for module in ("utils.results", "utils.checkpoint"):
        patch.setattr(f"{module}.replace_file", replaced)
    patch.setattr(Path, "open", open_)


def test_results_are_those_of_a_run_left_alone(cut):
    run = cut
    assert run("--resume", checkpoint_minutes=1e-9)[0] == 0
    assert set(os.listdir(run.last)) - {".lock", "plots"} == {
        "checkpoint", "config.json", "epochs.jsonl", "result.json", "train.log",
    }  # fmt: skip
