"""JSON files and --set -> a checked config, or every fault at once in sentences."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from utils.config import RunConfig, TrainConfig
from utils.errors import ConfigError, did_you_mean
from utils.foreign import yaml_hint
from utils.keys import allowed, condition_text, conditions, holds
from utils.storage import expanded

# Keys of the older toolboxes and of version 0.1 -> what they may be called here, the first that the learner has.
RENAMED = {
    "convnet_type": ("backbone",),
    "backbone_type": ("backbone",),
    "net_type": ("backbone",),
    "lr": ("lrate",),
    "init_epochs": ("init_epoch",),
    "inc_epochs": ("epochs",),
    "tuned_epoch": ("epochs",),
    "optim": ("optimizer",),
    "data_path": ("data_root",),
    "lr_decay": ("lrate_decay",),
    "perturb": ("sam",),
    "rho": ("sam",),
    "adapter_num": ("branches",),
    "ffn_num": ("bottleneck",),
    "ssca": ("shift",),
    "ca": ("ca_epochs",),
    "memory": ("subspace",),
    "stream": ("networks",),
}
# Keys that size an exemplar store elsewhere -> how a learner that has one writes it.
MEMORY_KEYS = {
    "memory_size": '"exemplars": {"total": N}',
    "fixed_memory": '"exemplars": {"per_class": N} in the place of "fixed_memory": true',
    "memory_per_class": '"exemplars": {"per_class": N}',
}
# Keys that the backbone itself fixes -> the argument of the constructor form.
OF_THE_BACKBONE = {"num_heads": "num_heads", "embd_dim": "embed_dim"}
FOLLOWS = {"total_sessions": "the number of tasks follows from init_cls, increment and the data; drop the key"}

# Keys of shipped configs that no line of their reference implementation reads.
UNREAD = frozenset(
    {"use_RP", "M", "pass", "vpt_type", "prompt_token_num", "EPSILON", "prefix", "model_postfix", "save_before_ca"}
)


LARGEST = 10 * 2**20  # bytes of a config file; the largest shipped one has two thousand


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises ConfigError when the file is missing, is not JSON (with line and column), holds a key twice, a number that is
    none, half a character, or anything but an object.
    """
    path = expanded(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(str(path), ["is no file: a config is a JSON file"])
        if path.is_file() and path.stat().st_size > LARGEST:
            raise ConfigError(str(path), [f"holds {path.stat().st_size / 2**20:.0f} MB: that is no config"])
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.json"))) if path.parent.is_dir() else ""
        raise ConfigError(str(path), [f"no such file{near}"]) from None
    except (OSError, ValueError) as error:  # not readable, not UTF-8, no possible name
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    try:
        values = parsed(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() in (".yaml", ".yml"):
            raise ConfigError(str(path), [yaml_hint(path, text)]) from None
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(
            str(path), [f"not valid JSON at {where}: {error.msg}{_another_language(path, text)}"]
        ) from None
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"holds a {type(values).__name__}; a config is one object {{...}}"])
    values.pop("$schema", None)  # for editors only
    return values


def parsed(text: str) -> Any:
    """JSON as a config may hold it. Raises ValueError with a sentence."""
    try:
        values = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply for a config") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character, {error.object[error.start : error.end]!r}") from None
    return values


def _another_language(path: Path, text: str) -> str:
    if path.suffix.lower() in (".yaml", ".yml", ".toml", ".py") or re.match(r"\s*(---|[A-Za-z_]\w*\s*[:=])", text):
        return '. Configs are JSON, {"key": value, ...}; YAML, TOML and Python are not read'
    return ""


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """["epochs=5", "backbone=small_vit"] -> values; each is JSON where it parses as JSON, else text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError("--set", [f'"{assignment}" is not key=value, for example --set epochs=5'])
        try:
            values[key.strip()] = parsed(text)
        except json.JSONDecodeError:
            values[key.strip()] = _whole_text(text)
        except ValueError as error:
            raise ConfigError("--set", [f'"{key.strip()}": {error}']) from None
    return values


def _whole_text(text: str) -> str:
    """Raises ConfigError for bytes of the command line that are no UTF-8, and for NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("--set", [f"{text!r} is no UTF-8"]) from None
    return text


def build(
    cls: type[RunConfig],
    values: Mapping[str, Any],
    origin: Mapping[str, str],
    source: str,
    written: frozenset[str] | None = None,
) -> RunConfig:
    """Check `values` against `cls`.

    origin: key -> where it was given, for keys that do not come from `source`. written: the keys that the user named;
    default: those of `values`.
    Raises ConfigError listing every fault with key, value, what is allowed and the nearest known key. Values are looked
    at one by one first; the rules between keys are asked of what is left without the faulty ones.
    """
    found: dict[str, str] = {}
    sound = dict(values)
    try:
        config = _resolved(cls, sound, written)
    except ValidationError as error:
        found = _describe(cls, error, values.get("model_name"))
        stand_in = {name: "" for name, field in cls.model_fields.items() if field.is_required() and name in found}
        sound = {name: value for name, value in sound.items() if name not in found}
        config = _resolved(cls, sound | stand_in, written)
    faults = [_at(name, sentence, origin) for name, sentence in found.items()]
    for name, sentence in [*_without_effect(config), *config.faults()]:
        if name not in found:  # one fault a key, the first
            found[name] = f'"{name}" {sentence}'
            faults.append(_at(name, found[name], origin))
    if faults:
        raise ConfigError(source, faults)
    return config


def _resolved(cls: type[RunConfig], values: Mapping[str, Any], written: frozenset[str] | None) -> RunConfig:
    """With what the values bring along, in the user's words first, then again with the implied ones."""
    named = frozenset(values) if written is None else written

    def checked(some: Mapping[str, Any]) -> RunConfig:
        config = cls.model_validate_json(json.dumps(some))
        config._written = named
        return config

    implied = {name: value for name, value in checked(values).implied().items() if name not in named}
    return checked({**values, **to_jsonable_python(implied)}) if implied else checked(values)


def _without_effect(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys that the user named although what they need does not hold."""
    for name in sorted(config.written & set(type(config).model_fields)):
        for other, wanted in conditions(type(config), name).items():
            if config.names(name) and not holds(getattr(config, other), wanted):
                yield name, f"has no effect unless {condition_text(other, wanted)}: drop the key"


def _describe(cls: type[RunConfig], error: ValidationError, learner: Any) -> dict[str, str]:
    """key -> sentence: a union reports one error per member, which is one fault."""
    faults: dict[str, str] = {}
    for item in error.errors(include_url=False):
        key = str(item["loc"][0])
        if key in faults:
            continue
        if item["type"] == "missing" and len(item["loc"]) == 1:
            faults[key] = f'missing key "{key}": {cls.model_fields[key].description}'
        elif item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            faults[key] = f'unknown key "{key}"{_known_as(cls, key, learner)}'
        else:
            value = _value(error, item)
            faults[key] = f'"{key}" must be {allowed(cls, key)}, got {value}'
    return faults


def _known_as(cls: type[RunConfig], key: str, learner: Any) -> str:
    """What to do about an unknown key, true for the learner at hand."""
    if key in UNREAD:
        return ": its reference implementation never reads it; drop the key"
    if key in MEMORY_KEYS:
        if "exemplars" in cls.model_fields:
            return f": write {MEMORY_KEYS[key]}"
        return f": {learner} keeps no images of old classes; drop the key"
    if key in OF_THE_BACKBONE:
        return f': a timm tag fixes it; "backbone": {{"name": "vit", ...}} takes {OF_THE_BACKBONE[key]}'
    if key in FOLLOWS:
        return f": {FOLLOWS[key]}"
    for name in RENAMED.get(key, ()):
        if name in cls.model_fields:
            return f': it is called "{name}" here'
    if key in TrainConfig.model_fields and key not in cls.model_fields:
        return f": {learner} trains nothing; drop the key"
    return did_you_mean(key, cls.model_fields) or ": `python main.py keys LEARNER` prints the known ones"


def _value(error: ValidationError, item: Mapping[str, Any]) -> str:
    """The offending value as JSON, with its place when it stands inside a list."""
    place = [str(part) for part in item["loc"][1:] if isinstance(part, int)]
    inside = f" at position {place[0]}" if place else ""
    if item["type"] == "extra_forbidden":
        return f'the unknown "{item["loc"][-1]}"'
    return json.dumps(item["input"], default=str) + inside


def _at(key: str, sentence: str, origin: Mapping[str, str]) -> str:
    return f"{sentence} ({origin[key]})" if key in origin else sentence


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f'key "{key}" stands twice: keep one of the two')
        values[key] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a config may hold")
