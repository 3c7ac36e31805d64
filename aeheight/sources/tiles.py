"""AlphaEarth tiles: what their headers promise, and their codes on any region of a grid.

Tiles come bottom-up (positive dy in the transform) from Google and north-up from exports; both are
read by integer pixel windows and flipped where needed, so that codes are copied, never resampled.
Past the edge of a UTM zone, where a zone's own tiles end, the nearest pixel of the neighbouring
zone stands in: its code is copied too, from up to half a pixel away.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Interleaving
from rasterio.windows import Window

from aeheight.embeddings import BANDS, NODATA, encode, parse_tile_name
from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, transformer
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.sources.files import find_files, geometry_problem, opened, read_raster
from aeheight.sources.mosaic import read_mosaic
from aeheight.sources.tile import EmbeddingSource, EmbeddingTile, TileFile
from aeheight.windows import Region

_FLOATS = ("float32", "float64")
_BANDS_AT_ONCE = 8
"""Of a file that stores band by band: few are held, and rasterio is not asked 64 times."""
_HEADERS = 16
"""Headers that are read at a time."""
_CONNECTIONS = 8
"""Reads at a time of a remote file: with 50 ms to the store 5 times as fast as one."""
_STRIP = 512
"""Rows whose coordinates in another zone are held at once; blocks at their rim are read twice."""


def scan_tiles(settings: RegionSettings) -> list[EmbeddingTile]:
    """The tiles of the wanted years, in order of their hrefs, from headers alone.

    Raises:
        InputError: see `sources.scan`.
    """
    wanted = settings.embeddings
    hrefs = find_files(settings, wanted.href, "embeddings", wanted.access)
    named = {href: parse_tile_name(Path(href).as_posix()).year for href in hrefs}
    have = {year for known in named.values() for year in ([known] if known else wanted.years)}
    if missing := sorted(set(wanted.years) - have):
        raise InputError(
            f"embeddings.year: no tile of {missing} among {wanted.href!r}; there are {sorted(have)}"
        )
    chosen = [href for href in hrefs if named[href] is None or named[href] in wanted.years]
    if len(wanted.years) > 1 and (nameless := [href for href in chosen if named[href] is None]):
        raise InputError(
            f"{nameless[0]}: its path names no year, and the settings ask for "
            f"{list(wanted.years)}; lay the tiles in folders YEAR/ZONE/, or read one year"
        )
    _refuse_other_years(chosen, named, wanted.years)

    def scanned(href: str) -> EmbeddingTile:
        year = named[href] or wanted.years[0]
        return read_raster(href, partial(_described, href, year), wanted.access)

    with ThreadPoolExecutor(_HEADERS) as pool:
        tiles = list(pool.map(scanned, chosen))
    refuse_doubles([tile for tile in tiles if named[tile.href] is None])
    return tiles


_YEAR = re.compile(r"(?<!\d)20[12]\d(?!\d)")


def _refuse_other_years(
    hrefs: Sequence[str], named: Mapping[str, int | None], wanted: tuple[int, ...]
) -> None:
    """A file without a folder YEAR/ZONE counts as the year asked for; its name must not object.

    Raises:
        InputError: the name holds one year, and it is another.
    """
    for href in hrefs:
        years = {int(year) for year in _YEAR.findall(href.rpartition("/")[2])}
        if named[href] is None and len(years) == 1 and not years & set(wanted):
            raise InputError(
                f"{href}: its name says {years.pop()}, embeddings.year asks for {list(wanted)}; "
                "mend the year, or the name"
            )


def refuse_doubles(tiles: Sequence[EmbeddingTile]) -> None:
    """Meet tiles of several years that do not say so.

    Raises:
        InputError: two tiles of one year cover exactly the same ground; names them.
    """
    counts = Counter((tile.grid, tile.year) for tile in tiles)
    for (grid, year), count in counts.items():
        if count > 1:
            same = [t.href for t in tiles if (t.grid, t.year) == (grid, year)]
            raise InputError(
                f"{same[0]} and {same[1]} cover the same ground, and their paths name no year: "
                f"both would count as {year}; name the tiles of one year only, or lay them in "
                "folders YEAR/ZONE/"
            )


def _described(href: str, year: int, dataset: Any) -> EmbeddingTile:
    """A tile by its header."""
    if dataset.count != BANDS:
        raise InputError(f"{href} is no AlphaEarth tile: {dataset.count} bands instead of {BANDS}")
    file = TileFile(href, zero_is_missing=declares_zero(dataset))
    return EmbeddingTile((file,), header_grid(dataset, href), year, block=_block(dataset))


def header_grid(dataset: Any, href: str) -> Grid:
    """The pixels of an open raster of embeddings, north-up.

    Raises:
        InputError: values, nodata or pixels that no tile has; or the file is cut short.
    """
    problem = geometry_problem(dataset) or _value_problem(dataset) or _cut_short(dataset)
    if problem:
        raise InputError(f"{href} is no AlphaEarth tile: {problem}")
    transform = dataset.transform
    top = transform.f + max(transform.e, 0) * dataset.height
    return Grid(crs_name(dataset.crs), transform.a, transform.c, top, dataset.shape)


def declares_zero(dataset: Any) -> bool:
    """Whether 0 is the missing-value of a float export, where it is also the value of a code."""
    return bool(dataset.nodata == 0 and dataset.dtypes[0] in _FLOATS)


def _value_problem(dataset: Any) -> str | None:
    kinds = set(dataset.dtypes)
    if len(kinds) > 1 or not kinds & {"int8", *_FLOATS}:
        return f"values are {', '.join(sorted(kinds))} instead of int8 (or a float export)"
    if kinds == {"int8"} and dataset.nodata not in (None, NODATA):
        return f"nodata is {dataset.nodata:g} instead of {NODATA}"
    transform = dataset.transform
    if abs(abs(transform.e) / transform.a - 1) > 1e-6:
        return f"pixels are {transform.a} x {abs(transform.e)}, not square"
    return None


def _cut_short(dataset: Any) -> str | None:
    """Whether a local TIFF ends before its last block, by the offsets in its header."""
    path = Path(dataset.name)
    if dataset.driver != "GTiff" or not path.is_file():
        return None
    height, width = dataset.block_shapes[0]
    last = f"{(dataset.width - 1) // width}_{(dataset.height - 1) // height}"
    ends = [0]
    for band in dataset.indexes:
        for block in ("0_0", last):
            start = dataset.get_tag_item(f"BLOCK_OFFSET_{block}", "TIFF", bidx=band)
            size = dataset.get_tag_item(f"BLOCK_SIZE_{block}", "TIFF", bidx=band)
            ends.append(int(start or 0) + int(size or 0))
    if max(ends) > path.stat().st_size:
        return (
            f"it is cut short: {path.stat().st_size} bytes, and its header promises at least "
            f"{max(ends)}; copy it again"
        )
    return None


def _block(dataset: Any) -> int:
    height, width = dataset.block_shapes[0]
    # In a bottom-up file blocks are counted from the south.
    from_top = dataset.transform.e < 0 or dataset.height % height == 0
    return int(height) if height == width and from_top else 1


def read_embeddings(
    source: EmbeddingSource, grid: Grid, region: Region, year: int
) -> NDArray[np.int8]:
    """The codes of a region: (64, rows, columns), -128 where no tile has any.

    Where tiles overlap, the first (in the order given) that is valid counts.

    Raises:
        OSError: a file breaks off, or is not what the plan saw.
        InputError: values that are no embedding.
    """
    out = np.full((BANDS, *region.shape), NODATA, dtype=np.int8)
    empty = np.ones(region.shape, dtype=np.bool_)
    for tile in source.tiles:
        place = tile.reaches(grid)
        shared = place and place.intersect(region)
        if tile.year != year or place is None or shared is None:
            continue
        inside = shared.within(region).slices
        if not empty[inside].any():  # a tile that lies under others is not read
            continue
        if tile.grid.crs == grid.crs:
            part = shared.within(place)
            _fill(out[(slice(None), *inside)], empty[inside], tile, part, source.access)
        else:
            _fill_nearest(out, empty, tile, grid, region, source.access)
    return out


def _fill(
    out: NDArray[np.int8],
    empty: NDArray[np.bool_],
    tile: EmbeddingTile,
    part: Region,
    access: AccessSettings,
) -> None:
    """Put a tile's codes where nothing is yet, band by band: no more than one is held besides.

    Args:
        out: (64, rows, columns), changed in place.
        empty: (rows, columns) where nothing is yet; changed in place.
        tile: on the same lattice.
        part: what to read, counted from the tile's north-western corner.
        access: of the tile's files.
    """
    holes, some, fresh = np.zeros_like(empty), np.zeros_like(empty), bool(empty.all())
    zero_is_missing = any(file.zero_is_missing for file in tile.files)
    blank = np.full_like(empty, zero_is_missing)
    for band, place, codes in _pieces(tile, part, access):
        missing = codes == NODATA
        if zero_is_missing:
            blank[place] &= codes == 0
        holes[place] |= missing
        some[place] |= ~missing
        if fresh:
            out[band][place] = codes
        else:
            np.copyto(out[band][place], codes, where=empty[place])
    # A pixel that lacks one band lacks all: a decoded pixel is whole, or is not there.
    holes |= blank
    partly = empty & holes & some
    if partly.any():
        out[:, partly] = NODATA
    empty &= holes


def _fill_nearest(
    out: NDArray[np.int8],
    empty: NDArray[np.bool_],
    tile: EmbeddingTile,
    grid: Grid,
    region: Region,
    access: AccessSettings,
) -> None:
    """Put another zone's pixels that hold the centres of those where nothing is yet."""
    move = transformer(grid.crs, tile.grid.crs)
    for first in range(0, region.height, _STRIP):
        wanted = np.argwhere(empty[first : first + _STRIP])
        wanted[:, 0] += first
        x = grid.left + (region.col + wanted[:, 1] + 0.5) * grid.resolution
        y = grid.top - (region.row + wanted[:, 0] + 0.5) * grid.resolution
        x, y = move.transform(x, y)
        row, col = np.floor(tile.grid.offset(x, y)).astype(np.int64)
        rows, cols = tile.grid.shape
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        if not inside.any():
            continue
        row, col, (down, right) = row[inside], col[inside], wanted[inside].T
        part = Region(int(row.min()), int(col.min()), int(np.ptp(row)) + 1, int(np.ptp(col)) + 1)
        there = np.full((BANDS, *part.shape), NODATA, dtype=np.int8)
        _fill(there, np.ones(part.shape, dtype=np.bool_), tile, part, access)
        row, col = row - part.row, col - part.col
        for band, codes in zip(out, there, strict=True):
            band[down, right] = codes[row, col]
        empty[down, right] = there[0, row, col] == NODATA


_Piece = tuple[int, tuple[slice, slice], NDArray[np.int8]]
"""A band (0 to 63), rows and columns of what is read, and the codes that lie there, north-up."""


def _pieces(tile: EmbeddingTile, part: Region, access: AccessSettings) -> Iterator[_Piece]:
    """The codes of a part of a tile, piece by piece, each once."""
    if tile.kind == "zarr":
        every = slice(0, part.height), slice(0, part.width)
        codes = read_mosaic(tile.href, tile.grid, part, tile.year, access)
        yield from ((band, every, plane) for band, plane in enumerate(codes))
        return
    for file in tile.files:
        yield from _pieces_of(file, tile, part, access)


def _pieces_of(
    file: TileFile, tile: EmbeddingTile, part: Region, access: AccessSettings
) -> Iterator[_Piece]:
    """As they are cheap to read: bands in groups, or block by block where bands lie together."""
    look = partial(_look, file.href, tile.grid)
    bottom_up, share, block, numbers = read_raster(file.href, look, access)
    row = tile.grid.shape[0] - part.bottom if bottom_up else part.row
    whole = Region(row, part.col, *part.shape)
    jobs = [
        (window, numbers[k : k + share])
        for window in (_blocks(whole, block) if block else [whole])
        for k in range(0, len(numbers), share)
    ]
    bands = file.bands or range(BANDS)

    def fetch(job: tuple[Region, Sequence[int]]) -> NDArray[np.int8]:
        return read_raster(file.href, lambda dataset: _codes(dataset, *job), access)

    with ExitStack() as resources:
        if "://" in file.href:
            pool = resources.enter_context(ThreadPoolExecutor(_CONNECTIONS))
            stacks: Iterator[NDArray[np.int8]] = pool.map(fetch, jobs)
        else:
            dataset = resources.enter_context(opened(file.href, access))
            stacks = (_codes(dataset, *job) for job in jobs)
        for (window, group), stack in zip(jobs, stacks, strict=True):
            rows, cols = window.within(whole).slices
            if bottom_up:
                rows = slice(part.height - rows.stop, part.height - rows.start)
            for number, codes in zip(group, stack, strict=True):
                yield bands[number - 1], (rows, cols), codes[::-1] if bottom_up else codes


def _look(
    href: str, planned: Grid, dataset: Any
) -> tuple[bool, int, tuple[int, int] | None, Sequence[int]]:
    """How a file is read: whether it is bottom-up, bands at a time, its blocks, and its bands.

    Blocks are None where the file stores band by band. Where it stores all bands of a pixel
    together, as Earth Engine does, band by band would decode each block 64 times.

    Raises:
        OSError: it does not lie where the plan says.
    """
    found = header_grid(dataset, href)
    if not _same_pixels(found, planned):
        raise OSError(
            f"{href} is not what the plan saw: it covers {list(found.bounds)} "
            f"({found.crs}) instead of {list(planned.bounds)} ({planned.crs}); plan again"
        )
    # A band of floats is as large as eight of codes.
    share = 1 if dataset.dtypes[0] in _FLOATS else _BANDS_AT_ONCE
    if dataset.interleaving == Interleaving.pixel and dataset.count > 1:
        return dataset.transform.e > 0, dataset.count, dataset.block_shapes[0], dataset.indexes
    return dataset.transform.e > 0, share, None, dataset.indexes


def _blocks(region: Region, block: tuple[int, int]) -> Iterator[Region]:
    """The parts of a region in each of a file's blocks."""
    height, width = block
    for row in range(region.row // height * height, region.bottom, height):
        for col in range(region.col // width * width, region.right, width):
            shared = Region(row, col, height, width).intersect(region)
            assert shared is not None
            yield shared


def _codes(dataset: Any, region: Region, numbers: Sequence[int]) -> NDArray[np.int8]:
    """The codes of some bands of a file: (bands, rows, columns), as they lie in it."""
    window = Window(region.col, region.row, region.width, region.height)
    if dataset.dtypes[0] == "int8":
        codes: NDArray[np.int8] = dataset.read(list(numbers), window=window)
        return codes
    # A band at a time: GDAL's cache holds the block, and nothing else is as large as its floats.
    return np.stack([_quantised(dataset.read(n, window=window), dataset) for n in numbers])


def _same_pixels(one: Grid, other: Grid) -> bool:
    """Whether two grids are one, but for the last digits of their corners."""
    offset = np.abs(one.offset(other.left, other.top)).max()
    step = abs(one.resolution / other.resolution - 1)
    return (one.crs, one.shape) == (other.crs, other.shape) and bool(offset < 1e-3 and step < 1e-6)


def _quantised(values: NDArray[Any], dataset: Any) -> NDArray[np.int8]:
    """The codes of a float export: exact, since it holds nothing but decoded codes."""
    declared = dataset.nodata
    if declared and not np.isnan(declared):  # 0 is also a value: see `zero_is_missing`
        values[values == declared] = np.nan
    strange = values[np.abs(values) > 1]
    if strange.size:
        raise InputError(
            f"{dataset.name}: values like {strange[0]:g} lie outside -1 to 1; if that is the "
            "missing-value, declare it in the file (gdal_edit.py -a_nodata); codes must be int8"
        )
    return encode(values)
