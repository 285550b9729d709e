"""A table of a paper: what is finished beside what was published, and a verdict; --run runs what is missing."""

import argparse
from pathlib import Path

COMMAND = "table"
HELP = "fill a table: run what is missing, and print ours beside the published numbers with a verdict"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="table file, such as exps/tables/small.json")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows; default all")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="these seeds, instead of each row's own")
    parser.add_argument("--run", action="store_true", help="run missing seeds, continue interrupted ones")
    parser.add_argument("--jobs", type=int, metavar="N", help="seeds side by side; default: GPUs at hand, else 1")
    parser.add_argument("--launcher", choices=("local", "slurm", "submitit-local"), default="local",
                        help="where seeds run; slurm and submitit-local need the package submitit")  # fmt: skip
    parser.add_argument("--slurm", nargs="+", default=[], metavar="KEY=VALUE",
                        help="parameters of submitit's executor, such as gpus_per_node=1 timeout_min=600")  # fmt: skip
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
                        help="override keys of every row")  # fmt: skip
    parser.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the configs'")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parser.add_argument("--output", type=Path, default=Path("runs"), metavar="DIR",
                        help="above the result folders; default runs")  # fmt: skip
    parser.add_argument("--format", choices=("text", "markdown", "csv", "latex"), default="text",
                        help="of what is printed")  # fmt: skip
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE",
                        help="write the table: .txt, .md, .csv, .tex")  # fmt: skip
    parser.add_argument("--figure", type=Path, metavar="FILE", help="curves of the rows: .pdf, .svg, .png")
    parser.add_argument("--sweeps", type=Path, metavar="FILE",
                        help="accuracy on the validation part over what rows sweep: .pdf, .svg, .png")  # fmt: skip
    parser.add_argument("--differences", type=Path, metavar="FILE", help="bars, ours less theirs: .pdf, .svg, .png")


def main(options: argparse.Namespace) -> int:
    from tools.table.command import run

    return run(options)
