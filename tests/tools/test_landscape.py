"""`landscape` on finished runs: every learner, branches, paths, what it refuses, and that it leaves the run alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import main
import trainer
from data.loading import Batch
from models.base import LEARNERS
from models.factory import saved_config
from models.finetune import Finetune
from models.parts.state import restore
from models.parts.varied import Varied, Weights
from tests.conftest import TINY_VIT, tiny_values, write_stream
from tools.landscape import runs
from utils import checkpoint
from utils.runtime import Runtime

pytestmark = pytest.mark.slow

SMALL = ("--grid", "3", "--images", "100")  # all 14 images of a task


def finished(tmp_path: Path, name: str = "out", **keys) -> Path:
    """The folder of a finished tiny run."""
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(tiny_values(tmp_path, **({"epochs": 2} | keys))))
    assert main.main(["--config", str(path), "--output", str(tmp_path / name)]) == 0
    return tmp_path / name


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Bytes and time of every file below, those in landscape/ apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and "landscape" not in path.parts]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def drawn(seed: Path, task: int) -> tuple[dict[str, np.ndarray], dict]:
    folder = seed / "landscape"
    assert (folder / f"task{task}.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(folder / f"task{task}.npz") as archive:
        return {key: archive[key] for key in archive.files}, json.loads((folder / f"task{task}.json").read_text())


def loss_by_hand(seed: Path, weights: str, task: int) -> float:
    """Of all training images of a task (from 0) in one batch, under the weights of a checkpoint."""
    manager, learner = restored(seed, weights, task)
    view = manager[task].train.view("test")
    images, targets = view.__getitems__(Batch(np.arange(len(view))))
    with torch.no_grad():
        return float(learner.landscape().loss(images.float() / 255, targets))


def restored(seed: Path, weights: str, task: int):
    """(stream, learner) of a task (from 0) under the weights of a checkpoint."""
    config = saved_config(seed / "config.json")
    manager = trainer.load_data(config)
    learner = trainer.seeded_learner(config, Runtime("cpu", "fp32"), manager[task], restoring=True)
    restore(learner, load(seed, weights)["learner"])
    learner.data = manager[task]
    return manager, learner.eval()


def load(seed: Path, weights: str):
    return checkpoint.load(seed / "checkpoint" / f"{weights}.pt")[1]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """Finished, last checkpoint kept alone; tests may not write into it."""
    return finished(tmp_path_factory.mktemp("shared"))


STREAMS = {"classes": {}, "domains": {"increment": None, "shuffle": False}}
# A stream of domains for one learner of each kind: plain, by statistics, of several networks.
DOMAINS = {"finetune", "slca", "hcl"} & set(LEARNERS)
CASES = [*((learner, "classes") for learner in LEARNERS), *((learner, "domains") for learner in sorted(DOMAINS))]


@pytest.mark.parametrize(("learner", "stream"), CASES)
def test_every_learner(learner, stream, tmp_path, capsys, monkeypatch):
    """Its numbers; the figure, which takes longest, is drawn in the other tests."""
    monkeypatch.setattr(runs, "plot_landscape", lambda arrays, numbers, path: path.write_bytes(b"\x89PNG"))
    keys = dict(STREAMS[stream])
    if stream == "domains":
        keys["dataset"] = write_stream(tmp_path / "domains.npz", classes=2, domains=3)
    out = finished(tmp_path, model_name=learner, keep_checkpoints="tasks", **keys)
    seed, before = out / "seed1993", contents(out)
    capsys.readouterr()
    status = main.main(["landscape", str(out), *SMALL])
    assert contents(out) == before, "the run itself was changed"
    if not json.loads((seed / "result.json").read_text())["parameters"]["trainable_per_task"][-1]:
        assert status == 2 and f"{learner} trained nothing in task 3" in capsys.readouterr().err
        assert not (seed / "landscape").exists()
        return
    assert status == 0
    arrays, numbers = drawn(seed, 3)
    assert numbers["loss"] == pytest.approx(loss_by_hand(seed, "last", 2), rel=1e-5)
    for name in ("surface_filter", "surface_radius"):
        assert arrays[name].shape == (3, 3) and np.isfinite(arrays[name]).all()
        assert arrays[name][1, 1] == pytest.approx(numbers["loss"], rel=1e-5)
        assert np.ptp(arrays[name]) > 0
    assert len(arrays["noise"]) == 20 and len(arrays["trace"]) == 32 and len(arrays["sphere"]) == 10
    assert numbers["sharpness_10"] >= numbers["sharpness_1"]
    assert numbers["images"] == (12 if learner == "hcl" else 14)  # hcl keeps one of each class for validation
    assert sum(numbers["varied"].values()) > 0
    if "have different networks" in (numbers["no_path"] or ""):  # one that widens with every task
        assert stream == "classes" and "path" not in arrays
        return
    assert numbers["no_path"] is None
    assert numbers["path"]["start"] == pytest.approx(loss_by_hand(seed, "task2", 1), rel=1e-5)
    # joint: a loss over all classes seen, and those that task 2 had not are left out of the path. hcl: its loss holds a
    # teacher, mos's the means of old classes, which on the path are still those of task 2.
    if learner not in ("joint", "hcl", "mos"):
        assert numbers["path"]["end"] == pytest.approx(loss_by_hand(seed, "last", 1), rel=1e-4)
    said = capsys.readouterr().out
    assert "top Hessian eigenvalue" in said and "task3.png" in said


class Branched(Finetune):
    """Features scaled by one of K gains, all trained, the first one used: the smallest learner with branches."""

    branches = 3

    def build(self, make_backbone):
        super().build(make_backbone)
        self.network.backbone.requires_grad_(False)
        self.network.gains = nn.Parameter(torch.rand(self.branches, self.network.feature_dim) + 0.5)

    def landscape(self):
        branches = [{"gain of branch 0": Weights(self.network.gains, k)} for k in range(self.branches)]
        return Varied(branches[0], lambda *batch: self.branch_loss(*batch, self.network.gains[0]), branches)

    def loss(self, net, images, targets):
        return sum(self.branch_loss(images, targets, gain) for gain in self.network.gains)

    def predict(self, images, frozen):
        return self.network.head(self.network.features(images) * self.network.gains[0])

    def branch_loss(self, images, targets, gain):
        logits = self.network.head(self.network.features(images) * gain)
        return nn.functional.cross_entropy(logits[:, self.task.classes.start :], targets - self.task.classes.start)


@pytest.fixture(params=[2, 3])
def branched(request):
    LEARNERS.register("branched")(type("Branched", (Branched,), {"branches": request.param}))
    yield request.param
    LEARNERS._table.pop("branched")


def test_between_branches(branched, tmp_path):
    seed = finished(tmp_path, model_name="branched") / "seed1993"
    assert main.main(["landscape", str(seed), *SMALL]) == 0
    arrays, numbers = drawn(seed, 3)
    assert numbers["varied"] == {"gain of branch 0": TINY_VIT["embed_dim"]}

    manager, learner = restored(seed, "last", 2)
    images, targets = manager[2].train.view("test").__getitems__(Batch(np.arange(14)))
    gains = learner.eval().network.gains.detach()

    def exact(*shares: float) -> float:
        mix = sum(share * gain for share, gain in zip(shares, gains, strict=False))
        with torch.no_grad():
            return float(learner.branch_loss(images.float() / 255, targets, mix))

    grid = arrays["branch_grid"]
    assert grid.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    np.testing.assert_allclose(arrays["branch_lines"][0], [exact(1 - a, a) for a in grid], rtol=1e-5)
    pairs = [tuple(pair) for pair in arrays["branch_pairs"]]
    assert pairs == ([(0, 1)] if branched == 2 else [(0, 1), (0, 2), (1, 2)])
    assert numbers["barrier"] == max(numbers["barriers"].values())
    ends = exact(1, 0), exact(0, 1)
    assert numbers["barriers"]["0-1"] == pytest.approx(max(*ends, exact(0.5, 0.5)) - sum(ends) / 2, abs=1e-6)
    if branched == 3:
        plane = [[exact(1 - a - b, a, b) for a in arrays["plane_grid"]] for b in arrays["plane_grid"]]
        np.testing.assert_allclose(arrays["branch_plane"], plane, rtol=1e-5)


def test_all_seeds_of_a_run_and_chosen_tasks(tmp_path):
    out = finished(tmp_path, seed=[1, 2], keep_checkpoints="tasks")
    assert main.main(["landscape", str(out), "--task", "1", "3", *SMALL]) == 0
    for seed in (out / "seed1", out / "seed2"):
        names = sorted(path.name for path in (seed / "landscape").iterdir())
        assert names == [f"task{t}.{kind}" for t in (1, 3) for kind in ("json", "npz", "png")]
        arrays, numbers = drawn(seed, 1)
        assert "path" not in arrays and numbers["no_path"] == "no task came before the first"
        assert numbers["loss"] == pytest.approx(loss_by_hand(seed, "task1", 0), rel=1e-5)


def test_the_same_command_gives_the_same_numbers_and_another_grid_the_same_noise(shared_run, tmp_path):
    for name, grid in (("a", "3"), ("b", "3"), ("c", "5")):
        command = ["landscape", str(shared_run), "--grid", grid, "--images", "5", "--output", str(tmp_path / name)]
        assert main.main(command) == 0
    (a, first), (b, second), (c, _) = (drawn(tmp_path / name / "seed1993", 3) for name in "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and first["images"] == 5
    assert np.array_equal(a["noise"], c["noise"]) and np.array_equal(a["trace"], c["trace"])
    np.testing.assert_array_equal(c["surface_filter"][::2, ::2], a["surface_filter"])
    assert not (shared_run / "seed1993" / "landscape").exists()


def test_what_is_there_is_kept(tmp_path, capsys):
    out = finished(tmp_path)
    command = ["landscape", str(out), *SMALL]
    assert main.main(command) == 0
    path = out / "seed1993" / "landscape" / "task3.json"
    before = path.read_bytes()
    assert main.main(command) == 2
    assert "is there already. --resume skips what is there" in capsys.readouterr().err
    assert main.main([*command, "--resume", "--rho", "0.1"]) == 2
    assert "rho 0.05 there, 0.1 now" in capsys.readouterr().err
    assert main.main([*command, "--resume"]) == 0
    assert path.read_bytes() == before
    path.unlink()  # as a kill before the last file leaves it: drawn anew
    assert main.main(command) == 0 and path.is_file()
    # The run still counts as its own beside its landscapes.
    assert main.main(["--config", str(tmp_path / "out.json"), "--output", str(out), "--resume"]) == 0


def test_without_kept_checkpoints_the_rest_is_drawn(shared_run, tmp_path, capsys):
    assert main.main(["landscape", str(shared_run), "--output", str(tmp_path), *SMALL]) == 0
    arrays, numbers = drawn(tmp_path / "seed1993", 3)
    assert "path" not in arrays and "surface_filter" in arrays
    assert '"keep_checkpoints": "tasks"' in numbers["no_path"]
    assert 'no session path: the run did not keep the weights after task 2; "keep_checkp' in capsys.readouterr().out
    assert main.main(["landscape", str(shared_run), "--task", "2", *SMALL]) == 2
    assert "without --task the landscape after the last one, 3, is drawn" in capsys.readouterr().err


def test_one_checkpoint_per_task_is_kept_and_changes_nothing_else(tmp_path):
    plain, kept = finished(tmp_path, "plain"), finished(tmp_path, "kept", keep_checkpoints="tasks")
    names = ["last.pt", "task1.pt", "task2.pt", "task3.pt"]
    assert sorted(path.name for path in (kept / "seed1993" / "checkpoint").iterdir()) == names
    assert [load(kept / "seed1993", f"task{t}")["record"]["done"] for t in (1, 2, 3)] == [1, 2, 3]
    states = [load(folder / "seed1993", "last")["learner"]["module"] for folder in (plain, kept)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    config = tmp_path / "plain.json"
    resumed = ["--config", str(config), "--output", str(plain), "--resume", "--set", "keep_checkpoints=tasks"]
    assert main.main(resumed) == 0, "which checkpoints are kept is no other run"


def test_a_checkpoint_is_kept_where_links_are_not_to_be_had(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", no_links)
    checkpoint.save({"a": 1}, tmp_path / "last.pt", {})
    checkpoint.keep(tmp_path / "last.pt", "task1.pt")
    checkpoint.save({"a": 2}, tmp_path / "last.pt", {})
    assert checkpoint.load(tmp_path / "task1.pt")[1] == {"a": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "task1.pt"]


def test_the_weights_that_the_run_began_with_are_not_needed(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    arguments = {key: value for key, value in TINY_VIT.items() if key != "name"}
    torch.save(VisionTransformer(num_classes=0, **arguments).state_dict(), tmp_path / "start.pth")
    out = finished(tmp_path, weights=str(tmp_path / "start.pth"))
    (tmp_path / "start.pth").unlink()
    assert main.main(["landscape", str(out), *SMALL]) == 0


def test_keys_at_their_default_do_not_contradict_one_another_in_a_saved_config(tmp_path):
    """config.json holds "ca_lrate" although nobody wrote it: without "ca_epochs" a user's config may not."""
    seed = finished(tmp_path, model_name="inflora", milestones=[1], scheduler="multistep") / "seed1993"
    assert "ca_lrate" in json.loads((seed / "config.json").read_text())
    config = saved_config(seed / "config.json", {"device": "cpu"})
    assert config.saved() == json.loads((seed / "config.json").read_text())


def unfinished(out: Path) -> None:
    path = out / "seed1993" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False, "curve": [50.0]}))


def other_data(out: Path) -> None:
    write_stream(out.parent / "stream.npz", seed=1)


def damaged_checkpoint(out: Path) -> None:
    path = out / "seed1993" / "checkpoint" / "last.pt"
    path.write_bytes(path.read_bytes()[:500])


def unknown_key(out: Path) -> None:
    path = out / "seed1993" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lrte": 1}))


# what was done to the run -> what the sentence must say
SPOILT = {
    "unfinished": (unfinished, "is unfinished (1 of 3 tasks done)"),
    "never begun": (lambda out: (out / "seed1993" / "result.json").unlink(), "is unfinished (no task done)"),
    "damaged result": (lambda out: (out / "seed1993" / "result.json").write_text("{"), "result.json' cannot be read"),
    "damaged config": (lambda out: (out / "seed1993" / "config.json").write_text("{"), "not valid JSON"),
    "config of another version": (unknown_key, 'unknown key "lrte": did you mean "lrate"?'),
    "no config": (lambda out: (out / "seed1993" / "config.json").unlink(), "holds no run"),
    "no checkpoint": (lambda out: (out / "seed1993" / "checkpoint" / "last.pt").unlink(), "last.pt' is missing"),
    "damaged checkpoint": (damaged_checkpoint, "last.pt' is damaged"),
    "data gone": (lambda out: (out.parent / "stream.npz").unlink(), "no such file"),
    "other data": (other_data, "the data are not those of the run"),
}
# arguments -> what the sentence must say
WRONG = {
    ("--grid", "20"): "--grid must be an odd number of at least 3",
    ("--grid", "1"): "--grid must be an odd number of at least 3",
    ("--images", "0"): "--images must be at least 1, got 0",
    ("--rho", "0"): "--rho must be a number above 0, got 0",
    ("--noise", "-1"): "--noise must be a number above 0, got -1",
    ("--radius", "nan"): "--radius must be a number above 0, got nan",
    ("--task", "4"): "--task 4: the run in",
    ("--task", "0"): "has the tasks 1 to 3",
    ("--device", "cuda:9"): 'device "cuda:9" was asked for',
    ("--device", "gpu"): '"device" must be',
}


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert err.strip() and "Traceback" not in out + err
    return err


@pytest.mark.parametrize("fault", SPOILT)
def test_a_run_that_cannot_be_drawn(fault, tmp_path, capsys):
    spoil, sentence = SPOILT[fault]
    out = finished(tmp_path, epochs=1)
    spoil(out)
    assert sentence in refused(capsys, "landscape", str(out), *SMALL)
    assert not list(out.rglob("*.npz"))


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments(arguments, shared_run, capsys):
    assert WRONG[arguments] in refused(capsys, "landscape", str(shared_run), *arguments)
    assert not list(shared_run.rglob("*.npz"))


def test_folders_that_hold_no_run(tmp_path, capsys):
    assert "no such folder" in refused(capsys, "landscape", str(tmp_path / "nowhere"))
    assert "holds no run. Give a seed's folder" in refused(capsys, "landscape", str(tmp_path))


def test_several_faults_are_answered_at_once(shared_run, capsys):
    error = refused(capsys, "landscape", str(shared_run), "--grid", "4", "--rho", "-1", "--images", "-5")
    assert all(part in error for part in ("--grid", "--rho", "--images"))


def test_steps_so_long_that_the_loss_is_no_number(shared_run, tmp_path, capsys):
    command = ["landscape", str(shared_run), "--output", str(tmp_path), "--radius", "1e30", *SMALL]
    assert "not a number somewhere in surface_radius: the steps are too long" in refused(capsys, *command)
    assert not list(tmp_path.rglob("*.npz"))


def test_all_seeds_are_looked_at_before_the_first_is_drawn(tmp_path, capsys):
    out = finished(tmp_path, seed=[1993, 1994], epochs=1)
    path = out / "seed1994" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    assert "seed1994' is unfinished" in refused(capsys, "landscape", str(out), *SMALL)
    assert not list(out.rglob("*.npz"))


def test_one_process_only(shared_run, monkeypatch, capsys):
    monkeypatch.setattr(Runtime, "__init__", lambda self, *_: self.__dict__.update(rank=0, world=2))
    assert "start it without torchrun" in refused(capsys, "landscape", str(shared_run), *SMALL)
