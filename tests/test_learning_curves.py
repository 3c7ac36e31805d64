"""The learning section of the report: the curves hold the history, the words say what it was."""

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from aeheight.charts import learning_curves
from aeheight.metrics import Stats
from aeheight.report import Report, render
from tests.test_report import Page

History = list[dict[str, float]]
START, SHARE = 16.0, 0.8
"""Metres on validation ground before the first epoch; what each epoch leaves of it."""


def history(epochs: int, share: float = SHARE) -> History:
    """Errors that shrink by the same share in each epoch; heights with a spread of 40 m."""
    return [
        {
            "epoch": epoch,
            "train_rmse": 0.9 * (rmse := START * share**epoch),
            "validation_rmse": rmse,
            "validation_r2": 1 - (rmse / 40) ** 2,
            "patches_per_second": 24.0,
            "seconds": 50.0 * epoch,
        }
        for epoch in range(epochs + 1)
    ]


def page(rows: History, asked: int | None = None) -> Page:
    reference = np.linspace(0, 100, 50, dtype=np.float32)
    test = Stats.of(reference + 1, reference).summary()
    settings = {} if asked is None else {"settings": {"model": {"epochs": asked}}}
    metrics = {"model": {"test": test}, "baselines": {}, "by": {}, "provenance": settings}
    return Page(render(Report(name="x", metrics=metrics, history=rows)))


def drawn(axes: Axes, label: str) -> list[tuple[float, float]]:
    """The points of the line of that label."""
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_the_curves_are_the_history() -> None:
    rows = history(5)
    figure = learning_curves(rows)
    assert figure is not None
    rmse, r2 = figure.axes
    for name, label in (("train_rmse", "training"), ("validation_rmse", "validation")):
        assert drawn(rmse, label) == [(row["epoch"], row[name]) for row in rows]
    curve = [(row["epoch"], row["validation_r2"]) for row in rows]
    assert [tuple(point) for point in r2.lines[0].get_xydata()] == curve
    assert drawn(rmse, "best") == [(5, rows[5]["validation_rmse"])]
    assert {y for _, y in drawn(rmse, "start")} == {START}
    assert rmse.get_yscale() == "linear"


def test_the_best_is_marked_where_it_was() -> None:
    rows = history(3) + [row | {"epoch": row["epoch"] + 4} for row in history(3)]
    rows[2]["validation_rmse"], rows[2]["validation_r2"] = 1.0, 0.999
    figure = learning_curves(rows)
    assert figure is not None
    rmse, r2 = figure.axes
    assert drawn(rmse, "best: 1.00 m, epoch 2") == [(2, 1.0)]
    assert [tuple(point) for point in r2.lines[1].get_xydata()] == [(2, 0.999)]


def test_what_falls_far_is_drawn_over_logarithms() -> None:
    figure = learning_curves(history(10, share=0.5))
    assert figure is not None
    assert figure.axes[0].get_yscale() == "log"


def test_noise_does_not_fill_the_panel() -> None:
    rows = history(2)
    for row, value in zip(rows, (0.9631, 0.9634, 0.9632), strict=True):
        row["validation_r2"] = value
    figure = learning_curves(rows)
    assert figure is not None
    low, high = figure.axes[1].get_ylim()
    assert low < 0.9631 < 0.9634 < high
    assert high - low == pytest.approx(0.02)


def test_a_history_with_holes() -> None:
    """Records of older models have no R²; a diverged epoch has nothing else."""
    rows: list[dict[str, Any]] = [{"epoch": e, "validation_rmse": 9.0 - e} for e in range(3)]
    rows += [{"epoch": 3, "validation_rmse": math.nan}, {"epoch": 4, "diverged": 1.0}]
    figure = learning_curves(rows)
    assert figure is not None
    (axes,) = figure.axes
    assert drawn(axes, "validation") == [(0, 9.0), (1, 8.0), (2, 7.0)]
    assert {x for x, _ in drawn(axes, "diverged")} == {4.0}


@pytest.mark.parametrize("rows", [[], history(0), [{"epoch": 0.0, "diverged": 1.0}]])
def test_a_model_that_was_not_trained_has_no_curves(rows: History) -> None:
    assert learning_curves(rows) is None
    assert "Learning" not in page(rows).words


def test_the_words_of_a_training_that_stopped_early() -> None:
    rows = history(4)
    rows[4]["validation_rmse"] = 12.0
    words = page(rows, asked=30).words
    assert "Training took 4 epochs of 30 allowed and 3 min 20 s, at 24 patches a second" in words
    assert "The weights of epoch 3 are kept" in words
    assert "their RMSE is 8.19 m (R² 0.958), on training ground it was 7.37 m" in words
    assert "started from 16.00 m on validation ground, and made that 49 % lower" in words
    for other in ("diverged", "The last epoch was the best", "No epoch was better"):
        assert other not in words


def test_the_words_of_a_training_that_could_go_on() -> None:
    assert "The last epoch was the best: more epochs may do better." in page(history(2)).words


def test_the_words_of_a_network_that_did_not_help() -> None:
    words = page(history(2, share=1.1)).words
    assert "The weights of epoch 0 are kept" in words
    assert "No epoch was better on validation ground than what training started from" in words
    assert "lower." not in words


def test_the_words_of_a_training_that_diverged() -> None:
    words = page([*history(2), {"epoch": 3, "diverged": 1.0, "seconds": 160.0}]).words
    assert "Training diverged in epoch 3 and ended there." in words
    assert "The weights of epoch 2 are kept" in words
    assert "The last epoch was the best" not in words


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        ({"relief": 0.5, "level": 0.25}, "50 % of its detail and 25 % of its level"),
        ({"relief": 0.0, "level": 0.0}, "the map is its base alone"),
    ],
)
def test_the_page_tells_how_much_of_the_network_is_believed(trust, words):
    metrics = {"model": {}, "baselines": {}, "by": {}, "provenance": {"model": {"trust": trust}}}
    assert words in Page(render(Report(name="x", metrics=metrics))).words
