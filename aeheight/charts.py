"""The report's charts by matplotlib: what errors are like, how training went, what seams leave."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, MultipleLocator
from numpy.typing import NDArray

from aeheight.seams import Seams
from aeheight.terms import format_metric

# Okabe & Ito's colours: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#d9dcdf"
STYLE: Final[dict[Any, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5b6670",
    "axes.labelcolor": "#26323c",
    "xtick.color": "#5b6670",
    "ytick.color": "#5b6670",
    "svg.hashsalt": "aeheight",
}

Histogram = tuple[NDArray[np.float64], NDArray[np.int64]]


def scatter_plot(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> Figure:
    """Density of pixels over reference and predicted height; see `figures.draw`."""
    figure = Figure(figsize=(4.4, 4.0), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    table = np.ma.masked_equal(counts.T, 0)
    limits = LogNorm(1, max(int(counts.max()), 2))
    mesh = axes.pcolormesh(edges, edges, table, cmap="viridis", norm=limits, rasterized=True)
    ends = [edges[0], edges[-1]]
    axes.plot(ends, ends, color="black", lw=1, ls=(0, (5, 3)), label="1 : 1")
    axes.set(xlim=ends, ylim=ends, xlabel="reference [m]", ylabel="predicted [m]")
    axes.legend(frameon=False, loc="upper left")
    width = float(edges[1] - edges[0])
    bar = figure.colorbar(mesh, ax=axes, shrink=0.85)
    bar.set_label(f"pixels in a cell of {width:g} × {width:g} m")
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    bar.outline.set_visible(False)
    return figure


def error_histogram(
    edges: NDArray[np.float64], counts: NDArray[np.int64], summary: Mapping[str, Any]
) -> Figure:
    """Share of pixels over the error, with median and NMAD; see `figures.draw`."""
    figure = Figure(figsize=(4.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    share = 100 * counts / (summary.get("n") or counts.sum())
    axes.stairs(share, edges, fill=True, color=BLUE)
    axes.axvline(0, color="black", lw=1, label="no error")
    median, nmad = summary.get("median"), summary.get("nmad")
    if median is not None:
        label = f"median {format_metric(median, 'median')} m"
        axes.axvline(median, color=ORANGE, lw=1.8, ls=(0, (5, 2)), label=label)
    if median is not None and nmad is not None:
        label = f"median ± NMAD ({format_metric(nmad, 'nmad')} m)"
        axes.axvspan(median - nmad, median + nmad, color="#fbe9c6", lw=0, zorder=0, label=label)
    width = float(edges[1] - edges[0])
    axes.set(xlabel="predicted − reference [m]", ylabel=f"share of pixels [% per {width:.3g} m]")
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.06 * float(share.max())))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8, handlelength=1.4)
    return figure


_WIDE: Final = 4.0
"""Curves whose largest value is more than this times the smallest are drawn over logarithms."""
_NARROW: Final = 0.02
"""The least range of R² that is drawn."""


def learning_curves(history: Sequence[Mapping[str, float | None]]) -> Figure | None:
    """RMSE of each epoch on training and validation ground, and R² on the latter; the best marked.

    Args:
        history: one row an epoch: epoch, train_rmse, validation_rmse (metres), validation_r2, and
            diverged where the epoch's numbers were not finite. Epoch 0 is what training starts
            from.

    Returns:
        None where no curve has two points.
    """
    train, validation, r2 = (
        _points(history, name) for name in ("train_rmse", "validation_rmse", "validation_r2")
    )
    if max(len(train), len(validation)) < 2:
        return None
    figure = Figure(figsize=(7.0 if len(r2) > 1 else 4.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2 if len(r2) > 1 else 1, squeeze=False)[0]
    _draw_rmse(panels[0], train, validation)
    if len(r2) > 1:
        _draw_r2(panels[1], r2)
    for axes in panels:
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for row in history:
            if row.get("diverged"):
                axes.axvline(float(row["epoch"] or 0), color="#b3261e", lw=1.2, label="diverged")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False, fontsize=8, handlelength=1.6)  # fmt: skip
    return figure


def _points(history: Sequence[Mapping[str, float | None]], name: str) -> list[tuple[float, float]]:
    """Epoch and value, where both are known."""
    pairs = [(row.get("epoch"), row.get(name)) for row in history]
    return [
        (float(epoch), float(value))
        for epoch, value in pairs
        if epoch is not None and value is not None and math.isfinite(value)
    ]


def _draw_rmse(
    axes: Axes, train: list[tuple[float, float]], validation: list[tuple[float, float]]
) -> None:
    axes.set(ylabel="RMSE [m]")
    if train:
        axes.plot(*zip(*train, strict=True), ".-", color=BLUE, label="training ground")
    if validation:
        axes.plot(*zip(*validation, strict=True), ".-", color=ORANGE, label="validation ground")
        epoch, value = min(validation, key=lambda point: point[1])
        label = f"best: {value:.2f} m, epoch {epoch:g}"
        axes.plot(epoch, value, "o", ms=8, mfc="none", mec="black", label=label)
    if validation and validation[0][0] == 0:
        start = validation[0][1]
        axes.axhline(start, color=GREEN, lw=1.2, ls=(0, (5, 2)), label=f"start: {start:.2f} m")
    kept = _without_spikes(axes, train + validation)
    if max(kept) > _WIDE * min(kept) > 0:
        axes.set(yscale="log", ylim=(0.9 * min(kept), axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))


def _without_spikes(axes: Axes, points: list[tuple[float, float]]) -> list[float]:
    """Leave spikes beyond the scale, so that they do not squash the rest, with their values there.

    Returns:
        What is on the scale: a spike is above the start by more than the start is above the lowest,
        and at most one point in four is one.
    """
    values = [value for _, value in points]
    low, start = min(values), max(value for epoch, value in points if epoch == points[0][0])
    top = start + max(start - low, 0.05 * start)
    if not 0 < sum(value > top for value in values) <= max(1, len(values) // 4):
        return values
    axes.set(ylim=(low - 0.05 * (top - low), top))
    for epoch, value in points:
        if value > top:
            axes.annotate(f"▲ {value:.3g}", (epoch, top), fontsize=7, ha="center", va="top",
                          annotation_clip=False)  # fmt: skip
    return [value for value in values if value <= top]


def _draw_r2(axes: Axes, r2: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*r2, strict=True), ".-", color=ORANGE)
    axes.plot(*max(r2, key=lambda point: point[1]), "o", ms=8, mfc="none", mec="black")
    axes.set(ylabel="R² on validation ground")
    values = [value for _, value in r2]
    low, high = axes.get_ylim()
    bottom = r2[0][1] - max(max(values) - r2[0][1], _NARROW)
    if min(values) < bottom:  # a spike, which the other panel tells of
        low, high = bottom, max(values) + 0.05 * (max(values) - bottom)
    if high - low < _NARROW:  # what is noise must not look like a gain
        low, high = (low + high - _NARROW) / 2, (low + high + _NARROW) / 2
    axes.set(ylim=(low, high))


def calibration_curve(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> Figure:
    """Share of the true heights within a multiple of the spread; see `figures.draw`."""
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    held = 100 * np.concatenate([[0.0], np.cumsum(counts[:-1])]) / counts.sum()
    drawn = edges[:-1] <= 3
    axes.plot(edges[:-1][drawn], held[drawn], color=BLUE, lw=1.8, label="true heights held")
    wanted = [200 * NormalDist().cdf(_NINETY * k) - 100 for k in edges[:-1][drawn]]
    axes.plot(edges[:-1][drawn], wanted, color=GREEN, lw=1.2, ls=(0, (5, 2)),
              label="normal errors, right spread")  # fmt: skip
    axes.plot(1, 90, "o", ms=8, mfc="none", mec="black", label="wanted: 90 % within 1")
    axes.set(xlabel="within so many times the spread", ylabel="share of pixels [%]")
    axes.set(xlim=(0, 3), ylim=(0, 102))
    axes.grid(color=GREY, lw=0.6)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


_NINETY: Final = NormalDist().inv_cdf(0.95)
"""Standard deviations in half a 90 % interval of normal errors."""


def variogram_plot(correlation: Mapping[str, Any]) -> Figure | None:
    """Semivariance of the errors over distance, as metrics.json has it under `correlation`.

    Returns:
        None where fewer than two distances have a value.
    """
    lags, found = correlation.get("lags_px", ()), correlation.get("semivariance_m2", ())
    points = [(lag, value) for lag, value in zip(lags, found, strict=True) if value is not None]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(4.9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), ".-", color=BLUE, label="semivariance")
    sill, length = correlation.get("sill_m2"), correlation.get("length_px")
    if sill:
        axes.axhline(sill, color=GREEN, lw=1.2, ls=(0, (5, 2)), label="variance of the errors")
    if length is not None:
        axes.axvline(length, color="black", lw=1, label=f"errors go together: {length:.3g} px")
    axes.set(xscale="log", xlabel="distance [px]", ylabel="semivariance [m²]")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


_NOTHING: Final = 1e-5
"""Metres: seams below this are float rounding, and drawn here."""


def seam_curves(seams: Seams, halo: int, limit: float | None) -> Figure | None:
    """Error beside the cut and step at seams, over the halo; logarithmic metres.

    Returns:
        None where nothing but rounding was measured: the model looks at no neighbour.
    """
    if max([*seams.step, *seams.rms], default=0.0) <= _NOTHING:
        return None
    figure = Figure(figsize=(4.9, 2.9), layout="constrained")
    axes = figure.subplots()
    for values, colour, label in (
        (seams.rms, BLUE, "RMS error beside the cut"),
        (seams.step, ORANGE, "RMS step at seams"),
    ):
        axes.plot(seams.halos, np.maximum(values, _NOTHING), ".-", color=colour, label=label)
    axes.axvline(halo, color="black", lw=1, label=f"chosen: {halo} px")
    if limit:
        label = f"1 % of the RMSE: {limit:.2g} m"
        axes.axhline(limit, color=GREEN, lw=1.2, ls=(0, (5, 2)), label=label)
    axes.set(yscale="log", xlabel="halo [px]", ylabel="difference [m]")
    axes.xaxis.set_major_locator(MultipleLocator(32 if seams.halos[-1] <= 256 else 64))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure
