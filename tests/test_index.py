"""The index: what lies where and when, from its columns alone, in every form that is published."""

import csv
import datetime as dt
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyproj import Transformer

from aeheight.errors import InputError
from aeheight.grid import Bounds, Grid, utm_zone
from aeheight.settings import RegionSettings
from aeheight.sources.index import scan_index
from aeheight.sources.tile import EmbeddingSource, EmbeddingTile
from aeheight.sources.tiles import read_embeddings
from aeheight.windows import whole
from tests.tifs import CRS, STEP, grid_of, random_codes, region, write_tile

Row = dict[str, Any]
EDGE = 81920.0
"""Metres: a tile of 8192 pixels."""
YEARS = (2019, 2020)
ROOT = "s3://us-west-2.opendata.source.coop/tge-labs/aef/v1/annual"


def row_of(crs: str, west: float, south: float, year: int, path: str, edge: float = EDGE) -> Row:
    """A row of the plain index; its box in degrees is drawn through the corners of the tile."""
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(
        [west, west, west + edge, west + edge], [south, south + edge, south, south + edge]
    )
    if np.ptp(lon) > 180:  # across 180 degrees: the box is west of it and east of it
        lon = np.where(np.asarray(lon) < 0, np.asarray(lon) + 360, lon)
    sides = [(x + 180) % 360 - 180 for x in (np.min(lon), np.max(lon))]
    zone = utm_zone(crs)
    assert zone
    return {
        "path": path, "year": year, "crs": crs, "utm_zone": f"{zone.number}{'NS'[not zone.north]}",
        "utm_west": west, "utm_south": south, "utm_east": west + edge, "utm_north": south + edge,
        "wgs84_west": sides[0], "wgs84_south": float(np.min(lat)),
        "wgs84_east": sides[1], "wgs84_north": float(np.max(lat)),
    }  # fmt: skip


def world() -> list[Row]:
    """Tiles of six zones, two of them at 180 degrees, from the equator to 84 degrees north."""
    rows = []
    for zone in (1, 2, 10, 11, 33, 60):
        for south in (0.0, 4177920.0, 6635520.0, 9256960.0):
            for west in np.arange(163840.0, 835000.0, EDGE):
                for year in YEARS:
                    crs, name = f"EPSG:{32600 + zone}", f"x{len(rows) * 7919 % 9973:04d}"
                    path = f"{ROOT}/{year}/{zone}N/{name}-{len(rows):010d}.tiff"
                    rows.append(row_of(crs, west, south, year, path))
    return rows


ROWS = world()


def plain_parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    return path


def plain_csv(path: Path, rows: list[Row]) -> Path:
    """With an outline that is long and holds commas, as the real one has."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["WKT", *rows[0]])
        writer.writeheader()
        writer.writerows({"WKT": "POLYGON ((1 2, 3 4, 5 6))"} | row for row in rows)
    return path


def stac_parquet(path: Path, rows: list[Row], **columns: Callable[[Row], Any]) -> Path:
    """Items as stac-geoparquet lays them out."""
    made: dict[str, Callable[[Row], Any]] = {
        "id": lambda r: Path(r["path"]).stem,
        "bbox": lambda r: {
            key: r[f"wgs84_{side}"]
            for key, side in zip(
                ("xmin", "ymin", "xmax", "ymax"), ("west", "south", "east", "north"), strict=True
            )
        },
        "datetime": lambda r: r["year"] and dt.datetime(r["year"], 1, 1, tzinfo=dt.UTC),
        "proj:code": lambda r: r["crs"],
        "proj:bbox": lambda r: [r[f"utm_{side}"] for side in ("west", "south", "east", "north")],
        "assets": lambda r: {
            "data": {"href": r["path"], "type": "image/tiff"}, "thumbnail": {"href": "x.png"}
        },
    } | columns  # fmt: skip
    table = [{key: value(row) for key, value in made.items() if value} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=40)
    return path


def transform_of(row: Row) -> list[float]:
    """Bottom-up, as the real tiles are."""
    return [STEP, 0.0, row["utm_west"], 0.0, STEP, row["utm_south"], 0.0, 0.0, 1.0]


def shape_of(row: Row) -> list[int]:
    return [round((row["utm_north"] - row["utm_south"]) / STEP)] * 2


FORMS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "plain.parquet": plain_parquet,
    "plain.csv": plain_csv,
    "stac": stac_parquet,
    "stac-epsg": lambda path, rows: stac_parquet(
        path, rows, **{"proj:code": None, "proj:epsg": lambda r: int(r["crs"][5:])}
    ),
    "stac-transform": lambda path, rows: stac_parquet(
        path, rows, **{"proj:bbox": None, "proj:transform": transform_of, "proj:shape": shape_of}
    ),
    "stac-start": lambda path, rows: stac_parquet(
        path, rows, datetime=lambda r: None, start_datetime=lambda r: f"{r['year']}-01-01T00:00:00Z"
    ),
    "stac-utm": lambda path, rows: stac_parquet(
        path,
        rows,
        **{"proj:bbox": None, "year": lambda r: r["year"]},
        **{f"utm_{s}": lambda r, s=s: r[f"utm_{s}"] for s in ("west", "south", "east", "north")},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FORMS))
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FORMS[request.param](tmp_path_factory.mktemp("index") / request.param, ROWS)


def settings(href: Any, year: Any = 2020, **more: Any) -> RegionSettings:
    href = [str(one) for one in href] if isinstance(href, list) else str(href)
    return region("x.tif", embeddings={"source": "index", "href": href, "year": year} | more)


def outline(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes all along the edge of a tile, and inside it."""
    along = np.linspace(0, 1, 41)
    x, y = np.meshgrid(row["utm_west"] + along * EDGE, row["utm_south"] + along * EDGE)
    lon, lat = Transformer.from_crs(row["crs"], "EPSG:4326", always_xy=True).transform(x, y)
    return np.asarray(lon), np.asarray(lat)


OUTLINES = [outline(row) for row in ROWS]


def inside(area: Bounds, lon: np.ndarray, lat: np.ndarray) -> bool:
    west, south, east, north = area
    return bool(((lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)).any())


@given(
    lon=st.one_of(st.floats(-180, 175), st.sampled_from([-180.0, -124.0, 12.0, 170.0])),
    lat=st.sampled_from([-0.5, 0.1, 37.9, 38.2, 59.9, 60.3, 83.4]),
    size=st.tuples(st.floats(0.01, 5), st.floats(0.01, 2)),
    years=st.sampled_from([(2019,), (2020,), (2019, 2020)]),
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_no_tile_of_the_ground_is_missed_and_none_far_away_is_found(
    index: Path, lon: float, lat: float, size: tuple[float, float], years: tuple[int, ...]
) -> None:
    """Against the outlines of all tiles, densely drawn in their own CRS."""
    area = (lon, lat, lon + size[0], lat + size[1])
    needed = {
        row["path"]
        for row, line in zip(ROWS, OUTLINES, strict=True)
        if row["year"] in years and inside(area, *line)
    }
    try:
        found = {tile.href for tile in scan_index(settings(index, [*years]), [area])}
    except InputError:
        assert not needed
        return
    assert needed <= found
    # What is found besides touches the box that is drawn around a tile, give or take 0.02 degrees.
    for row in ROWS:
        if row["path"] in found - needed:
            west, south, east, north = (
                row[f"wgs84_{s}"] for s in ("west", "south", "east", "north")
            )
            level = south - 0.02 <= area[3] and north + 0.02 >= area[1]
            begins, ends = west - 0.02 <= area[2], east + 0.02 >= area[0]
            assert level
            assert (begins and ends) if west < east else (begins or ends)


def test_a_row_becomes_a_tile(index: Path) -> None:
    wanted = [row for row in ROWS if row["utm_zone"] == "10N" and row["utm_south"] == 4177920]
    by_href = {row["path"]: row for row in wanted}
    tiles = scan_index(settings(index, [2019, 2020]), [(-125.9, 37.9, -120.1, 38.2)])
    tiles = [tile for tile in tiles if tile.grid.crs == "EPSG:32610"]
    assert len(tiles) >= 12
    assert [tile.href for tile in tiles] == sorted(tile.href for tile in tiles)
    for tile in tiles:
        row = by_href[tile.href]
        assert tile.year == row["year"]
        assert type(tile.year) is int
        assert (tile.kind, tile.block, tile.files[0].bands) == ("raster", 1024, ())
        assert tile.grid == Grid(
            "EPSG:32610", 10.0, row["utm_west"], row["utm_north"], (8192, 8192)
        )


@pytest.mark.parametrize("areas", [
    [(179.9, 60.0, 180.0, 60.1), (-180.0, 60.0, -179.9, 60.1)],
    [(179.99, 60.0, 180.0, 60.1)],
    [(-180.0, 60.0, -179.99, 60.1)],
])  # fmt: skip
def test_tiles_across_180_degrees(index: Path, areas: list[Bounds]) -> None:
    across = {row["path"] for row in ROWS if row["wgs84_west"] > row["wgs84_east"]}
    assert {path.split("/")[-2] for path in across} >= {"1N", "60N"}
    found = scan_index(settings(index), areas)
    assert {tile.href for tile in found} & across
    assert {tile.grid.name for tile in found} <= {"utm01n", "utm60n"}
    needed = {
        row["path"]
        for row, line in zip(ROWS, OUTLINES, strict=True)
        if row["year"] == 2020 and any(inside(area, *line) for area in areas)
    }
    assert needed <= {tile.href for tile in found}


def small(folder: Path, **changes: Any) -> tuple[list[Row], np.ndarray, list[Bounds]]:
    """Two real tiles of 40 x 40 pixels side by side, their rows, codes and ground."""
    codes = random_codes(np.random.default_rng(3), 40, 80)
    rows = []
    for col in (0, 40):
        path = f"2020/10N/x-{col:010d}.tiff"
        write_tile(folder / path, codes[:, :, col : col + 40], 0, col)
        grid = grid_of(40, 40, 0, col)
        rows.append(row_of(CRS, grid.bounds[0], grid.bounds[1], 2020, path, 400.0) | changes)
    area = (
        rows[0]["wgs84_west"],
        rows[0]["wgs84_south"],
        rows[1]["wgs84_east"],
        rows[1]["wgs84_north"],
    )
    return rows, codes, [area]


def read(tiles: list[EmbeddingTile]) -> np.ndarray:
    grid = grid_of(40, 80)
    return read_embeddings(EmbeddingSource(tuple(tiles)), grid, whole(grid.shape), 2020)


@pytest.mark.parametrize("form", list(FORMS))
def test_relative_paths_start_at_the_index(tmp_path: Path, form: str) -> None:
    rows, codes, areas = small(tmp_path)
    tiles = scan_index(settings(FORMS[form](tmp_path / "index", rows)), areas)
    assert [tile.grid for tile in tiles] == [grid_of(40, 40), grid_of(40, 40, 0, 40)]
    np.testing.assert_array_equal(read(tiles), codes)


def test_an_index_without_pixels_is_completed_from_headers(tmp_path: Path) -> None:
    rows, codes, areas = small(tmp_path)
    path = stac_parquet(tmp_path / "index", rows, **{"proj:bbox": None})
    np.testing.assert_array_equal(read(scan_index(settings(path), areas)), codes)


def test_several_indexes_are_one(tmp_path: Path) -> None:
    rows, codes, areas = small(tmp_path)
    one = plain_parquet(tmp_path / "one", rows[:1])
    two = plain_csv(tmp_path / "two", rows)
    tiles = scan_index(settings([one, two]), areas)
    assert len(tiles) == 2
    np.testing.assert_array_equal(read(tiles), codes)


class _Ranges(SimpleHTTPRequestHandler):
    """A folder as a bucket that anyone may read, in parts; counts the bytes."""

    sent = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        begin, end = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[begin : end + 1]
        type(self).sent += len(part)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that is served as `s3://world`."""
    root = tmp_path_factory.mktemp("buckets")
    (root / "world").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=root))
    with server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root / "world"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["plain.parquet", "plain.csv", "stac"])
def test_a_remote_index_is_read_in_parts(bucket: Path, form: str) -> None:
    path = FORMS[form](bucket / form, ROWS)
    area = [(-125.9, 37.9, -120.1, 38.2)]
    _Ranges.sent = 0
    found = scan_index(settings(f"s3://world/{form}", access={"anonymous": True}), area)
    assert found == scan_index(settings(path), area)
    # The beginning twice: it says of what form the index is.
    assert 0 < _Ranges.sent <= 2 * path.stat().st_size + 2**20


@pytest.mark.usefixtures("bucket")
def test_a_remote_index_that_is_missing() -> None:
    with pytest.raises(InputError, match=r"embeddings\.href: s3://world/none\.csv is missing"):
        scan_index(settings("s3://world/none.csv", access={"anonymous": True}), [(0, 0, 1, 1)])


_MEMORY = """
import resource, sys
from aeheight.settings import RegionSettings
from aeheight.sources.index import scan_index
embeddings = {"source": "index", "href": sys.argv[1], "year": 2020}
settings = RegionSettings.model_validate({"name": "t", "store": "t", "embeddings": embeddings})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert scan_index(settings, [(-123.0, 38.0, -122.9, 38.1)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_large_csv_is_streamed(tmp_path: Path) -> None:
    """300 MB with outlines of 2.6 kB, as the real one has: never a third of it is held."""
    ring = ", ".join(f"{i}.123456789 {i}.987654321" for i in range(100))
    path = tmp_path / "aef_index.csv"
    one = plain_csv(tmp_path / "one.csv", ROWS).read_text().replace("1 2, 3 4, 5 6", ring)
    header, _, body = one.partition("\n")
    with path.open("w", newline="") as file:
        file.write(header + "\n")
        while file.tell() < 300e6:
            file.write(body)
    command = [sys.executable, "-c", _MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, done.stdout


# --- bad input ----------------------------------------------------------------------------------


def test_a_region_without_bounds(index: Path) -> None:
    with pytest.raises(
        InputError, match=r"the index of the whole world: bound the region with aoi"
    ):
        scan_index(settings(index), None)


def test_years_that_it_lacks(index: Path) -> None:
    area = (-123.0, 38.0, -122.9, 38.1)
    with pytest.raises(InputError, match=r"no tile of \[2018\].*-123\.0.*it has \[2019, 2020\]"):
        scan_index(settings(index, [2018, 2020]), [area])
    with pytest.raises(InputError, match=r"no tile of \[2020\].*none there of any year"):
        scan_index(settings(index), [(100.0, -40.0, 100.1, -39.9)])


@pytest.mark.parametrize("form", [plain_parquet, plain_csv])
@pytest.mark.parametrize("column", ["path", "year", "crs", "utm_west", "utm_north", "wgs84_east"])
def test_a_plain_row_that_lacks_something(
    tmp_path: Path, form: Callable[[Path, list[Row]], Path], column: str
) -> None:
    rows, _, areas = small(tmp_path)
    rows[1][column] = None
    name = {"path": "href", "wgs84_east": "east"}.get(column, column)
    message = rf"index: the row of (.*0040\.tiff|a tile without a path) has no {name}; mend"
    with pytest.raises(InputError, match=message):
        scan_index(settings(form(tmp_path / "index", rows)), areas)


def test_a_row_of_nan(tmp_path: Path) -> None:
    rows, _, areas = small(tmp_path)
    rows[1]["wgs84_south"] = float("nan")
    with pytest.raises(InputError, match=r"row of .*0040\.tiff has no south"):
        scan_index(settings(plain_parquet(tmp_path / "index", rows)), areas)
    rows, _, areas = small(tmp_path)
    rows = [row | {"year": float("nan")} for row in rows]
    with pytest.raises(InputError, match=r"row of .*0000\.tiff has no year"):
        scan_index(settings(plain_parquet(tmp_path / "index", rows)), areas)


@pytest.mark.parametrize("lost", ["datetime", "bbox", "proj:code"])
def test_items_that_lack_something(tmp_path: Path, lost: str) -> None:
    rows, _, areas = small(tmp_path)
    path = stac_parquet(tmp_path / "index", rows, **{lost: None})
    with pytest.raises(InputError, match=rf"lacks the columns {lost}.*it has id, "):
        scan_index(settings(path), areas)
    empty = stac_parquet(tmp_path / "index", rows, **{lost: lambda row: None})
    with pytest.raises(InputError, match=r"lacks the columns|has no (year|crs|west)"):
        scan_index(settings(empty), areas)


def test_which_asset_is_the_tile(tmp_path: Path) -> None:
    rows, codes, areas = small(tmp_path)
    one = stac_parquet(tmp_path / "a", rows, assets=lambda r: {"cog": {"href": r["path"]}})
    np.testing.assert_array_equal(read(scan_index(settings(one), areas)), codes)
    two = stac_parquet(tmp_path / "b", rows, assets=lambda r: {k: {"href": "x"} for k in "cd"})
    with pytest.raises(InputError, match=r"which asset is the tile\?.*there are c, d"):
        scan_index(settings(two), areas)


@pytest.mark.parametrize("columns", [["path", "year"], ["id", "geometry"]])
def test_files_that_are_no_index(tmp_path: Path, columns: list[str]) -> None:
    rows: list[Row] = [dict.fromkeys(columns, "x")]
    for write in (plain_parquet, plain_csv):
        path = write(tmp_path / "no-index", rows)
        with pytest.raises(InputError, match=r"no-index is no index.*wgs84_west.*it has") as caught:
            scan_index(settings(path), [(0, 0, 1, 1)])
        assert "STAC GeoParquet" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    area = [(0.0, 0.0, 1.0, 1.0)]
    with pytest.raises(InputError, match=r"embeddings\.href: .*missing\.parquet is missing"):
        scan_index(settings(tmp_path / "missing.parquet"), area)
    cut = plain_parquet(tmp_path / "cut.parquet", ROWS)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.parquet cannot be read as an index"):
        scan_index(settings(cut), area)
    for content in (b"", b"SQLite format 3\0\xff\xfe\xfd", b"year,path\r\n1,2,3\r\n"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(InputError, match=r"other (cannot be read as an|is no) index"):
            scan_index(settings(tmp_path / "other"), area)
    text = plain_csv(tmp_path / "text.csv", ROWS)
    text.write_text(text.read_text().replace("2020,EPSG", "this year,EPSG", 1))
    with pytest.raises(InputError, match=r"text\.csv cannot be read.*this year"):
        scan_index(settings(text), area)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utm_east": 403607.0}, r"row of .*\.tiff has bounds .*no whole number of 10 m pixels"),
        ({"utm_north": 0.0}, r"row of .*\.tiff has bounds .*0\.0"),
        ({"crs": "EPSG:1"}, r"row of .*\.tiff has the CRS 'EPSG:1', which PROJ does not know"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, changes: Row, message: str) -> None:
    rows, _, areas = small(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        scan_index(settings(plain_parquet(tmp_path / "index", rows)), areas)
