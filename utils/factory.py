"""Builds a learner from a config: imports every module of `models/` once, so that learners register themselves."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import models
from convs.backbones import make_backbone
from data.sources import SOURCES
from data.transforms import RECIPES
from models.base import LEARNERS, Learner
from utils.config import RunConfig, build, parse_set, read_json, written_keys
from utils.errors import ConfigError
from utils.registry import Registry
from utils.runtime import Runtime

for _module in pkgutil.iter_modules(models.__path__):
    importlib.import_module(f"models.{_module.name}")


def load_config(path: str, assignments: list[str] | None = None, overrides: Mapping[str, Any] | None = None):
    """The checked config in a JSON file; assignments: ["key=value"]; overrides: values of command line flags.

    Raises ConfigError with every fault of file and command line at once.
    """
    values = read_json(Path(path))
    given = parse_set(assignments or []) | dict(overrides or {})
    origin = {key: "from the command line" for key in given}
    return config_from(values | given, source=path, origin=origin)


def saved_config(path: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """The config that a run left in its folder, with values of command line flags.

    The file holds every key. Those at their default are left out again: whether two keys contradict one another is
    asked of what a user wrote.
    """
    values = read_json(path)
    name = values.get("model_name")
    cls = LEARNERS[name].Config if isinstance(name, str) and name in LEARNERS else RunConfig
    return config_from(written_keys(cls, values) | dict(overrides), source=str(path))


def config_from(values: Mapping[str, Any], source: str, origin: Mapping[str, str] | None = None) -> RunConfig:
    """The config of the learner that `values` names, checked.

    An unknown learner is one fault among the others: the keys of the harness are checked all the same.
    """
    faults = [
        f'"{key}": {table.unknown(values[key])}'
        for key, table in _NAMES.items()
        if isinstance(values.get(key), str) and values[key] not in table and not _is_path(key, values[key])
    ]
    name = values.get("model_name")
    known_learner = isinstance(name, str) and name in LEARNERS
    cls = LEARNERS[str(name)].Config if known_learner else RunConfig
    # Under an unknown learner the keys of any learner pass; those of none are faults all the same.
    others = {key for learner in LEARNERS for key in LEARNERS[learner].Config.model_fields} - set(cls.model_fields)
    checked = {key: value for key, value in values.items() if known_learner or key not in others}
    try:
        config = build(cls, checked, origin or {}, source)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(source, faults)
    return config


_NAMES: Mapping[str, Registry] = {
    "model_name": LEARNERS,
    "dataset": SOURCES,
    "train_transform": RECIPES,
    "test_transform": RECIPES,
}


def _is_path(key: str, value: str) -> bool:
    return key == "dataset" and value.startswith(("npz:", "folder:"))


def build_learner(config: RunConfig, runtime: Runtime) -> Learner:
    """The learner on its device, backbone and weights loaded."""
    make = partial(make_backbone, config.backbone, config.weights, config.image_size)
    learner = LEARNERS[config.model_name](config, make, runtime)
    return learner.to(runtime.device)
