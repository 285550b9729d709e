"""Config files of every kind: right, or one sentence."""

import os

import pytest

from utils.checking import parse_set, read_json
from utils.errors import ConfigError, UserError

TEXTS = {
    "yaml": (b"model_name: slca\nepochs: 3\n", "Configs are JSON"),
    "yaml with a start": (b"---\nmodel_name: slca\n", "Configs are JSON"),
    "toml": (b'model_name = "slca"\n', "Configs are JSON"),
    "deep lists": (b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 200_000, "nested too deeply"),
    "half a character": (b'{"about": {"x": "\\ud800"}}', "half a character"),
    "half a character as a key": (b'{"\\udfff": 1}', "half a character"),
    "infinite": (b'{"lrate": 1e999}', "too large a number"),
    "infinite inside": (b'{"about": {"x": [1e400]}}', "too large a number"),
    "many digits": (b'{"seed": ' + b"9" * 5000 + b"}", "too large a number"),
    "NaN inside": (b'{"about": {"x": NaN}}', "NaN"),
    "another encoding": ('{"about": "ü"}'.encode("latin-1"), "cannot be read"),
    "UTF-16": ("{}".encode("utf-16"), "cannot be read"),
    "binary": (bytes(range(256)), "cannot be read"),
    "empty": (b"", "not valid JSON"),
    "a list": (b"[]", "one object"),
    "null": (b"null", "one object"),
    "twice inside": (b'{"about": {"x": 1, "x": 2}}', "stands twice"),
    "large": (b" " * (11 * 2**20) + b"{}", "that is no config"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_config(case, tmp_path):
    text, sentence = TEXTS[case]
    path = tmp_path / "run.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="run.json") as caught:
        read_json(path)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "run.json").write_bytes(b'\xef\xbb\xbf{"epochs": 3}')
    assert read_json(tmp_path / "run.json") == {"epochs": 3}


def test_a_file_that_would_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no file"):
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-that-name/a.json", "\udcff.json"])
def test_names_that_are_none(name, tmp_path):
    from pathlib import Path

    with pytest.raises(UserError):
        read_json(Path(name))


@pytest.mark.parametrize(
    "text", ["seed=" + "9" * 100, "lrate=1e999", "a=NaN", "dataset=\udcff", "=1", "epochs", "x=[" + "[" * 9**5]
)
def test_values_of_the_command_line_that_are_none(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_set([text])
