"""One page of all runs below a folder, in a file that needs nothing else."""

import argparse
from pathlib import Path

COMMAND = "report"
HELP = "one self-contained HTML page of all runs below a folder: table, curves, matrices, costs, config differences"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help="default runs")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    parser.add_argument("--title", default="Runs", help="heading of the page")


def main(options: argparse.Namespace) -> int:
    from tools.report.page import write_report

    count, faults = write_report(options.folder, options.output, options.title)
    for fault in faults:
        print(fault)
    print(f"{count} runs in {options.output}")
    return 0
