"""Errors whose text is meant for the user: they end a run with exit status 2 and no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something in the config, the data, the weights or the machine has to be changed by the user."""


class ConfigError(UserError):
    """One or more faults of a configuration, all reported at once."""

    def __init__(self, source: str, faults: Iterable[str]):
        self.faults = list(faults)
        super().__init__("\n".join([f"{source}:", *(f"  - {fault}" for fault in self.faults)]))


class DataError(UserError):
    """A data set is missing, damaged, or not what its protocol needs."""


class WeightsError(UserError):
    """A weight file is missing, damaged, or made for another network."""


class TrainingError(Exception):
    """Training cannot go on, for example because the loss is not a number: exit status 1 with a message."""


class Interrupted(BaseException):  # noqa: N818 - not an error: the run was asked to stop
    """A signal asked the run to stop; what was done is saved: exit status 3. No Exception, so that no reader that
    answers whatever goes wrong in it takes a stop for a damaged file."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """': did you mean "x"?' for the nearest known word, or '' when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f': did you mean "{near[0]}"?' if near else ""
