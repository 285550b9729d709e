"""The keys of a learner's config: its own first, then those of every learner."""

import argparse
import textwrap

from models.factory import learner_class
from utils.config import TrainConfig
from utils.keys import key_table

COMMAND = "keys"
HELP = "the config keys of a learner: type, default, meaning, and what they need to have an effect"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("learner", metavar="LEARNER", help="name, or package.module:Class")


def main(options: argparse.Namespace) -> int:
    print(keys(options.learner))
    return 0


def keys(learner: str) -> str:
    """The key table of a learner as text. Raises UserError for an unknown one."""
    cls = learner_class(learner).Config
    lines = []
    for name, kind, default, meaning in key_table(cls, TrainConfig):
        own = "" if name in TrainConfig.model_fields else f"  [{learner}]"
        lines += [
            f"{name}{own}",
            f"    {kind}; default {default}" if default != "required" else f"    {kind}; required",
        ]
        lines += textwrap.wrap(meaning, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
