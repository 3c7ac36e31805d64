"""Pictures of a map: shaded relief, alone and under colours by height."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Heights = NDArray[np.float32]

_LIGHT = (315.0, 45.0)
"""Azimuth (clockwise from north) and altitude of the sun, degrees: what map readers are used to."""
_STEEP = 0.5
"""Slope (metres a metre) that a picture's steepest tenth is raised to, so that flat land shows."""
_MOST = 20.0
"""Times by which heights are raised at most."""
_COLOURS = np.array(
    [(38, 70, 83), (42, 120, 110), (124, 160, 96), (222, 203, 140), (190, 128, 84), (240, 236, 232)]
)
"""From low to high: lightness grows along nearly all of it, so the colour-blind can read it."""


def hillshade(heights: Heights, pixel: tuple[float, float]) -> NDArray[np.float32]:
    """How light a slope is under a sun in the north-west, after Horn (1981).

    Args:
        heights: (rows, columns) metres, north up; NaN where there is none.
        pixel: height and width of a pixel, metres.

    Returns:
        (rows, columns) 0 (dark) to 1; NaN where no slope is known.
    """
    down, right = _gradients(heights, pixel)
    steep = np.hypot(down, right)
    known = steep[np.isfinite(steep)]
    raised = _STEEP / max(float(np.percentile(known, 90)), 1e-9) if known.size else 1.0
    raised = float(np.clip(raised, 1, _MOST))
    azimuth, altitude = np.radians(_LIGHT)
    # The surface's normal is (-dz/dx, -dz/dy, 1), with y to the north: against `down`.
    east, north = -right * raised, down * raised
    lit = np.cos(altitude) * (east * np.sin(azimuth) + north * np.cos(azimuth)) + np.sin(altitude)
    shade: NDArray[np.float32] = np.clip(lit / np.sqrt(1 + east**2 + north**2), 0, 1)
    return shade.astype(np.float32)


def _gradients(heights: Heights, pixel: tuple[float, float]) -> tuple[Heights, Heights]:
    """Metres a metre down the rows and along the columns; zero along an axis of one pixel."""
    found = [
        np.gradient(heights, pixel[axis], axis=axis) if heights.shape[axis] > 1
        else np.where(np.isfinite(heights), np.float32(0), np.float32(np.nan))
        for axis in (0, 1)
    ]  # fmt: skip
    return found[0], found[1]


def shaded_png(heights: Heights, pixel: tuple[float, float]) -> bytes:
    """The hillshade as a grey PNG, transparent where there is none; see `hillshade`."""
    shade = hillshade(heights, pixel)
    grey = (np.nan_to_num(shade) * 255).astype(np.uint8)
    return _png(np.stack([grey, np.where(np.isfinite(shade), 255, 0).astype(np.uint8)], axis=-1))


def coloured_png(heights: Heights, pixel: tuple[float, float]) -> bytes:
    """Colours by height (2 to 98 % of what is there) over the hillshade, as a PNG."""
    known = heights[np.isfinite(heights)]
    low, high = np.percentile(known, (2, 98)) if known.size else (0.0, 1.0)
    place = np.clip((np.nan_to_num(heights) - low) / max(high - low, 1e-6), 0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    shade = np.nan_to_num(hillshade(heights, pixel), nan=0.7)
    light = 0.35 + 0.65 * shade
    bands = [np.interp(place, stops, channel) * light for channel in _COLOURS.T]
    alpha = np.where(np.isfinite(heights), 255, 0)
    return _png(np.stack([*bands, alpha], axis=-1).astype(np.uint8))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return data.getvalue()
