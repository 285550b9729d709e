"""What every family needs: each key of theirs is read, ignored or refused, and what is left over is an error."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from utils.errors import ConfigError, did_you_mean
from utils.results import is_number

MISSING: Any = object()
IN21K = "vit_base_patch16_224.augreg_in21k"
FT_IN1K = "vit_base_patch16_224.augreg_in21k_ft_in1k"


class Theirs:
    """A config of theirs on its way. ours: keys written so far. ignored: of theirs, that change no result. constants:
    keys of ours that their code fixes and their config does not name."""

    def __init__(self, values: Mapping[str, Any], flags: Iterable[str] = ()):
        self._values, self._read = dict(values), set[str]()
        self.flags = frozenset(flags)
        self.ours: dict[str, Any] = {}
        self.ignored: list[str] = []
        self.constants: list[str] = []
        self.notes: list[str] = []
        self.faults: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = MISSING) -> Any:
        """The value of a key. Absent without a default: a fault, and None."""
        self._read.add(key)
        if key in self._values:
            return self._values[key]
        if default is MISSING:
            self.fault(f'missing key "{key}": their code has no default for it')
            return None
        return default

    def number(self, key: str, default: Any = MISSING) -> Any:
        """As `get`; "1e-8", which is text to a YAML reader, is the number. Anything else that is none is a fault."""
        value = self.get(key, default)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        elif value is None or is_number(value):
            return value
        self.fault(f'"{key}" must be a number, got {value!r}')
        return None

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """As `get`, for true and false."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool | int):
            self.fault(f'"{key}" must be true or false, got {value!r}')
        return bool(value)

    def named(self, key: str, table: Mapping[str, Any], default: Any = MISSING, what: str = "") -> Any:
        """table[value of the key]; a value that it has not is refused."""
        value = self.get(key, default)
        if isinstance(value, str) and value in table:
            return table[value]
        if value is not None or key in self:
            near = did_you_mean(str(value), table)
            known = ", ".join(table)
            self.refuse(key, f"{what or 'has no counterpart here'}{near or '.'} Known: {known}")
        return None

    def same(self, *keys: str, default: Any = MISSING, **renamed: str) -> None:
        """Keys that are called the same here, and theirs=ours."""
        for theirs, ours in {**dict.fromkeys(keys), **renamed}.items():
            if theirs in self or default is MISSING:
                self.put(ours or theirs, self.get(theirs))

    def put(self, key: str, value: Any) -> None:
        if value is not None:
            self.ours[key] = value

    def constant(self, **values: Any) -> None:
        """Keys of ours that their code fixes."""
        for key, value in values.items():
            self.ours[key] = value
            if key not in self.constants:
                self.constants.append(key)

    def ignore(self, *keys: str) -> None:
        """Keys that their code never reads, or that change no result; also patterns such as "eval.*"."""
        for name in self._values:
            if name not in self._read and any(fnmatchcase(name, key) for key in keys):
                self._read.add(name)
                self.ignored.append(name)

    def without_effect(self, *keys: str) -> None:
        """Keys that were read, and change nothing beside the others."""
        self.ignored += [key for key in keys if key in self._values and key not in self.ignored]

    def refuse(self, key: str, why: str) -> None:
        self._read.add(key)
        self.fault(f'"{key}": {self._values.get(key)!r} {why}')

    def fault(self, sentence: str) -> None:
        if sentence not in self.faults:
            self.faults.append(sentence)

    def finish(self, source: str) -> dict[str, Any]:
        """The config. Raises ConfigError with everything that was refused, missing or unknown."""
        for key in self._values:
            if key not in self._read:
                near = did_you_mean(key, self._read)
                self.fault(f'unknown key "{key}"{near or ": nothing says what it does in their code"}')
        if self.faults:
            raise ConfigError(source, self.faults)
        return self.ours


def seeds(theirs: Theirs, alone: bool = True) -> None:
    """theirs: a number, or a list. alone: a list of one is written as its number."""
    value = theirs.get("seed")
    if isinstance(value, list) and len(value) == 1 and alone:
        value = value[0]
    theirs.put("seed", value)


def task_sizes(theirs: Theirs, short: bool = True) -> None:
    """init_cls and increment; short: the first is left out where it is the second."""
    first, later = theirs.get("init_cls"), theirs.get("increment")
    if not short or first != later:
        theirs.put("init_cls", first)
    theirs.put("increment", later)


def first_task(theirs: Theirs) -> None:
    """Leaves out each key of the first task that says what the later ones say."""
    for first, later in (
        ("init_epoch", "epochs"), ("init_lr", "lrate"), ("init_weight_decay", "weight_decay"),
        ("init_milestones", "milestones"), ("init_lr_decay", "lrate_decay"),
    ):  # fmt: skip
        if first in theirs.ours and theirs.ours[first] == theirs.ours.get(later):
            del theirs.ours[first]


def shuffled(theirs: Theirs) -> None:
    """true is the default here."""
    if not theirs.flag("shuffle"):
        theirs.put("shuffle", False)
