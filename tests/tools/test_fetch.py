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


def _a_file(folder):
    folder.write_text("mine")


def _a_folder_in_its_place(folder):
    (folder / f"{TAG}.safetensors").mkdir(parents=True)


def _a_link_to_nowhere(folder):
    folder.mkdir()
    (folder / f"{TAG}.safetensors").symlink_to(folder / "nowhere")


def _a_part(folder):
    folder.mkdir()
    (folder / f"{TAG}.safetensors").write_bytes(b"wei")


@pytest.mark.parametrize("obstacle", [_a_file, _a_folder_in_its_place, _a_link_to_nowhere, _a_part])
def test_what_stands_in_the_way_is_told_and_stays(obstacle, config, fetched, tmp_path, capsys):
    folder = tmp_path / "weights"
    obstacle(folder)
    before = sorted((path, path.is_symlink(), path.is_dir()) for path in [folder, *folder.rglob("*")])
    assert main.main(["fetch", config(backbone=TAG, weights=None), "--weights-dir", str(folder)]) == 2
    said = capsys.readouterr()
    assert "mnist:" in said.out and str(folder) in said.err and "--output" not in said.err
    assert sorted((path, path.is_symlink(), path.is_dir()) for path in [folder, *folder.rglob("*")]) == before


@pytest.mark.parametrize("link", [False, True])
def test_fetched_twice(link, config, fetched, tmp_path, capsys):
    folder, path = tmp_path / "weights", config(backbone=TAG, weights=None)
    if link:
        folder.mkdir()
        (folder / f"{TAG}.safetensors").symlink_to(fetched)
    for _ in range(2):
        assert main.main(["fetch", path, path, "--weights-dir", str(folder)]) == 0
    assert [file.name for file in folder.iterdir()] == [f"{TAG}.safetensors"]
    assert fetched.read_bytes() == b"weights"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_is_cut_off_leaves_nothing(error, config, fetched, tmp_path, capsys, monkeypatch):
    def cut(source, target):
        target.write(b"wei")
        raise error

    folder, path = tmp_path / "weights", config(backbone=TAG, weights=None)
    with monkeypatch.context() as patched:
        patched.setattr("tools.fetch.shutil.copyfileobj", cut)
        assert main.main(["fetch", path, "--weights-dir", str(folder)]) in (2, 130)
    assert not list(folder.iterdir())
    assert main.main(["fetch", path, "--weights-dir", str(folder)]) == 0


def test_all_wrong_configs_are_told_and_the_others_fetched(config, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    paths = [config("odd", lratee=1), str(broken), config(), str(tmp_path / "none.json")]
    assert main.main(["fetch", *paths]) == 2
    said = capsys.readouterr()
    assert "mnist:" in said.out
    for part in ("lratee", "broken.json", "none.json"):
        assert part in said.err
    assert main.main(["fetch", str(broken)]) == 2
    assert "nothing comes" not in capsys.readouterr().out


def test_own_weights_below_home_are_found(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.npz").write_bytes(b"weights")
    assert main.main(["fetch", config(weights="~/mine.npz")]) == 0
    assert main.main(["fetch", config(weights="~/none.npz")]) == 2


def test_the_place_is_where_the_data_lie(config, tmp_path, monkeypatch, capsys):
    from data import idx
    from tests.data.official import idx_files

    monkeypatch.setattr(idx, "PACKAGE", tmp_path / "usr" / "fashion-mnist")
    idx_files(idx.PACKAGE, classes=10)
    assert main.main(["fetch", config(dataset="fashionmnist", increment=5), config("b", dataset="digits")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"'{idx.PACKAGE}'" in first and "data_root" not in first + second
