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
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from aeheight.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    Histogram,
    calibration_curve,
    error_histogram,
    learning_curves,
    scatter_plot,
    seam_curves,
    variogram_plot,
)
from aeheight.limits import error_limits, novelty_limits, value_limits
from aeheight.seams import Seams

COLOURS: Final = {
    "heights": "viridis",
    "difference": "RdBu_r",
    "novelty": "YlOrBr",
    "spread": "magma_r",
}
"""Colour maps that are told apart with any kind of colour vision: lightness alone orders them."""
USES: Final = (GREY, BLUE, ORANGE, GREEN)
"""Colours of unused, training, validation and test ground."""


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
    """(h, w) how unlike the training ground; above 1: more than 99 % of the validation's."""

    spread: NDArray[np.float32] | None = None
    """(h, w) metres; half the width of the 90 % interval."""


def draw(
    maps: Sequence[Maps] = (),
    *,
    scatter: Histogram | None = None,
    errors: Histogram | None = None,
    summary: Mapping[str, Any] | None = None,
    calibration: Histogram | None = None,
    correlation: Mapping[str, Any] | None = None,
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
        calibration: edges (k + 1,) of |predicted - reference| / spread, counts (k,); the last of
            them holds all that is beyond.
        correlation: as metrics.json has it: lags_px, semivariance_m2, sill_m2, length_px.
        history: one row an epoch.
        seams: of the checkpoint.
        halo: the chosen one, in pixels.
        limit: of the seams, metres.
    """
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Any] = {"maps": _map_rows(maps)}
        if scatter is not None and scatter[1].any():
            figures["scatter"] = _svg(scatter_plot(*scatter))
        if errors is not None and errors[1].any():
            figures["errors"] = _svg(error_histogram(*errors, summary or {}))
        if calibration is not None and calibration[1].any():
            figures["calibration"] = _svg(calibration_curve(*calibration))
        if correlation and (plot := variogram_plot(correlation)):
            figures["variogram"] = _svg(plot)
        if curves := learning_curves(history):
            figures["history"] = _svg(curves)
        if seams is not None and (plot := seam_curves(seams, halo, limit)):
            figures["seams"] = _svg(plot)
    return figures


def _map_rows(maps: Sequence[Maps]) -> list[dict[str, str]]:
    """Panels of each group; all share their limits, so that zones compare."""
    heights = Normalize(*value_limits(a for p in maps for a in (p.reference, p.predicted)))
    errors = Normalize(*error_limits(p.difference for p in maps))
    doubts = Normalize(*value_limits(p.spread for p in maps if p.spread is not None))
    strange = Normalize(*novelty_limits(p.novelty for p in maps if p.novelty is not None))
    scales = {
        "reference": ("heights", heights, "reference height [m]"),
        "predicted": ("heights", heights, "predicted height [m]"),
        "difference": ("difference", errors, "predicted − reference [m]"),
        "spread": ("spread", doubts, "spread [m]"),
    }
    # Many zones must not swell the page, and their labels must stay legible.
    dpi = max(90.0, 200 * min(1.0, math.sqrt(2 / max(len(maps), 1))))
    rows = []
    for panel in maps:
        drawn = {}
        for key, (kind, limits, label) in scales.items():
            array = getattr(panel, key)
            if array is not None:
                picture = _draw_map(panel, array, COLOURS[kind], limits, label)
                drawn[key] = _png(picture, dpi, COLOURS[kind])
        if panel.split is not None:
            drawn["split"] = _png(_draw_split(panel, panel.split), dpi, None)
        if panel.novelty is not None:
            picture = _draw_novelty(panel, panel.novelty, strange)
            drawn["novelty"] = _png(picture, dpi, COLOURS["novelty"])
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
    image = axes.imshow(novelty, cmap=COLOURS["novelty"], norm=limits, extent=extent)
    low, high = float(limits.vmin or 0), float(limits.vmax or 2)
    apart = 0.12 * (high - low)
    ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    bar = _colourbar(
        figure,
        axes,
        image,
        "novelty",
        extend=_beyond(novelty, limits),
        ticks=sorted({1.0, *(tick for tick in ticks if abs(tick - 1) > apart)}),
    )
    bar.axvline(1, color="black", lw=2)
    return figure


def _draw_split(panel: Maps, split: NDArray[np.uint8]) -> Figure:
    figure, axes, extent = _map_axes(panel)
    colours: Colormap = ListedColormap(list(USES))
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


def _png(figure: Figure, dpi: float, colours: str | None) -> str:
    """PNG with a palette of 256 colours: a third of the bytes, the same to the eye."""
    drawn, data = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    picture = Image.open(drawn).convert("RGB")
    if colours is None:
        # One round of k-means keeps the few pixels of the text in their own colours.
        small = picture.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    else:
        small = picture.quantize(palette=_palette(colours), dither=Image.Dither.NONE)
    small.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _palette(colours: str) -> Image.Image:
    """230 colours of a map, which keep its colour bar smooth; greys for the text and no data.

    Pillow takes colours less than 8 levels apart for one: more greys would tint the white.
    """
    main = matplotlib.colormaps[colours](np.linspace(0, 1, 230))[:, :3]
    greys = np.linspace(0, 1, 25)[:, None].repeat(3, axis=1)
    table = np.concatenate([main, greys, [to_rgb(GREY)]])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * table).round().astype(np.uint8).tobytes())
    return palette


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
