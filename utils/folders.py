"""The folder of a seed and the one above it: whose they are, whether they may be written to, what their seeds say."""

import json
import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.config import WRITTEN, RunConfig
from utils.errors import UserError
from utils.plots import plot_seeds
from utils.results import summarise_seeds, summary_text, write_json, write_text
from utils.storage import LEFTOVERS, put_aside

Weights = tuple[str | None, str | None]  # name of a weight file, its hash

log = logging.getLogger(__name__)

OUR_FILES = frozenset({"config.json", "train.log", "epochs.jsonl", "result.json"})
OUR_FOLDERS = frozenset({"checkpoint", "plots", "landscape", "predictions", "tensorboard", "wandb"})


def seed_folder(folder: Path, seed: int) -> Path:
    """Of one seed of a run."""
    return folder / f"seed{seed}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a seed's folder, or None when there is none."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def sound_result(folder: Path, repair: bool = True) -> dict[str, Any] | None:
    """result.json of a seed's folder; None when there is none, or a damaged one, which is put aside.

    repair: whether this process may rename files.
    """
    try:
        result = read_result(folder)
        if result is None or (isinstance(result, dict) and {"finished", "config"} <= set(result)):
            return result
        why = "it is no result of a run"
    except (ValueError, RecursionError) as error:
        why = str(error)[:100]
    if repair:
        put_aside(folder / "result.json", why)
    return None


def seeds_below(folder: Path) -> list[Path]:
    """The folder itself when it is a seed's, else those of the seeds below it.

    Raises UserError when there is no run.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: '{folder}'")
    if (folder / "config.json").is_file():
        return [folder]
    seeds = [path for path in sorted(folder.glob("seed*")) if (path / "config.json").is_file()]
    if not seeds:
        raise UserError(
            f"'{folder}' holds no run. Give a seed's folder (it holds config.json, like runs/quickstart/seed1993), or "
            "the folder above it"
        )
    return seeds


def single_seed(folder: Path) -> Path:
    """The seed's folder that a run's folder stands for when it has one seed.

    Raises UserError when there is no run, or when there are several.
    """
    seeds = seeds_below(folder)
    if len(seeds) > 1:
        names = ", ".join(path.name for path in seeds)
        raise UserError(f"'{folder}' holds {len(seeds)} seeds ({names}): name the folder of one of them")
    return seeds[0]


def finished_result(folder: Path) -> dict[str, Any]:
    """result.json of a seed that is through with its stream.

    Raises UserError when it is unfinished, or when the file cannot be read.
    """
    try:
        result = read_result(folder)
    except ValueError as error:
        raise UserError(f"'{folder / 'result.json'}' cannot be read ({error})") from None
    if result is None or not result.get("finished"):
        done = "no task" if result is None else f"{len(result['curve'])} of {result['tasks']} tasks"
        raise UserError(
            f"'{folder}' is unfinished ({done} done): the command that started it finishes it with --resume"
        )
    return result


def claim(folder: Path, config: RunConfig, resume: bool, repair: bool = True) -> None:
    """Refuse a folder that holds another config, this run's results without --resume, or foreign files.

    A run that ended before its first epoch holds nothing worth keeping: its folder is free. repair: whether this
    process may put damaged files aside.
    """
    refuse_foreign(folder)
    result, last = sound_result(folder, repair), folder / "checkpoint" / "last.pt"
    epochs = folder / "epochs.jsonl"
    if result is None and not last.is_file() and not (epochs.is_file() and epochs.stat().st_size):
        return
    saved, why = _saved_config(folder)
    if saved is None:
        _refuse_unknown(folder, config, result, last, why)
        if repair and (folder / "config.json").is_file():
            put_aside(folder / "config.json", why)
    elif saved.get("seed") != config.seed:
        raise UserError(
            f"'{folder}' holds a run of seed {saved.get('seed')}, not of {config.seed}: a copy would count twice. Move "
            f"it to a folder of its own"
        )
    elif differing := config.same_run(saved):
        now = config.model_dump(mode="json")
        shown = ", ".join(f"{key} {saved.get(key)} there, {now.get(key)} now" for key in differing[:5])
        raise UserError(
            f"'{folder}' holds a run with another config ({shown}). Choose another folder with --output DIR"
        )
    if not resume:
        raise UserError(
            f"'{folder}' holds this run already. --resume continues it (and skips what is finished); "
            "--output DIR starts it anew elsewhere"
        )


def as_begun(folder: Path, config: RunConfig) -> RunConfig:
    """With what "auto" meant when the run in this folder began, so that it goes on as it was on another machine."""
    saved = _saved_config(folder)[0] or {}
    begun, named = saved.get("augment_on"), "augment_on" in (saved.get(WRITTEN) or ())
    return config.settled(begun, named) if begun in ("host", "device") else config


def refuse_foreign(folder: Path) -> None:
    """Raises UserError where a folder holds what no run writes, or where one of our names is taken by another kind."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file, and a run needs a folder there. Choose another with --output DIR")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    ours = {name for name in names if name.partition(".damaged")[0] in OUR_FILES | OUR_FOLDERS}
    foreign = sorted(name for name in names - ours if not any(fnmatch(name, pattern) for pattern in LEFTOVERS))
    if foreign:
        raise UserError(
            f"'{folder}' holds other files ({', '.join(foreign[:3])}). Choose another folder with --output DIR"
        )
    wrong = [f"'{name}' is a folder" for name in sorted(names & OUR_FILES) if (folder / name).is_dir()]
    wrong += [f"'{name}' is no folder" for name in sorted(names & OUR_FOLDERS) if not (folder / name).is_dir()]
    if wrong:
        raise UserError(f"'{folder}' is no run's folder: {wrong[0]}. Choose another folder with --output DIR")


def _saved_config(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(config.json of a seed's folder, ""), or (None, why there is none)."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, str(error)[:200]
    return (saved, "") if isinstance(saved, dict) else (None, "it is no object")


def _refuse_unknown(folder: Path, config: RunConfig, result: dict[str, Any] | None, last: Path, why: str) -> None:
    """Without a readable config.json the checkpoint or the result has to say that a run is this one."""
    known = result is not None and not config.same_run(result["config"])
    if last.is_file():
        identity = checkpoint.identity_of(last)
        known = (identity.get("config"), identity.get("seed")) == (config.fingerprint(), config.seed)
    if not known:
        raise UserError(
            f"'{folder}' holds a run whose config.json cannot be read ({why}). Restore it, or choose another folder "
            "with --output DIR"
        )


def refuse_other_inputs(folder: Path, config: RunConfig, data: str, weights: Weights) -> None:
    """Raises UserError where a finished seed beside this one was computed on other data, or from another file of the
    same name: their mean would mean nothing. data: its hash."""
    for path, result in _seeds_of(config, folder.parent):
        theirs, then = _inputs(result)
        differing: list[tuple[str, Any, Any]] = [("data", theirs, data)] if theirs != data else []
        # Of several networks in one run the last one's file stands in the result: only a name says which it is.
        differing += [("weights", then[1], weights[1])] if then[0] == weights[0] and then[1] != weights[1] else []
        if path != folder and differing:
            name, was, now = differing[0]
            raise UserError(
                f"'{path}' was computed with other {name} (sha256 {str(was)[:12]}, now {str(now)[:12]}): the mean over "
                f"seeds would mix them. Put the {name} back, or choose another folder with --output DIR"
            )


def _seeds_of(config: RunConfig, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, result) of the finished seeds of a config. Raises UserError where one lies under another's number."""
    found = []
    for path in sorted(folder.glob("seed*")):
        result = sound_result(path) if path.is_dir() else None
        if result is None or not result["finished"] or config.same_run(result["config"]):
            continue
        if path.name != f"seed{result['config'].get('seed')}":
            raise UserError(
                f"'{path}' holds the run of seed {result['config'].get('seed')} under another number: it would count "
                "twice. Move it to a folder of its own"
            )
        found.append((path, result))
    return found


def _inputs(result: Mapping[str, Any]) -> tuple[str, Weights]:
    weights = result.get("weights", {})
    return result.get("data", {}).get("hash"), (weights.get("name"), weights.get("sha256"))


def summarise(config: RunConfig, folder: Path) -> None:
    """summary.json, summary.md and the seeds' curves, over all finished seeds of this config in the folder.

    Raises UserError where their data or weights differ.
    """
    found = _seeds_of(config, folder)
    if not found:
        return
    results = [result for _, result in found]
    path, first = found[0]
    refuse_other_inputs(path, config, *_inputs(first))
    summary = summarise_seeds(results)
    write_json(folder / "summary.json", summary)
    write_text(folder / "summary.md", summary_text(results, summary))
    if len(results) > 1:
        log.info("mean of %d seeds: last %.2f, average %.2f", len(results), summary["last_acc"]["mean"],
                 summary["avg_acc"]["mean"])  # fmt: skip
        draw(plot_seeds, results, folder / "plots" / "seeds.png")


def draw(plot: Callable[..., None], *arguments: Any) -> None:
    """A figure that fails is no reason to end a run: its numbers are written."""
    try:
        plot(*arguments)
    except Exception as error:  # noqa: BLE001 - matplotlib raises anything, its fonts and caches as well
        log.warning("%s could not be drawn (%s: %s)", arguments[-1], type(error).__name__, str(error)[:200])
