"""Configs of the reference repositories: which family a file is of, by the keys that only that family has.

`python main.py import` translates them; here they are only recognised, so that a run answers one with that command.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Family -> how it is named to people.
FAMILIES = {
    "raa": "RAA's repository",
    "inflora": "InfLoRA's repository",
    "slca": "SLCA's repository",
    "hcl": "HCL's repository",
    "pilot": "PILOT",
    "pycil": "PyCIL",
}
# model_name of PILOT (and of APER's repository, whose names are older) that no other family uses.
PILOT_NAMES = (
    "aper_", "adam_", "ranpac", "fecam", "ease", "mos", "lae", "l2p", "dualprompt", "coda_prompt",
)  # fmt: skip
_RAA_KEYS = frozenset({"adapter_num", "ssca", "perturb", "loss_weight", "inc_epochs"})


def family_of(values: Mapping[str, Any]) -> str | None:
    """The family of a config that is not ours; None for ours, and for what is neither."""
    if "backbone" in values:
        return None
    model, name = values.get("model"), str(values.get("model_name", "")).lower()
    if isinstance(model, Mapping) and "cl_model" in model:
        return "hcl"
    if "backbone_type" in values:
        return "pilot"
    if "net_type" in values or name.startswith(("inflora", "sprompts_")):
        return "inflora"
    if "model_postfix" in values:
        return "slca"
    if name == "adapter" or _RAA_KEYS & set(values):
        return "raa"
    if "convnet_type" not in values:
        return None
    if str(values["convnet_type"]).startswith("vit-b-p16"):
        return "slca"
    if name.startswith(PILOT_NAMES):
        return "pilot"
    if name == "simplecil" or "ffn_num" in values:
        return "raa"
    return "pilot" if "vit" in str(values["convnet_type"]) else "pycil"


def import_hint(path: Path, family: str) -> str:
    """The sentence that answers a config of theirs where one of ours is expected."""
    return (
        f"is a config of {FAMILIES[family]}: python main.py import {path} --output exps/{path.stem}.json "
        "writes the same experiment for this program"
    )


def yaml_hint(path: Path, text: str) -> str:
    """The sentence that answers a YAML file where JSON is expected."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    family = family_of(values) if isinstance(values, Mapping) else None
    return import_hint(path, family) if family else "is YAML; a config is JSON: one object {...}"
