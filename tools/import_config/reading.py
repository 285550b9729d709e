"""A config file of another repository -> its keys, flat or nested as they stand."""

import json
from pathlib import Path
from typing import Any

import yaml

from utils.checking import read_json
from utils.errors import ConfigError
from utils.foreign import FAMILIES, family_of


def read_theirs(path: Path) -> tuple[str, dict[str, Any]]:
    """(family, keys as they stand). YAML by its suffix, else JSON.

    Raises ConfigError when the file cannot be read, or is of no family.
    """
    values = _read_yaml(path) if path.suffix.lower() in (".yaml", ".yml") else read_json(path)
    family = family_of(values)
    if family is None:
        ours = "backbone" in values and "model_name" in values
        known = ", ".join(FAMILIES.values())
        raise ConfigError(
            str(path),
            ["is a config of this program already: give it to --config" if ours else
             f"no config of a family that can be imported: {known}. Nothing in it says which one"],
        )  # fmt: skip
    return family, values


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f'key "{key}" stands twice: keep one of the two')
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"holds a {type(values).__name__}; a config is one object"])
    return json.loads(json.dumps(values, default=str))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"base_lr": 1}} -> {"train.base_lr": 1}, however deep."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
