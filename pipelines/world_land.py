"""The demo world's ground: terrain, trees, buildings and water on 5 m pixels.

A river leaves hills in the east and crosses a plain in the west; forest patches and settlements
lie on it. The east is higher, hillier and more wooded than the west.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PIXEL = 5.0
"""Edge of a pixel of the landscape, metres."""

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The ground truth on 5 m pixels, each field (2 * size, 2 * size)."""

    terrain: Field
    """Bare ground, metres."""
    canopy: Field
    """Height of trees above ground, metres; 0 elsewhere."""
    buildings: Field
    """Height of buildings above ground, metres; 0 elsewhere."""
    river: Mask
    """Running water."""
    lake: Mask
    """Still water: a gap in the embeddings."""

    @property
    def surface(self) -> Field:
        """The DSM: terrain, trees and buildings, metres."""
        return np.asarray(self.terrain + self.canopy + self.buildings, np.float32)


def make_landscape(size: int, seed: int) -> Landscape:
    """Draw the ground truth.

    Lengths of hills and river are shares of the world's edge, so that a small world holds the
    same variety; trees and houses keep their size.

    Args:
        size: Edge in pixels of 10 m; the fields have twice as many pixels of 5 m.
        seed: What all is drawn from.
    """
    n = 2 * size
    terrain, off_river = _terrain(n, seed)
    river = off_river < 0.004 + (0.0025 * noise(n, seed, "banks", 0.1, 3.0)).clip(-0.003)
    from_lake = _from_lake(n, seed)
    lake = from_lake < 1
    shore = _smoothstep((from_lake - 1) / 1.5)
    terrain = terrain * shore + np.median(terrain[lake]) * (1 - shore)
    water = river | lake
    buildings = _buildings(terrain, off_river, water, seed)
    canopy = _canopy(terrain, water | (blur(buildings, 4) > 0), seed)
    return Landscape(
        terrain=terrain, canopy=canopy, buildings=buildings, river=river & ~lake, lake=lake
    )


def _terrain(n: int, seed: int) -> tuple[Field, Field]:
    """Bare ground (metres), and the distance from the river as a share of the edge."""
    y, x = axes(n)
    phase = stream(seed, "river").uniform(0, 2 * np.pi, 3)
    east = _smoothstep((x - 0.38) / 0.24)
    course = 0.5 + 0.08 * np.sin(4.4 * x + phase[0]) + 0.03 * np.sin(15 * x + phase[1])
    course = course + (1 - 0.7 * east) * 0.012 * np.sin(55 * x + phase[2])
    off_river = np.abs(y - course).astype(np.float32)
    plain = 0.10 - 0.06 * east + 0.025 * noise(n, seed, "plain", 0.5, 6.0)
    hills = _smoothstep((off_river - plain) / 0.17)
    # Noise crosses zero along connected lines: its absolute value has valleys there.
    valleys = sum(
        share * np.abs(noise(n, seed, f"valley{k}", length, 5.5))
        for k, (length, share) in enumerate([(0.5, 0.40), (0.25, 0.38), (0.12, 0.22)])
    )
    relief = hills * ((50 + 25 * east) * (0.3 + valleys) + 18 * east)
    detail = (0.6 + 0.045 * relief) * noise(n, seed, "detail", 0.08, 4.2)
    swell = 2.0 * noise(n, seed, "swell", 0.15, 4.0)
    bed = -2.0 * np.exp(-((off_river / 0.008) ** 2))
    ground = 48 + 25 * x + 70 * (off_river - 0.05).clip(0) + relief + swell + detail + bed
    return ground.astype(np.float32), off_river


def _from_lake(n: int, seed: int) -> Field:
    """Distance from the middle of the one lake, in the west; its shore is at 1."""
    y, x = axes(n)
    radius = 0.035 * (1 + 0.2 * noise(n, seed, "lake", 0.15, 4.5).clip(-2, 2))
    return np.asarray(np.hypot(x - 0.23, y - 0.2) / radius, np.float32)


def _buildings(terrain: Field, off_river: Field, water: Mask, seed: int) -> Field:
    """Settlements on flat dry ground near the river: houses on plots along a grid of streets."""
    n = len(terrain)
    rng = stream(seed, "settlements")
    heights = np.zeros((n, n), np.float32)
    slope = slope_of(blur(terrain, 4), PIXEL)
    flat = (off_river > 0.02) & (off_river < 0.15) & (slope < 0.12) & ~water
    sites = np.argwhere(flat)
    if not len(sites):
        return heights
    for _ in range(9):
        row, column = sites[rng.integers(len(sites))]
        _settle(heights, row, column, rng)
    heights[~flat] = 0
    return heights


def _settle(heights: Field, row: int, column: int, rng: np.random.Generator) -> None:
    """Draw one settlement around a pixel into `heights`: denser and taller at its heart."""
    n = len(heights)
    radius = n * rng.uniform(0.025, 0.06)
    reach = int(radius * 1.5)
    rows = slice(max(0, row - reach), min(n, row + reach))
    columns = slice(max(0, column - reach), min(n, column + reach))
    y, x = np.ogrid[rows, columns]
    angle = rng.uniform(0, np.pi / 2)
    u = (x - column) * np.cos(angle) + (y - row) * np.sin(angle)
    v = (y - row) * np.cos(angle) - (x - column) * np.sin(angle)
    plot = rng.uniform(5, 7)  # pixels, a third of them yard
    i, j = np.floor(u / plot).astype(int), np.floor(v / (0.8 * plot)).astype(int)
    house = (u / plot - i > 0.3) & (v / (0.8 * plot) - j > 0.3) & (i % 6 > 0) & (j % 5 > 0)
    drawn = rng.uniform(size=(64, 64)), rng.uniform(size=(64, 64))
    nearness = (1 - np.hypot(u, v) / radius).clip(0)
    built = house & (drawn[0][i % 64, j % 64] < 2.2 * nearness)
    storeys = 4 + 26 * nearness * drawn[1][i % 64, j % 64] ** 1.5
    heights[rows, columns] = np.where(built, storeys, heights[rows, columns])


def _canopy(terrain: Field, taken: Mask, seed: int) -> Field:
    """Forest patches, likelier on slopes and in the east; 8 to 25 m high with rough crowns."""
    n = len(terrain)
    _, x = axes(n)
    slope = slope_of(blur(terrain, 6), PIXEL)
    wish = noise(n, seed, "forest", 0.15, 3.4) + 2.5 * slope.clip(0, 0.4)
    wooded = (wish > 1.05 - 0.75 * _smoothstep((x - 0.38) / 0.24)) & ~taken
    stand = 16 + 4.5 * noise(n, seed, "stand", 0.06, 2.8)
    crowns = 2.0 * noise(n, seed, "crowns", 6 / n, 1.0)
    return np.where(wooded, (stand + crowns).clip(8, 25), 0).astype(np.float32)


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose: to change one field leaves the others as they are."""
    return np.random.default_rng([seed, *purpose.encode()])


def noise(n: int, seed: int, purpose: str, longest: float, steepness: float) -> Field:
    """Fractal noise (n, n) of mean 0 and SD 1 by spectral synthesis.

    Power falls with frequency to the power `steepness` (2 is rough, 4 is smooth) below the
    wavelength `longest` (share of the edge) and is flat above it.
    """
    m = n + n // 4  # the spectrum repeats itself at m: cut, so that east does not meet west
    half = m // 2 + 1
    frequency = np.hypot(np.fft.fftfreq(m)[:, None], np.fft.rfftfreq(m)[None, :])
    amplitude = (1 + (frequency * n * longest) ** 2) ** (-steepness / 4)
    rng = stream(seed, purpose)
    waves = rng.standard_normal((m, half)) + 1j * rng.standard_normal((m, half))
    field = np.fft.irfft2(waves * amplitude, (m, m))[:n, :n]
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def axes(n: int) -> tuple[Field, Field]:
    """Pixel centres from the north-west as shares of the edge: (n, 1) and (1, n)."""
    centres = ((np.arange(n) + 0.5) / n).astype(np.float32)
    return centres[:, None], centres[None, :]


def _smoothstep(t: Field) -> Field:
    """From 0 to 1 without a kink as t goes from 0 to 1, and constant beyond."""
    inside = np.clip(t, 0, 1)
    return np.asarray(inside * inside * (3 - 2 * inside), np.float32)


def slope_of(heights: Field, pixel: float) -> Field:
    """Rise over run."""
    dy, dx = np.gradient(heights, pixel)
    return np.asarray(np.hypot(dx, dy), np.float32)


def halve(field: Field) -> Field:
    """Means of 2 by 2 pixels."""
    n = len(field) // 2
    return np.asarray(field.reshape(n, 2, n, 2).mean((1, 3)), np.float32)


def blur(field: Field, radius: int) -> Field:
    """Mean over a square of 2 * radius + 1 pixels; the rim is repeated outwards."""
    width = 2 * radius + 1
    for axis, n in enumerate(field.shape):
        pad = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        total = np.cumsum(np.pad(field, pad, mode="edge"), axis=axis, dtype=np.float64)
        upper, lower = np.arange(width, width + n), np.arange(n)
        field = ((total.take(upper, axis) - total.take(lower, axis)) / width).astype(np.float32)
    return field
