"""A filled table as one that people read."""

from collections.abc import Sequence

from tools.table.rows import Shown, by_worth
from tools.table.spec import Published, TableFile
from tools.table.verdict import Verdict
from utils.tables import Table, number, with_std

TITLES = {"last_acc": "last", "avg_acc": "average", "last_acc_task_mean": "last, mean of tasks"}


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def as_table(table: TableFile, shown: Sequence[Shown]) -> Table:
    """A line a row and metric: n, ours, theirs, difference, its standard error, verdict, what theirs is worth."""
    headers = ["row", "metric", "n", "ours", "published", "difference", "error", "verdict", "kind"]
    rows = []
    for entry in shown:
        for position, metric in enumerate(table.spec.metrics):
            verdict, published = entry.verdicts[metric], entry.published[metric]
            ours = entry.runs.metric(metric) if entry.runs is not None else None
            value = published.value(metric) if published is not None else None
            rows.append([
                entry.row.name if position == 0 else "",
                title_of(metric),
                str(ours.n) if ours is not None else "",
                with_std(ours.mean, ours.std) if ours is not None else "",
                with_std(value.mean, value.std) if value is not None else "",
                number(verdict.difference, signed=True),
                number(verdict.error),
                verdict.word,
                published.kind if published is not None else "",
            ])  # fmt: skip
    caption = f"{table.spec.title}. {table.spec.protocol}."
    return Table(caption, headers, rows, frozenset({2, 3, 4, 5, 6}), notes(table, shown))


def csv_table(table: TableFile, shown: Sequence[Shown]) -> Table:
    """For programs: every number at full precision, a name in every line, every source."""
    headers = ["row", "metric", "n", "seeds", "mean", "std", "published", "published_std", "published_n", "difference",
               "standard_error", "verdict", "reason", "parts_at_task", "kind", "source"]  # fmt: skip
    rows = []
    for entry in shown:
        for metric in table.spec.metrics:
            rows.append([_plain(value) for value in _cells(entry, metric)])
    return Table(table.spec.title, headers, rows)


def _cells(entry: Shown, metric: str) -> list[object]:
    verdict: Verdict = entry.verdicts[metric]
    published: Published | None = entry.published[metric]
    ours = entry.runs.metric(metric) if entry.runs is not None else None
    value = published.value(metric) if published is not None else None
    return [
        entry.row.name, metric, ours.n if ours else 0, " ".join(map(str, entry.runs.seeds)) if entry.runs else None,
        ours.mean if ours else None, ours.std if ours else None, value.mean if value else None,
        value.std if value else None, published.runs if published else None, verdict.difference, verdict.error,
        verdict.word, verdict.reason, entry.parting, published.kind if published else None,
        published.source if published else None,
    ]  # fmt: skip


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def notes(table: TableFile, shown: Sequence[Shown]) -> list[str]:
    """What the columns mean, where curves part, and other sources that disagree with the one beside ours."""
    lines = [
        "Accuracies in percent, mean ± standard deviation over n seeds; error: standard error of the difference "
        "(Welch's where both deviations are known); within: inside its 95 % interval, or "
        f"{table.spec.tolerance:g} points where no deviation is known."
    ]
    lines += [
        f"{entry.row.name}: the curves part after task {entry.parting}." for entry in shown if entry.parting is not None
    ]
    lines += _reasons(table, shown)
    lines += [f"{entry.row.name}: {entry.row.chosen}." for entry in shown if entry.row.chosen]
    for entry in shown:
        if entry.runs is not None and (left := sorted(set(entry.row.seeds) - set(entry.runs.seeds))):
            lines.append(f"{entry.row.name}: not finished: seed {', '.join(map(str, left))}.")
    for entry in shown:
        for metric in table.spec.metrics:
            lines += _others(entry, metric)
    return lines + ([table.spec.note] if table.spec.note else [])


def _reasons(table: TableFile, shown: Sequence[Shown]) -> list[str]:
    """Why rows have no comparison, each reason once."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in shown:
        for metric in table.spec.metrics:
            verdict = entry.verdicts[metric]
            if verdict.word in ("cannot compare", "not run") and verdict.reason:
                found.setdefault(verdict.text, {}).setdefault(entry.row.name, []).append(title_of(metric))
    every = len(table.spec.metrics)
    return [
        f"{text}: "
        + "; ".join(
            name if len(metrics) == every else f"{name} ({', '.join(metrics)})" for name, metrics in rows.items()
        )
        + "."
        for text, rows in found.items()
    ]


def _others(entry: Shown, metric: str) -> list[str]:
    chosen = entry.published[metric]
    others = [
        f"{with_std(value.mean, value.std)} ({source.kind})"
        for source in by_worth(entry.row.spec)
        if source is not chosen and (value := source.value(metric)) is not None
    ]
    return [f"{entry.row.name}, {title_of(metric)}: also published {', '.join(others)}."] if others else []
