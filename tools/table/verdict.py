"""Ours beside theirs: difference, its standard error, what that says; where two curves part ways.

    d = m - M,   se^2 = s^2 / n + S^2 / N      (Welch where both spreads are known, with his degrees of freedom)

Where one spread alone is known it stands for both. A published mean of an unknown number of runs counts as one run: the
error is then too large rather than too small. Where no spread is known, d is held against the table's tolerance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from tools.table.spec import READ_OFF, Published
from utils.aggregate import Runs, Spread

Word = Literal["within", "below", "above", "cannot compare", "not run", "theirs only", "ours only"]
CONFIDENCE = 0.95
READING = 0.5  # points that a number read off a picture may be wrong by


@dataclass(frozen=True)
class Verdict:
    """error: standard error of the difference; None where no spread is known. reason: why not, or beside what."""

    word: Word
    difference: float | None = None
    error: float | None = None
    reason: str = ""

    @property
    def text(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


def compare(ours: Spread, theirs: Spread, runs: int | None, tolerance: float, reading: float = 0.0) -> Verdict:
    """theirs: its n is 1 where `runs`, the number behind their mean, is not known. reading: added to the margin."""
    difference = ours.mean - theirs.mean
    error, margin = standard_error(ours, theirs, runs)
    allowed = (tolerance if margin is None else margin) + reading
    word: Word = "within" if abs(difference) <= allowed + 1e-9 else "above" if difference > 0 else "below"
    return Verdict(word, difference, error)


def standard_error(ours: Spread, theirs: Spread, runs: int | None) -> tuple[float | None, float | None]:
    """(standard error of the difference, half width of its 95 % interval); both None where no spread is known."""
    n, m = ours.n, runs or 1
    if ours.std is not None and theirs.std is not None and m > 1:
        a, b = ours.std**2 / n, theirs.std**2 / m
        error = math.sqrt(a + b)
        if error == 0:
            return 0.0, 0.0
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    elif ours.std is not None or theirs.std is not None:
        known = max(std for std in (ours.std, theirs.std) if std is not None)
        error = known * math.sqrt(1 / n + 1 / m)
        freedom = max(n - 1 if ours.std is not None else 0, m - 1 if theirs.std is not None else 0, 1)
    else:
        return None, None
    return error, float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def parting(ours: np.ndarray, theirs: Sequence[float], tolerance: float) -> int | None:
    """The first task, from 1, after which two curves differ by more than twice the spread of our seeds at that task,
    or than the tolerance where that is more or unknown; None where they never do, or have other lengths.

    ours (seeds, tasks).
    """
    if ours.shape[1] != len(theirs):
        return None
    spreads = ours.std(axis=0, ddof=1) if len(ours) > 1 else np.zeros(ours.shape[1])
    apart = np.abs(ours.mean(axis=0) - np.array(theirs)) > np.maximum(tolerance, 2 * spreads)
    return int(np.argmax(apart)) + 1 if apart.any() else None


def obstacles(runs: Runs, published: Published) -> list[str]:
    """Why finished runs and a published number cannot be compared: sentences, none where nothing speaks against it."""
    first, under, found = runs.first, published.under, []
    data, weights = first.get("data", {}), first.get("weights", {})
    for what, theirs, ours in (
        ("other data", under.data, data.get("hash")),
        ("other split", under.split, data.get("split")),
        ("other weights", under.weights, weights.get("sha256")),
        ("other backbone", under.backbone, _backbone(first["config"])),
        ("other precision", under.precision, first.get("environment", {}).get("precision")),
    ):
        if theirs == "unknown":
            found.append(f"their {what.partition(' ')[2]} is not known")
        elif theirs is not None and theirs != ours and not (what == "other split" and theirs in (ours or "")):
            found.append(f"{what} ({_short(ours)} here, {_short(theirs)} there)")
    found += _order(runs, published)
    if published.curve is not None and len(published.curve) != len(first["curve"]):
        found.append(f"other number of tasks ({len(first['curve'])} here, {len(published.curve)} there)")
    return found


def _order(runs: Runs, published: Published) -> list[str]:
    """A single published run has the class order of its seed; means over several are taken as of orders like ours."""
    order = published.under.class_order
    if order == "unknown":
        return ["their class order is not known"]
    for result in runs.results:
        seed = result["config"]["seed"]
        if order is not None:
            wanted = sorted(result["class_order"]) if order == "natural" else order
            if list(result["class_order"]) != wanted:
                return [f"other class order (seed {seed} here, {'natural' if order == 'natural' else 'another'} there)"]
        elif published.seeds is not None and len(published.seeds) == 1 and result["config"].get("shuffle", True):
            drawn = result["config"].get("class_order_seed")
            if (seed if drawn is None else drawn) != published.seeds[0]:
                return [f"other class order (seed {seed} here, {published.seeds[0]} there)"]
    return []


def _backbone(config: Mapping[str, Any]) -> str:
    backbone = config["backbone"]
    return backbone if isinstance(backbone, str) else backbone["name"]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def judge(runs: Runs | None, published: Published | None, metric: str, tolerance: float, missing: str) -> Verdict:
    """Of one metric of one row. missing: why there are no runs."""
    value = None if published is None else published.value(metric)
    if runs is None:
        return Verdict("not run" if not missing else "cannot compare", reason=missing)
    ours = runs.metric(metric)
    if value is None or published is None:
        return Verdict("ours only", reason="no published number")
    if ours is None:
        return Verdict("cannot compare", reason=f"our runs have no {metric}")
    if reasons := obstacles(runs, published):
        return Verdict("cannot compare", ours.mean - value.mean, reason="; ".join(reasons))
    reading = READING if published.kind in READ_OFF else 0.0
    theirs = Spread(value.mean, value.std, published.runs or 1)
    return compare(ours, theirs, published.runs, tolerance, reading)
