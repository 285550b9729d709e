"""What the runs of some configs will need from a network, got beforehand: data sets, weights of the hub."""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from convs import hub
from convs.backbones import NAMED
from convs.small import SMALL
from convs.weights import sha256
from data.layouts import Options
from data.rows import ROWS
from data.sources import default_root, load
from data.splits import cache_root
from data.torchvision_sets import SHORT
from models.factory import load_config
from utils.config import RunConfig
from utils.errors import UserError, reason
from utils.storage import expanded, replace_file

T = TypeVar("T")

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
    lines: list[str] = []
    faults: list[str] = []
    configs: list[RunConfig] = []
    for path in options.configs:
        _noted(str(path), partial(load_config, str(path), options.set, flags), configs, faults)
    wanted = {(config.dataset, config.data_root, config.split): config for config in configs}
    for config in wanted.values():
        _noted(config.dataset, partial(_data, config), lines, faults)
    for config in {_tag(config): config for config in configs if _tag(config)}.values():
        _noted(f"weights of '{_tag(config)}'", partial(_weights, config, options.weights_dir), lines, faults)
    for config in configs:
        if isinstance(config.weights, str) and config.weights != "random" and not expanded(config.weights).is_file():
            faults.append(f"weights: '{config.weights}' is a file of your own, and it is not there")
    if lines or not faults:
        print("\n".join(lines or ["nothing comes from a network"]))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return 0


def _noted(what: str, get: Callable[[], T], found: list[T], faults: list[str]) -> None:
    try:
        found.append(get())
    except UserError as error:
        faults.append(str(error))
    except OSError as error:  # a disk that is full, a folder that is a file or may not be written
        place = f"'{error.filename}': " if error.filename else ""
        faults.append(f"{what} could not be fetched ({place}{reason(error)}): choose another folder, or make room")


def _data(config: RunConfig) -> str:
    """Read as a run reads it, which downloads what is missing."""
    name = config.dataset
    data = load(name, config.data_root, Options(config.split, cache=cache_root(config.cache_root)))
    counts = f"{len(data.train):,} + {len(data.test):,} images"
    below = name in ROWS or name in SHORT or name.startswith("torchvision:")
    root = f"data_root '{default_root(config.data_root)}', " if below else ""
    where = f"'{data.place}', " if data.place else root
    return f"data     {name}: {counts}, {where}hash {data.digest}"


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
    use, digest = "", sha256(file)
    if folder is not None:
        target = folder.expanduser() / f"{name}{file.suffix}"
        _copy(file, target, digest)
        file, use = target, f'; run with --set weights="{target}"'
    return f"weights  {name}: '{file}', sha256 {digest}{use}"


def _copy(file: Path, target: Path, digest: str) -> None:
    """In one step: a kill leaves no part of it, which the next call would take for a file of somebody else's."""
    if target.is_symlink() or target.exists():
        if target.is_file() and sha256(target) == digest:
            return
        raise UserError(f"'{target}' exists and holds something else: name another --weights-dir")
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source:
        replace_file(target, lambda opened: shutil.copyfileobj(source, opened))
