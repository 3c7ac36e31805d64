"""The index of all AlphaEarth tiles: which of them lie on some ground in some years.

Two forms are published, and both are met by their columns, as GeoParquet or as CSV. The plain one
(`aef_index`) has a row a tile with `path`, `year`, `crs`, its bounds in the tile's CRS (`utm_west`
...) and in degrees (`wgs84_west` ...). The STAC form (`aef_index_stac_geoparquet`) has items with
an asset's `href`, a `datetime`, a `bbox`, and the projection extension's properties. Only the
columns that are asked for are read, and of a Parquet file only the row groups that can match; a
CSV is streamed. (Columns: the data set's own description, and the STAC GeoParquet specification.)
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import isnan
from operator import or_
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from aeheight.errors import InputError
from aeheight.grid import Bounds, Grid, crs_name, parse_crs
from aeheight.settings import AccessSettings, RegionSettings
from aeheight.sources.files import read_raster
from aeheight.sources.tile import EmbeddingTile, TileFile
from aeheight.sources.tiles import header_grid
from aeheight.store import Store, plain_errors

_RESOLUTION = 10.0
"""Metres: a pixel of every AlphaEarth tile."""
_BLOCK = 1024
"""Pixels: the edge of the blocks that every AlphaEarth tile is stored in."""
_PAD = 0.02
"""Degrees: a box drawn through a tile's corners falls this short of its curved edges (84° N)."""
_DEGREES = ("west", "south", "east", "north")
_PLAIN = {
    **{"href": "path", "year": "year", "crs": "crs"},
    **{side: f"wgs84_{side}" for side in _DEGREES},
    **{f"utm_{side}": f"utm_{side}" for side in _DEGREES},
}
"""What a row says -> the column of the plain form."""
_CSV_BLOCK = 1 << 21
"""Bytes that are parsed at once; a row with its outline is far shorter."""
_HEADERS = 16
"""Headers that are read at the same time."""

_Columns = Mapping[str, Any]
"""What a row says by name -> the expression that finds it in the file's columns."""
_Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Index:
    """One index file."""

    href: str
    access: AccessSettings

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file as bytes, from its beginning; a remote one is read in parts."""
        if "://" not in self.href:
            with Path(self.href).open("rb") as file:
                yield file
            return
        with io.BufferedReader(_Remote(self.href, self.access), 1 << 20) as buffered:
            yield buffered


def scan_index(settings: RegionSettings, areas: Sequence[Bounds] | None) -> list[EmbeddingTile]:
    """The tiles of the wanted years on some ground, in order of their hrefs; no pixel is read.

    The index alone says where they lie. Where it names no more than their outlines in degrees, as
    the STAC form may, the headers of the tiles found are read too.

    Args:
        settings: `embeddings.href` names one index, or a list of them.
        areas: boxes in degrees, each with west < east; None where nothing bounds the region.

    Raises:
        InputError: no bounds; a file that is missing or is no index, by the columns that it lacks;
            a row that lacks its year, path, CRS or bounds; no tile for a year.
        OSError: the index cannot be reached.
    """
    wanted = settings.embeddings
    if areas is None:
        raise InputError(
            f"{wanted.href} is the index of the whole world: bound the region with aoi "
            "([west, south, east, north] in degrees, or a GeoJSON file) or with grid"
        )
    hrefs = [wanted.href] if isinstance(wanted.href, str) else wanted.href
    tiles: dict[str, EmbeddingTile] = {}
    there: set[int] = set()
    for href in hrefs:
        index = _Index(settings.resolve(href), wanted.access)
        with _named(index.href):
            columns = _columns(index)
            rows = list(_query(index, columns, _touching(columns, areas)))
        there |= {_year(row, index.href) for row in rows}
        rows = [row for row in rows if row["year"] in wanted.years]
        tiles |= {tile.href: tile for tile in _tiles(rows, index)}
    if missing := sorted(set(wanted.years) - {tile.year for tile in tiles.values()}):
        raise InputError(
            f"embeddings.year: {wanted.href} has no tile of {missing} that touches "
            f"{[list(area) for area in areas]} (west, south, east, north); "
            + (f"it has {sorted(there)} there" if there else "it has none there of any year")
        )
    return [tiles[href] for href in sorted(tiles)]


class _Remote(io.RawIOBase):
    """An object of a store as a file, read by ranges."""

    def __init__(self, href: str, access: AccessSettings) -> None:
        folder, _, self._key = href.rpartition("/")
        self._href, self._at = href, 0
        self._store = Store.at(folder, access).zarr(read_only=True).store
        with plain_errors(f"read {href}"):
            self._size: int = self._store.head(self._key)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        with plain_errors(f"read {self._href}"):
            data = memoryview(self._store.get_range(self._key, start=self._at, end=end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _named(href: str) -> Iterator[None]:
    """Turn what Arrow and a missing file raise into an error that names the index."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"embeddings.href: {href} is missing; relative hrefs start at the region file"
        ) from error
    except pa.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"{href} cannot be read as an index: {problem}") from error


def _is_parquet(file: IO[bytes]) -> bool:
    magic = file.read(4)
    file.seek(0)
    return magic == b"PAR1"


def _csv(file: IO[bytes], columns: Sequence[str] = ()) -> Any:
    """A CSV as a stream of batches of the plain form's columns; of all, as they come, for none."""
    # The first rows would decide on a type, and be wrong: years can be missing further down.
    types = {name: pa.float64() for name in columns}
    types |= {"path": pa.string(), "crs": pa.string(), "year": pa.int64()} if columns else {}
    return pc_csv.open_csv(
        pa.PythonFile(file, mode="r"),
        read_options=pc_csv.ReadOptions(block_size=_CSV_BLOCK),
        convert_options=pc_csv.ConvertOptions(
            column_types=types, include_columns=columns, strings_can_be_null=True
        ),
    )


def _query(index: _Index, columns: _Columns, keep: Any) -> Iterator[_Row]:
    """The rows that may pass an expression, with the wanted columns alone."""
    with index.open() as file:
        if _is_parquet(file):
            fragment = ds.ParquetFileFormat().make_fragment(pa.PythonFile(file, mode="r"))
            scanner = fragment.scanner(columns=dict(columns), filter=keep)
        else:
            batches = _csv(file, list(_PLAIN.values()))
            scanner = ds.Scanner.from_batches(batches, columns=dict(columns), filter=keep)
        for batch in scanner.to_batches():
            yield from batch.to_pylist()


def _touching(columns: _Columns, areas: Sequence[Bounds]) -> Any:
    """Rows whose box meets one of the areas, or that lack a box: those are told of."""
    west, south, east, north = (columns[side] for side in _DEGREES)
    # Tiles of the zones 1 and 60 may reach across 180 degrees: west of it and east of it, then.
    across = (west > 90) & (east < -90)

    def meets(area: Bounds) -> Any:
        left, bottom, right, top = area
        begins, ends = ~(west > right + _PAD), ~(east < left - _PAD)
        level = ~(south > top + _PAD) & ~(north < bottom - _PAD)
        return level & ((begins & ends) | (across & (begins | ends)))

    lacking = [columns[side].is_null() for side in _DEGREES]
    return reduce(or_, [*map(meets, areas), *lacking])


def _columns(index: _Index) -> _Columns:
    """What the file's columns say, whichever form it has.

    Raises:
        InputError: columns that neither form can do without are missing; names them.
    """
    with index.open() as file:
        schema = pq.read_schema(file) if _is_parquet(file) else _csv(file).schema
    lacking = [name for name in _PLAIN.values() if name not in schema.names]
    if not lacking:
        return {name: pc.field(column) for name, column in _PLAIN.items()}
    if "assets" in schema.names:
        return _stac_columns(schema, index.href)
    raise InputError(
        f"{index.href} is no index of AlphaEarth tiles: it lacks the columns {', '.join(lacking)} "
        f"(or those of STAC GeoParquet: assets, bbox, datetime, proj:code); it has "
        f"{', '.join(schema.names[:20])}"
    )


def _stac_columns(schema: Any, href: str) -> _Columns:
    """The columns of STAC GeoParquet; of the projection's, those that there are."""
    asset = _asset(schema, href)

    def find(*names: str) -> Any:
        for name in names:
            if name in schema.names:
                return pc.field(name)
            if asset.type.get_field_index(name) >= 0:
                return pc.field("assets", asset.name, name)
        return None

    found = {
        "href": find("href") if "path" not in schema.names else pc.field("path"),
        "year": _stac_year(schema),
        "crs": find("proj:code", "proj:epsg", "crs"),
        "bounds": find("proj:bbox"),
        "transform": find("proj:transform"),
        "shape": find("proj:shape"),
    }
    found |= {f"utm_{side}": find(f"utm_{side}") for side in _DEGREES}
    sides = dict(zip(_DEGREES, ("xmin", "ymin", "xmax", "ymax"), strict=True))
    box = schema.field("bbox").type if "bbox" in schema.names else pa.struct([])
    if pa.types.is_struct(box) and all(box.get_field_index(key) >= 0 for key in sides.values()):
        found |= {side: pc.field("bbox", key) for side, key in sides.items()}
    else:
        found |= {side: find(f"wgs84_{side}") for side in _DEGREES}
    needed = {"year": "datetime (or year)", "crs": "proj:code", "west": "bbox (xmin, ymin ...)"}
    if lacking := [column for name, column in needed.items() if found[name] is None]:
        raise InputError(
            f"{href} is no index of AlphaEarth tiles: it lacks the columns {', '.join(lacking)}; "
            f"it has {', '.join(schema.names[:20])}"
        )
    return {name: column for name, column in found.items() if column is not None}


def _asset(schema: Any, href: str) -> Any:
    """The field of the asset that is the tile: `data`, or the only one with an href."""
    assets = schema.field("assets").type
    fields = [assets.field(i) for i in range(assets.num_fields)] if _is_struct(assets) else []
    usable = {
        f.name: f for f in fields if _is_struct(f.type) and f.type.get_field_index("href") >= 0
    }
    if "data" in usable:
        return usable["data"]
    if len(usable) != 1:
        raise InputError(
            f"{href}: which asset is the tile? There must be one called data, or just one with an "
            f"href; there are {', '.join(usable) or 'none'}"
        )
    return next(iter(usable.values()))


def _is_struct(kind: Any) -> bool:
    return bool(pa.types.is_struct(kind))


def _stac_year(schema: Any) -> Any:
    if "year" in schema.names:
        return pc.field("year").cast(pa.int64())
    found = [name for name in ("datetime", "start_datetime") if name in schema.names]
    years = [_year_of(schema.field(name)) for name in found]
    return pc.coalesce(*years) if years else None


def _year_of(column: Any) -> Any:
    if pa.types.is_timestamp(column.type):
        # Without its zone (UTC, as STAC has it), so that no time zone data is asked for.
        return pc.year(pc.field(column.name).cast(pa.timestamp(column.type.unit)))
    return pc.utf8_slice_codeunits(pc.field(column.name).cast(pa.string()), 0, 4).cast(pa.int64())


def _tiles(rows: Sequence[_Row], index: _Index) -> Iterator[EmbeddingTile]:
    def tile(row: _Row) -> EmbeddingTile:
        href = _absolute(_present(row, "href", index.href), index.href)
        grid = _grid(row, index.href)
        if grid is None:
            grid = read_raster(href, lambda dataset: header_grid(dataset, href), index.access)
        return EmbeddingTile((TileFile(href),), grid, int(row["year"]), block=_BLOCK)

    with ThreadPoolExecutor(_HEADERS) as pool:
        yield from pool.map(tile, rows)


def _absolute(path: str, index: str) -> str:
    """A tile's path; a relative one starts at its index."""
    if "://" in path or path.startswith("/"):
        return path
    return f"{index.rpartition('/')[0]}/{path}"


def _grid(row: _Row, index: str) -> Grid | None:
    """A tile's pixels; None where the row does not say."""
    bounds = _bounds(row, index)
    if bounds is None:
        return None
    transform = row.get("transform")
    resolution = abs(transform[0]) if transform else _RESOLUTION
    crs = _crs(_present(row, "crs", index), row, index)
    try:
        return Grid.from_bounds(crs, resolution, bounds)
    except InputError as error:
        raise InputError(
            f"{index}: the row of {row['href']} has bounds {list(bounds)} in {crs}, which are no "
            f"whole number of {resolution:g} m pixels"
        ) from error


def _bounds(row: _Row, index: str) -> Bounds | None:
    """West, south, east, north of a tile in its CRS, from whichever columns say so."""
    if row.get("bounds"):
        west, south, east, north = row["bounds"]
        return west, south, east, north
    if "utm_west" in row:
        west, south, east, north = (_present(row, f"utm_{side}", index) for side in _DEGREES)
        return west, south, east, north
    if not (row.get("transform") and row.get("shape")):
        return None
    (rows, cols), (step, _, left, _, rise, start) = row["shape"], row["transform"][:6]
    # Real tiles are bottom-up: their rise is positive.
    ends = sorted((start, start + rise * rows))
    return left, ends[0], left + step * cols, ends[1]


def _crs(found: Any, row: _Row, index: str) -> str:
    text = str(found)
    try:
        return crs_name(parse_crs(f"EPSG:{text}" if text.isdigit() else text))
    except InputError as error:
        raise InputError(
            f"{index}: the row of {row['href']} has the CRS {text!r}, which PROJ does not know"
        ) from error


def _year(row: _Row, index: str) -> int:
    for name in (*_DEGREES, "year"):
        _present(row, name, index)
    return int(row["year"])


def _present(row: _Row, name: str, index: str) -> Any:
    value = row[name]
    if value is None or (isinstance(value, float) and isnan(value)):
        raise InputError(
            f"{index}: the row of {row['href'] or 'a tile without a path'} has no {name}; mend the "
            "index, or take that row out"
        )
    return value
