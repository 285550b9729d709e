import pickle

import pytest

from utils.errors import ConfigError, DataError, TrainingError, UserError, WeightsError, printable, reason, shown

LONG = "x" * 5_000


@pytest.mark.parametrize(
    "value",
    [
        LONG,  # one word
        f"'{'many words ' * 500}'",
        f'"{"many words " * 500}"',
        str(list(range(5_000))),
        str({"a": LONG}),
        "/".join(["folder"] * 900),
        "\n".join([LONG] * 50),
        "[" * 5_000,
    ],
)
@pytest.mark.parametrize("kind", [UserError, DataError, WeightsError, TrainingError])
def test_what_comes_from_outside_does_not_fill_the_screen(kind, value):
    text = str(kind(f'the key "lrate" got {value}, allowed is a number'))
    assert len(text) < 2_000
    assert text.startswith('the key "lrate" got ')
    if "\n" not in value:
        assert text.endswith("allowed is a number")


def test_sentences_of_usual_length_are_left_alone():
    sentence = """'a b' and the users' "keys" [1, 2] {"x": 1}, the network's own: don't change 'weights', it's """ + (
        "what the file of this network's author holds; " * 6
    )
    assert printable(sentence) == sentence


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1bcb", "ab"),
        ("a\x00b\rc\x7f", r"a\x00b\rc\x7f"),
        ("a\x9b31mb", r"a\x9b31mb"),
        ("a\udc80b", r"a\udc80b"),
        ("a\u202eb\u2028b", r"a\u202eb\u2028b"),
        ("Ünïcode 文字", "Ünïcode 文字"),
    ],
)
def test_a_terminal_is_not_steered_by_a_name(outside, expected):
    assert str(DataError(f"image '{outside}' cannot be read")) == f"image '{expected}' cannot be read"
    str(DataError(outside)).encode("utf-8")


def test_many_faults_are_counted():
    error = ConfigError("x.json", [f"unknown key number {i} of many that the user has written" for i in range(100)])
    assert len(error.faults) == 100 and len(str(error)) < 2_000
    assert str(error).startswith("x.json:\n  - unknown key number 0") and "more lines" in str(error).splitlines()[-1]


def test_errors_travel_between_processes():
    for error in (ConfigError("x.json", ["a", "b"]), DataError("c")):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error) and str(back) == str(error)


def test_shown_keeps_both_ends():
    assert shown("abc") == "abc"
    text = shown("a" * 300 + "z" * 300)
    assert len(text) == 200 and text.startswith("aaa") and text.endswith("zzz") and " ... " in text


def test_reason_is_one_line():
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(RecursionError()) == "RecursionError"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
