"""A config file of another repository -> its keys, flat or nested as they stand."""

import json
from pathlib import Path
from typing import Any

import yaml

from utils.errors import ConfigError, did_you_mean
from utils.foreign import FAMILIES, family_of


def read_theirs(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    """(family, keys as they stand, names of keys that stand twice). YAML by its suffix, else JSON.

    Raises ConfigError when the file cannot be read, or is of no family.
    """
    twice: list[str] = []
    read = _read_yaml if path.suffix.lower() in (".yaml", ".yml") else _read_json
    values = read(path, twice)
    family = family_of(values)
    if family is None:
        ours = "backbone" in values and "model_name" in values
        known = ", ".join(FAMILIES.values())
        raise ConfigError(
            str(path),
            ["is a config of this program already: give it to --config" if ours else
             f"no config of a family that can be imported: {known}. Nothing in it says which one"],
        )  # fmt: skip
    return family, values, twice


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise ConfigError(str(path), [f"no such file{near}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None


def _read_json(path: Path, twice: list[str]) -> dict[str, Any]:
    """As their code reads it: of a key that stands twice the last one counts; `twice` takes its name."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        twice.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(found)

    try:
        values = json.loads(_text(path), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(str(path), [f"not valid JSON at {where}: {error.msg}"]) from None
    return _object(path, values)


def _read_yaml(path: Path, twice: list[str]) -> dict[str, Any]:
    """As `_read_json`."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
            twice.extend(sorted({name for name in names if names.count(name) > 1}))
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(_text(path), Loader=Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    return json.loads(json.dumps(_object(path, values), default=str))


def _object(path: Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"holds a {type(values).__name__}; a config is one object"])
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"base_lr": 1}} -> {"train.base_lr": 1}, however deep."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
