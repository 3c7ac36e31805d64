"""The demo world: a made-up landscape and the embeddings that describe it in part.

A river leaves hills in the east and crosses a plain in the west; forest patches, fields and
settlements lie on it. The west serves for training and the east for testing: the east is higher,
hillier and more wooded, which is the difficulty that arXiv 2602.17250 met in its own split.

The embeddings carry the height in part. One pixel knows its height through a bent code with much
noise, most of which a neighbourhood averages away; canopy height shows only in the local texture;
slope and relief must be integrated. So a per-pixel ridge beats the mean, and a convolution beats
the ridge. `pipelines.world_files` writes it all in the formats that real data has, and
`pipelines.world_zones` cuts it where two UTM zones meet.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.embeddings import BANDS, NODATA, encode
from aeheight.errors import InputError
from pipelines import world_files, world_zones
from pipelines.world_land import (
    Field,
    Landscape,
    Mask,
    axes,
    blur,
    halve,
    make_landscape,
    noise,
    stream,
)

GENERATOR = 1
"""Version of the landscape: a folder made by another one is made anew."""

CRS = "EPSG:32631"
WEST = 431_230.0
NORTH = 5_098_770.0
"""The north-west corner of the world, metres: on the 10 m lattice, on no rounder number. A world of
two zones lies further east."""

PIXEL = 10.0
"""Edge of an embedding pixel, metres; the landscape itself is built at half of it."""

STRIP = 64
"""Rows of embeddings that are made at once: bounds the memory."""

LEVELS = [(60, 80), (120, 100), (180, 120), (240, 140), (180, 200)]
"""Middle and width (metres) of the bands that tell the height, each a bent code."""

GRAIN, HAZE, DRIFT = 6, 15, 7
"""SD of what hides the height, metres: noise that is white, that a neighbourhood of some pixels
averages away, and that none does."""


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
    """The UTM zone of the DSM and of the (first) tiles, as EPSG:code."""
    bounds: tuple[float, float, float, float]
    """west, south, east, north, metres."""
    size: int
    """Edge in pixels of 10 m."""
    seed: int
    """What the landscape was drawn from."""
    zones: int
    """1, or 2: then its eastern half has tiles of the next UTM zone."""


def make_world(folder: Path, size: int = 1024, seed: int = 0, zones: int = 1) -> World:
    """Write a world into a folder, or do nothing where the same world already lies there.

    It appears whole or not at all: it is made in a hidden folder beside `folder` and renamed.

    Args:
        folder: What to create. A world of other parameters in it is replaced.
        size: Edge in pixels of 10 m, a multiple of 256.
        seed: The same seed gives the same pixels.
        zones: 2 lays the same landscape across the meridian where two UTM zones meet.

    Returns:
        The paths and the place of the world.

    Raises:
        InputError: If the size is no multiple of 256, the seed is negative, the zones are neither
            1 nor 2, or the folder holds something else.
    """
    if size < 256 or size % 256:
        raise InputError(f"size is {size}; give a positive multiple of 256 pixels, such as 1024")
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")
    if zones not in (1, 2):
        raise InputError(f"zones is {zones}; give 1 or 2")
    folder = folder.absolute()
    world = _describe(folder, size, seed, zones)
    note = _note(folder)
    if note and _is_whole(world, note):
        return world
    if not note and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no demo world; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / "world"
        _write(_describe(draft, size, seed, zones))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        draft.rename(folder)
    return world


def _describe(folder: Path, size: int, seed: int, zones: int) -> World:
    edge = size * PIXEL
    west = WEST if zones == 1 else world_zones.west_of_meeting(CRS, NORTH, edge)
    return World(
        folder=folder,
        embeddings=folder / "aef",
        height=folder / "dsm" / "catalog.json",
        prior=folder / "prior" / "prior_30m.tif",
        crs=CRS,
        bounds=(west, NORTH - edge, west + edge, NORTH),
        size=size,
        seed=seed,
        zones=zones,
    )


def _parameters(world: World) -> dict[str, object]:
    return {
        "generator": GENERATOR,
        "size": world.size,
        "seed": world.seed,
        "zones": world.zones,
    }


def _note(folder: Path) -> dict[str, Any] | None:
    """The note that a world leaves when it is whole; None where the folder is no world."""
    try:
        note = json.loads((folder / "world.json").read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"generator", "files"} <= set(note) else None


def _is_whole(world: World, note: dict[str, Any]) -> bool:
    files = [world.folder / name for name in note["files"]]
    return note == _parameters(world) | {"files": note["files"]} and all(f.is_file() for f in files)


def _write(world: World) -> None:
    """Draw the world and write its files; world.json comes last and says that it is whole."""
    land = make_landscape(world.size, world.seed)
    codes = embed(land, world.seed)
    corner = (world.bounds[0], world.bounds[3])
    whole = world_zones.Part(world.crs, corner, codes)
    del codes
    for part in [whole] if world.zones == 1 else world_zones.cut(whole):
        world_files.write_tiles(world.embeddings, part.codes, part.corner, part.crs, year=2021)
    world_files.write_dsm(world.height.parent, _voids(land.surface, world.seed), corner, world.crs)
    rng = stream(world.seed, "prior")
    world_files.write_prior(world.prior, _seen_by_radar(land), corner, world.crs, rng)
    paths = [path for path in world.folder.rglob("*") if path.is_file()]
    files = sorted(path.relative_to(world.folder).as_posix() for path in paths)
    note = _parameters(world) | {"files": files}
    (world.folder / "world.json").write_text(json.dumps(note, indent=1))


def embed(land: Landscape, seed: int) -> NDArray[np.int8]:
    """Describe the landscape by AlphaEarth codes, (64, size, size), -128 where there are none.

    Args:
        land: The truth.
        seed: What the noise is drawn from; how traits turn into bands never changes.
    """
    traits = _traits(land, seed)
    count, size = traits.shape[:2]
    turn, _ = np.linalg.qr(np.random.default_rng(64).normal(size=(BANDS, count)))
    rng = stream(seed, "bands")
    codes = np.empty((BANDS, size, size), np.int8)
    for row in range(0, size, STRIP):
        part = traits[:, row : row + STRIP]
        vectors: Field = np.tensordot(turn.astype(np.float32), part, 1)
        vectors += 0.04 * rng.standard_normal(vectors.shape, np.float32)
        vectors /= np.linalg.norm(vectors, axis=0)
        codes[:, row : row + STRIP] = encode(vectors)
    codes[:, _gaps(land, seed)] = NODATA
    return codes


def _traits(land: Landscape, seed: int) -> Field:
    """What the embeddings know of each 10 m pixel, (traits, size, size), each about -1 to 1."""
    size = len(land.terrain) // 2
    rng = stream(seed, "traits")

    def white() -> Field:
        return rng.standard_normal((size, size), np.float32)

    ground = halve(land.terrain)
    forest = halve((land.canopy > 0).astype(np.float32))
    town = halve((land.buildings > 0).astype(np.float32))
    water = halve(land.river.astype(np.float32))
    # One error of height for all bands that tell it: no pixel alone can see through it.
    haze = HAZE * noise(size, seed, "haze", 8 / size, 3.0)
    drift = DRIFT * noise(size, seed, "drift", 0.05, 2.5)
    told = ground + GRAIN * white() + haze + drift
    cover = 1 - 0.5 * forest + 0.3 * town
    level = [0.9 * cover * np.tanh((told - middle) / width) for middle, width in LEVELS]
    dy, dx = np.gradient(blur(ground, 1), PIXEL)
    rise = (ground - blur(ground, max(4, size // 50))) / 15
    relief = [0.6 * f + 0.3 * white() for f in (2 * dx, 2 * dy, 2 * np.hypot(dx, dy), rise)]
    canopy, roofs = halve(land.canopy) / 16, halve(land.buildings) / 10
    grain = [0.5 * height * white() for height in (canopy, canopy, roofs)]
    kind = [f + 0.25 * white() for f in (forest, blur(town, 1), water, 1 - forest)]
    crops = [f * (1 - forest) for f in _parcels(size, seed)]
    seasons = [0.4 * noise(size, seed, f"season{k}", 0.2, 3.0) for k in range(5)]
    constant = np.full((size, size), 0.8, np.float32)
    traits = [*level, *relief, *grain, *kind, *crops, *seasons, constant]
    return np.asarray(traits, np.float32)


def _parcels(size: int, seed: int) -> list[Field]:
    """Crops: 6 traits, each constant over a field of some 100 m by 200 m; nothing about height."""
    rng = stream(seed, "parcels")
    y, x = np.ogrid[:size, :size]
    warp = 6 * noise(size, seed, "hedges", 30 / size, 4.0)
    i, j = (x + 0.4 * y + warp) // 20, (y - 0.4 * x + warp) // 11
    crop = rng.integers(0, 7, (97, 89))[i.astype(int) % 97, j.astype(int) % 89]
    looks = rng.normal(0, 0.3, (6, 7)).astype(np.float32)
    return list(looks[:, crop])


def _gaps(land: Landscape, seed: int) -> Mask:
    """Where no embedding is: the lake, and a ragged north-east corner."""
    size = len(land.lake) // 2
    y, x = axes(size)
    ragged = (1 - x) + y < 0.12 + 0.02 * noise(size, seed, "ragged", 0.05, 2.2)
    return ragged | (halve(land.lake.astype(np.float32)) > 0.5)


def _seen_by_radar(land: Landscape) -> Field:
    """The surface on 10 m pixels as a coarse radar DEM has it: blurred, and below the tree tops."""
    sunk = land.terrain + 0.6 * land.canopy + land.buildings
    return blur(halve(sunk), 2)


def _voids(surface: Field, seed: int) -> Field:
    """The DSM as it was flown: NaN in a ragged cloud and in a strip that the flight missed."""
    n = len(surface)
    y, x = axes(n)
    cloud = np.hypot(x - 0.72, y - 0.74) < 0.03 * (1 + 0.4 * noise(n, seed, "cloud", 0.05, 2.6))
    strip = (x > 0.10) & (x < 0.14) & (y > 0.83) & (y < 0.835)
    return np.where(cloud | strip, np.float32(np.nan), surface)
