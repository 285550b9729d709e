"""Commands: found by what stands in tools/, answered by name, predict and evaluate on a finished run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import tools
from predictor import Predictor
from tests.conftest import tiny_values, write_stream
from utils import checkpoint
from utils.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, test images, their labels); tests may not write into it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps(tiny_values(folder, epochs=2)))
    assert main.main(["--config", str(folder / "run.json"), "--output", str(folder / "out")]) == 0
    with np.load(folder / "stream.npz") as archive:
        return folder / "out", archive["x_test"], archive["y_test"]


@pytest.fixture
def pictures(run, tmp_path):
    """A folder with the test images as PNG files."""
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(run[1]):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number:02d}.png")
    return tmp_path / "pictures"


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert err.strip() and "Traceback" not in out + err
    return err


def test_help_lists_every_module_of_tools(capsys):
    modules = {path.stem for path in (ROOT / "tools").glob("*.py")} | {
        path.name for path in (ROOT / "tools").iterdir() if (path / "__init__.py").is_file()
    }
    assert {command.module.rpartition(".")[2] for command in tools.COMMANDS.values()} == modules - {"__init__"}
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and command.help for name, command in tools.COMMANDS.items())


@pytest.mark.parametrize("flag", main.OLD_FLAGS)
def test_old_flags_are_answered_with_the_new_form(flag, capsys):
    assert f"python main.py {main.OLD_FLAGS[flag]}" in refused(capsys, flag, "x")
    assert "is a command now" in refused(capsys, f"{flag}=x")


def test_a_wrong_command_gets_the_nearest_name(capsys):
    assert 'did you mean "landscape"' in refused(capsys, "landscap", "runs/x")
    assert "Known: " in refused(capsys, "qqqq")


def test_help_is_quick_and_imports_no_torch():
    program = "import sys, main\ntry: main.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly():
    done = subprocess.run(
        f"{sys.executable} main.py keys slca | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_predict_writes_the_run_s_classes(run, pictures, tmp_path, capsys):
    out, images, labels = run
    table = tmp_path / "found.csv"
    assert main.main(["predict", str(out), str(pictures), "--csv", str(table), "--device", "cpu"]) == 0
    rows = list(csv.DictReader(table.open()))
    assert list(rows[0]) == ["file", "class", "score"] and len(rows) == len(images)
    result = json.loads((out / "seed1993" / "result.json").read_text())
    right = sum(row["class"] == str(label) for row, label in zip(rows, labels, strict=True))
    assert 100.0 * right / len(rows) == result["last_acc"]
    patterns = [str(pictures / "0*.png"), str(pictures / "00.png")]
    assert main.main(["predict", str(out / "seed1993"), *patterns, "--top", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 30, "ten files, each once, three classes each"


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_classified(run, pictures, capsys):
    (pictures / "03.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main.main(["predict", str(run[0]), str(pictures), str(pictures / "gone.png"), "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert "03.png' cannot be read" in out and "gone.png' cannot be read" in out
    assert len([line for line in out.splitlines() if "cannot be read" not in line]) == len(run[1]) - 1


def test_what_predict_refuses(run, pictures, tmp_path, capsys):
    out = str(run[0])
    (tmp_path / "there.csv").touch()
    (tmp_path / "empty").mkdir()
    assert "is there already" in refused(capsys, "predict", out, str(pictures), "--csv", str(tmp_path / "there.csv"))
    assert "--top must be at least 1" in refused(capsys, "predict", out, str(pictures), "--top", "0")
    assert "no images in" in refused(capsys, "predict", out, str(tmp_path / "empty"))
    assert "no images in" in refused(capsys, "predict", out, str(tmp_path / "*.jpg"))
    assert "no such folder" in refused(capsys, "predict", str(tmp_path / "nowhere"), str(pictures))
    assert "holds no run" in refused(capsys, "predict", str(tmp_path), str(pictures))


def test_evaluate_gives_the_run_s_own_accuracy(run, tmp_path, capsys):
    capsys.readouterr()
    assert main.main(["evaluate", str(run[0])]) == 0
    assert "as the run's result.json" in capsys.readouterr().out
    other = write_stream(tmp_path / "other.npz", seed=3)
    assert main.main(["evaluate", str(run[0]), "--data", other]) == 0
    assert "result.json" not in capsys.readouterr().out
    fewer = write_stream(tmp_path / "fewer.npz", classes=4)
    assert "has other classes than the run" in refused(capsys, "evaluate", str(run[0]), "--data", fewer)


def test_images_of_every_kind_give_the_same_scores(run):
    predictor, image = Predictor(run[0], "cpu"), run[1][3]
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    found = [
        predictor(kind).scores for kind in (image, image[None], [image], Image.fromarray(image), pixels, pixels[None])
    ]
    assert all(scores.shape == (1, 6) and (scores == found[0]).all() for scores in found)
    assert predictor([]).scores.shape == (0, 6)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((16, 16, 3)), "must be uint8"),
        (np.zeros((16, 16), np.uint8), "must be uint8"),
        (torch.zeros(3, 8, 8), "a tensor must be float"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "a tensor must be float"),
        (3, "is no image"),
        ("nowhere.png", "no such file"),
    ],
)
def test_what_is_no_image_gets_a_sentence(run, image, sentence):
    with pytest.raises((UserError, DataError), match=sentence):
        Predictor(run[0], "cpu")([image] if not isinstance(image, np.ndarray) or image.ndim == 3 else image)


def spoil_version(path: Path) -> None:
    identity, state = checkpoint.load(path)
    checkpoint.save(state, path, {**identity, "format": 99, "version": "9.0"})


def other_learner(path: Path) -> None:
    identity, state = checkpoint.load(path)
    checkpoint.save(state, path, {**identity, "learner": "slca"})


SPOILT = {
    "damaged": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    "one bit": (lambda path: path.write_bytes(_flipped(path.read_bytes())), "is damaged"),
    "missing": (Path.unlink, "is missing, and with it the weights"),
    "version 0.1": (lambda path: torch.save({"a": 1}, path), "was written by version 0.1"),
    "a later version": (spoil_version, "was written by version 9.0"),
    "another learner's": (other_learner, "is of slca, the run's config.json of finetune"),
}


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_run_that_cannot_be_used_gets_a_sentence(command, fault, run, pictures, tmp_path, capsys):
    import shutil

    spoil, sentence = SPOILT[fault]
    shutil.copytree(run[0], tmp_path / "out")
    spoil(tmp_path / "out" / "seed1993" / "checkpoint" / "last.pt")
    assert sentence in refused(
        capsys, command, str(tmp_path / "out"), *([str(pictures)] if command == "predict" else [])
    )


def test_several_seeds_and_an_unfinished_run_are_answered(run, pictures, tmp_path, capsys):
    import shutil

    shutil.copytree(run[0], tmp_path / "out")
    shutil.copytree(run[0] / "seed1993", tmp_path / "out" / "seed1")
    assert "holds 2 seeds (seed1, seed1993)" in refused(capsys, "predict", str(tmp_path / "out"), str(pictures))
    path = tmp_path / "out" / "seed1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    assert "is unfinished" in refused(capsys, "predict", str(path.parent), str(pictures))
