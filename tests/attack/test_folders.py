"""Seeded fuzz of run folders: a damaged one resumes to the same numbers, or is refused in one sentence and kept."""

import json
import random
import shutil

import pytest

import main
import trainer
from tests.conftest import tiny_values
from tests.test_resume import Killed, kill_after

pytestmark = pytest.mark.long
CASES = 200


def numbers(folder):
    result = json.loads((folder / "seed2" / "result.json").read_text())
    return result["acc"], result["acc_per_class"], result["forgetting"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(command, folder of the cut run, numbers of one that was not)."""
    folder = tmp_path_factory.mktemp("attack")
    values = tiny_values(folder, epochs=1, seed=[1, 2], shuffle=False, checkpoint_minutes=1e-9)
    (folder / "run.json").write_text(json.dumps(values))
    command = ["--config", str(folder / "run.json"), "--output", str(folder / "out")]
    assert main.main(command) == 0
    whole = numbers(folder / "out")
    shutil.rmtree(folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, trainer.SeedRun, "step_done", 18)
        with pytest.raises(Killed):
            main.main(command)
    return folder, whole


def damage(rng: random.Random, out) -> str:
    """One fault in the folder; what it was."""
    path = rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"))
    kind = rng.choice(["flip", "cut", "empty", "gone", "noise", "folder", "extra", "swap", "link"])
    data = bytearray(path.read_bytes())
    if kind == "flip" and data:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "gone":
        path.unlink()
    elif kind == "noise":
        path.write_bytes(rng.randbytes(rng.randint(1, 5000)))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "extra":
        name = rng.choice(["a.tmp", ".nfs01", "model.pth", "seed9", "x" * 200, ".DS_Store", "result (1).json"])
        (path.parent / name).write_bytes(rng.randbytes(20))
    elif kind == "swap":
        other = rng.choice(sorted(p for p in out.rglob("*") if p.is_file()))
        shutil.copy(other, path) if other != path else None
    elif kind == "link":
        path.unlink()
        path.symlink_to(rng.choice(["/nonexistent", "/dev/null", ".", path.name]))
    return f"{kind} {path.relative_to(out)}"


@pytest.mark.parametrize("block", range(4))
def test_a_damaged_run_folder(block, prepared, tmp_path, capsys):
    folder, whole = prepared
    command = ["--config", str(folder / "run.json"), "--output", str(tmp_path / "out"), "--resume"]
    answered = 0
    for case in range(block * CASES // 4, (block + 1) * CASES // 4):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(folder / "out", tmp_path / "out")
        rng = random.Random(case)
        done = [damage(rng, tmp_path / "out") for _ in range(rng.randint(1, 2))]
        capsys.readouterr()
        status = main.main(command)
        said = capsys.readouterr()
        assert status in (0, 2), f"seed {case}: {done}"
        if status == 0:
            assert numbers(tmp_path / "out") == whole, f"seed {case}: {done}"
        else:
            answered += 1
            assert 0 < len(said.err) < 2000 and "Traceback" not in said.err, f"seed {case}: {done}: {said.err[:3000]}"
    assert answered < CASES // 4, "some go on"
