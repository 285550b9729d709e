"""The command line: what it answers, and that wrong input gets one sentence, exit status 2 and no traceback."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from data.loading import _end_loader_processes
from models.base import LEARNERS
from tests.conftest import TINY_VIT, tiny_values, write_stream

ROOT = Path(__file__).resolve().parent.parent


def config_file(tmp_path: Path, **keys) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, **keys)))
    return path


def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "broken.json"
    path.write_text(text)
    return path


def npz(tmp_path: Path, **changes) -> dict:
    """Keys of a stream whose npz has some arrays replaced (None: left out)."""
    write_stream(tmp_path / "changed.npz")
    with np.load(tmp_path / "changed.npz") as archive:
        arrays = {key: archive[key] for key in archive.files} | changes
    np.savez(tmp_path / "changed.npz", **{key: value for key, value in arrays.items() if value is not None})
    return {"dataset": f"npz:{tmp_path / 'changed.npz'}"}


def folders(tmp_path: Path, classes: int = 4) -> Path:
    for half in ("train", "test"):
        for c in range(classes):
            folder = tmp_path / "images" / half / f"class {c}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 18), (60 * c, 100, 30 * i)).save(folder / f"{i}.png")
    return tmp_path / "images"


def damage(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def other_width(tmp_path: Path) -> str:
    from timm.models.vision_transformer import VisionTransformer

    arguments = {key: value for key, value in TINY_VIT.items() if key != "name"} | {"embed_dim": 32}
    torch.save(VisionTransformer(num_classes=0, **arguments).state_dict(), tmp_path / "wide.pth")
    return str(tmp_path / "wide.pth")


class Harmful:
    def __reduce__(self):
        return (print, ("code from a weight file",))


def pickled(tmp_path: Path) -> str:
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful()))
    return str(tmp_path / "harmful.pth")


def one_empty_class(tmp_path: Path) -> dict:
    root = folders(tmp_path)
    shutil.rmtree(root / "train" / "class 2")
    (root / "train" / "class 2").mkdir()
    return {"dataset": f"folder:{root}"}


def one_class_less(tmp_path: Path) -> dict:
    shutil.rmtree(folders(tmp_path) / "test" / "class 2")
    return {"dataset": f"folder:{tmp_path / 'images'}"}


def no_test_folder(tmp_path: Path) -> dict:
    shutil.rmtree(folders(tmp_path) / "test")
    return {"dataset": f"folder:{tmp_path / 'images'}"}


def truncated_image(tmp_path: Path) -> dict:
    damage(folders(tmp_path) / "train" / "class 1" / "1.png", 60)
    return {"dataset": f"folder:{tmp_path / 'images'}", "image_size": 16}


def damaged_npz(tmp_path: Path) -> dict:
    write_stream(tmp_path / "cut.npz")
    damage(tmp_path / "cut.npz", 400)
    return {"dataset": f"npz:{tmp_path / 'cut.npz'}"}


def domains(tmp_path: Path, **keys) -> dict:
    return {"dataset": write_stream(tmp_path / "domains.npz", domains=2), "increment": None} | keys


# what is wrong -> (keys of the config, what the sentence must say)
BAD_KEYS = {
    "unknown learner": ({"model_name": "finetun"}, 'unknown learner "finetun": did you mean "finetune"?'),
    "unknown data set": ({"dataset": "cifar1000"}, 'did you mean "cifar100"?'),
    "unknown backbone": ({"backbone": "vit_bose_patch16_224", "weights": None}, "vit_base_patch16_224"),
    "ambiguous backbone": ({"backbone": "vit_base_patch16_224", "weights": None}, "vit_base_patch16_224.augreg_in21k"),
    "unknown tag": ({"backbone": "vit_base_patch16_224.augreg_in22k", "weights": None}, "augreg_in21k"),
    "wrong constructor argument": ({"backbone": TINY_VIT | {"deepth": 2}}, "deepth"),
    "backbone object without name": ({"backbone": {"depth": 2}}, '"name"'),
    "unknown transform": ({"train_transform": "pad_crop_flp"}, 'did you mean "pad_crop_flip"?'),
    "unknown key": ({"lrte": 0.1}, 'unknown key "lrte": did you mean "lrate"?'),
    "key of an older toolbox": ({"convnet_type": "vit"}, 'it is called "backbone" here'),
    "wrong type": ({"epochs": "20"}, '"epochs" must be whole number >= 0, got "20"'),
    "out of range": ({"momentum": 1.5}, '"momentum" must be number >= 0 < 1, got 1.5'),
    "wrong choice": ({"optimizer": "sdg"}, '"sgd" | "adam" | "adamw"'),
    "wrong entry of a list": ({"task_sizes": [3, 0, 3]}, "got 0 at position 1"),
    "contradiction": ({"task_sizes": [3, 3]}, '"task_sizes" contradicts "increment"'),
    "no milestones": ({"scheduler": "multistep"}, '"milestones" missing'),
    "idle milestones": ({"milestones": [1]}, '"milestones" has no effect'),
    "idle class order seed": ({"shuffle": False, "class_order_seed": 3}, '"class_order_seed" has no effect'),
    "missing increment": ({"increment": None}, 'missing key "increment"'),
    "too many classes": ({"init_cls": 7}, '"init_cls" is 7, but'),
    "task sizes that do not add up": ({"task_sizes": [3, 2], "increment": None}, "adds up to 5"),
    "missing weights": ({"weights": "nowhere.pth"}, "no such file"),
    "CUDA asked for and absent": ({"device": "cuda"}, "torch sees no CUDA device"),
    "unknown device": ({"device": "gpu"}, '"device" must be'),
    "missing npz": ({"dataset": "npz:nowhere.npz"}, "no such file: nowhere.npz"),
    "missing folder": ({"dataset": "folder:nowhere"}, "folder 'nowhere' not found"),
}
BAD_FILES = {
    "npz without labels": (lambda p: npz(p, y_train=None), "missing array y_train"),
    "npz of floats": (lambda p: npz(p, x_train=np.zeros((42, 16, 16, 3))), "must be uint8 [N, H, W, 3], is float64"),
    "npz of unequal lengths": (lambda p: npz(p, y_test=np.arange(5)), "24 images but y_test 5 labels"),
    "npz with a gap in the labels": (lambda p: npz(p, y_train=np.repeat([0, 1, 2, 3, 4, 6], 7)), "every label 0..C-1"),
    "npz with other test labels": (lambda p: npz(p, y_test=np.zeros(24, int)), "y_test holds the labels 0"),
    "damaged npz": (damaged_npz, "cannot be read as npz"),
    "truncated image": (truncated_image, "class 1/1.png' cannot be read"),
    "empty class folder": (one_empty_class, "train/class 2"),
    "different classes in test": (one_class_less, "only in train: class 2"),
    "no test folder": (no_test_folder, "'test/' missing under"),
    "weights of another width": (lambda p: {"weights": other_width(p)}, "have another shape"),
    "weights that run code": (lambda p: {"weights": pickled(p)}, "refused"),
    "domains with increment": (lambda p: domains(p, increment=2, shuffle=False), '"increment" has no meaning'),
    "domain order": (
        lambda p: domains(p, shuffle=False, domain_order=["domain 0", "domain 2"]),
        '"domain_order" must hold each domain of',
    ),
    "domain order of classes": (lambda p: {"domain_order": ["a"]}, '"domain_order" has no meaning'),
    "all domains of classes": (lambda p: {"dil_eval": "all"}, '"dil_eval": "all" has no meaning'),
    "crop larger than the images": (
        lambda p: {"dataset": f"folder:{folders(p)}", "train_transform": "pad_crop", "image_size": 64},
        '"train_transform": pad_crop cannot cut 64 x 64 pixels from',
    ),
    "domains shuffled": (lambda p: domains(p, shuffle=True), '"shuffle" must be false'),
}
BAD_TEXTS = {
    "invalid JSON": ('{"epochs": 3,\n "lrate": }', "line 2, column 11"),
    "not an object": ("[1, 2]", "a config is one object"),
    "key given twice": ('{"epochs": 3, "epochs": 4}', 'key "epochs" stands twice'),
    "not a number": ('{"lrate": NaN}', "NaN"),
}


def refused(capsys, tmp_path: Path, *arguments: str) -> str:
    """The sentence on standard error of a command that must exit with 2; what it may not do is checked as well."""
    before = {path for path in ROOT.iterdir()}
    assert main.main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert err.strip() and "Traceback" not in err + out
    assert {path for path in ROOT.iterdir()} == before, "something was written beside the run folder"
    assert not any(json.loads(path.read_text())["finished"] for path in tmp_path.rglob("result.json"))
    return err


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_wrong_keys_are_answered_with_a_sentence(fault, tmp_path, capsys):
    keys, sentence = BAD_KEYS[fault]
    path = config_file(tmp_path, **keys)
    assert sentence in refused(capsys, tmp_path, "--config", str(path), "--output", str(tmp_path / "out"))


@pytest.mark.parametrize("fault", BAD_FILES)
def test_wrong_files_are_answered_with_a_sentence(fault, tmp_path, capsys):
    make, sentence = BAD_FILES[fault]
    path = config_file(tmp_path, **make(tmp_path))
    assert sentence in refused(capsys, tmp_path, "--config", str(path), "--output", str(tmp_path / "out"))


def test_a_loader_process_hands_the_sentence_over(tmp_path, capsys):
    path = config_file(tmp_path, **(truncated_image(tmp_path) | {"num_workers": 1}))
    error = refused(capsys, tmp_path, "--config", str(path), "--output", str(tmp_path / "out"))
    assert error.startswith("image '") and "worker" not in error
    _end_loader_processes()  # the error holds its loader, which would wait ten seconds for them


@pytest.mark.slow
def test_the_program_ends_although_an_error_holds_a_loader_process(tmp_path):
    path = config_file(tmp_path, **(truncated_image(tmp_path) | {"num_workers": 1}))
    program = "import gc, sys, main; gc.disable(); sys.exit(main.main(sys.argv[1:]))"  # no luck in the collector
    command = [sys.executable, "-c", program, "--config", str(path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("image '")


@pytest.mark.slow
def test_an_error_of_the_program_is_not_hidden_by_the_end_of_its_loader_processes(tmp_path):
    path = config_file(tmp_path, **(truncated_image(tmp_path) | {"num_workers": 1}))
    program = "import sys, main, data.images; data.images.DataError = ValueError; sys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--config", str(path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "1.png' cannot be read" in done.stderr and "killed by signal" not in done.stderr


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_wrong_json_is_answered_with_a_sentence(fault, tmp_path, capsys):
    text, sentence = BAD_TEXTS[fault]
    path = text_file(tmp_path, text)
    error = refused(capsys, tmp_path, "--config", str(path))
    assert sentence in error and str(path) in error


def test_a_missing_config_names_its_neighbour(tmp_path, capsys):
    path = config_file(tmp_path)
    assert 'did you mean "run.json"?' in refused(capsys, tmp_path, "--config", str(path.with_name("rum.json")))


def test_all_faults_are_reported_at_once(tmp_path, capsys):
    path = config_file(tmp_path, model_name="simplecill", dataset="digit", lr=0.1, epochs=-1)
    more = ("--set", "batch_size=0", "momentum=2", "--set", "weight_decay=-1")
    error = refused(capsys, tmp_path, "--config", str(path), *more)
    for part in ('"simplecil"', '"digits"', '"lrate" here', '"epochs" must be', "command line"):
        assert part in error
    for key in ("batch_size", "momentum", "weight_decay"):
        assert f'"{key}" must be' in error


def test_a_malformed_assignment_is_refused(tmp_path, capsys):
    assert "is not key=value" in refused(capsys, tmp_path, "--config", str(config_file(tmp_path)), "--set", "epochs")


def test_an_output_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = config_file(tmp_path)
    assert "cannot write to" in refused(
        capsys, tmp_path, "--config", str(path), "--output", str(tmp_path / "file" / "x")
    )


def test_a_folder_with_foreign_files_is_refused(tmp_path, capsys):
    (tmp_path / "out" / "seed1993").mkdir(parents=True)
    (tmp_path / "out" / "seed1993" / "thesis.tex").write_text("x")
    path = config_file(tmp_path)
    assert "thesis.tex" in refused(capsys, tmp_path, "--config", str(path), "--output", str(tmp_path / "out"))


def test_a_finished_folder_is_kept(tmp_path, capsys):
    path, out = config_file(tmp_path), str(tmp_path / "out")
    assert main.main(["--config", str(path), "--output", out]) == 0
    before = (tmp_path / "out" / "seed1993" / "result.json").read_bytes()
    capsys.readouterr()
    assert main.main(["--config", str(path), "--output", out]) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main.main(["--config", str(path), "--output", out, "--resume", "--set", "lrate=0.5"]) == 2
    assert "lrate 0.005 there, 0.5 now" in capsys.readouterr().err
    assert main.main(["--config", str(path), "--output", out, "--resume"]) == 0
    assert (tmp_path / "out" / "seed1993" / "result.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_epoch_can_be_started_again(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main.main(["--config", str(config_file(tmp_path, weights="nowhere.pth")), "--output", out]) == 2
    assert main.main(["--config", str(config_file(tmp_path)), "--output", out]) == 0


def test_a_loss_that_is_not_a_number_ends_with_1(tmp_path, capsys):
    path = config_file(tmp_path, optimizer="sgd", lrate=1e18)
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "lower lrate" in capsys.readouterr().err


@pytest.mark.plots
def test_result_folder_holds_what_the_design_promises(tmp_path, capsys):
    path = config_file(tmp_path, seed=[1, 2])
    out = tmp_path / "out"
    assert main.main(["--config", str(path), "--output", str(out)]) == 0
    assert "task  3" in capsys.readouterr().out
    result = json.loads((out / "seed2" / "result.json").read_text())
    promised = {
        "last_acc", "avg_acc", "last_acc_task_il", "avg_acc_task_il", "acc", "acc_task_il", "curve", "forgetting",
        "bwt", "class_order", "seconds", "peak_memory_mib", "images_per_second", "parameters", "config", "environment",
        "data", "weights",
    }  # fmt: skip
    assert promised <= set(result)
    assert {"train", "eval", "data", "total"} <= set(result["seconds"])
    assert [[value is None for value in row] for row in result["acc"]] == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    assert result["config"]["seed"] == 2 and sorted(result["class_order"]) == list(range(6))
    for name in (
        "config.json",
        "epochs.jsonl",
        "train.log",
        "checkpoint/last.pt",
        "plots/curve.png",
        "plots/matrix.png",
    ):
        assert (out / "seed1" / name).stat().st_size > 0
    assert "seed 2" in (out / "seed2" / "train.log").read_text()
    assert "seed 1:" not in (out / "seed2" / "train.log").read_text(), "each seed logs into its own file"
    summary = json.loads((out / "summary.json").read_text())
    both = [json.loads((out / f"seed{s}" / "result.json").read_text())["last_acc"] for s in (1, 2)]
    assert summary["last_acc"] == {
        "mean": np.mean(both),
        "std": pytest.approx(np.std(both, ddof=1)),
        "n": 2,
        "values": both,
    }
    assert "| last_acc |" in (out / "summary.md").read_text()
    assert (out / "plots" / "seeds.png").stat().st_size > 0


def test_check_runs_nothing(tmp_path, capsys):
    path = config_file(tmp_path)
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "6 classes: 2 + 2 x 2 = 6" in out and "trainable" in out and "MiB" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_keys_lists_every_key_with_its_meaning(learner, capsys):
    assert main.main(["keys", learner]) == 0
    out = capsys.readouterr().out
    for key, field in LEARNERS[learner].Config.model_fields.items():
        assert f"\n{key}" in "\n" + out
        assert field.description, f"{key} has no meaning written down"


def test_list_names_learners_data_sets_and_experiments(capsys):
    assert main.main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("simplecil", "glyphs", "crop_flip_scale05", "small_vit", "exps/quickstart.json"):
        assert word in out


def test_nothing_to_do_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main.main([])
    assert exit_status.value.code == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("exps/slca/cars.json", "runs/slca/cars"),
        ("exps/quickstart.json", "runs/quickstart"),
        ("elsewhere/mine.json", "runs/mine"),
    ],
)
def test_experiments_of_two_families_do_not_share_a_folder(config, expected):
    assert main.result_folder(Path(config), None, alone=True) == Path(expected)


def test_a_stream_of_domains_evaluated_on_all_of_them(tmp_path):
    path = config_file(
        tmp_path, **domains(tmp_path, shuffle=False, dil_eval="all", domain_order=["domain 1", "domain 0"])
    )
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "seed1993" / "result.json").read_text())
    assert result["domains"] == ["domain 1", "domain 0"]
    assert None not in result["acc"][0] and len(result["acc"][0]) == 2
    assert result["curve"][0] == pytest.approx(np.mean(result["acc"][0]))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")],
)  # fmt: skip
def test_too_little_memory_is_a_sentence(error, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **keys):
        raise error

    monkeypatch.setattr("models.finetune.Finetune.predict", fail)
    path = config_file(tmp_path, epochs=1)
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "the memory does not suffice" in capsys.readouterr().err


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*arguments, **keys):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("models.finetune.Finetune.predict", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main.main(["--config", str(config_file(tmp_path, epochs=1)), "--output", str(tmp_path / "out")])
