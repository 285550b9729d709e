"""Files that are replaced in one step, put aside, or held."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.storage import expanded, held, put_aside, replace_file

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def half(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_link_is_followed(tmp_path):
    """Where an older version put its temporary file."""
    (tmp_path / "mine").write_text("untouched")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "mine").read_text() == "untouched" and (tmp_path / "a.tmp").is_symlink()


def test_what_is_put_aside_takes_nothing_s_place(tmp_path, caplog):
    for text in ("first", "second", "third"):
        (tmp_path / "a").write_text(text)
        put_aside(tmp_path / "a", "why")
    assert [(tmp_path / f"a.damaged{n}").read_text() for n in ("", "2", "3")] == ["first", "second", "third"]
    assert "put aside as a.damaged3" in caplog.text


def test_a_folder_is_held_by_one_process_and_let_go_by_the_kernel(tmp_path):
    program = (
        "import sys, pathlib; from utils.storage import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on "), held(tmp_path):
            pass
        other.kill()
        other.wait()
    with held(tmp_path):
        pass


def test_the_home_of_nobody_is_a_sentence():
    assert expanded("~/x") == Path.home() / "x"
    with pytest.raises(UserError, match="no such home folder"):
        expanded("~nobody-of-that-name/x")
