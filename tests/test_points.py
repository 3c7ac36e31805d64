"""Reference heights from files: every form they come in, the datum, and what is dropped and why."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from aeheight.errors import InputError
from aeheight.sources.points import Points, box_around, read_points
from tests.test_datum import separation, write_geoid

EGM96, EGM2008, ELLIPSOID = "EPSG:5773", "EPSG:3855", "EPSG:4979"
BOX = (-124.5, 38.0, -123.5, 39.0)
LON = np.array([-124.25, -124.0, -123.75, -123.6])
LAT = np.array([38.25, 38.5, 38.75, 38.9])
HEIGHT = np.array([120.5, 130.25, 0.0, -3.5])
SIGMA = np.array([0.1, 3.0, 0.0, 8.0])


def read(path: Any, box=BOX, datum=EGM96, surface="dsm", **more: Any) -> Points:
    return read_points(str(path), [box], datum, surface, **more)


def columns(**changes: Any) -> dict[str, Any]:
    plain = {"lon": LON, "lat": LAT, "height": HEIGHT, "sigma": SIGMA, "datum": [EGM96] * len(LON)}
    return {name: value for name, value in (plain | changes).items() if value is not None}


def write_csv(path: Path, **changes: Any) -> Path:
    found = columns(**changes)
    rows = zip(*found.values(), strict=True)
    text = [",".join(found), *(",".join("" if v is None else str(v) for v in r) for r in rows)]
    path.write_text("\n".join(text) + "\n")
    return path


def write_parquet(path: Path, geo: Any = None, **changes: Any) -> Path:
    table = pa.table(columns(**changes))
    if geo is not None:
        table = table.replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, path)
    return path


def geo(encoding="WKB", **crs: Any) -> dict[str, Any]:
    column = {"encoding": encoding, "geometry_types": ["Point"], **crs}
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def wkb(x, y, form="<I", z=False, srid=False) -> bytes:
    order = form[0]
    code = 1 + 1000 * (z and not srid) + 0x20000000 * srid + 0x80000000 * (z and srid)
    data = struct.pack(order + "BI", int(order == "<"), code)
    data += struct.pack(order + "I", 4326) * srid
    return data + struct.pack(order + "dd", x, y) + struct.pack(order + "d", 7.0) * z


def same(points: Points) -> None:
    np.testing.assert_allclose(points.lon, LON, atol=1e-9)
    np.testing.assert_allclose(points.lat, LAT, atol=1e-9)
    np.testing.assert_array_equal(points.height, HEIGHT)
    np.testing.assert_array_equal(points.sigma, SIGMA)
    assert (points.rows, dict(points.dropped), points.shifts) == (4, {}, ())
    assert dict(points.datums) == {EGM96: 4}


# Forms.


def test_csv(tmp_path):
    same(read(write_csv(tmp_path / "p.csv")))


def test_columns_in_other_case_and_order(tmp_path):
    path = tmp_path / "p.csv"
    rows = [f"{s},GNSS,{a},{o},{h},{EGM96}" for s, a, o, h in zip(SIGMA, LAT, LON, HEIGHT)]  # noqa: B905
    path.write_text("\n".join(["Sigma,kind,Latitude,LONGITUDE,Height,vertical_datum", *rows]))
    same(read(path))


def test_parquet(tmp_path):
    same(read(write_parquet(tmp_path / "p.parquet")))
    ints = write_parquet(tmp_path / "i.parquet", height=pa.array([120, 130, 0, -3], pa.int16()))
    np.testing.assert_array_equal(read(ints).height, [120, 130, 0, -3])


@pytest.mark.parametrize("more", [{}, {"form": ">I"}, {"z": True}, {"srid": True},
                                  {"z": True, "srid": True, "form": ">I"}])  # fmt: skip
def test_geoparquet_as_wkb(tmp_path, more):
    shapes = [wkb(x, y, **more) for x, y in zip(LON, LAT, strict=True)]
    path = write_parquet(tmp_path / "p.parquet", geo(), geometry=shapes, lon=None, lat=None)
    same(read(path))


def test_geoparquet_of_mixed_forms_and_without_a_shape(tmp_path):
    shapes = [wkb(LON[0], LAT[0]), None, wkb(LON[2], LAT[2], ">I"), wkb(np.nan, np.nan)]
    path = write_parquet(tmp_path / "p.parquet", geo(), geometry=shapes, lon=None, lat=None)
    found = read(path)
    np.testing.assert_array_equal(found.lon, LON[[0, 2]])
    assert found.dropped == {"no place": 2}


def test_geoparquet_as_points(tmp_path):
    shapes = pa.StructArray.from_arrays([pa.array(LON), pa.array(LAT)], ["x", "y"])
    table = {"geometry": shapes, "lon": None, "lat": None}
    same(read(write_parquet(tmp_path / "p.parquet", geo("point"), **table)))


def test_a_geometry_in_another_crs_is_moved(tmp_path):
    x, y = Transformer.from_crs(4326, 32610, always_xy=True).transform(LON, LAT)
    shapes = [wkb(*place) for place in zip(x, y, strict=True)]
    about = geo(crs=CRS.from_epsg(32610).to_json_dict())
    # What lon and lat say beside it is not asked.
    path = write_parquet(tmp_path / "p.parquet", about, geometry=shapes, lon=LAT, lat=LON)
    same(read(path))


def test_a_uri(tmp_path):
    same(read(f"file://{write_csv(tmp_path / 'p.csv')}"))
    with pytest.raises(InputError, match="no file that is there"):
        read(f"file://{tmp_path}/other.csv")


def test_the_digest_is_that_of_the_bytes(tmp_path):
    one, other = write_csv(tmp_path / "p.csv"), write_csv(tmp_path / "q.csv")
    assert read(one).digest == read(other).digest
    assert read(write_csv(tmp_path / "r.csv", sigma=SIGMA + 1)).digest != read(one).digest


# What is no table of points.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": None}, ["lacks the columns height", "it has lon, lat, sigma, datum"]),
        ({"datum": None}, ["lacks the columns datum", "EPSG:4979 (WGS84 ellipsoid"]),
        ({"lon": None, "lat": None}, ["lacks the columns lon, lat"]),
    ],
)
@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_missing_columns_are_named(tmp_path, write, changes, words):
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "p", **changes))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("about", "shape", "message"),
    [
        (geo("polygon"), wkb(0, 0), "encoded as polygon; points are WKB or point"),
        (geo(), struct.pack("<BII", 1, 2, 1) + struct.pack("<dd", 0, 0), "are no points"),
        (geo(crs=None), wkb(0, 0), "the CRS of its geometry is said to be unknown"),
        (geo(crs={"type": "?"}), wkb(0, 0), "PROJ does not know the CRS"),
        ({"version": "1.0.0"}, wkb(0, 0), "GeoParquet metadata is damaged"),
    ],
)
def test_a_geometry_that_is_no_place(tmp_path, about, shape, message):
    path = write_parquet(tmp_path / "p.parquet", about, geometry=[shape] * 4, lon=None, lat=None)
    with pytest.raises(InputError, match=message):
        read(path)


def test_what_is_no_table(tmp_path):
    with pytest.raises(InputError, match="no file that is there"):
        read(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="no file that is there"):
        read(tmp_path)
    (tmp_path / "empty.csv").write_bytes(b"")
    torn = write_parquet(tmp_path / "torn.parquet")
    torn.write_bytes(torn.read_bytes()[:-20])
    words = write_csv(tmp_path / "words.csv", height=["high"] * 4)
    for path in (tmp_path / "empty.csv", torn, words):
        with pytest.raises(InputError, match="cannot be read as Parquet or CSV"):
            read(path)
    with pytest.raises(InputError, match="has no rows"):
        read(write_csv(tmp_path / "none.csv", **{name: [] for name in columns()}))


# What is dropped.


def test_every_row_that_is_dropped_is_counted_once(tmp_path):
    path = write_csv(
        tmp_path / "p.csv",
        lon=["", 10, *[-124.0] * 7],
        lat=["", 38.5, *[38.5] * 7],
        height=[1, 1, -9999, 3.4028235e38, "", 5, 6, 7, 8],
        sigma=[1, 1, 1, 1, 1, 1, -1, 2, ""],
        datum=[EGM96, EGM96, EGM96, EGM96, EGM96, "", EGM96, EGM96, EGM96],
    )
    found = read(path)
    assert found.dropped == {
        "no datum": 1,
        "no height": 3,
        "no place": 1,
        "outside the region": 1,
        "sigma below 0 or infinite": 1,
    }
    assert found.rows == 9 == len(found.height) + sum(found.dropped.values())
    np.testing.assert_array_equal(found.height, [7, 8])
    np.testing.assert_array_equal(found.sigma, [2, 2])  # the unknown one is as the others


def test_without_sigma_all_points_are_alike(tmp_path):
    assert (read(write_csv(tmp_path / "p.csv", sigma=None)).sigma == 0).all()


def test_heights_of_another_surface_are_dropped(tmp_path):
    path = write_csv(tmp_path / "p.csv", surface=["dsm", "dtm", "DSM", ""])
    assert read(path).dropped == {"of another surface than dsm": 1}
    assert read(path, surface="dtm").dropped == {"of another surface than dtm": 2}


def test_of_many_points_the_same_are_drawn(tmp_path):
    path = write_csv(tmp_path / "p.csv")
    one, other = read(path, most=3), read(path, most=3)
    assert one.dropped == {"more than 3: not drawn": 1}
    np.testing.assert_array_equal(one.height, other.height)
    assert len(one.height) == 3


def test_a_box_across_the_180th_meridian(tmp_path):
    path = write_csv(tmp_path / "p.csv", lon=[179.5, -179.5, 178.0, -178.0])
    found = read(path, box=(179.0, 38.0, -179.0, 39.0))
    np.testing.assert_array_equal(found.lon, [179.5, -179.5])


def test_longitudes_of_0_to_360_are_those_of_180_west_to_180_east(tmp_path):
    """Both sides of Greenwich, and of the 180th meridian."""
    path = write_csv(tmp_path / "p.csv", lon=[359.5, 0.5, 180.0, 179.5])
    found = read(path, box=(-180.0, -90.0, 179.999, 90.0))
    np.testing.assert_array_equal(found.lon, [-0.5, 0.5, -180.0, 179.5])
    np.testing.assert_array_equal(found.height, HEIGHT)


def test_heights_on_both_sides_of_greenwich_are_converted(tmp_path, geoids):
    write_geoid(tmp_path / "proj", "us_nga_egm96_15.tif", bounds=(-3, 36, 3, 41))
    lon = np.array([359.5, 0.5, 0.0, 359.0])
    path = write_csv(tmp_path / "p.csv", lon=lon, datum=[ELLIPSOID] * 4)
    found = read(path, box=(-2.0, 38.0, 2.0, 39.0))
    expected = HEIGHT - separation(np.where(lon > 180, lon - 360, lon), LAT)
    np.testing.assert_allclose(found.height, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("lon", "west", "east"),
    [
        ([5.0], 5.0, 5.0),
        ([-0.5, 0.5], -0.5, 0.5),
        ([-100.0, 70.0], -100.0, 70.0),
        ([179.5, -179.5, 178.0], 178.0, -179.5),
        ([-180.0, 179.0], 179.0, -180.0),
        ([-170.0, -20.0, 100.0, 170.0], -20.0, -170.0),
        ([0.0, 10.0, 100.0, -100.0], -100.0, 100.0),
    ],
)
def test_the_box_of_places_leaves_out_the_largest_gap(lon, west, east):
    assert box_around(np.array(lon), np.zeros(len(lon))) == (west, 0.0, east, 0.0)


@given(st.lists(st.floats(-180, 180, exclude_max=True), min_size=1, max_size=9))
def test_the_box_of_places_holds_them_all_and_none_is_narrower(lon):
    west, _, east, _ = box_around(np.array(lon), np.zeros(len(lon)))
    width = (east - west) % 360
    assert all((x - west) % 360 <= width + 1e-9 for x in lon)
    assert width <= min(max((x - start) % 360 for x in lon) for start in lon) + 1e-9


# Datums.


@pytest.fixture
def geoids(tmp_path):
    before = pyproj.datadir.get_data_dir()
    write_geoid(tmp_path / "proj", "us_nga_egm96_15.tif")
    pyproj.datadir.append_data_dir(tmp_path / "proj")
    yield
    pyproj.datadir.set_data_dir(before)


def test_heights_of_several_datums_become_one(tmp_path, geoids):
    names = [EGM96, ELLIPSOID, ELLIPSOID, EGM96]
    found = read(write_csv(tmp_path / "p.csv", datum=names))
    above = HEIGHT - separation(LON, LAT)
    expected = np.where([True, False, False, True], HEIGHT, above)
    np.testing.assert_allclose(found.height, expected, atol=1e-3)
    assert found.datums == {ELLIPSOID: 2, EGM96: 2}
    (shift,) = found.shifts
    assert (shift.source, shift.target, shift.grids) == (ELLIPSOID, EGM96, ("us_nga_egm96_15.tif",))


def test_datums_that_cannot_be_had_are_told_with_their_points(tmp_path):
    names = [EGM96, "EGM69", "EPSG:4326", EGM2008]
    with pytest.raises(InputError) as error:
        read(write_csv(tmp_path / "p.csv", datum=names))
    told = str(error.value)
    assert f"not all heights can be had in {EGM96}" in told
    assert "1 points: datum: PROJ does not know 'EGM69'; for example EPSG:5773 (EGM96)" in told
    assert "1 points: datum: 'EPSG:4326' says nothing of heights" in told
    assert "1 points:" in told.splitlines()[-1]
    assert EGM2008 in told
