"""What tests share: reference numbers, a tiny stream, a tiny learner."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convs.backbones import Backbone, BackboneInfo
from convs.weights import LoadReport
from data.stream import DataManager
from models.base import LEARNERS
from models.factory import build_learner, config_from, learner_class
from utils.config import RunConfig, TrainConfig
from utils.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(os.environ.get("PALIMPSEST_FIXTURES") or Path(__file__).parent / "fixtures")
TINY_VIT = {"name": "vit", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def reference(name: str) -> dict[str, np.ndarray]:
    """The arrays of "method/file": numbers of a reference implementation."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def write_stream(
    path: Path, classes: int = 6, train: int = 7, test: int = 4, size: int = 16, domains: int = 0, seed: int = 0
) -> str:
    """An npz of noisy flat colours, one colour a class, `train` and `test` images of each (and of each domain);
    returns the data set's name."""
    rng = np.random.RandomState(seed)
    colours = rng.randint(40, 216, size=(classes, 3))
    arrays: dict[str, Any] = {}
    for half, count in (("train", train), ("test", test)):
        labels = np.tile(np.repeat(np.arange(classes), count), max(1, domains))
        noise = rng.randint(-30, 31, size=(len(labels), size, size, 3))
        arrays[f"x_{half}"] = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{half}"] = labels
        if domains:
            arrays[f"d_{half}"] = np.repeat(np.arange(domains), classes * count)
    np.savez(path, **arrays)
    return f"npz:{path}"


def pytest_addoption(parser):
    parser.addoption(
        "--learner",
        action="append",
        default=[],
        metavar="NAME",
        help="in tests/contract: this learner instead of all registered ones; also package.module:Class",
    )


def pytest_generate_tests(metafunc):
    """`learner_name` runs over the learners that a contract test is asked for."""
    if "learner_name" in metafunc.fixturenames:
        metafunc.parametrize("learner_name", metafunc.config.getoption("--learner") or list(LEARNERS))


TRAINING = {"epochs": 4, "batch_size": 4, "optimizer": "adamw", "lrate": 0.005}


def tiny_values(tmp_path: Path, model_name: str = "finetune", **keys: Any) -> dict[str, Any]:
    """Raw config of a learner on the tiny stream and a tiny random ViT, with the learner's own `example`; None takes a
    key away."""
    known = ":" in model_name or model_name in LEARNERS
    learner = learner_class(model_name if known else "finetune")
    values = {
        "model_name": model_name,
        "backbone": TINY_VIT,
        "weights": "random",
        "increment": 2,
        "normalize": "half",
        "num_workers": 0,
        "device": "cpu",
        **(TRAINING if issubclass(learner.Config, TrainConfig) else {}),
        **learner.example,
    }
    if "dataset" not in keys:
        keys["dataset"] = write_stream(tmp_path / "stream.npz")
    trains = issubclass(learner.Config, TrainConfig)
    given = {key: value for key, value in keys.items() if trains or key not in TRAINING_KEYS}
    return {key: value for key, value in (values | given).items() if value is not None}


# What a test may ask of every learner, and one that trains nothing does not have.
TRAINING_KEYS = set(TrainConfig.model_fields) - set(RunConfig.model_fields)


def build_tiny(tmp_path: Path, model_name: str = "finetune", **keys: Any):
    """(DataManager, Learner) of `tiny_values`, seeded."""
    config = config_from(tiny_values(tmp_path, model_name, **keys), source="test")
    runtime = Runtime("cpu", keys.get("precision", "fp32"), num_workers=0)
    manager = DataManager(config, image_size=16)
    torch.manual_seed(0)
    return manager, build_learner(config, runtime, manager[0].info)


def in_processes(tmp_path: Path, values: dict[str, Any], counts: Sequence[int] = (1, 2)) -> list[Path]:
    """Run a config by torchrun, over gloo, in so many processes each time; the seed's folders."""
    (tmp_path / "run.json").write_text(json.dumps(values))
    for count in counts:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "main.py"]
        command = [*launch, "--config", str(tmp_path / "run.json"), "--output", str(tmp_path / str(count))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    return [tmp_path / str(count) / "seed1993" for count in counts]


def in_forks(tmp_path: Path, function: Callable[[Path], Any], count: int = 2) -> list[Any]:
    """What a function gives in each of several forked processes over gloo; each has a folder of its own. Seconds less
    than a launch, since nothing is imported again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def process(rank: int, folder: Path) -> None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.save(function(folder), folder / "found.pt")
        torch.distributed.destroy_process_group()

    folders = [tmp_path / f"process{rank}" for rank in range(count)]
    started = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        started.append(context.Process(target=process, args=(rank, folder), daemon=True))
        started[-1].start()
    for child in started:
        child.join(timeout=120)
        child.kill()
    assert [child.exitcode for child in started] == [0] * count
    return [torch.load(folder / "found.pt") for folder in folders]


def bare_backbone(model: torch.nn.Module, width: int) -> Backbone:
    """A network of one's own as a backbone, pixels as they are."""
    report = LoadReport("random", None, 0.0)
    return Backbone(model, BackboneInfo("own", width, 16, (0.0,) * 3, (1.0,) * 3, report))


@pytest.fixture(autouse=True)
def one_thread():
    """The same number everywhere, since sums of floats depend on it; more only slow tiny networks down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """They cost half a second a run, as much as the run; tests that look at them are marked `plots`."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("trainer.plot_run", lambda *arguments: None)
