"""The global mosaic of AlphaEarth: one Zarr array in degrees, read on its own lattice.

`embeddings(time, band, y, x)` holds int8 codes in EPSG:4326 at 8.983e-5 degrees, resampled (the
nearest pixel) from the UTM tiles: a pixel is 10 m high and 10 m times the cosine of its latitude
wide. That geometry, not the tiles', is what a cube of it has and records. Codes are copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from aeheight.embeddings import BAND_NAMES, BANDS, NODATA
from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, parse_crs
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.sources.tile import EmbeddingTile, TileFile
from aeheight.store import Store, plain_errors
from aeheight.windows import Region

_ARRAY = "embeddings"
_DIMENSIONS = ("time", "band", "y", "x")
_OFF = 0.25
"""Pixels: what coordinates and transform may differ by; centres taken for corners are 0.5 off."""
_UNITS = {
    "day": "D", "hour": "h", "minute": "m", "second": "s",
    "millisecond": "ms", "microsecond": "us", "nanosecond": "ns",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Mosaic:
    """An open mosaic."""

    array: Any
    """(years, 64, rows, columns) int8, as stored."""
    years: tuple[int, ...]
    """The year of each step in time."""
    grid: Grid
    """Its pixels, north-up, whichever way up they are stored."""
    ascending: bool
    """Whether its first row is the southernmost."""

    @property
    def block(self) -> int:
        """Edge of a chunk, the least that is decoded; 1 where they are not square."""
        height, width = self.array.chunks[-2:]
        return int(height) if height == width else 1


def scan_mosaic(settings: RegionSettings) -> list[EmbeddingTile]:
    """The mosaic as one tile a year, from its metadata and the ends of its coordinates.

    Raises:
        InputError: no Zarr group, no `embeddings` array of that type and shape, a year that it
            lacks, no CRS, coordinates that are uneven or disagree with its transform.
        OSError: it cannot be reached.
    """
    wanted = settings.embeddings
    if not isinstance(wanted.href, str):
        raise InputError(f"embeddings.href: a mosaic is one Zarr, not a list ({wanted.href})")
    href = settings.resolve(wanted.href).rstrip("/")
    mosaic = _opened(href, wanted.access)
    if missing := sorted(set(wanted.years) - set(mosaic.years)):
        raise InputError(f"embeddings.year: {href} has no {missing}; it has {list(mosaic.years)}")
    return [
        EmbeddingTile((TileFile(href),), mosaic.grid, year, kind="zarr", block=mosaic.block)
        for year in wanted.years
    ]


def read_mosaic(
    href: str, grid: Grid, part: Region, year: int, access: AccessSettings
) -> NDArray[np.int8]:
    """Codes of a part of the mosaic: (64, rows, columns), north-up, -128 where there are none.

    Args:
        href: as in the plan's tile.
        grid: the mosaic's pixels as the plan saw them.
        part: rows and columns from the mosaic's north-western corner, inside it.
        year: one that it has.
        access: how its store lets readers in.

    Raises:
        OSError: it cannot be reached, breaks off, is damaged, or is not what the plan saw.
    """
    mosaic = _opened(href, access)
    if mosaic.grid != grid or year not in mosaic.years:
        raise OSError(
            f"{href} is not what the plan saw: it covers {list(mosaic.grid.bounds)} in "
            f"{list(mosaic.years)} instead of {list(grid.bounds)} in {year}; plan again"
        )
    row = grid.shape[0] - part.bottom if mosaic.ascending else part.row
    rows, cols = slice(row, row + part.height), slice(part.col, part.col + part.width)
    with _breaks_off(href):
        codes = np.asarray(mosaic.array[mosaic.years.index(year), :, rows, cols])
    _declare_missing(codes, mosaic.array.fill_value)
    if mosaic.ascending:
        for band in codes:
            band[...] = band[::-1].copy()
    return codes


def _declare_missing(codes: NDArray[np.int8], fill: Any) -> None:
    """Give ground that was never written the code of nodata, where the store fills in another."""
    if int(fill) != NODATA:
        missing = np.ones(codes.shape[1:], dtype=bool)
        for band in codes:
            missing &= band == fill
        codes[:, missing] = NODATA


@contextmanager
def _breaks_off(href: str) -> Iterator[None]:
    """A shard that cannot be read or decoded may pass on a rerun."""
    try:
        with plain_errors(f"read {href}"):
            yield
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise OSError(f"{href} breaks off while it is read: {error}") from error


def _opened(href: str, access: AccessSettings) -> _Mosaic:
    """A worker opens a mosaic once, not once a shard: its metadata are several requests."""
    group = _group(href, access)
    array = group.get(_ARRAY)
    if not isinstance(array, zarr.Array):
        names = ", ".join(sorted(name for name, _ in group.arrays())) or "no arrays"
        raise InputError(f"{href} is no AlphaEarth mosaic: it has no {_ARRAY}, but {names}")
    if problem := _array_problem(array) or _band_problem(group):
        raise InputError(f"{href} is no AlphaEarth mosaic: {problem}")
    with _breaks_off(href):
        years = _years(group, href)
        grid, ascending = _grid(group, array, href)
    return _Mosaic(array, years, grid, ascending)


def _group(href: str, access: AccessSettings) -> zarr.Group:
    store = Store.at(href, access)
    try:
        if store.is_local and not Path(store.uri).is_dir():
            raise FileNotFoundError(store.uri)
        with plain_errors(f"read {href}"):
            return zarr.open_group(store.zarr(read_only=True), mode="r")
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"embeddings.href: {href} is no Zarr group, or is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"embeddings.href: {href} is no Zarr group: {error}") from error


def _array_problem(array: Any) -> str | None:
    dimensions = tuple(getattr(array.metadata, "dimension_names", None) or ())
    if dimensions != _DIMENSIONS:
        return f"{_ARRAY} has the dimensions {dimensions} instead of {_DIMENSIONS}"
    if array.dtype != np.int8:
        return f"{_ARRAY} holds {array.dtype} instead of int8"
    if array.shape[1] != BANDS:
        return f"{_ARRAY} has {array.shape[1]} bands instead of {BANDS}"
    return None


def _band_problem(group: zarr.Group) -> str | None:
    """Whether bands that have names have them in another order."""
    bands = group.get("band")
    if not isinstance(bands, zarr.Array) or np.issubdtype(bands.dtype, np.number):
        return None
    names = [str(name) for name in np.asarray(bands[:])]
    return None if names == list(BAND_NAMES) else f"its bands are {names[:4]} ..., not A00 to A63"


def _years(group: zarr.Group, href: str) -> tuple[int, ...]:
    """The year of each step: from datetimes, CF units, or plain numbers."""
    time = group.get("time")
    if not isinstance(time, zarr.Array):
        raise InputError(f"{href} is no AlphaEarth mosaic: it has no coordinate time")
    values, units = np.asarray(time[:]), str(time.attrs.get("units", ""))
    unit, _, start = units.partition(" since ")
    step = _UNITS.get(unit.strip().lower().rstrip("s"))
    if values.dtype.kind in "iuf" and start and step:
        origin = np.datetime64(start.strip().replace(" ", "T").removesuffix("Z")[:19])
        values = origin + values.astype(np.int64) * np.timedelta64(1, step)  # type: ignore[call-overload]
    if values.dtype.kind == "M":
        return tuple(int(year) for year in values.astype("datetime64[Y]").astype(int) + 1970)
    if values.dtype.kind in "iuf" and not start and ((values > 1900) & (values < 2200)).all():
        return tuple(int(year) for year in values)
    raise InputError(
        f"{href}: its time {values[:3]} ... ({units or 'no units'}) names no years; it must be "
        "datetimes, CF times (days since ...) or years"
    )


def _grid(group: zarr.Group, array: Any, href: str) -> tuple[Grid, bool]:
    """The pixels of a mosaic, and whether they are stored from the south."""
    crs, shape = _crs(group, array, href), array.shape[-2:]
    found = [_from_transform(group, array), _from_coordinates(group, shape, href)]
    corners = [one for one in found if one]
    if not corners:
        raise InputError(f"{href} has neither coordinates x and y nor a spatial:transform")
    left, start, step, rise = corners[0]
    for other in corners[1:]:
        ends = [(left, other[0]), (start, other[1])]
        ends.append((left + step * shape[1], other[0] + other[2] * shape[1]))
        ends.append((start + rise * shape[0], other[1] + other[3] * shape[0]))
        if max(abs(a - b) for a, b in ends) > _OFF * abs(step):
            raise InputError(
                f"{href}: its transform starts at {left}, {start} with pixels of {step}, {rise}, "
                f"its coordinates (taken as pixel centres) at {other[0]}, {other[1]} with "
                f"{other[2]}, {other[3]}; one of them is wrong"
            )
    if step <= 0 or abs(abs(rise) / step - 1) > 1e-6:
        raise InputError(f"{href}: its pixels are {step} x {abs(rise)}, not square")
    top = max(start, start + rise * shape[0])
    return Grid(crs, float(step), float(left), float(top), (int(shape[0]), int(shape[1]))), rise > 0


_Corner = tuple[float, float, float, float]
"""x and y of the outer corner of the first stored pixel, and the steps along a row and a column."""


def _mapping(group: zarr.Group, array: Any) -> dict[str, Any]:
    """The attributes of the CF grid mapping of an array, where it has one."""
    name = array.attrs.get("grid_mapping")
    found = group.get(name) if isinstance(name, str) else None
    return dict(found.attrs) if found is not None else {}


def _crs(group: zarr.Group, array: Any, href: str) -> str:
    """The one CRS that is declared: by GeoZarr's `proj:` attributes, or by CF's grid mapping."""
    places = (dict(array.attrs), dict(group.attrs), _mapping(group, array))
    keys = ("proj:code", "proj:wkt2", "crs_wkt", "spatial_ref")
    declared = [place[key] for place in places for key in keys if place.get(key)]
    names = {crs_name(parse_crs(str(text))) for text in declared}
    if len(names) != 1:
        raise InputError(
            f"{href} declares {'no CRS' if not names else 'the CRSs ' + ', '.join(sorted(names))}; "
            "it must have one, as proj:code or as crs_wkt of its grid_mapping"
        )
    return names.pop()


def _from_transform(group: zarr.Group, array: Any) -> _Corner | None:
    for place in (array.attrs, group.attrs):
        transform: Any = place.get("spatial:transform")
        if transform:
            step, _, left, _, rise, start = transform[:6]
            return left, start, step, rise
    if text := _mapping(group, array).get("GeoTransform"):
        left, step, _, start, _, rise = (float(number) for number in str(text).split())
        return left, start, step, rise
    return None


def _from_coordinates(group: zarr.Group, shape: tuple[int, ...], href: str) -> _Corner | None:
    """From the ends of `x` and `y`, pixel centres; a few of their millions of values are read."""
    starts, steps = [], []
    for name, size in (("x", shape[1]), ("y", shape[0])):
        centres = group.get(name)
        if not isinstance(centres, zarr.Array):
            return None
        if centres.shape != (size,) or size < 2:
            raise InputError(f"{href}: {name} has the shape {centres.shape}, the pixels {size}")
        first, middle, last = (float(np.asarray(centres[i])) for i in (0, size // 2, size - 1))
        step = (last - first) / (size - 1)
        if not abs(first + step * (size // 2) - middle) < _OFF * abs(step):
            raise InputError(
                f"{href}: its {name} is uneven: {first} to {last} in {size} steps, but {middle} "
                f"at {size // 2}"
            )
        starts.append(first - step / 2)
        steps.append(step)
    return starts[0], starts[1], steps[0], steps[1]
