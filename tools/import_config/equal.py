"""Which shipped experiments are the same run as a config."""

from pathlib import Path
from typing import Any

from models.factory import load_config
from tools.index import experiments
from utils.checking import read_json
from utils.config import INIT, MACHINE_KEYS, RunConfig
from utils.errors import ConfigError


def shipped_like(config: RunConfig, folder: Path) -> list[str]:
    """Files below a folder of experiments that compute the same, named from the folder's parent; where the seeds
    differ, that is said behind the name."""
    found = []
    for path in experiments(folder):
        if read_json(path).get("model_name") != config.model_name:
            continue
        try:
            other = load_config(str(path))
        except ConfigError:
            continue  # a file of the user's, under work
        if resolved(other) == resolved(config):
            seeds = "" if other.seeds == config.seeds else f" (there with seeds {', '.join(map(str, other.seeds))})"
            found.append(str(path.relative_to(folder.parent)) + seeds)
    return found


def resolved(config: RunConfig) -> dict[str, Any]:
    """What a config computes, whichever way it is written: without machine keys and seeds, a first task that is as the
    others left out."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in MACHINE_KEYS}
    for first, later in {**{first: later for later, first in INIT.items()}, "init_cls": "increment"}.items():
        if values.get(first) == values.get(later):
            values[first] = None
    return values
