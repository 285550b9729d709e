"""Verdicts on made-up results: every word, every reason, the arithmetic by hand."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.made_results import made_config, made_result
from tools.table.spec import Published
from tools.table.verdict import compare, judge, obstacles, parting, standard_error
from utils.aggregate import Runs, Spread, runs_of

CONFIG = made_config()


def runs(*lasts: float, seeds=(1993, 1996, 1997), **keys) -> Runs:
    results = [made_result(CONFIG, seed, (99.0, 95.0, last), **keys) for seed, last in zip(seeds, lasts, strict=False)]
    return runs_of(Path("runs/x"), results)


def published(mean: float, std: float | None = None, **keys) -> Published:
    values = {"kind": "paper table", "source": "a paper", "last_acc": {"mean": mean, "std": std}, **keys}
    return Published.model_validate(values)


def test_welch_is_scipys():
    ours, theirs = np.array([90.0, 91.0, 92.5]), np.array([88.0, 89.5, 90.0, 91.0])
    spreads = [Spread(float(x.mean()), float(x.std(ddof=1)), len(x)) for x in (ours, theirs)]
    error, margin = standard_error(*spreads, runs=4)
    found = stats.ttest_ind(ours, theirs, equal_var=False)
    interval = found.confidence_interval(0.95)
    assert error == pytest.approx((ours.mean() - theirs.mean()) / found.statistic)
    assert margin == pytest.approx((interval.high - interval.low) / 2)


@pytest.mark.parametrize("mean, word", [(90.3, "within"), (95.0, "below"), (85.0, "above")])
def test_words_where_both_spreads_are_known(mean, word):
    verdict = judge(runs(90.0, 90.5, 91.0), published(mean, 0.4, n=3), "last_acc", 1.0, "")
    assert verdict.word == word
    assert verdict.difference == pytest.approx(90.5 - mean)
    assert verdict.error == pytest.approx((0.25 / 3 + 0.16 / 3) ** 0.5)


def test_one_spread_stands_for_both_and_an_unknown_number_of_runs_is_one():
    error, _ = standard_error(Spread(90.0, 0.6, 3), Spread(91.0, None, 1), None)
    assert error == pytest.approx(0.6 * (1 / 3 + 1) ** 0.5)
    error, _ = standard_error(Spread(90.0, None, 1), Spread(91.0, 0.6, 1), 3)
    assert error == pytest.approx(0.6 * (1 + 1 / 3) ** 0.5)
    error, _ = standard_error(Spread(90.0, 0.6, 3), Spread(91.0, 0.4, 1), None)
    assert error == pytest.approx(0.6 * (1 / 3 + 1) ** 0.5), "the larger of the two"


def test_without_spreads_the_tolerance_decides_and_a_picture_adds_to_it():
    single = Spread(90.0, None, 1)
    assert compare(single, Spread(90.9, None, 1), 1, 1.0).word == "within"
    assert compare(single, Spread(91.1, None, 1), 1, 1.0).word == "below"
    assert compare(single, Spread(91.4, None, 1), 1, 1.0, reading=0.5).word == "within"
    assert compare(single, Spread(91.1, None, 1), 1, 1.0).error is None
    figure = published(91.4, kind="repo figure")
    assert judge(runs(90.0), figure, "last_acc", 1.0, "").word == "within"


@pytest.mark.parametrize("keys, reason", [
    ({"under": {"data": "e" * 64}}, "other data (dddddddddddd here, eeeeeeeeeeee there)"),
    ({"under": {"weights": "e" * 64}}, "other weights"),
    ({"under": {"split": "seeded:1"}}, "other split (fixed here, seeded:1 there)"),
    ({"under": {"split": "unknown"}}, "their split is not known"),
    ({"under": {"backbone": "vit_base_patch16_224"}}, "other backbone (small_vit here"),
    ({"under": {"precision": "bf16"}}, "other precision (fp32 here, bf16 there)"),
    ({"under": {"class_order": "natural"}}, "other class order (seed 1993 here, natural there)"),
    ({"under": {"class_order": [0, 1, 2, 3, 4, 5]}}, "other class order"),
    ({"under": {"class_order": "unknown"}}, "their class order is not known"),
    ({"seeds": [7]}, "other class order (seed 1993 here, 7 there)"),
    ({"curve": [99.0, 90.0]}, "other number of tasks (3 here, 2 there)"),
])  # fmt: skip
def test_what_cannot_be_compared_says_why(keys, reason):
    verdict = judge(runs(90.0), published(90.0, **keys), "last_acc", 1.0, "")
    assert verdict.word == "cannot compare" and reason in verdict.reason


def test_conditions_that_hold_are_no_obstacle():
    ours = runs(90.0, seeds=(1992,))  # 1992 is a multiple of the six classes: the made order is the natural one
    under = {"data": "d" * 64, "weights": "w" * 64, "split": "fixed", "backbone": "small_vit", "precision": "fp32",
             "class_order": "natural"}  # fmt: skip
    assert obstacles(ours, published(90.0, under=under, curve=[1.0, 2.0, 3.0])) == []
    assert obstacles(runs(90.0), published(90.0, seeds=[1993])) == []


def test_words_without_a_number():
    assert judge(None, published(90.0), "last_acc", 1.0, "").word == "not run"
    missing = judge(None, published(90.0), "last_acc", 1.0, "data missing: folder 'x' not found")
    assert missing.text == "cannot compare: data missing: folder 'x' not found"
    assert judge(runs(90.0), None, "last_acc", 1.0, "").word == "ours only"
    assert judge(runs(90.0), published(90.0), "avg_acc", 1.0, "").word == "ours only"


def test_first_task_at_which_curves_part():
    ours = np.array([[99.0, 95.0, 90.0, 80.0], [98.0, 95.4, 91.0, 79.0]])
    assert parting(ours, [98.4, 95.1, 90.2, 79.5], 1.0) is None
    assert parting(ours, [98.4, 90.0, 90.2, 79.5], 1.0) == 2
    assert parting(ours, [98.5, 95.2, 92.3, 70.0], 1.0) == 3 or parting(ours, [98.5, 95.2, 92.3, 70.0], 1.0) == 4
    assert parting(ours, [98.5], 1.0) is None, "other lengths are no curve to hold ours against"
