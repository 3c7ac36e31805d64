"""Sparse reference heights (GNSS, ICESat-2, GEDI) from GeoParquet, Parquet or CSV.

A row is a point: its place, `height` and, where known, `sigma` in metres, and the vertical `datum`
of its height. The place is the geometry of GeoParquet (1.0 and 1.1, as WKB or as points), else the
columns `lon` and `lat` in degrees (WGS 84). What cannot be used is dropped, and counted by reason.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from aeheight.errors import InputError
from aeheight.grid import Bounds, transformer
from aeheight.sources.datum import DatumShift, check_datum, plan_shift
from aeheight.store import Store

Floats = NDArray[np.float64]

_NAMES = {
    "lon": ("lon", "longitude"),
    "lat": ("lat", "latitude"),
    "height": ("height",),
    "sigma": ("sigma",),
    "datum": ("datum", "vertical_datum"),
    "surface": ("surface",),
}
"""What a column says -> its names, in any case."""
_SAID = ("height", "sigma", "datum", "surface")
_WORDS = ("datum", "surface")
_HEIGHTS = (-1000.0, 10_000.0)
"""Metres: what lies outside is no height of ground, but a missing-value (-9999, 3.4e38)."""
_POINT, _HAS_SRID = 1, 0x20000000
"""WKB's code of a point, and the flag of PostGIS for one that carries its CRS."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Reference heights in one vertical datum, all arrays (n,)."""

    lon: Floats
    """Degrees east, WGS 84; -180 to below 180."""
    lat: Floats
    """Degrees north."""
    height: Floats
    """Metres, in the datum that was asked for."""
    sigma: Floats
    """Standard deviation, metres; where a row lacks it the median of the others; 0 without any."""
    digest: str
    """BLAKE2b-128 of the file."""
    rows: int
    """In the file."""
    dropped: Mapping[str, int]
    """Rows that are not here, by reason."""
    datums: Mapping[str, int]
    """Points that are here, by the datum that their rows name."""
    shifts: tuple[DatumShift, ...]
    """How those of other datums were converted."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of a file on the wanted ground."""

    lon: Floats
    lat: Floats
    columns: Mapping[str, Any]
    """Arrow arrays by what they say: height; sigma, datum, surface where there are such columns."""
    rows: int
    dropped: Counter[str]


def read_points(
    href: str, boxes: Sequence[Bounds], datum: str, surface: str, most: int = 1 << 62
) -> Points:
    """The reference heights of a file that lie on some ground, in one vertical datum.

    Args:
        href: path (relative to where the command runs) or URI.
        boxes: west, south, east, north of the ground in degrees; west may be above east.
        datum: that the heights are wanted in, such as `EPSG:5773`.
        surface: `dsm` or `dtm`: rows whose column `surface` says otherwise are dropped.
        most: of more points so many are drawn, always the same.

    Raises:
        InputError: no such file, or it is no table; columns are missing; geometries that are no
            points; a datum that is unknown or cannot be converted, with the number of its points.
        OSError: the store cannot be reached.
    """
    with _opened(href) as (file, digest):
        try:
            table = _read(href, file, boxes)
        except pa.ArrowException as error:
            problem = str(error).splitlines()[0]
            raise InputError(f"{href} cannot be read as Parquet or CSV: {problem}") from error
    kept, height, sigma, names = _usable(table, surface, most)
    lon, lat = table.lon[kept], table.lat[kept]
    height, shifts = _converted(href, lon, lat, height, names, datum)
    good = np.isfinite(height)
    _drop(table.dropped, "beyond PROJ's grids", ~good)
    return Points(
        lon[good], lat[good], height[good], sigma[good],
        digest,
        table.rows,
        dict(sorted(table.dropped.items())),
        dict(sorted(Counter(names[good].tolist()).items())),
        shifts,
    )  # fmt: skip


@contextmanager
def _opened(href: str) -> Iterator[tuple[IO[bytes], str]]:
    """A file as bytes, with its digest; a remote one is fetched whole: points are few."""
    try:
        if "://" in href:
            folder, _, name = href.rpartition("/")
            data: IO[bytes] = io.BytesIO(Store.at(folder).read(name))
        else:
            data = Path(href).open("rb")  # noqa: SIM115 (closed below)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"--points: {href} is no file that is there") from error
    with data as file:
        found = hashlib.blake2b(digest_size=16)
        while part := file.read(1 << 20):
            found.update(part)
        file.seek(0)
        yield file, found.hexdigest()


def _read(href: str, file: IO[bytes], boxes: Sequence[Bounds]) -> _Table:
    """The rows on the wanted ground, read batch by batch."""
    parquet = file.read(4) == b"PAR1"
    file.seek(0)
    schema = (
        pq.read_schema(file) if parquet else pc_csv.open_csv(pa.PythonFile(file, mode="r")).schema
    )
    file.seek(0)
    place, where = _placing(href, schema)
    columns = _columns(href, schema, where)
    batches = _parquet(file, columns) if parquet else _csv(file, columns)
    parts, rows, dropped = [], 0, Counter[str]()
    for batch in batches:
        lon, lat = place(batch)
        known = (np.abs(lon) <= 360) & (np.abs(lat) <= 90)  # NaN is not
        lon = _signed(lon)
        inside = known & _inside(lon, lat, boxes)
        _drop(dropped, "no place", ~known)
        _drop(dropped, "outside the region", known & ~inside)
        rows += len(lon)
        named = {name: batch.column(column) for name, column in columns.items() if name in _SAID}
        chosen = pa.array(inside)
        parts.append(
            (lon[inside], lat[inside], {name: c.filter(chosen) for name, c in named.items()})
        )
    if not parts:
        raise InputError(f"{href} has no rows")
    lons, lats, tables = zip(*parts, strict=True)
    joined = {name: pa.chunked_array([table[name] for table in tables]) for name in tables[0]}
    return _Table(np.concatenate(lons), np.concatenate(lats), joined, rows, dropped)


def _drop(dropped: Counter[str], reason: str, rows: NDArray[np.bool_]) -> None:
    if count := int(rows.sum()):
        dropped[reason] += count


def _signed(lon: Floats) -> Floats:
    """Longitudes of -360..360 degrees as -180 to below 180, without rounding."""
    return np.where(lon >= 180, lon - 360, np.where(lon < -180, lon + 360, lon))


def _inside(lon: Floats, lat: Floats, boxes: Sequence[Bounds]) -> NDArray[np.bool_]:
    found = np.zeros(len(lon), dtype=bool)
    for west, south, east, north in boxes:
        found |= (((lon - west) % 360) <= (east - west) % 360) & (lat >= south) & (lat <= north)
    return found


def _columns(href: str, schema: Any, where: Mapping[str, str]) -> dict[str, str]:
    """What is said -> the column that says it, of all columns that are read.

    Raises:
        InputError: `height` or `datum` is missing.
    """
    found = {**where, **_named(schema)}
    if where:  # a geometry: what lon and lat say is not asked
        found.pop("lon", None), found.pop("lat", None)
    needed = ["height", "datum"] + ([] if where else ["lon", "lat"])
    if lacking := [name for name in needed if name not in found]:
        hint = (
            ": the vertical datum that each height is in, such as EPSG:4979 (WGS84 ellipsoid: "
            "ICESat-2, GEDI, GNSS), EPSG:5773 (EGM96) or EPSG:3855 (EGM2008)"
            if "datum" in lacking
            else ""
        )
        raise InputError(
            f"{href} lacks the columns {', '.join(lacking)}{hint}; it has "
            f"{', '.join(schema.names[:20])}"
        )
    return found


def _named(schema: Any) -> dict[str, str]:
    """What is said -> the column of that name."""
    there = {name.lower(): name for name in reversed(schema.names)}
    pairs = ((name, there.get(word)) for name, words in _NAMES.items() for word in words)
    found: dict[str, str] = {}
    for name, column in pairs:
        if column is not None:
            found.setdefault(name, column)
    return found


def _parquet(file: IO[bytes], columns: Mapping[str, str]) -> Iterator[Any]:
    # A column of a struct is asked for by its own name: the whole of it comes.
    yield from pq.ParquetFile(file).iter_batches(columns=list(columns.values()))


def _csv(file: IO[bytes], columns: Mapping[str, str]) -> Iterator[Any]:
    # The first rows would decide on a type, and may be empty, or whole numbers, by chance.
    types = {c: pa.string() if name in _WORDS else pa.float64() for name, c in columns.items()}
    yield from pc_csv.open_csv(
        pa.PythonFile(file, mode="r"),
        convert_options=pc_csv.ConvertOptions(
            column_types=types, include_columns=list(columns.values()), strings_can_be_null=True
        ),
    )


_Place = Callable[[Any], tuple[Floats, Floats]]


def _placing(href: str, schema: Any) -> tuple[_Place, dict[str, str]]:
    """How longitude and latitude come from a batch, and the geometry's column where there is one.

    Raises:
        InputError: an encoding or a CRS that is not known.
    """
    about = (schema.metadata or {}).get(b"geo")
    if about is None:
        found = _named(schema)
        return (lambda batch: (_numbers(batch, found["lon"]), _numbers(batch, found["lat"]))), {}
    try:
        geo = json.loads(about)
        name = geo["primary_column"]
        column = geo["columns"][name]
        encoding = str(column["encoding"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{href}: its GeoParquet metadata is damaged ({error!r})") from error
    readers = {"wkb": _wkb, "point": _structs}
    if encoding.lower() not in readers:
        raise InputError(f"{href}: {name} is encoded as {encoding}; points are WKB or point")
    read, move = readers[encoding.lower()], _to_degrees(href, column)
    return (lambda batch: move(*read(href, batch.column(name)))), {"geometry": name}


def _to_degrees(href: str, column: Mapping[str, Any]) -> Callable[[Floats, Floats], Any]:
    if "crs" not in column:  # OGC:CRS84, as GeoParquet has it
        return lambda x, y: (x, y)
    if column["crs"] is None:
        raise InputError(f"{href}: the CRS of its geometry is said to be unknown; name it")
    try:
        crs = CRS.from_user_input(column["crs"])
    except CRSError as error:
        raise InputError(f"{href}: PROJ does not know the CRS of its geometry ({error})") from error
    return transformer(crs.to_2d().to_wkt(), "EPSG:4326").transform


def _numbers(batch: Any, name: str) -> Floats:
    return _floats(batch.column(name))


def _floats(column: Any) -> Floats:
    """(n,) values, NaN where there is none."""
    values = pc.fill_null(pc.cast(column, pa.float64()), np.nan)
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def _structs(_: str, column: Any) -> tuple[Floats, Floats]:
    """Of GeoParquet's encoding `point`: a struct of x and y."""
    return _floats(pc.struct_field(column, "x")), _floats(pc.struct_field(column, "y"))


def _wkb(href: str, column: Any) -> tuple[Floats, Floats]:
    """Of well-known binary, as ISO or PostGIS has it, of either byte order.

    Raises:
        InputError: a geometry is no point.
    """
    objects = column.to_pylist()
    groups: dict[tuple[int, int], list[int]] = {}
    for number, data in enumerate(objects):
        if data:
            groups.setdefault((len(data), data[0]), []).append(number)
    out = np.full((2, len(objects)), np.nan)
    for (size, little), members in groups.items():
        order = "<" if little else ">"
        raw = np.frombuffer(b"".join(objects[k] for k in members), np.uint8).reshape(-1, size)
        code = np.ascontiguousarray(raw[:, 1:5]).view(f"{order}u4").ravel()
        start = 9 if code[0] & _HAS_SRID else 5
        if ((code & 0xFFFF) % 1000 != _POINT).any() or size < start + 16:
            raise InputError(f"{href}: its geometries are no points; give one point a height")
        out[:, members] = np.ascontiguousarray(raw[:, start : start + 16]).view(f"{order}f8").T
    return out[0], out[1]


def _usable(
    table: _Table, surface: str, most: int
) -> tuple[NDArray[np.intp], Floats, Floats, NDArray[Any]]:
    """Which rows are of use, and their height, sigma and datum as written."""
    height = _floats(table.columns["height"])
    datum = np.array(table.columns["datum"].cast(pa.string()).to_pylist(), dtype=object)
    sigma = np.full(len(height), np.nan)
    if "sigma" in table.columns:
        sigma = _floats(table.columns["sigma"])
    low, high = _HEIGHTS
    tests = {
        "no height": ~((height > low) & (height < high)),
        "no datum": np.array([not word for word in datum], dtype=bool),
        "sigma below 0 or infinite": (sigma < 0) | np.isinf(sigma),
    }
    if "surface" in table.columns:
        words = table.columns["surface"].cast(pa.string()).to_pylist()
        other = [word is not None and word.strip().lower() != surface for word in words]
        tests[f"of another surface than {surface}"] = np.array(other, dtype=bool)
    good = np.ones(len(height), dtype=bool)
    for reason, bad in tests.items():
        _drop(table.dropped, reason, good & bad)
        good &= ~bad
    kept = np.flatnonzero(good)
    if len(kept) > most:
        table.dropped[f"more than {most}: not drawn"] = len(kept) - most
        kept = np.sort(np.random.default_rng(0).choice(kept, most, replace=False))
    known = sigma[kept]
    usual = float(np.nanmedian(known)) if np.isfinite(known).any() else 0.0
    return kept, height[kept], np.where(np.isnan(known), usual, known), datum[kept]


def _converted(
    href: str, lon: Floats, lat: Floats, height: Floats, names: NDArray[Any], target: str
) -> tuple[Floats, tuple[DatumShift, ...]]:
    """Heights in the wanted datum (NaN beyond PROJ's grids), and how they came there.

    Raises:
        InputError: names every datum that cannot be converted, with the number of its points.
    """
    out, shifts, problems = height.copy(), [], []
    for name in sorted(set(names)):
        mine = names == name
        try:
            check_datum(name, "datum")
            box = box_around(lon[mine], lat[mine])
            shift = plan_shift(name, target, box, "their", "or convert the points first")
        except InputError as error:
            problems.append(f"{int(mine.sum())} points: {error}")
            continue
        if shift is not None:
            how = Transformer.from_pipeline(shift.pipeline)
            out[mine] = how.transform(lon[mine], lat[mine], height[mine])[2]
            shifts.append(shift)
    if problems:
        raise InputError(
            f"{href}: not all heights can be had in {target}\n  " + "\n  ".join(problems)
        )
    return out, tuple(shifts)


def box_around(lon: Floats, lat: Floats) -> Bounds:
    """West, south, east, north around (n,) places, without the widest gap between longitudes.

    Where that gap is not the one across the 180th meridian, west is above east.

    Args:
        lon: degrees, -180 to 180.
        lat: degrees.
    """
    around = np.sort(lon)
    gaps = np.append(np.diff(around), around[0] + 360 - around[-1])
    widest = int(len(gaps) - 1 - gaps[::-1].argmax())  # of equal ones the last
    west, east = around[(widest + 1) % len(around)], around[widest]
    return float(west), float(lat.min()), float(east), float(lat.max())
