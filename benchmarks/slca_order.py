"""python -m benchmarks.slca_order: what the slow learner and classifier alignment each bring (SLCA's ablation).

Three rows per stream: sequential fine-tuning, + slow learner (SL), + classifier alignment (CA). The last two share
their training, since alignment is rolled back before the next task: + SL is evaluated before alignment, + CA after it,
which is what `exps/slca/<stream>_small_noca.json` and `<stream>_small.json` give (see the
test of that name in tests/models/test_slca.py).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from data.stream import Task
from models.factory import load_config
from models.parts.evaluation import evaluate
from models.parts.loop import begin, fit
from trainer import prepare
from utils.metrics import pooled_curve
from utils.runtime import Runtime

ROWS = ("Seq FT", "+ SL", "+ SL + CA")


def curves(path: Path, seed: int, runtime: Runtime) -> tuple[np.ndarray, np.ndarray]:
    """Pooled accuracy after each task, evaluated before `after_task` and after it: two arrays (T,)."""
    manager, learner = prepare(load_config(str(path)).with_seed(seed), runtime)
    correct = np.full((2, len(manager), len(manager)), np.nan)
    for task in manager:
        begin(learner, task)
        fit(learner, task)
        seen: list[Task] = manager[: task.index + 1]
        correct[0, task.index, : task.index + 1] = evaluate(learner, seen).main[0]
        learner.after_task(task)
        correct[1, task.index, : task.index + 1] = evaluate(learner, seen).main[0]
    count = np.array([len(task.test) for task in manager], dtype=float)
    return pooled_curve(correct[0], count), pooled_curve(correct[1], count)


def rows_of(stream: str, seed: int, runtime: Runtime) -> dict[str, list[float]]:
    sequential, _ = curves(Path(f"exps/slca/{stream}_small_seqft.json"), seed, runtime)
    slow, aligned = curves(Path(f"exps/slca/{stream}_small.json"), seed, runtime)
    return dict(zip(ROWS, (sequential.tolist(), slow.tolist(), aligned.tolist()), strict=True))


def table(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """stream -> seed -> row -> curve, as Markdown: mean and sample deviation over seeds."""
    lines = ["| stream | row | last | average | n |", "|---|---|---|---|---|"]
    for stream, seeds in results.items():
        for row in ROWS:
            found = np.array([rows[row] for rows in seeds.values()])  # (seeds, T)
            cells = [
                f"{v.mean():.2f} ± {v.std(ddof=1) if len(v) > 1 else 0:.2f}" for v in (found[:, -1], found.mean(1))
            ]
            lines.append(f"| {stream} | {row} | {cells[0]} | {cells[1]} | {len(found)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.6), squeeze=False, sharey=True)
    for axis, (stream, seeds) in zip(axes[0], results.items(), strict=True):
        for row in ROWS:
            found = np.array([rows[row] for rows in seeds.values()])
            tasks = np.arange(1, found.shape[1] + 1)
            axis.plot(tasks, found.mean(axis=0), marker="o", label=row)
            axis.fill_between(tasks, found.min(axis=0), found.max(axis=0), alpha=0.2)
        axis.set(title=stream, xlabel="tasks seen")
    axes[0, 0].set_ylabel("accuracy over classes seen (percent)")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="*", default=["digits", "glyphs"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1993, 1996, 1997])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--curves", type=Path, help="JSON file of all curves; streams and seeds in it are not run again"
    )
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    place = Runtime(given.device, "auto")
    done = json.loads(given.curves.read_text()) if given.curves and given.curves.is_file() else {}
    for name in given.streams:
        for number in given.seeds:
            if str(number) not in done.setdefault(name, {}):
                done[name][str(number)] = rows_of(name, number, place)
                if given.curves:
                    given.curves.write_text(json.dumps(done))
    print(table(done))
    if given.figure:
        plot(done, given.figure)
