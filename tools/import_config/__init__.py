"""A config of another repository as one of this program: the same run, with what their code fixes written out."""

import argparse
from pathlib import Path

COMMAND = "import"
HELP = "write a config of RAA, InfLoRA, SLCA, HCL, PILOT or PyCIL as one of this program"

# Flags of HCL's command line; the values say whether an argument follows. Those of the other families change no result.
FLAGS = {
    "--hcl": False, "--cl_default": False, "--validation": False, "--server": False, "--hide_progress": False,
    "--debug": False, "--ood_eval": False, "--buffer_qdi": False, "--download": False, "--data_dir": True,
    "--log_dir": True, "--ckpt_dir": True, "--ckpt_dir_1": True, "--alpha": True, "--eval_from": True, "--device": True,
    "--config": True, "--config-file": True, "-c": True,
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="their config: JSON or YAML")
    parser.add_argument("--flags", nargs="?", const="", default="", metavar='"--hcl --validation"',
                        help="flags that their command line had beside the file")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here; must not be there. Default: print")
    # `--flags "--hcl"` reaches argparse as two options: each flag is one of its own.
    parser.set_defaults(single=[])
    for flag, follows in FLAGS.items():
        if not follows:
            parser.add_argument(flag, action="append_const", const=flag, dest="single", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    from tools.import_config.command import run

    return run(options.file, options.flags, options.single or [], options.output)
