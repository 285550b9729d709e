"""The loss around the weights that a finished run ended in (docs/landscape.md)."""

import argparse
from pathlib import Path

COMMAND = "landscape"
HELP = "draw the loss around the weights of a finished run: surfaces, lines, numbers of flatness"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a seed, or of a run with all its seeds")
    parser.add_argument("--task", type=int, nargs="+", metavar="T", help="after these tasks (1, 2, ...); default last")
    parser.add_argument("--images", type=int, default=128, metavar="N", help="training images of the task; default 128")
    parser.add_argument("--grid", type=int, default=21, metavar="N", help="points a side, odd; default 21")
    parser.add_argument("--rho", type=float, default=0.05, metavar="R", help="radius of the sphere; default 0.05")
    parser.add_argument("--noise", type=float, default=0.1, metavar="R",
                        help="size of the noise over the weights'; default 0.1")  # fmt: skip
    parser.add_argument("--radius", type=float, default=0.5, metavar="R",
                        help="fixed row length of a direction; default 0.5")  # fmt: skip
    parser.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the run's")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of beside the run")
    parser.add_argument("--resume", action="store_true", help="skip what is there")


def main(options: argparse.Namespace) -> int:
    from tools.landscape.runs import Settings, run

    machine = {"device": options.device, "data_root": options.data_root}
    overrides = {key: value for key, value in machine.items() if value is not None}
    settings = Settings(options.images, options.grid, options.rho, options.noise, options.radius)
    run(options.run, settings, options.task, overrides, options.output, options.resume)
    return 0
