"""The commands of `python main.py COMMAND`, one module each, found like learners are.

A module declares COMMAND (its name), HELP (one line), `arguments(parser)` and `main(options) -> exit status`. Name and
line are read from its text, so that `--help` does not import what a command needs.
"""

import argparse
import ast
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """module: where it is defined. help: one line."""

    module: str
    help: str


def _constants(file: Path) -> dict[str, str]:
    """The text constants that a module assigns at its top."""
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def _find() -> dict[str, Command]:
    found: dict[str, Command] = {}
    for entry in pkgutil.iter_modules(__path__):
        folder = Path(__path__[0])
        constants = _constants(folder / entry.name / "__init__.py" if entry.ispkg else folder / f"{entry.name}.py")
        if "COMMAND" in constants:
            found[constants["COMMAND"]] = Command(f"{__name__}.{entry.name}", constants["HELP"])
    return dict(sorted(found.items()))


COMMANDS = _find()


def run(name: str, arguments: list[str], imported: Callable[[], None] = lambda: None) -> int:
    """Exit status of a command. imported: called when all modules are there. Raises UserError with the nearest name for
    one that does not exist."""
    from utils.errors import UserError, did_you_mean

    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        raise UserError(f'unknown command "{name}"{near or "."} Known: {", ".join(COMMANDS)}')
    module = importlib.import_module(COMMANDS[name].module)
    imported()
    parser = argparse.ArgumentParser(prog=f"main.py {name}", description=COMMANDS[name].help)
    module.arguments(parser)
    return module.main(parser.parse_args(arguments))
