"""Grids against rasterio, pyproj and what is known of places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer
from rasterio import crs as rasterio_crs
from rasterio import transform as rasterio_transform
from rasterio.warp import transform_bounds

from aeheight.errors import InputError
from aeheight.grid import Grid, crs_name, parse_crs, reproject_bounds
from aeheight.windows import Region, whole

ANY = settings(deadline=None)

NORCAL = ("EPSG:32610", 900, (403200, 4279500, 616500, 4431600))
"""The grid of the real rasters: 169 rows of 237 pixels."""

grids = st.builds(
    Grid,
    st.just("EPSG:32610"),
    st.sampled_from([0.5, 1, 2.5, 10, 30, 900]),
    st.integers(100_000, 900_000).map(float),
    st.integers(0, 9_000_000).map(float),
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
)


def test_a_grid_of_a_real_raster_is_known():
    grid = Grid.from_bounds(*NORCAL)
    assert grid == Grid("EPSG:32610", 900, 403200, 4431600, (169, 237))
    assert grid.bounds == NORCAL[2]
    assert grid.x()[[0, -1]].tolist() == [403650, 616050]
    assert grid.y()[[0, -1]].tolist() == [4431150, 4279950]
    assert (grid.x().shape, grid.y().shape) == ((237,), (169,))
    assert not grid.is_geographic
    assert grid.pixel_metres() == (900, 900)


def test_a_grid_in_degrees_is_known():
    grid = Grid.from_bounds("EPSG:4326", 0.25, (-1, 44, 1, 45))
    assert grid.shape == (4, 8)
    assert grid.x().tolist() == [-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875]
    assert grid.y().tolist() == [44.875, 44.625, 44.375, 44.125]
    assert grid.is_geographic
    assert grid.name == "epsg4326"


@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")  # in rasterio
@ANY
@given(grids)
def test_geometry_is_that_of_rasterio(grid):
    theirs = rasterio_transform.from_origin(grid.left, grid.top, grid.resolution, grid.resolution)
    assert grid.transform == theirs
    assert grid.bounds == rasterio_transform.array_bounds(*grid.shape, theirs)
    rows, cols = np.arange(grid.shape[0]), np.arange(grid.shape[1])
    np.testing.assert_array_equal(grid.x(), rasterio_transform.xy(theirs, 0 * cols, cols)[0])
    np.testing.assert_array_equal(grid.y(), rasterio_transform.xy(theirs, rows, 0 * rows)[1])


@ANY
@given(grids)
def test_bounds_give_the_grid_back(grid):
    assert Grid.from_bounds(grid.crs, grid.resolution, grid.bounds) == grid


@ANY
@given(
    grids,
    st.builds(Region, *[st.integers(-600, 600)] * 2, *[st.integers(1, 600)] * 2),
)
def test_a_part_lies_where_its_region_says(grid, region):
    part = grid.part(region)
    assert part.offset(grid.left, grid.top) == (-region.row, -region.col)
    assert grid.offset(part.left, part.top) == (region.row, region.col)
    assert part.shape == region.shape
    inside = region.intersect(whole(grid.shape))
    if inside is not None:
        rows, cols = inside.slices
        np.testing.assert_array_equal(grid.part(inside).x(), grid.x()[cols])
        np.testing.assert_array_equal(grid.part(inside).y(), grid.y()[rows])


def test_an_offset_between_pixels_is_a_fraction():
    assert Grid.from_bounds(*NORCAL).offset(403200 + 450, 4431600 - 1800) == (2, 0.5)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 0, 0, 9), r"bounds \[0, 0, 0, 9\] are empty; give \[west, south, east, north\]"),
        ((9, 0, 0, 9), "are empty"),
        ((0, 9, 9, 0), "are empty"),
        ((0, 0, float("nan"), 9), "are empty"),
        ((0, 0, 100, 96), r"hold 9\.600 x 10\.000 pixels of 10; .* east 100, south -4"),
        ((0, 0, 104, 100), r"hold 10\.000 x 10\.400 pixels of 10; .* east 100, south 0"),
        ((0, 0, 2, 3), r"hold 0\.300 x 0\.200 pixels of 10; .* east 10, south -7"),
        ((0, 0, 0.004, 0.004), r"hold 0\.000 x 0\.000 pixels of 10"),
    ],
)
def test_bounds_that_make_no_grid_are_bad_input(bounds, message):
    with pytest.raises(InputError, match=message):
        Grid.from_bounds("EPSG:32610", 10, bounds)


def test_bounds_a_rounding_away_from_whole_pixels_are_whole():
    """Degrees are rarely whole multiples of a resolution in binary."""
    assert Grid.from_bounds("EPSG:4326", 0.1, (0, 0, 0.7, 0.3)).shape == (3, 7)
    assert Grid.from_bounds("EPSG:32610", 10, (0, 0, 100.009, 50)).shape == (5, 10)
    with pytest.raises(InputError, match=r"5\.000 x 10\.002"):
        Grid.from_bounds("EPSG:32610", 10, (0, 0, 100.02, 50))


@pytest.mark.parametrize("text", ["EPSG:99", "", "UTM zone 10", "32610N"])
def test_an_unknown_crs_is_bad_input(text):
    with pytest.raises(InputError, match=f"does not know the CRS '{text}'; name one like EPSG:3"):
        parse_crs(text)
    with pytest.raises(InputError, match="does not know the CRS"):
        Grid.from_bounds(text, 10, (0, 0, 10, 10))


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crs", "name"),
    [
        ("EPSG:32610", "utm10n"),
        ("EPSG:32601", "utm01n"),
        ("EPSG:32660", "utm60n"),
        ("EPSG:32733", "utm33s"),
        ("EPSG:4326", "epsg4326"),
        ("EPSG:2154", "epsg2154"),
        ("EPSG:26910", "epsg26910"),
        ("EPSG:32661", "epsg32661"),  # the north pole's, no UTM zone
        ("epsg:32610", "utm10n"),
        ("+proj=utm +zone=10 +datum=WGS84", "utm10n"),
    ],
)
def test_groups_have_known_names(crs, name):
    assert Grid.from_bounds(crs, 1, (0, 0, 1, 1)).name == name


def test_a_crs_without_a_code_has_a_name_that_a_group_can_bear():
    name = Grid.from_bounds("+proj=laea +lat_0=12.5 +lon_0=3", 1, (0, 0, 1, 1)).name
    assert name.isidentifier()
    assert name.islower()
    assert len(name) <= 32


@pytest.mark.parametrize("code", [32610, 32733, 4326, 2154, 26918, 3857])
def test_a_crs_has_one_name_however_it_comes(code):
    known = CRS.from_epsg(code)
    forms = [known, f"EPSG:{code}", code, known.to_wkt(), known.to_wkt("WKT1_GDAL")]
    forms += [rasterio_crs.CRS.from_epsg(code), rasterio_crs.CRS.from_epsg(code).to_wkt()]
    assert {crs_name(form) for form in forms} == {f"EPSG:{code}"}


def test_a_crs_without_a_code_keeps_its_meaning():
    custom = CRS.from_user_input("+proj=laea +lat_0=12.5 +lon_0=3 +datum=WGS84")
    assert CRS.from_user_input(crs_name(custom)) == custom


# --- ground ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "source", "target"),
    [
        (NORCAL[2], "EPSG:32610", "EPSG:4326"),
        (NORCAL[2], "EPSG:32610", "EPSG:32611"),
        ((-1.5, 44, 1.5, 46), "EPSG:4326", "EPSG:32630"),
        ((-1.5, 44, 1.5, 46), "EPSG:4326", "EPSG:2154"),
        ((100_000, 0, 900_000, 9_000_000), "EPSG:32733", "EPSG:4326"),
        ((500_000, 0, 900_000, 100_000), "EPSG:32660", "EPSG:4326"),  # over the 180th meridian
    ],
)
def test_bounds_move_as_those_of_rasterio(bounds, source, target):
    moved = reproject_bounds(bounds, source, target)
    np.testing.assert_allclose(moved, transform_bounds(source, target, *bounds), rtol=1e-12)


@ANY
@given(
    place=st.tuples(st.integers(200_000, 700_000), st.integers(10_000, 7_000_000)),
    size=st.tuples(st.integers(10, 100_000), st.integers(10, 100_000)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_moved_bounds_hold_every_point(place, size, share):
    bounds = (*place, place[0] + size[0], place[1] + size[1])
    west, south, east, north = reproject_bounds(bounds, "EPSG:32610", "EPSG:4326")
    point = [start + length * part for start, length, part in zip(place, size, share, strict=True)]
    lon, lat = Transformer.from_crs("EPSG:32610", "EPSG:4326", always_xy=True).transform(*point)
    slack = 1e-5  # degrees: the arcs between the 21 points of an edge
    assert west - slack <= lon <= east + slack
    assert south - slack <= lat <= north + slack


def test_bounds_in_the_same_crs_stay_as_they_are():
    assert reproject_bounds((1, 2, 3, 4), "EPSG:32610", "EPSG:32610") == (1, 2, 3, 4)


def test_bounds_that_cannot_be_shown_are_bad_input():
    far = (1_000_000_000, 0, 2_000_000_000, 1)
    with pytest.raises(InputError, match=r"\[1000000000, .* in EPSG:32610 cannot be shown in EPSG"):
        reproject_bounds(far, "EPSG:32610", "EPSG:4326")


@pytest.mark.parametrize("latitude", [-60, 0, 45, 70])
def test_a_pixel_in_degrees_is_as_large_as_the_ellipsoid_says(latitude):
    grid = Grid.from_bounds("EPSG:4326", 0.001, (5, latitude - 0.5, 6, latitude + 0.5))
    geod = Geod(ellps="WGS84")
    height = geod.inv(5.5, latitude - 0.0005, 5.5, latitude + 0.0005)[2]
    width = geod.inv(5.5, latitude, 5.501, latitude)[2]
    assert grid.pixel_metres() == pytest.approx((height, width), rel=0.01)


def test_a_pixel_in_feet_is_given_in_metres():
    grid = Grid.from_bounds("EPSG:2227", 100, (6_000_000, 2_000_000, 6_000_100, 2_000_100))
    assert grid.pixel_metres() == pytest.approx((30.48006, 30.48006), rel=1e-6)


def test_rows_of_degrees_get_narrower_whatever_the_cut():
    grid = Grid("EPSG:4326", 0.01, 10.0, 70.0, (1000, 30))
    widths = grid.pixel_widths()
    assert widths.shape == (1000, 1)
    assert widths[0, 0] == pytest.approx(1113.2 * np.cos(np.radians(69.995)))
    part = grid.part(Region(300, 7, 50, 9)).pixel_widths()
    np.testing.assert_allclose(part, widths[300:350], rtol=1e-12)
    flat = Grid("EPSG:32631", 10, 0, 0, (3, 4))
    np.testing.assert_array_equal(flat.pixel_widths(), np.full((3, 1), 10.0))
