"""Errors whose text is meant for the user: they end a run with exit status 2 and no traceback.

What comes from outside stands in these texts: `printable`, which every one of them passes, keeps a terminal, a log and
a reader safe from it.
"""

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

VALUE = 200  # characters that a text shows of one value
LINE = 1_000  # of one line
WHOLE = 1_900  # of a text

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[PX^_].*?\x1b\\|[ -/]*[0-~])")
# A value in a sentence: in quotes, in brackets, or one word. Quotes that stand in a word are apostrophes.
_VALUES = (re.compile(r"(?<!\w)'[^'\n]*'(?!\w)"), re.compile(r'"[^"\n]*"'), re.compile(r"\[[^\[\]\n]*\]"),
           re.compile(r"\{[^{}\n]*\}"), re.compile(r"\S+"))  # fmt: skip
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, lone surrogate, line and paragraph separators


class _ToldError(Exception):
    """An error whose text has been made fit to print."""

    def __init__(self, text: object):
        super().__init__(printable(text))


class UserError(_ToldError):
    """Something in the config, the data, the weights or the machine has to be changed by the user."""


class ConfigError(UserError):
    """One or more faults of a configuration, all reported at once."""

    def __init__(self, source: str, faults: Iterable[str]):
        self.source, self.faults = source, list(faults)
        super().__init__("\n".join([f"{source}:", *(f"  - {fault}" for fault in self.faults)]))

    def __reduce__(self):
        return type(self), (self.source, self.faults)


class DataError(UserError):
    """A data set is missing, damaged, or not what its protocol needs."""


class WeightsError(UserError):
    """A weight file is missing, damaged, or made for another network."""


class TrainingError(_ToldError):
    """Training cannot go on, for example because the loss is not a number: exit status 1 with a message."""


class Interrupted(BaseException):  # noqa: N818 - not an error: the run was asked to stop
    """A signal asked the run to stop; what was done is saved: exit status 3. No Exception, so that no reader that
    answers whatever goes wrong in it takes a stop for a damaged file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """': did you mean "x"?' for the nearest known word, or '' when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f': did you mean "{near[0]}"?' if near else ""


def printable(text: object) -> str:
    """The text without escape codes, what cannot be seen written out (`\\x00`, `\\u202e`), and shortened in the middle:
    values to 200 characters, lines to 1,000, the whole to 1,900, by whole lines where there are several."""
    clean = "".join(_visible(letter) for letter in _ESCAPES.sub("", str(text)))
    for pattern in _VALUES:
        clean = pattern.sub(lambda found: shown(found[0]), clean)
    lines = [shown(line, LINE) for line in clean.split("\n")]
    kept = len(lines)
    while kept > 1 and sum(map(len, lines[:kept])) + kept > WHOLE:
        kept -= 1
    left = [f"  ... and {len(lines) - kept} more lines"] if kept < len(lines) else []
    return "\n".join(lines[:kept] + left)


def shown(value: object, limit: int = VALUE) -> str:
    """The value as text of at most `limit` characters, three quarters of them from its beginning."""
    text = str(value)
    if len(text) <= limit:
        return text
    last = limit // 4
    return f"{text[: limit - last - 5]} ... {text[-last:]}"


def reason(error: BaseException) -> str:
    """What an exception says, in one line, to stand in a sentence; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return shown(words or type(error).__name__)


def _visible(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in _UNSEEN:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
