"""Earth Engine's exports of AlphaEarth: decoded values in GeoTIFFs, quantised back on reading.

An export holds exactly `sign(q) (|q| / 127.5)^2` for every code `q`, so that its codes come back
bit for bit. It comes as one file with 64 bands, or by bands in several, and a large one is cut into
pieces that lie side by side (`name-0000000000-0000008192.tif`). What was cut to another grid than
the tiles' (EPSG:4326, another UTM zone) was resampled by Earth Engine to the nearest pixel: that
geometry is the one that was read, and a cube records it.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aeheight.embeddings import BAND_NAMES, BANDS, parse_tile_name
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.sources.files import find_files, read_raster
from aeheight.sources.tile import EmbeddingTile, TileFile
from aeheight.sources.tiles import declares_zero, header_grid

_BAND = re.compile(r"(?:^|[_.-])A(\d\d)$")
"""A band at the end of a name: `A07`, `2024_A07`, `download.A07`."""
_PIECE = re.compile(r"-\d{10}-\d{10}$")
"""What Earth Engine adds to the name of a piece: its first row and column."""
_HEADERS = 16
"""Headers that are read at the same time."""


@dataclass(frozen=True, slots=True)
class _Export:
    """One file, as its header and its name describe it."""

    file: TileFile
    grid: Grid
    block: int
    """Edge of its blocks in pixels; 1 where they are not square."""


def scan_exports(settings: RegionSettings) -> list[EmbeddingTile]:
    """Files of one grid and year as one tile each, in order of their first hrefs; headers alone.

    Raises:
        InputError: a file that is no export of AlphaEarth, or whose bands have no names; pixels
            whose 64 bands are not there, or are there twice; a year that no file is of.
    """
    wanted = settings.embeddings
    hrefs = find_files(settings, wanted.href, "embeddings", wanted.access)
    years = _years(hrefs, wanted.years)
    if missing := sorted(set(wanted.years) - set(years.values())):
        raise InputError(
            f"embeddings.year: no export of {missing} among {wanted.href!r}; there are "
            f"{sorted(set(years.values()))}"
        )
    scanned = [href for href, year in years.items() if year in wanted.years]
    tiles: dict[tuple[Grid, int], list[_Export]] = defaultdict(list)
    with ThreadPoolExecutor(_HEADERS) as pool:
        for export in pool.map(lambda href: _scan(href, wanted.access), scanned):
            tiles[export.grid, years[export.file.href]].append(export)
    return [_tile(grid, year, exports) for (grid, year), exports in tiles.items()]


def _years(hrefs: Sequence[str], wanted: tuple[int, ...]) -> Mapping[str, int]:
    """The year of every file: its path's, or the only one that is asked for."""
    years = {}
    for href in hrefs:
        year = parse_tile_name(Path(href).as_posix()).year
        if year is None and len(wanted) > 1:
            raise InputError(
                f"{href}: its path names no year, and the settings ask for {list(wanted)}; lay the "
                "exports in folders YEAR/ZONE/, or read one year"
            )
        years[href] = year or wanted[0]
    return years


def _scan(href: str, access: AccessSettings) -> _Export:
    def header(dataset: Any) -> _Export:
        height, width = dataset.block_shapes[0]
        block = int(height) if height == width else 1
        file = TileFile(href, _bands(dataset, href), declares_zero(dataset))
        return _Export(file, header_grid(dataset, href), block)

    return read_raster(href, header, access)


def _bands(dataset: Any, href: str) -> tuple[int, ...]:
    """The embedding band of each of a file's bands; none where it holds all 64 in their order."""
    names = [name or "" for name in dataset.descriptions]
    stem = _PIECE.sub("", Path(href).stem)
    if not any(names):
        names = list(BAND_NAMES) if dataset.count == BANDS else [stem] * dataset.count
    found = [_BAND.search(name) for name in names]
    bands = tuple(int(match[1]) for match in found if match)
    if len(bands) < dataset.count or max(bands) >= BANDS:
        strange = next(n for n, match in zip(names, found, strict=True) if not _is_band(match))
        raise InputError(
            f"{href}: which of the bands A00 to A63 are its {dataset.count}? They are called "
            f"{strange!r}; export them under their names, or one a file named like export_A07.tif"
        )
    if len(bands) > 1 and len(set(bands)) == 1:
        raise InputError(
            f"{href} holds {dataset.count} bands without names, and its own name says one, "
            f"{BAND_NAMES[bands[0]]}; export the bands under their names"
        )
    return () if bands == tuple(range(BANDS)) else bands


def _is_band(match: re.Match[str] | None) -> bool:
    return match is not None and int(match[1]) < BANDS


def _tile(grid: Grid, year: int, exports: Sequence[_Export]) -> EmbeddingTile:
    holders: dict[int, list[str]] = defaultdict(list)
    for export in exports:
        for band in export.file.bands or range(BANDS):
            holders[band].append(export.file.href)
    where = f"{[round(edge, 6) for edge in grid.bounds]} ({grid.crs}) in {year}"
    if doubled := [band for band, hrefs in holders.items() if len(hrefs) > 1]:
        one, two, *_ = holders[doubled[0]]
        raise InputError(
            f"{one} and {two} both hold {_named(doubled)} of {where}; name one of them only, or, "
            "if they are of several years, lay them in folders YEAR/ZONE/"
        )
    if lacking := [band for band in range(BANDS) if band not in holders]:
        hrefs = [export.file.href for export in exports]
        raise InputError(
            f"no file holds {_named(lacking)} of {where}; there are {', '.join(hrefs[:4])}"
            f"{f' and {len(hrefs) - 4} more' if len(hrefs) > 4 else ''}"
        )
    blocks = {export.block for export in exports}
    block = blocks.pop() if len(blocks) == 1 else 1
    return EmbeddingTile(tuple(export.file for export in exports), grid, year, block=block)


def _named(bands: Sequence[int]) -> str:
    names = [BAND_NAMES[band] for band in sorted(bands)]
    if len(names) > 8:
        names = [*names[:3], "...", names[-1], f"({len(names)} bands)"]
    return "the band" + ("s " if len(bands) > 1 else " ") + ", ".join(names)
