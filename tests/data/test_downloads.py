"""Downloads that are cut off; none reaches a network."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.downloads import cut_off, marked
from data.layouts import Options
from data.sources import read
from tests.data.official import MAKERS

SETS = ("EuroSAT", "Country211", "SUN397")  # whose readers take a folder that exists for the whole set


@pytest.fixture
def download(monkeypatch):
    """Of a set: writes its official layout, then ends as it is told."""

    def of(name, root, error=None, parts=True):
        def act(self):
            if parts and not (root / name.lower()).exists() and not (root / name).exists():
                MAKERS[name](root)
            if error is not None:
                raise error

        owner = __import__("torchvision.datasets", fromlist=[name])
        method = next(entry for entry in ("download", "_download") if hasattr(getattr(owner, name), entry))
        monkeypatch.setattr(getattr(owner, name), method, act)

    return of


def options_of(name, tmp_path, **keys):
    return Options(split="folder" if name == "Country211" else "seeded", cache=tmp_path / "cache", **keys)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("name", SETS)
def test_a_part_is_not_taken_for_the_set(name, error, download, tmp_path):
    root = tmp_path / "data"
    download(name, root, error)
    try:
        data, findings = read(f"torchvision:{name}", str(root), options_of(name, tmp_path))
        assert data is None and findings.of("error")
    except KeyboardInterrupt:
        pass
    for may in (False, True):
        data, findings = read(f"torchvision:{name}", str(root), options_of(name, tmp_path, download=may))
        (told,) = findings.of("error")
        assert data is None and "cut off" in told.text and f"'{root / f'.{name}.part'}'" in told.text
    (root / f".{name}.part").unlink()
    data, _ = read(f"torchvision:{name}", str(root), options_of(name, tmp_path, download=False))
    assert data is not None, "what is there is the user's to judge"


@pytest.mark.parametrize("name", SETS)
def test_nothing_is_left_of_one_that_brought_nothing_or_came_to_its_end(name, download, tmp_path):
    root = tmp_path / "data"
    download(name, root, OSError("no route to host"), parts=False)
    data, findings = read(f"torchvision:{name}", str(root), options_of(name, tmp_path))
    assert data is None and "no route to host" in findings.of("error")[0].text and not root.exists()
    download(name, root)
    data, _ = read(f"torchvision:{name}", str(root), options_of(name, tmp_path))
    assert data is not None and not list(root.glob(".*"))


@pytest.mark.parametrize("killed", [True, False])
def test_a_mark_alone_stops_nobody(killed, download, tmp_path):
    """Killed before anything was unpacked, by force or by Ctrl-C."""
    root = tmp_path / "data"
    if killed:
        root.mkdir()
        (root / ".EuroSAT.part").touch()
    else:
        download("EuroSAT", root, KeyboardInterrupt(), parts=False)
        with pytest.raises(KeyboardInterrupt):
            read("eurosat", str(root), options_of("EuroSAT", tmp_path))
        assert not list(root.glob(".*"))
    download("EuroSAT", root)
    data, _ = read("eurosat", str(root), options_of("EuroSAT", tmp_path))
    assert data is not None and not list(root.glob(".*"))


def test_one_at_work_is_waited_for(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def work():
        with marked(tmp_path, "Set", lambda: True):
            begun.set()
            go_on.wait(10)

    with ThreadPoolExecutor(2) as pool:
        working = pool.submit(work)
        begun.wait(10)
        waiting = pool.submit(cut_off, tmp_path, "Set")
        assert not waiting.done()
        go_on.set()
        assert waiting.result(10) is None
        working.result(10)
