"""The demo world: a made-up landscape and the embeddings that describe it in part.

A river leaves hills in the east and crosses a plain in the west; forest patches, fields and
settlements lie on it. The west serves for training and the east for testing: the east is higher,
hillier and more wooded, which is the difficulty that arXiv 2602.17250 met in its own split.

The embeddings carry the height in part. One pixel knows its height through a bent code with much
white noise, which a neighbourhood averages away; canopy height shows only in the local texture;
slope and relief must be integrated. So a per-pixel ridge beats the mean, and a convolution beats
the ridge. `pipelines.world_files` writes it all in the formats that real data has.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, NODATA, encode
from aeheight.errors import InputError
from pipelines import world_files

GENERATOR = 1
"""Version of the landscape: a folder made by another one is made anew."""

CRS = "EPSG:32631"
WEST = 431_230.0
NORTH = 5_098_770.0
"""The north-west corner of the world, metres: on the 10 m lattice, on no rounder number."""

PIXEL = 10.0
"""Edge of an embedding pixel, metres; the landscape itself is built at half of it."""

STRIP = 64
"""Rows of embeddings that are made at once: bounds the memory."""

LEVELS = [(60, 60), (100, 60), (140, 70), (200, 80), (150, 150)]
"""Middle and width (metres) of the bands that tell the height, each a bent code."""

HAZE, DRIFT = 18, 7
"""SD of what hides the height, metres: white noise, and noise that no neighbourhood removes."""

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a world lies on disk and on the ground."""

    folder: Path
    """The folder that holds it all."""
    embeddings: Path
    """Folder of AlphaEarth tiles, `{year}/{zone}/NAME.tiff` below it."""
    height: Path
    """The DSM's STAC catalogue (catalog.json)."""
    prior: Path
    """The coarse DEM in degrees, one GeoTIFF."""
    crs: str
    """The UTM zone of tiles and DSM, as EPSG:code."""
    bounds: tuple[float, float, float, float]
    """west, south, east, north, metres."""
    size: int
    """Edge in pixels of 10 m."""
    seed: int
    """What the landscape was drawn from."""


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
        return self.terrain + self.canopy + self.buildings


def make_world(folder: Path, size: int = 1024, seed: int = 0) -> World:
    """Write a world into a folder, or do nothing where the same world already lies there.

    It appears whole or not at all: it is made in a hidden folder beside `folder` and renamed.

    Args:
        folder: What to create. A world of other parameters in it is replaced.
        size: Edge in pixels of 10 m, a multiple of 256.
        seed: The same seed gives the same pixels.

    Returns:
        The paths and the place of the world.

    Raises:
        InputError: If the size is no multiple of 256, or the folder holds something else.
    """
    if size < 256 or size % 256:
        raise InputError(f"size is {size}; give a positive multiple of 256 pixels, such as 1024")
    world = _describe(folder, size, seed)
    if _holds(world):
        return world
    if folder.exists() and not (folder / "world.json").is_file() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no demo world; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "world"
        _write(_describe(draft, size, seed))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        draft.rename(folder)
    return world


def _describe(folder: Path, size: int, seed: int) -> World:
    edge = size * PIXEL
    return World(
        folder=folder,
        embeddings=folder / "aef",
        height=folder / "dsm" / "catalog.json",
        prior=folder / "prior" / "prior_30m.tif",
        crs=CRS,
        bounds=(WEST, NORTH - edge, WEST + edge, NORTH),
        size=size,
        seed=seed,
    )


def _parameters(world: World) -> dict[str, object]:
    return {"generator": GENERATOR, "size": world.size, "seed": world.seed}


def _holds(world: World) -> bool:
    """Whether the folder holds exactly this world with every file it was written with."""
    try:
        found = json.loads((world.folder / "world.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    files = found.pop("files", None)
    return found == _parameters(world) and all((world.folder / f).is_file() for f in files or [""])


def _write(world: World) -> None:
    """Draw the world and write its files; world.json comes last and says that it is whole."""
    land = make_landscape(world.size, world.seed)
    codes = embed(land, world.seed)
    surface = land.surface
    corner = (WEST, NORTH)
    world_files.write_tiles(world.embeddings, codes, corner, world.crs, year=2021)
    del codes
    world_files.write_dsm(world.height.parent, _voids(surface, world.seed), corner, world.crs)
    truth = _blur(_halve(surface), 1)
    world_files.write_prior(world.prior, truth, corner, world.crs, _rng(world.seed, "prior"))
    files = sorted(p.relative_to(world.folder).as_posix() for p in world.folder.rglob("*.*"))
    note = _parameters(world) | {"files": [f for f in files if (world.folder / f).is_file()]}
    (world.folder / "world.json").write_text(json.dumps(note, indent=1))


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
    river = off_river < 0.004 + 0.0025 * _noise(n, seed, "banks", 0.1, 3.0)
    from_lake = _from_lake(n, seed)
    lake = from_lake < 1
    shore = _smoothstep((from_lake - 1) / 1.5)
    terrain = terrain * shore + np.median(terrain[lake]) * (1 - shore)
    water = river | lake
    buildings = _buildings(terrain, off_river, water, seed)
    canopy = _canopy(terrain, water | (_blur(buildings, 4) > 0), seed)
    return Landscape(
        terrain=terrain, canopy=canopy, buildings=buildings, river=river & ~lake, lake=lake
    )


def _terrain(n: int, seed: int) -> tuple[Field, Field]:
    """Bare ground (metres), and the distance from the river as a share of the edge."""
    y, x = _axes(n)
    phase = _rng(seed, "river").uniform(0, 2 * np.pi, 3)
    east = _smoothstep((x - 0.38) / 0.24)
    course = 0.5 + 0.08 * np.sin(4.4 * x + phase[0]) + 0.03 * np.sin(15 * x + phase[1])
    course = course + (1 - 0.7 * east) * 0.012 * np.sin(55 * x + phase[2])
    off_river = np.abs(y - course).astype(np.float32)
    plain = 0.10 - 0.06 * east + 0.02 * _noise(n, seed, "plain", 0.3, 3.0)
    hills = _smoothstep((off_river - plain) / 0.17)
    # Noise crosses zero along connected lines: its absolute value has valleys there.
    valleys = sum(
        share * np.abs(_noise(n, seed, f"valley{k}", length, 5.0))
        for k, (length, share) in enumerate([(0.5, 0.50), (0.25, 0.32), (0.12, 0.18)])
    )
    relief = hills * ((50 + 25 * east) * (0.3 + valleys) + 18 * east)
    detail = (1.0 + 0.05 * relief) * _noise(n, seed, "detail", 0.08, 3.6)
    swell = 2.0 * _noise(n, seed, "swell", 0.15, 3.0)
    bed = -2.0 * np.exp(-((off_river / 0.008) ** 2))
    ground = 48 + 25 * x + 70 * (off_river - 0.05).clip(0) + relief + swell + detail + bed
    return ground.astype(np.float32), off_river


def _from_lake(n: int, seed: int) -> Field:
    """Distance from the middle of the one lake, in the west; its shore is at 1."""
    y, x = _axes(n)
    radius = 0.035 * (1 + 0.2 * _noise(n, seed, "lake", 0.15, 4.5).clip(-2, 2))
    return np.hypot(x - 0.23, y - 0.2) / radius


def _buildings(terrain: Field, off_river: Field, water: Mask, seed: int) -> Field:
    """Settlements on flat dry ground near the river: houses on plots along a grid of streets."""
    n = len(terrain)
    rng = _rng(seed, "settlements")
    heights = np.zeros((n, n), np.float32)
    slope = _slope(_blur(terrain, 4), PIXEL / 2)
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
    plot = rng.uniform(5, 7)  # pixels of 5 m, one third of it street and yard
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
    _, x = _axes(n)
    slope = _slope(_blur(terrain, 6), PIXEL / 2)
    wish = _noise(n, seed, "forest", 0.15, 3.4) + 2.5 * slope.clip(0, 0.4)
    wooded = (wish > 1.05 - 0.75 * _smoothstep((x - 0.38) / 0.24)) & ~taken
    stand = 16 + 4.5 * _noise(n, seed, "stand", 0.06, 2.8)
    crowns = 2.0 * _noise(n, seed, "crowns", 6 / n, 1.0)
    return np.where(wooded, (stand + crowns).clip(8, 25), 0).astype(np.float32)


def embed(land: Landscape, seed: int) -> NDArray[np.int8]:
    """Describe the landscape by AlphaEarth codes, (64, size, size), -128 where there are none.

    Args:
        land: The truth.
        seed: What the noise is drawn from; how traits turn into bands never changes.
    """
    traits = _traits(land, seed)
    count, size = traits.shape[:2]
    turn = np.linalg.qr(np.random.default_rng(64).normal(size=(BANDS, count)))[0]
    rng = _rng(seed, "bands")
    codes = np.empty((BANDS, size, size), np.int8)
    for row in range(0, size, STRIP):
        part = traits[:, row : row + STRIP]
        vectors = np.tensordot(turn.astype(np.float32), part, 1)
        vectors += 0.04 * rng.standard_normal(vectors.shape, np.float32)
        vectors /= np.linalg.norm(vectors, axis=0)
        codes[:, row : row + STRIP] = encode(vectors)
    codes[:, _gaps(land, seed)] = NODATA
    return codes


def _traits(land: Landscape, seed: int) -> Field:
    """What the embeddings know of each 10 m pixel, (traits, size, size), each about -1 to 1."""
    size = len(land.terrain) // 2
    rng = _rng(seed, "traits")

    def white() -> Field:
        return rng.standard_normal((size, size), np.float32)

    ground = _halve(land.terrain)
    forest, town, water = (
        _halve((f > 0).astype(np.float32))
        for f in (land.canopy, land.buildings, land.river)
    )
    # One error of height for all bands that tell it: no pixel alone can see through it.
    haze = HAZE * white() + DRIFT * _noise(size, seed, "drift", 0.05, 2.5)
    told = ground + haze
    cover = 1 - 0.5 * forest + 0.3 * town
    level = [0.9 * cover * np.tanh((told - middle) / width) for middle, width in LEVELS]
    gy, gx = np.gradient(_blur(ground, 1), PIXEL)
    steep = np.hypot(gx, gy)
    rise = (ground - _blur(ground, max(4, size // 50))) / 15
    lie = [f + 0.5 * white() for f in (2 * gx, 2 * gy, 2 * steep, rise)]
    canopy = _halve(land.canopy) / 16
    roofs = _halve(land.buildings) / 10
    grain = [canopy * white(), canopy * white(), roofs * white()]
    kind = [f + 0.25 * white() for f in (forest, _blur(town, 1), water, 1 - forest)]
    fields = [f * (1 - forest) for f in _parcels(size, seed)]
    mood = [0.4 * _noise(size, seed, f"mood{k}", 0.2, 3.0) for k in range(5)]
    constant = np.full((size, size), 0.8, np.float32)
    groups = [level, [0.6 * f for f in lie], [0.5 * f for f in grain], kind, fields, mood]
    return np.stack([*(f for group in groups for f in group), constant]).astype(np.float32)


def _parcels(size: int, seed: int) -> list[Field]:
    """Crops: 6 traits, each constant over a field of some 100 m by 200 m; nothing about height."""
    rng = _rng(seed, "parcels")
    y, x = np.ogrid[:size, :size]
    warp = 6 * _noise(size, seed, "hedges", 30 / size, 4.0)
    i, j = (x + 0.4 * y + warp) // 20, (y - 0.4 * x + warp) // 11
    crop = rng.integers(0, 7, (97, 89))[i.astype(int) % 97, j.astype(int) % 89]
    looks = rng.normal(0, 0.3, (6, 7)).astype(np.float32)
    return list(looks[:, crop])


def _gaps(land: Landscape, seed: int) -> Mask:
    """Where no embedding is: the lake, and a ragged north-east corner."""
    size = len(land.lake) // 2
    y, x = _axes(size)
    ragged = (1 - x) + y < 0.12 + 0.02 * _noise(size, seed, "ragged", 0.05, 2.2)
    return ragged | (_halve(land.lake.astype(np.float32)) > 0.5)


def _voids(surface: Field, seed: int) -> Field:
    """The DSM as it was flown: NaN in a ragged cloud and in a strip that the flight missed."""
    n = len(surface)
    y, x = _axes(n)
    cloud = np.hypot(x - 0.72, y - 0.74) < 0.03 * (1 + 0.4 * _noise(n, seed, "cloud", 0.05, 2.6))
    strip = (x > 0.10) & (x < 0.14) & (y > 0.83) & (y < 0.835)
    return np.where(cloud | strip, np.float32(np.nan), surface)


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose: to change one field leaves the others as they are."""
    return np.random.default_rng([seed, *purpose.encode()])


def _noise(n: int, seed: int, purpose: str, longest: float, steepness: float) -> Field:
    """Fractal noise (n, n) of mean 0 and SD 1 by spectral synthesis.

    Power falls with frequency to the power `steepness` (2 is rough, 4 is smooth) below the
    wavelength `longest` (share of the edge) and is flat above it.
    """
    m = n + n // 4  # the spectrum repeats itself at m: cut, so that east does not meet west
    half = m // 2 + 1
    frequency = np.hypot(np.fft.fftfreq(m)[:, None], np.fft.rfftfreq(m)[None, :])
    amplitude = (1 + (frequency * n * longest) ** 2) ** (-steepness / 4)
    rng = _rng(seed, purpose)
    waves = rng.standard_normal((m, half)) + 1j * rng.standard_normal((m, half))
    field = np.fft.irfft2(waves * amplitude, (m, m))[:n, :n]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _axes(n: int) -> tuple[Field, Field]:
    """Pixel centres from the north-west as shares of the edge: (n, 1) and (1, n)."""
    centres = ((np.arange(n) + 0.5) / n).astype(np.float32)
    return centres[:, None], centres[None, :]


def _smoothstep(t: Field) -> Field:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _slope(heights: Field, pixel: float) -> Field:
    """Rise over run."""
    dy, dx = np.gradient(heights, pixel)
    return np.hypot(dx, dy)


def _halve(field: Field) -> Field:
    """Means of 2 by 2 pixels."""
    n = len(field) // 2
    return field.reshape(n, 2, n, 2).mean((1, 3), dtype=np.float32)


def _blur(field: Field, radius: int) -> Field:
    """Mean over a square of 2 * radius + 1 pixels; the rim is repeated outwards."""
    width = 2 * radius + 1
    for axis in (0, 1):
        pad = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        total = np.cumsum(np.pad(field, pad, mode="edge"), axis=axis, dtype=np.float64)
        n = field.shape[axis]
        upper, lower = np.arange(width, width + n), np.arange(n)
        field = ((total.take(upper, axis) - total.take(lower, axis)) / width).astype(np.float32)
    return field
