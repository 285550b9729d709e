"""Palimpsest: continual learning with pre-trained vision models.

    python main.py --config exps/quickstart.json

Exit status: 0 finished; 2 wrong config, data or weights; 3 stopped by a signal after saving; 1 anything else.
"""

import argparse
import logging
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parse = argparse.ArgumentParser(description=description, epilog="Exit status: 0 finished, 2 wrong input, "
                                    "3 stopped by a signal after saving, 1 anything else.")  # fmt: skip
    parse.add_argument("--config", action="append", default=[], metavar="FILE", help="experiment; may be repeated")
    parse.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the config")
    parse.add_argument("--seed", type=int, nargs="+", metavar="N", help="one or more, instead of the config's")
    parse.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the config's")
    parse.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parse.add_argument("--output", type=Path, metavar="DIR", help="result folder; default runs/<experiment>")
    parse.add_argument("--resume", action="store_true", help="continue unfinished seeds, skip finished ones")
    parse.add_argument("--check", action="store_true", help="load everything, print the plan, run nothing")
    parse.add_argument("--keys", metavar="LEARNER", help="print the config keys of a learner")
    parse.add_argument("--list", action="store_true", help="print learners, data sets, transforms, experiments")
    parse.add_argument(
        "--index", type=Path, metavar="DIR", help="write DIR/README.md and DIR/schema/ of the experiments in DIR"
    )
    return parse


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    if not (options.config or options.keys or options.list or options.index):
        parse.error("nothing to do: give --config FILE (or --list, --keys LEARNER)")
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

    if options.list:
        print(listing.everything())
    if options.keys:
        print(listing.keys(options.keys))
    if options.index:
        listing.write_index(options.index)
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


def result_folder(config: Path, output: Path | None, alone: bool) -> Path:
    """runs/<stem>, with the folders below exps/ in between: exps/slca/cars.json and exps/raa/cars.json differ."""
    parts = config.resolve().with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("exps") :] if "exps" in parts[:-1] else parts[-1:]
    if output is None:
        return Path("runs", *below)
    return output if alone else output.joinpath(*below)


if __name__ == "__main__":
    sys.exit(main())
