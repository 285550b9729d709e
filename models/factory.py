"""Builds a learner from a config: imports every module of `models/` once, so that learners register themselves."""

import importlib
import logging
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
from convs.backbones import BackboneMaker
from convs.weights import WeightOptions
from data.sources import SOURCES
from data.stream import TaskInfo
from data.transforms import RECIPES
from models.base import LEARNERS, Learner
from utils.checking import build, parse_set, read_json
from utils.config import WRITTEN, RunConfig, TrainConfig
from utils.errors import ConfigError, UserError
from utils.foreign import family_of, import_hint
from utils.registry import Registry, imported
from utils.runtime import Runtime

log = logging.getLogger(__name__)

NOT_LEARNERS = {"base", "factory", "parts"}
BROKEN: dict[str, str] = {}  # file of models/ -> why it cannot be imported


def find_learners() -> None:
    """Import all that lies in models/. A file that cannot be imported is named, and the others stay usable."""
    for module in pkgutil.iter_modules(models.__path__):
        if module.name in NOT_LEARNERS:
            continue
        try:
            importlib.import_module(f"models.{module.name}")
        except Exception as error:  # noqa: BLE001 - a learner under work may raise anything
            BROKEN[module.name] = f"{type(error).__name__}: {error}"
            log.warning("models/%s cannot be imported (%s); the other learners can be used", module.name,
                        BROKEN[module.name])  # fmt: skip


find_learners()


def learner_class(name: str) -> type[Learner]:
    """The learner that a config names: registered here, or "package.module:Class" from the Python path.

    Raises UserError with the sentence that answers a name that is neither.
    """
    if ":" not in name:
        if name not in LEARNERS and name in BROKEN:
            raise UserError(f'learner "{name}": models/{name} cannot be imported ({BROKEN[name]})')
        return LEARNERS[name]
    found = imported(name, "learner")
    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise UserError(f'learner "{name}" is no subclass of models.base.Learner')
    return found


def load_config(path: str, assignments: list[str] | None = None, overrides: Mapping[str, Any] | None = None):
    """The checked config in a JSON file; assignments: ["key=value"]; overrides: values of command line flags.

    Raises ConfigError with every fault of file and command line at once; a config of another repository is answered
    with the command that imports it.
    """
    values = read_json(Path(path))
    if (family := family_of(values)) is not None:
        raise ConfigError(path, [import_hint(Path(path), family)])
    given = parse_set(assignments or []) | dict(overrides or {})
    origin = {key: "from the command line" for key in given}
    return config_from(values | given, source=path, origin=origin)


def config_from(
    values: Mapping[str, Any],
    source: str,
    origin: Mapping[str, str] | None = None,
    written: frozenset[str] | None = None,
) -> RunConfig:
    """The config of the learner that `values` names, checked. written: as `utils.checking.build` takes it.

    An unknown learner is one fault among the others: the keys of the harness are checked all the same.
    """
    faults = [
        f'"{key}": {table.unknown(values[key])}'
        for key, table in _NAMES.items()
        if isinstance(values.get(key), str) and values[key] not in table and not _is_path(key, values[key])
    ]
    cls: type[RunConfig] = TrainConfig
    checked = dict(values)
    try:
        cls = learner_class(values["model_name"]).Config
    except KeyError:
        pass  # a missing key is said below
    except (UserError, TypeError) as error:  # no learner of that name; no text at all, which is said below
        if isinstance(values["model_name"], str):
            faults.insert(0, f'"model_name": {error}')
        # Under an unknown learner the keys of any learner pass; those of none are faults all the same.
        others = {key for learner in LEARNERS for key in LEARNERS[learner].Config.model_fields} - set(cls.model_fields)
        checked = {key: value for key, value in values.items() if key not in others}
    try:
        config = build(cls, checked, origin or {}, source, written)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(source, faults)
    return config


def saved_config(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config that a run left in its folder, with values of command line flags."""
    values = read_json(path)
    written = frozenset(values.pop(WRITTEN, ()))
    return config_from(values | dict(overrides or {}), source=str(path), written=written)


_NAMES: Mapping[str, Registry] = {"dataset": SOURCES, "train_transform": RECIPES, "test_transform": RECIPES}


def _is_path(key: str, value: str) -> bool:
    return key == "dataset" and ":" in value


def build_learner(config: RunConfig, runtime: Runtime, task: TaskInfo, restoring: bool = False) -> Learner:
    """The learner on its device, for a task: the stream's first, or the one that a state to be restored is of.

    restoring: all weights come from a state, so no weight file is read.
    Raises ConfigError where backbone and method do not fit, WeightsError for the weights.
    """
    learner = learner_class(config.model_name)(config, runtime, task)
    options = WeightOptions(config.weights_entry, config.resample_patch)
    learner.build(
        BackboneMaker(config.backbone, config.weights, config.image_size, options, restoring, runtime.fused_attention)
    )
    return learner.to(runtime.device)
