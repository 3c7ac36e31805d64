"""Exports of known values for tests of what reads them: real COGs, items and a collection."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from aeheight.catalogue import COLLECTION, File, Origin, collection, tile_item
from aeheight.export import About, write_cog
from aeheight.grid import Grid, reproject_bounds
from aeheight.settings import ExportSettings

ORIGIN = Origin("made", "dsm", "EPSG:5773", "0" * 64, "Made up.", {"aeheight": "0"})
Values = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Longitudes and latitudes to values."""


def degrees(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitude and latitude of all pixel centres: (rows, columns) each."""
    to_degrees = Transformer.from_crs(grid.crs, 4326, always_xy=True)
    return to_degrees.transform(*np.meshgrid(grid.x(), grid.y()))


def make_export(
    store: Path, grids: Iterable[Grid], layers: Mapping[str, Values], years: Sequence[int] = (2021,)
) -> Path:
    """An export in which each layer of each grid is what a function says; the export's folder.

    A layer is that much higher in each year after the first as the years lie apart.
    """
    folder, items, grids = store / "export", [], tuple(grids)
    about = About("made", "metre", CRS.from_epsg(4326))
    for grid in grids:
        for year in years:
            place = folder / grid.name / str(year)
            place.mkdir(parents=True, exist_ok=True)
            files = {}
            for name, values in layers.items():
                told = (values(*degrees(grid)) + (year - years[0])).astype(np.float32)
                files[name] = _file(place / f"{name}.tif", grid, told, about)
            made = tile_item(f"{grid.name}-{year}", grid, year, files, ORIGIN, "../..")
            (place / "tile.json").write_bytes(made)
            items.append(f"./{grid.name}/{year}/tile.json")
    boxes = [reproject_bounds(grid.bounds, grid.crs, "EPSG:4326") for grid in grids]
    found = collection(ORIGIN, "A note.", boxes, years, items, {})
    (folder / COLLECTION).write_bytes(found)
    return folder


def _file(path: Path, grid: Grid, values: NDArray[np.float32], about: About) -> File:
    about = About(about.description, about.unit, CRS.from_user_input(grid.crs))
    read = lambda region: values[region.slices]  # noqa: E731
    moments = write_cog(path, grid, read, about, ExportSettings(block=128))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    rights = {"attribution": "Surveyed by nobody <b>"} if path.stem == "reference" else {}
    return File(path.name, path.stem, "metre", size, digest, moments.statistics, rights)
