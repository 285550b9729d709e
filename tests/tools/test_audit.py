"""`audit RUN`: who depends on the batch, what has changed since the run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from data.loading import Batch
from data.stream import TaskData
from models.factory import saved_config
from predictor import Predictor
from tests.conftest import build_tiny, tiny_values
from tools.audit import audit
from trainer import check_processes
from utils.errors import ConfigError, UserError


def finished(folder, model: str, **keys):
    """The folder of a finished run."""
    (folder / "run.json").write_text(json.dumps(tiny_values(folder, model_name=model, epochs=1, **keys)))
    assert main.main(["--config", str(folder / "run.json"), "--output", str(folder / "out")]) == 0
    return folder / "out"


def audited(capsys, run, *options: str) -> str:
    capsys.readouterr()
    assert main.main(["audit", str(run), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "upstream"),
    [
        ("l2p", False),
        ("dualprompt", False),
        ("dualprompt", True),
        ("coda_prompt", True),
        ("slca", False),
    ],
)
def test_the_verdict(model, upstream, tmp_path, capsys):
    out = audited(capsys, finished(tmp_path, model, upstream=upstream), "--device", "cpu")
    dependent = upstream and model != "coda_prompt"
    assert ("verdict: predictions depend on their neighbours" in out) == dependent, out
    assert ("verdict: no prediction depends on its neighbours" in out) != dependent, out
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp32", "bf16"))]
    assert len(rows) == 16
    assert all(row[-2:] == ["0", "0"] for row in rows if row[-4] == "1"), "single images are the measure"


def test_what_depends_on_its_batch_is_refused_where_it_cannot_be_had(tmp_path, capsys):
    run = finished(tmp_path, "dualprompt", upstream=True)
    assert "depend on the other images of a test batch" in capsys.readouterr().out
    with pytest.raises(UserError, match="a single image has none"):
        Predictor(run)
    assert main.main(["evaluate", str(run)]) == 0
    assert "as the run's result.json" in capsys.readouterr().out
    config = saved_config(run / "seed1993" / "config.json")
    with pytest.raises(ConfigError, match="run it in one process"):
        check_processes(config, SimpleNamespace(world=2))


@pytest.mark.parametrize("upstream", [False, True])
def test_the_vote_of_l2p_is_noticed(upstream, tmp_path):
    """Each of some images has a key of its own, so that its neighbours outvote it."""
    manager, learner = build_tiny(tmp_path, "l2p", upstream=upstream, top_k=1, pool_size=8)
    learner.eval()
    data = TaskData.joined([task.test for task in manager])
    learner.task = manager[-1].info
    pixels, _ = learner.runtime.to_device(*data.view("test").__getitems__(Batch(np.arange(8))))
    with torch.no_grad():
        learner.network.keys.copy_(learner.network.ask(pixels).query)
        learner.network.head.weight.normal_()
    rows = list(audit(learner, data, "fp32"))
    assert [row.moved > 0 for row in rows] == [upstream and row.batch > 1 for row in rows]


def test_what_has_changed_since_the_run_is_named(tmp_path, capsys):
    run = finished(tmp_path, "slca")
    assert audited(capsys, run).count("as in the run") == 2  # no weight file
    with np.load(tmp_path / "stream.npz") as archive:
        arrays = dict(archive)
    arrays["x_test"] = 255 - arrays["x_test"]
    np.savez(tmp_path / "stream.npz", **arrays)
    out = audited(capsys, run, "--images", "5")
    assert "data         OTHER: sha256" in out and "\n5 images" in out and "class order  as in the run" in out


def test_the_weights_of_a_bundled_network_are_compared(tmp_path, capsys, monkeypatch):
    run = finished(tmp_path, "simplecil", backbone="small_vit", weights=None, image_size=None)
    assert audited(capsys, run, "--images", "5").count("as in the run") == 3
    monkeypatch.setattr("tools.audit.bundled_file", lambda name: tmp_path / "stream.npz")
    assert "weights      OTHER: sha256" in audited(capsys, run, "--images", "5")
    monkeypatch.setattr("tools.audit.bundled_file", lambda name: tmp_path / "gone")
    assert f"'{tmp_path / 'gone'}' is not there any more" in audited(capsys, run, "--images", "5")


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main.main(["audit", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
