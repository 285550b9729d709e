"""Figures: what they show, and that their size stays what it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.made_results import made_config, made_result
from utils.plots import (
    Curves,
    new_figure,
    percent,
    plot_confusion,
    plot_curves,
    plot_differences,
    plot_matrix,
    plot_run,
    plot_seeds,
    protocol,
    ticks,
    title_of,
)

RESULT = made_result(made_config())


@pytest.mark.parametrize("value, text, short", [
    (100.0, "100", "100"), (99.97, "99.9", "99"), (99.5, "99.5", "99"), (87.65, "87.7", "88"), (0.0, "0.0", "0"),
])  # fmt: skip
def test_values_are_not_rounded_to_100_when_they_are_not(value, text, short):
    assert (percent(value), percent(value, short=True)) == (text, short)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 12, 13, 20, 50, 100, 120, 200, 1000])
def test_ticks_are_few_and_even(count):
    found = ticks(count)
    assert len(found) <= 13 and found[0] == 1 and found[-1] <= count
    assert len(set(np.diff(found[1:]))) <= 1


@pytest.mark.parametrize("count", [1, 3, 20, 21, 120])
def test_a_matrix_has_one_size_whatever_the_number_of_tasks(tmp_path, count):
    acc = [[90.0 - t + i if i <= t else None for i in range(count)] for t in range(count)]
    plot_matrix(acc, "title", tmp_path / "matrix.png")
    assert Image.open(tmp_path / "matrix.png").size == (768, 672)


def test_title_names_learner_data_protocol_and_backbone():
    assert title_of(RESULT) == ("simplecil on digits\n3 tasks of 2 classes, class order by seed 1993\nsmall_vit")


@pytest.mark.parametrize("keys, sizes, domains, expected", [
    ({}, [2, 2, 2], [], "3 tasks of 2 classes, class order by seed 1993"),
    ({"shuffle": False}, [2, 2, 2], [], "3 tasks of 2 classes, natural class order"),
    ({"class_order_seed": 4}, [50, 10, 10, 10], [], "4 tasks of 50, then 10 classes, class order by seed 4"),
    ({}, [20, 20, 16], [], "3 tasks of 20 (last 16) classes, class order by seed 1993"),
    ({}, [3, 1, 4], [], "3 tasks of 1 to 4 classes, class order by seed 1993"),
    ({}, [10, 10], ["real", "clipart"], "2 domains of 10 classes"),
])  # fmt: skip
def test_protocol_in_words(keys, sizes, domains, expected):
    result = made_result(made_config(**keys), task_sizes=sizes, domains=domains)
    assert protocol(result) == expected


def test_run_seeds_curves_bars_and_confusions_are_drawn_whatever_the_backend(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    plot_run(RESULT | {"scores": ["logits", "nme"], "curve_nme": [90.0, 80.0, 70.0]}, tmp_path)
    plot_seeds([RESULT, made_result(made_config(), 7)], tmp_path / "seeds.png")
    plot_curves([Curves("a", np.array([[90.0, 80.0], [91.0, 82.0]]), [2, 2])], "t", tmp_path / "curves.png")
    plot_differences([("a", 1.0, 0.2, "above"), ("b", None, None, "within")], "last", "t", tmp_path / "bars.pdf")
    plot_confusion(np.eye(200, dtype=int), "class", "t", tmp_path / "confusion.png", range(20, 200, 20))
    plot_confusion(np.zeros((3, 3), dtype=int), "task", "t", tmp_path / "tasks.png")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"curve.png", "matrix.png", "seeds.png", "curves.png", "curves.pdf", "curves.svg", "bars.pdf",
                     "confusion.png", "tasks.png"}  # fmt: skip


def drawn(monkeypatch, *curves: Curves):
    """The axes of a figure that `plot_curves` draws."""
    kept = []
    monkeypatch.setattr("utils.plots.save", lambda figure, path: kept.append(figure))
    plot_curves(curves, "title", Path("x.png"))
    kept[0].canvas.draw()
    return kept[0]


def test_axes_fit_the_values_and_the_legend_covers_none(monkeypatch):
    figure = drawn(monkeypatch, Curves("a", np.array([[99.0, 97.0, 96.0]]), [10, 10, 10]),
                   Curves("b", np.array([[98.0, 96.0, 95.0], [98.2, 96.4, 95.8]]), [10, 10, 10]))  # fmt: skip
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert 93 < low < 95 and 99 < high < 100
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 <= axes.get_window_extent().y0
    assert "standard deviation" in figure.legends[0].get_title().get_text()
    markers = {line.get_marker() for line in axes.lines}
    assert len(markers) == 2


def test_classes_seen_are_a_second_axis_where_all_share_them(monkeypatch):
    same = drawn(monkeypatch, Curves("a", np.array([[99.0, 97.0]]), [10, 5]))
    (second,) = same.axes[0].child_axes
    assert [label.get_text() for label in second.get_xticklabels()] == ["10", "15"]
    other = drawn(monkeypatch, Curves("a", np.array([[99.0, 97.0]]), None))
    assert other.axes[0].child_axes == []


def test_figures_leave_no_global_state():
    figure = new_figure()
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"
