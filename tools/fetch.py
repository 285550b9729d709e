"""What the runs of some configs will need from a network, got beforehand: data sets, weights of the hub."""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from convs import hub
from convs.backbones import NAMED
from convs.small import SMALL
from convs.weights import sha256
from data.layouts import Options
from data.sources import default_root, load
from data.splits import cache_root
from models.factory import load_config
from utils.config import RunConfig
from utils.errors import UserError, reason

COMMAND = "fetch"
HELP = "get the data and the weights that configs need, for a machine without a network"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets go; default as in a run")
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="copy weights there as well")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override keys")


def main(options: argparse.Namespace) -> int:
    """Status 2 where something could not be had; the rest is fetched all the same."""
    flags = {"data_root": options.data_root} if options.data_root else {}
    configs = [load_config(str(path), options.set, flags) for path in options.configs]
    lines: list[str] = []
    faults: list[str] = []
    wanted = {(config.dataset, config.data_root, config.split): config for config in configs}
    for config in wanted.values():
        _noted(partial(_data, config), lines, faults)
    for config in {_tag(config): config for config in configs if _tag(config)}.values():
        _noted(partial(_weights, config, options.weights_dir), lines, faults)
    for config in configs:
        if isinstance(config.weights, str) and config.weights != "random" and not Path(config.weights).is_file():
            faults.append(f"weights: '{config.weights}' is a file of your own, and it is not there")
    print("\n".join(lines or ["nothing comes from a network"]))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return 0


def _noted(get: Callable[[], str], lines: list[str], faults: list[str]) -> None:
    try:
        lines.append(get())
    except UserError as error:
        faults.append(str(error))


def _data(config: RunConfig) -> str:
    """Read as a run reads it, which downloads what is missing."""
    data = load(config.dataset, config.data_root, Options(config.split, cache=cache_root(config.cache_root)))
    counts = f"{len(data.train):,} + {len(data.test):,} images"
    return f"data     {config.dataset}: {counts}, data_root '{default_root(config.data_root)}', hash {data.digest}"


def _tag(config: RunConfig) -> str | None:
    """The tag whose weights come from the hub."""
    name = config.backbone
    own = isinstance(name, str) and config.weights is None and name not in NAMED and name not in SMALL
    return str(name) if own else None


def _weights(config: RunConfig, folder: Path | None) -> str:
    name = _tag(config)
    assert name is not None
    try:
        file = hub.fetch(name)
    except Exception as error:  # noqa: BLE001 - the hub raises its own, changing, types
        raise UserError(f"weights of '{name}' could not be fetched ({reason(error)})") from None
    if folder is not None:
        target = folder.expanduser() / f"{name}{file.suffix}"
        if target.exists() and sha256(target) != sha256(file):
            raise UserError(f"'{target}' exists and holds something else: name another --weights-dir")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        file = target
    use = f'; run with --set weights="{file}"' if folder is not None else ""
    return f"weights  {name}: '{file}', sha256 {sha256(file)}{use}"
