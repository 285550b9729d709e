"""Palimpsest: continual learning with pre-trained vision models.

    python main.py --config exps/quickstart.json
    python main.py COMMAND ...

Exit status: 0 finished; 2 wrong config, data or weights; 3 stopped by a signal after saving; 1 anything else.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is at work during the imports: no traceback

import argparse
import errno
import logging
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import tools
from tools.table.places import below_experiments

# Flags of version 0.1 -> the commands that took their place.
OLD_FLAGS = {
    "--landscape": "landscape RUN",
    "--keys": "keys LEARNER",
    "--list": "list",
    "--check-data": "check-data NAME",
    "--check-weights": "check-weights FILE --backbone NAME",
    "--index": "index DIR",
}


def parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    width = max(map(len, tools.COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in tools.COMMANDS.items())
    parse = argparse.ArgumentParser(
        description=description,
        usage="main.py --config FILE [options] | main.py COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands (main.py COMMAND --help says more):\n{commands}\n\nExit status: 0 finished, 2 wrong input, "
        "3 stopped by a signal after saving, 1 anything else.",
    )
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
    return parse


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    for word in given:
        if (flag := word.partition("=")[0]) in OLD_FLAGS:
            print(f"{flag} is a command now: python main.py {OLD_FLAGS[flag]}", file=sys.stderr)
            return 2
    if given and not given[0].startswith("-"):
        return guarded(tools.run, given[0], given[1:], _interruptible)
    parse = parser()
    options = parse.parse_args(given)
    if not options.config:
        parse.error("nothing to do: give --config FILE, or a command (--help lists them)")
    return guarded(run, options)


def guarded(action, *arguments) -> int:
    """Its exit status, or that of the error whose sentence is printed."""
    # After the arguments: torch takes seconds to import, and --help should not.
    from utils.errors import Interrupted, TrainingError, UserError

    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # closed, or another kind of object
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that a terminal lacks
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback a line
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        status = action(*arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UserError as error:
        return _say(error, 2)
    except TrainingError as error:
        return _say(error, 1)
    except Interrupted as stop:
        return _say(f"stopped by {stop}; what was done is saved. The same command with --resume continues", 3)
    except KeyboardInterrupt:
        return _say(AT_ONCE, 130)
    except BrokenPipeError:  # the reader, say `| head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what was being written complains of being cut
            return _say(AT_ONCE, 130)
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        told = next(iter(str(error).splitlines()), "")[:300]
        return _say(
            f"the memory does not suffice ({told}): lower batch_size, test_batch_size or image_size, or the sizes that "
            "the learner's keys ask for; --resume then continues",
            2,
        )
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        place = f"'{error.filename}': " if error.filename else ""
        return _say(f"{place}{error.strerror}. {OF_THE_MACHINE[error.errno]}; --resume then continues", 2)


AT_ONCE = "stopped at once by a second signal; --resume continues from what was saved before"

# What a disk or a file system may refuse at any moment -> what to do.
OF_THE_MACHINE = {
    errno.ENOSPC: "Free some space, or choose another folder with --output DIR",
    errno.EDQUOT: "Free some of your quota, or choose another folder with --output DIR",
    errno.EROFS: "Choose another folder with --output DIR",
    errno.EACCES: "Change its permissions, or choose another folder with --output DIR",
    errno.EPERM: "Change its permissions, or choose another folder with --output DIR",
    errno.EIO: "The disk failed; look at it, or choose another folder with --output DIR",
    errno.ESTALE: "The network file system lost the file; mount it again",
    errno.ELOOP: "A symbolic link stands in its place: remove it",
    errno.ENOTDIR: "A file stands where a folder should be: move it, or choose another folder with --output DIR",
    errno.EISDIR: "A folder stands where a file should be: move it, or choose another folder with --output DIR",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise `ulimit -n`, or lower num_workers",
    errno.ENFILE: "The machine has too many files open; close some",
}


def _say(sentence: object, status: int) -> int:
    with suppress(OSError, ValueError):  # nobody listens any more
        print(sentence, file=sys.stderr)
    return status


def run(options: argparse.Namespace) -> int:
    from models.factory import load_config
    from utils.errors import UserError

    _interruptible()
    if twice := sorted({path for path in options.config if options.config.count(path) > 1}):
        raise UserError(f"--config {twice[0]} is given twice: one is enough")
    flags = {"seed": options.seed, "device": options.device, "data_root": options.data_root}
    flags = {key: value for key, value in flags.items() if value is not None}
    # All configs are checked before the first one runs.
    configs = [(Path(path), load_config(path, options.set, flags)) for path in options.config]
    for path, config in configs:
        if options.check:
            from tools.plan import plan

            print(plan(config))
        else:
            import trainer

            trainer.run(config, result_folder(path, options.output, alone=len(configs) == 1), options.resume)
    return 0


def _interruptible() -> None:
    """From here on Ctrl-C unwinds what is at work."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def result_folder(config: Path, output: Path | None, alone: bool) -> Path:
    """runs/<stem>, with the folders below exps/ in between; below `output` where several configs share it."""
    below = below_experiments(config)
    if output is None:
        return Path("runs") / below
    from utils.storage import expanded

    output = expanded(output)
    return output if alone else output / below


if __name__ == "__main__":
    sys.exit(main())
