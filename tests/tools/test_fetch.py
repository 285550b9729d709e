import json

import pytest

import main
from convs import hub
from convs.weights import sha256
from tests.conftest import tiny_values
from tests.data.official import mnist

TAG = "test_vit.r160_in1k"


@pytest.fixture
def config(tmp_path):
    mnist(tmp_path / "data")

    def write(name="run", **keys):
        values = tiny_values(tmp_path, "simplecil", dataset="mnist", data_root=str(tmp_path / "data"), increment=1)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({key: value for key, value in (values | keys).items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    monkeypatch.setattr(hub, "fetch", lambda name: file)
    return file


def test_says_what_where_and_with_which_hash(config, fetched, tmp_path, capsys):
    folder = tmp_path / "weights"
    paths = [config(), config("vit", backbone=TAG, weights=None)]
    assert main.main(["fetch", *paths, "--weights-dir", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.count("mnist:") == 1, "one data set of two configs is fetched once"
    assert str(tmp_path / "data") in text and "12 + 6 images" in text
    copied = folder / f"{TAG}.safetensors"
    assert copied.read_bytes() == b"weights" and str(copied) in text and sha256(fetched) in text


def test_what_is_there_is_not_overwritten(config, fetched, tmp_path, capsys):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / f"{TAG}.safetensors").write_bytes(b"mine")
    path = config(backbone=TAG, weights=None)
    assert main.main(["fetch", path, "--weights-dir", str(folder)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (folder / f"{TAG}.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_had_is_told_and_the_rest_is_fetched(config, tmp_path, monkeypatch, capsys):
    def fail(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "fetch", fail)
    own = config("own", weights=str(tmp_path / "none.pth"))
    assert main.main(["fetch", config("vit", backbone=TAG, weights=None), own]) == 2
    said = capsys.readouterr()
    assert "mnist:" in said.out and "no route to host" in said.err and "none.pth" in said.err


def test_nothing_to_fetch(config, tmp_path, capsys):
    from tests.conftest import write_stream

    path = config(dataset=write_stream(tmp_path / "s.npz"), data_root=None, increment=2)
    assert main.main(["fetch", path]) == 0
    assert "npz:" in capsys.readouterr().out
