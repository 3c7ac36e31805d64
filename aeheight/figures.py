"""The report's figures by matplotlib: pictures inside the page, as data URIs.

The same values give the same bytes, so that the same report is the same page.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, MultipleLocator
from numpy.typing import NDArray
from PIL import Image

from aeheight.limits import error_limits, height_limits, novelty_limits, spread_limits
from aeheight.seams import Seams

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


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Overviews of one group (a zone) of the heights, north up; NaN where nothing is known."""

    group: str
    """Name of the group in the store, such as utm10n."""

    crs: str
    """Its coordinate reference system, such as EPSG:32610."""

    bounds: tuple[float, float, float, float]
    """West, south, east, north of the overview, in units of the CRS."""

    pixel: tuple[float, float]
    """Width and height of an overview pixel, metres on the ground."""

    reference: NDArray[np.float32]
    """(h, w) reference heights, metres."""

    predicted: NDArray[np.float32]
    """(h, w) predicted heights, metres."""

    difference: NDArray[np.float32]
    """(h, w) predicted - reference, metres."""

    split: NDArray[np.uint8] | None = None
    """(h, w) 0 unused, 1 train, 2 validation, 3 test."""

    novelty: NDArray[np.float32] | None = None
    """(h, w) distance from the training ground; above 1: farther than 99 % of the validation's."""
    spread: NDArray[np.float32] | None = None
    """(rows, columns) metres; half the width of the 90 % interval."""


def format_metric(value: float | None, name: str) -> str:
    """A metric as a person reads it; a dash where it is undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    if name == "n":
        return f"{value:,.0f}".replace(",", "\u202f")
    if name == "coverage":
        # Never rounded up to a full 100 %, which would hide the gaps.
        return f"{math.floor(value * 1000) / 10:.1f} %"
    if name in ("r2", "pearson"):
        return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")
    sign = "+" if name in ("mean", "median", "p5", "p95", "min", "max") else ""
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")


def draw(
    maps: Sequence[Maps] = (),
    *,
    scatter: Histogram | None = None,
    errors: Histogram | None = None,
    summary: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, float | None]] = (),
    seams: Seams | None = None,
    halo: int = 0,
    limit: float | None = None,
) -> dict[str, Any]:
    """Data URIs of every figure that has data; `maps` holds a mapping of panels for each group.

    Args:
        maps: overviews.
        scatter: edges (k + 1,) in metres, counts (k, k) [reference, predicted].
        errors: edges (k + 1,) in metres, counts (k,) of predicted - reference.
        summary: of the same errors: median and NMAD are marked.
        history: one row an epoch.
        seams: of the checkpoint.
        halo: the chosen one, in pixels.
        limit: of the seams, metres.
    """
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Any] = {"maps": _map_rows(maps)}
        if scatter is not None and scatter[1].any():
            figures["scatter"] = _svg(_draw_scatter(*scatter))
        if errors is not None and errors[1].any():
            figures["errors"] = _svg(_draw_errors(*errors, summary or {}))
        if curves := learning_curves(history):
            figures["history"] = _svg(curves)
        if seams is not None and seams.halos:
            figures["seams"] = _svg(_draw_seams(seams, halo, limit))
    return figures


def _map_rows(maps: Sequence[Maps]) -> list[dict[str, str]]:
    """Panels of each group; all share their limits, so that zones compare."""
    heights = Normalize(*height_limits(a for p in maps for a in (p.reference, p.predicted)))
    errors = Normalize(*error_limits(p.difference for p in maps))
    doubts = Normalize(*spread_limits(p.spread for p in maps if p.spread is not None))
    strange = Normalize(*novelty_limits(p.novelty for p in maps if p.novelty is not None))
    # Many zones must not swell the page, and their labels must stay legible.
    dpi = max(90.0, 200 * min(1.0, math.sqrt(2 / max(len(maps), 1))))
    rows = []
    for panel in maps:
        row = {
            "reference": (panel.reference, "viridis", heights, "reference height [m]"),
            "predicted": (panel.predicted, "viridis", heights, "predicted height [m]"),
            "difference": (panel.difference, "RdBu_r", errors, "predicted − reference [m]"),
        }
        drawn = {key: _png(_draw_map(panel, *what), dpi) for key, what in row.items()}
        if panel.split is not None:
            drawn["split"] = _png(_draw_split(panel, panel.split), dpi)
        if panel.novelty is not None:
            drawn["novelty"] = _png(_draw_novelty(panel, panel.novelty, strange), dpi)
        if panel.spread is not None:
            what = panel.spread, "magma_r", doubts, "spread [m]"
            drawn["spread"] = _png(_draw_map(panel, *what), dpi)
        rows.append(drawn)
    return rows


def _map_axes(panel: Maps) -> tuple[Figure, Axes, tuple[float, float, float, float]]:
    rows, columns = panel.reference.shape
    width, height = columns * panel.pixel[0], rows * panel.pixel[1]
    ratio = min(max(height / width, 0.3), 2.0)
    figure = Figure(figsize=(3.6, 3.5 * ratio + 0.55), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[], facecolor=GREY)
    axes.spines[:].set_visible(False)
    length = _round_length(width / 3)
    left, base = 0.04 * width, 0.05 * height
    label = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2.5}
    axes.plot([left, left + length], [base, base], color="white", lw=5, solid_capstyle="butt")
    axes.plot([left, left + length], [base, base], color="black", lw=2, solid_capstyle="butt")
    axes.text(left, base + 0.03 * height, label, fontsize=8, va="bottom", bbox=box)
    return figure, axes, (0, width, 0, height)


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5 · 10ᵏ that is not above ``most``."""
    unit = 10.0 ** math.floor(math.log10(most))
    return max(step * unit for step in (1, 2, 5) if step * unit <= most)


def _draw_map(
    panel: Maps, array: NDArray[np.float32], colours: str, limits: Normalize, label: str
) -> Figure:
    figure, axes, extent = _map_axes(panel)
    image = axes.imshow(array, cmap=colours, norm=limits, extent=extent)
    _colourbar(figure, axes, image, label, extend=_beyond(array, limits))
    return figure


def _beyond(array: NDArray[np.float32], limits: Normalize) -> str:
    """At which ends of a scale values lie beyond it."""
    low = bool(np.nanmin(array, initial=np.inf) < (limits.vmin or 0))
    high = bool(np.nanmax(array, initial=-np.inf) > (limits.vmax or 0))
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[low, high]


def _draw_novelty(panel: Maps, novelty: NDArray[np.float32], limits: Normalize) -> Figure:
    figure, axes, extent = _map_axes(panel)
    image = axes.imshow(novelty, cmap="YlOrBr", norm=limits, extent=extent)
    most = float(limits.vmax or 2)
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, most) if 0 <= tick <= most and tick]
    bar = _colourbar(
        figure,
        axes,
        image,
        "novelty",
        extend=_beyond(novelty, limits),
        ticks=sorted({0.0, 1.0, *(tick for tick in ticks if abs(tick - 1) > 0.1 * most)}),
    )
    bar.axvline(1, color="black", lw=2)
    return figure


def _draw_split(panel: Maps, split: NDArray[np.uint8]) -> Figure:
    figure, axes, extent = _map_axes(panel)
    colours: Colormap = ListedColormap([GREY, BLUE, ORANGE, GREEN])
    limits = BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5], 4)
    image = axes.imshow(split, cmap=colours, norm=limits, extent=extent, interpolation="nearest")
    bar = _colourbar(figure, axes, image, "use of the ground", ticks=[0, 1, 2, 3])
    bar.set_xticklabels(["unused", "train", "valid.", "test"])
    return figure


def _colourbar(
    figure: Figure, axes: Axes, image: ScalarMappable, label: str, **options: Any
) -> Axes:
    bar = figure.colorbar(
        image, ax=axes, orientation="horizontal", aspect=30, pad=0.03, shrink=0.96, **options
    )
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar.ax


def _draw_scatter(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> Figure:
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


def _draw_errors(
    edges: NDArray[np.float64], counts: NDArray[np.int64], summary: Mapping[str, Any]
) -> Figure:
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
    values = [value for _, value in train + validation]
    if max(values) > _WIDE * min(values) > 0:
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
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


def _draw_r2(axes: Axes, r2: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*r2, strict=True), ".-", color=ORANGE)
    axes.plot(*max(r2, key=lambda point: point[1]), "o", ms=8, mfc="none", mec="black")
    axes.set(ylabel="R² on validation ground")
    low, high = axes.get_ylim()
    if high - low < _NARROW:  # what is noise must not look like a gain
        axes.set(ylim=((low + high - _NARROW) / 2, (low + high + _NARROW) / 2))


_NOTHING: Final = 1e-5
"""Metres: seams below this are float rounding, and drawn here."""


def _draw_seams(seams: Seams, halo: int, limit: float | None) -> Figure:
    """Error beside the cut and step at seams, over the halo; logarithmic metres."""
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


def _png(figure: Figure, dpi: float) -> str:
    """PNG with a palette of 256 colours: a third of the bytes, the same to the eye."""
    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    picture = Image.open(drawn).convert("RGB")
    # One round of k-means keeps the few pixels of the text in their own colours.
    picture.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
