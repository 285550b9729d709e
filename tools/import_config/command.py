"""The command itself: translate, check, say what was done, write."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.factory import config_from
from tools.import_config import FLAGS, hcl, inflora, pilot, pycil, raa, slca
from tools.import_config.equal import shipped_like
from tools.import_config.reading import flat, read_theirs
from tools.import_config.theirs import Theirs
from utils.errors import UserError, did_you_mean
from utils.foreign import FAMILIES
from utils.results import write_text

CONVERT: dict[str, Callable[[Theirs], None]] = {
    "raa": raa.convert, "inflora": inflora.convert, "slca": slca.convert, "hcl": hcl.convert, "pilot": pilot.convert,
    "pycil": pycil.convert,
}  # fmt: skip
EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "exps"


def run(file: Path, flags: str, single: Sequence[str], output: Path | None) -> int:
    """0. Raises UserError where theirs cannot be read, holds what has no counterpart, or `output` is there."""
    if output is not None and output.exists():
        raise UserError(f"'{output}' is there already: choose another name")
    values, remarks = imported(file, [*parse_flags(flags), *single])
    folder = output.parent if output is not None else Path("exps")
    schema = os.path.relpath(EXPERIMENTS / "schema" / f"{values['model_name']}.json", folder.resolve())
    text = config_text({"$schema": Path(schema).as_posix(), **values})
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)
        remarks.insert(0, f"written: {output}")
    for remark in remarks:
        print(remark, file=sys.stderr if output is None else sys.stdout)
    return 0


def imported(file: Path, flags: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """(the keys of our config, remarks for people).

    Raises ConfigError with everything that is unknown, missing or refused.
    """
    family, values, twice = read_theirs(file)
    theirs = Theirs(flat(values) if family == "hcl" else values, flags)
    theirs.notes += [f'"{name}" stands twice: the last one counts, as in their code' for name in twice]
    CONVERT[family](theirs)
    ours = theirs.finish(str(file))
    other = [flag for flag in flags if flag not in ("--hcl", "--cl_default", "--validation")]
    if family != "hcl":
        other = list(flags)
    about: dict[str, Any] = {
        "imported": str(file), "from": FAMILIES[family], "ignored": [*theirs.ignored, *other],
        "constants": [key for key in theirs.constants if key.partition(".")[0] in ours],
    }  # fmt: skip
    if flags:
        about["flags"] = " ".join(flags)
    if theirs.notes:
        about["note"] = "; ".join(theirs.notes)
    config = {"about": about, **ours}
    checked = config_from(config, source=f"{file}, as imported")
    same = shipped_like(checked, EXPERIMENTS)
    remarks = [f"ignored: {', '.join(about['ignored']) or 'nothing'}",
               f"set, as their code does: {', '.join(about['constants']) or 'nothing'}", *theirs.notes,
               *(f"the same run is shipped: {name}" for name in same)]  # fmt: skip
    if same:
        about["shipped"] = same
    return config, remarks


def parse_flags(text: str) -> list[str]:
    """ "--hcl --data_dir ../Data" -> ["--hcl", "--data_dir"]. Raises UserError for a flag that is none of theirs."""
    found, words = [], shlex.split(text)
    while words:
        flag, equals, _ = words.pop(0).partition("=")
        if flag not in FLAGS:
            raise UserError(
                f'--flags: unknown flag "{flag}"{did_you_mean(flag, FLAGS) or "."} Known: {", ".join(FLAGS)}'
            )
        if FLAGS[flag] and not equals and words:
            words.pop(0)
        found.append(flag)
    return found


def config_text(values: dict[str, Any]) -> str:
    """As the shipped experiments are written: a key a line, lists and small objects on one."""
    lines = []
    for key, value in values.items():
        whole = json.dumps(value)
        if key == "about":
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            whole = "{\n" + inner + "\n }"
        lines.append(f" {json.dumps(key)}: {whole}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
