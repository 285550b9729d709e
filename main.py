"""Palimpsest: continual learning with pre-trained vision models.

    python main.py --config exps/quickstart.json

Exit status: 0 finished; 2 wrong config, data or weights; 3 stopped by a signal after saving; 1 anything else.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parse = argparse.ArgumentParser(description=description, epilog="Exit status: 0 finished, 2 wrong input, "
                                    "3 stopped by a signal after saving, 1 anything else.")  # fmt: skip
    parse.add_argument("--config", action="append", default=[], metavar="FILE", help="experiment; may be repeated")
    parse.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the config"
    )
    parse.add_argument("--seed", type=int, nargs="+", metavar="N", help="one or more, instead of the config's")
    parse.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the config's")
    parse.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parse.add_argument("--output", type=Path, metavar="DIR", help="result folder; default runs/<experiment>")
    parse.add_argument("--resume", action="store_true", help="continue unfinished seeds, skip finished ones")
    parse.add_argument("--check", action="store_true", help="load everything, print the plan, run nothing")
    parse.add_argument("--check-data", metavar="NAME", help="look through a data set and report all that is wrong")
    parse.add_argument("--strict", action="store_true", help="with --check-data: doubts about counts are errors")
    parse.add_argument("--check-weights", metavar="FILE", help="load a weight file into --set backbone=NAME")
    parse.add_argument("--keys", metavar="LEARNER", help="print the config keys of a learner")
    parse.add_argument("--list", action="store_true", help="print learners, data sets, transforms, experiments")
    parse.add_argument("--landscape", type=Path, metavar="RUN", help="draw the loss around the weights of a finished "
                       "run: the folder of a seed, or of a run with all its seeds")  # fmt: skip
    landscape = parse.add_argument_group("with --landscape (docs/landscape.md)")
    landscape.add_argument(
        "--task", type=int, nargs="+", metavar="T", help="after these tasks (1, 2, ...); default last"
    )
    landscape.add_argument("--images", type=int, metavar="N", help="training images of the task; default 128")
    landscape.add_argument("--grid", type=int, metavar="N", help="points a side, odd; default 21")
    landscape.add_argument("--rho", type=float, metavar="R", help="radius of the sphere; default 0.05")
    landscape.add_argument("--noise", type=float, metavar="R", help="size of the noise over the weights'; default 0.1")
    landscape.add_argument("--radius", type=float, metavar="R", help="fixed row length of a direction; default 0.5")
    parse.add_argument(
        "--index", type=Path, metavar="DIR", help="write DIR/README.md and DIR/schema/ of the experiments in DIR"
    )
    return parse


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    wanted = (options.config, options.keys, options.list, options.index, options.check_data, options.check_weights)
    if not any(wanted) and options.landscape is None:
        parse.error("nothing to do: give --config FILE (or --list, --keys LEARNER, --check-data NAME)")
    # After the arguments: torch takes seconds to import, and --help should not.
    from utils.errors import Interrupted, TrainingError, UserError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        return act(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    except Interrupted as signal:
        print(f"stopped by {signal}; saved. The same command with --resume continues", file=sys.stderr)
        return 3


def act(options: argparse.Namespace) -> int:
    from utils import factory, listing
    from utils.errors import UserError

    if options.list:
        print(listing.everything())
    if options.keys:
        print(listing.keys(options.keys))
    if options.index:
        listing.write_index(options.index)
    if options.check_weights:
        check_weights(options)
    if options.check_data and not check_data(options):
        return 2
    if options.landscape is not None:
        draw_landscape(options)
    elif idle := landscape_flags(options):
        raise UserError(f"--{next(iter(idle))} has no meaning without --landscape RUN")
    flags = {"seed": options.seed, "device": options.device, "data_root": options.data_root}
    flags = {key: value for key, value in flags.items() if value is not None}
    # All configs are checked before the first one runs.
    configs = [(Path(path), factory.load_config(path, options.set, flags)) for path in options.config]
    for path, config in configs:
        if options.check:
            check(config)
        else:
            import trainer

            trainer.run(config, result_folder(path, options.output, alone=len(configs) == 1), options.resume)
    return 0


def check(config) -> None:
    import trainer
    from utils.plan import plan
    from utils.runtime import Runtime

    first = config.with_seed(config.seeds[0])
    manager, learner = trainer.prepare(first, Runtime(config.device, config.precision, config.num_workers))
    print(plan(learner, manager))


def landscape_flags(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the flags that only --landscape knows."""
    names = ("task", "images", "grid", "rho", "noise", "radius")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def draw_landscape(options: argparse.Namespace) -> None:
    import landscape
    from utils.errors import UserError

    # What the run was is in its folder.
    for flag in ("config", "set", "seed", "check"):
        if getattr(options, flag):
            raise UserError(f"--{flag} has no meaning with --landscape: the run's own config is used")
    machine = {"device": options.device, "data_root": options.data_root}
    overrides = {key: value for key, value in machine.items() if value is not None}
    given = landscape_flags(options)
    tasks = given.pop("task", None)
    settings = landscape.Settings(**given)
    landscape.run(options.landscape, settings, tasks, overrides, options.output, options.resume)


def check_data(options: argparse.Namespace) -> bool:
    """Print what is right and wrong with a data set; whether it can be used."""
    from tqdm import tqdm

    from data.inspection import inspect
    from data.layouts import Options
    from data.splits import cache_root

    given = one_off_keys(options.set, "--check-data", {"split", "data_root", "cache_root", "strict_data"})
    choices = Options(
        split=str(given.get("split", "folder")),
        strict=options.strict or given.get("strict_data") is True,
        download=False,
        cache=cache_root(given.get("cache_root")),
    )
    bar = {"desc": options.check_data, "unit": "img", "disable": None}
    root = options.data_root or given.get("data_root")
    found = inspect(options.check_data, root, choices, lambda images, total: tqdm(images, total=total, **bar))
    print(found.text)
    return found.usable


def check_weights(options: argparse.Namespace) -> None:
    """Print how a weight file fits a backbone, and the fingerprint of what the two compute together."""
    from convs.fingerprint import check_file
    from utils.errors import ConfigError

    given = one_off_keys(options.set, "--check-weights", {"backbone", "image_size"})
    if "backbone" not in given:
        raise ConfigError("--check-weights", ["name the backbone as well, like --set backbone=vit_base_patch16_224"])
    print(check_file(given["backbone"], options.check_weights, given.get("image_size")))


def one_off_keys(assignments: list[str], command: str, known: set[str]) -> dict[str, Any]:
    """The values of --set, for a command that knows only a few keys."""
    from utils.config import parse_set
    from utils.errors import ConfigError, did_you_mean

    given = parse_set(assignments)
    if faults := [f'"{key}" has no meaning here{did_you_mean(key, known)}' for key in given if key not in known]:
        raise ConfigError(command, [*faults, f"known: {', '.join(sorted(known))}"])
    return given


def result_folder(config: Path, output: Path | None, alone: bool) -> Path:
    """runs/<stem>, with the folders below exps/ in between: exps/slca/cars.json and exps/raa/cars.json differ."""
    parts = config.resolve().with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("exps") :] if "exps" in parts[:-1] else parts[-1:]
    if output is None:
        return Path("runs", *below)
    return output if alone else output.joinpath(*below)


if __name__ == "__main__":
    sys.exit(main())
