"""The folder of a seed and the one above it: whose they are, whether they may be written to, what their seeds say."""

import json
import logging
from pathlib import Path
from typing import Any

from utils.config import RunConfig
from utils.errors import UserError
from utils.plots import plot_seeds
from utils.results import summarise_seeds, summary_text, write_json, write_text

log = logging.getLogger(__name__)

OUR_FILES = frozenset({"config.json", "train.log", "epochs.jsonl", "result.json", "checkpoint", "plots", "landscape",
                       "predictions", "tensorboard", "wandb"})  # fmt: skip


def seed_folder(folder: Path, seed: int) -> Path:
    """Of one seed of a run."""
    return folder / f"seed{seed}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a seed's folder, or None when there is none."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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


def claim(folder: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that holds another config, this run's results without --resume, or foreign files.

    A run that ended before its first epoch holds nothing worth keeping: its folder is free.
    """
    if folder.is_dir() and (foreign := sorted({path.name for path in folder.iterdir()} - OUR_FILES)):
        raise UserError(
            f"'{folder}' holds other files ({', '.join(foreign[:3])}). Choose another folder with --output DIR"
        )
    epochs = folder / "epochs.jsonl"
    begun = (folder / "result.json").is_file() or (folder / "checkpoint" / "last.pt").is_file()
    if not begun and not (epochs.is_file() and epochs.stat().st_size):
        return
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' holds a run whose config.json cannot be read ({error}). Restore it, or choose another folder "
            "with --output DIR"
        ) from None
    if differing := config.same_run(saved):
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


def summarise(config: RunConfig, folder: Path) -> None:
    """summary.json, summary.md and the seeds' curves, over all finished seeds of this config in the folder."""
    found = [read_result(path) for path in sorted(folder.glob("seed*")) if path.is_dir()]
    results = [r for r in found if r is not None and r["finished"] and not config.same_run(r["config"])]
    if not results:
        return
    summary = summarise_seeds(results)
    write_json(folder / "summary.json", summary)
    write_text(folder / "summary.md", summary_text(results, summary))
    if len(results) > 1:
        plot_seeds(results, folder / "plots" / "seeds.png")
        log.info("mean of %d seeds: last %.2f, average %.2f", len(results), summary["last_acc"]["mean"],
                 summary["avg_acc"]["mean"])  # fmt: skip
