"""STAC items of heights: the same pixels as the files themselves, whatever the catalogue's form."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pystac
import pytest
import rasterio
from affine import Affine
from pyproj import Transformer
from rasterio.warp import transform_bounds

from aeheight.errors import InputError
from aeheight.grid import Grid
from tests.tifs import (
    CRS,
    DATA,
    GRID,
    LEFT,
    STEP,
    TOP,
    block_mean,
    read,
    source_of,
    terrain,
    write_heights,
)


def item_of(path: Path, projection: str = "code") -> pystac.Item:
    """A STAC item as catalogues of heights have them."""
    with rasterio.open(path) as dataset:
        bounds = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        shape, transform = list(dataset.shape), list(dataset.transform)[:6]
        epsg = dataset.crs.to_epsg()
    w, s, e, n = bounds
    ring = [[[w, s], [e, s], [e, n], [w, n], [w, s]]]
    named = {"code": {"proj:code": f"EPSG:{epsg}"}, "epsg": {"proj:epsg": epsg}, "none": {}}
    properties = named[projection]
    if projection != "none":
        properties = properties | {"proj:shape": shape, "proj:transform": transform}
    item = pystac.Item(
        path.stem, {"type": "Polygon", "coordinates": ring}, list(bounds),
        datetime(2020, 1, 1, tzinfo=UTC), properties,
    )  # fmt: skip
    item.add_asset("data", pystac.Asset(str(path), roles=["data"]))
    item.add_asset("thumbnail", pystac.Asset("gone.png"))
    return item


def catalogue(folder: Path, paths: list[Path], projection: str = "code") -> Path:
    """A static catalogue with a collection, relative links and relative assets."""
    items = [item_of(path, projection) for path in paths]
    root = pystac.Catalog("heights", "made for a test")
    collection = pystac.Collection("dsm", "heights", pystac.Extent.from_items(items))
    root.add_child(collection)
    collection.add_items(items)
    root.normalize_hrefs(str(folder))
    for item in items:
        item.make_asset_hrefs_relative()
    root.save(pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


@pytest.mark.parametrize("projection", ["code", "epsg", "none"])
@pytest.mark.parametrize("kind", ["2 m", "10 m", "30 m", "degrees"])
def test_stac_equals_the_raster_way(tmp_path: Path, projection: str, kind: str) -> None:
    west, _, _, north = transform_bounds(CRS, "EPSG:4326", *GRID.bounds)
    path = {
        "2 m": lambda p: write_heights(p, terrain(150, 180, 0.2), step=2.0),
        "10 m": lambda p: write_heights(p, terrain(30, 36, 0.2)),
        "30 m": lambda p: write_heights(p, terrain(12, 14, 0.2), LEFT - 31, TOP + 17, 30.0),
        "degrees": lambda p: write_heights(
            p, terrain(20, 20, 0.2), west - 1e-3, north + 1e-3, 1 / 3600, crs="EPSG:4326"
        ),
    }[kind](tmp_path / "dsm.tif")
    wanted = read(path)
    found = read(catalogue(tmp_path / "stac", [path], projection), source="stac")
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["catalogue", "collection", "item", "features", "list"])
def test_stac_in_all_its_forms(tmp_path: Path, kind: str) -> None:
    paths = [
        write_heights(tmp_path / "a.tif", terrain(60, 36), step=5.0),
        write_heights(tmp_path / "b.tif", terrain(60, 36), LEFT + 180, step=5.0),
    ]
    root = catalogue(tmp_path / "stac", paths)
    items = sorted((tmp_path / "stac").rglob("[ab].json"))
    href: Any = {
        "catalogue": root,
        "collection": root.parent / "dsm" / "collection.json",
        "item": items[0],
        "list": items,
        "features": tmp_path / "search.json",
    }[kind]
    described = [item_of(path).to_dict() for path in paths]
    for feature in described:  # as a search saves them: no links, hrefs beside the file
        feature["links"] = []
        feature["assets"]["data"]["href"] = Path(feature["assets"]["data"]["href"]).name
    (tmp_path / "search.json").write_text(
        json.dumps({"type": "FeatureCollection", "features": described})
    )
    wanted = read(paths[:1] if kind == "item" else paths)
    np.testing.assert_array_equal(read(href, source="stac"), wanted)


def test_of_several_items_the_first_valid_height_counts(tmp_path: Path) -> None:
    paths = [write_heights(tmp_path / f"{n}.tif", terrain(30, 36, 0.4)) for n in range(3)]
    items = [str(catalogue(tmp_path / f"stac{n}", [path])) for n, path in enumerate(paths)]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = read([items[n] for n in order], source="stac")
        np.testing.assert_array_equal(found, read([paths[n] for n in order]))


def test_a_missing_value_named_for_stac_does_not_bleed(tmp_path: Path) -> None:
    heights = terrain(150, 180, 0.1)
    voids = np.where(np.isnan(heights), np.float32(-9999), heights)
    path = write_heights(tmp_path / "dsm.tif", voids, step=2.0, nodata=None)
    found = read(catalogue(tmp_path / "stac", [path]), source="stac", nodata=-9999)
    np.testing.assert_allclose(found, block_mean(heights, 5), rtol=1e-6)


def test_stac_on_a_grid_without_a_code(tmp_path: Path) -> None:
    wkt = pyproj.CRS.from_proj4(
        "+proj=tmerc +lon_0=-122.1 +lat_0=38 +ellps=GRS80 +units=m"
    ).to_wkt()
    heights = np.full((200, 200), 42, np.float32)
    path = write_heights(tmp_path / "dsm.tif", heights, LEFT - 200, TOP + 200, 5.0)
    x, y = Transformer.from_crs(CRS, wkt, always_xy=True).transform(LEFT, TOP)
    grid = Grid(wkt, STEP, round(x), round(y), (20, 20))
    found = read(catalogue(tmp_path / "stac", [path]), grid, source="stac")
    np.testing.assert_array_equal(found, np.full((20, 20), 42, np.float32))


def test_an_asset_of_another_name(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    item = item_of(path)
    item.assets = {"dem": item.assets["data"], "data": item.assets["thumbnail"]}
    href = tmp_path / "item.json"
    item.save_object(include_self_link=False, dest_href=str(href))
    np.testing.assert_array_equal(read(href, source="stac", asset="dem"), read(path))
    with pytest.raises(InputError, match=r"no asset 'height'; it has \['data', 'dem'\]"):
        read(href, source="stac", asset="height")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as STAC"),
        ("", "cannot be read as STAC"),
        ("[]", "cannot be read as STAC"),
        ("{}", "cannot be read as STAC"),
        ('{"type": "Feature"}', "cannot be read as STAC"),
        ('{"type": "FeatureCollection"}', "cannot be read as STAC"),
        ('{"type": "FeatureCollection", "features": []}', "holds no STAC item"),
        ('{"type": "FeatureCollection", "features": [1]}', "cannot be read as STAC"),
    ],
)
def test_what_is_no_stac(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "stac.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "stac.json", source="stac")


def test_a_catalogue_with_a_broken_link(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    root = catalogue(tmp_path / "stac", [path])
    next((tmp_path / "stac").rglob("dsm.json")).unlink()
    with pytest.raises(InputError, match=r"catalog\.json cannot be read as STAC"):
        read(root, source="stac")


@pytest.mark.parametrize("projection", ["code", "none"])
def test_an_asset_that_is_gone(tmp_path: Path, projection: str) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    root = catalogue(tmp_path / "stac", [path], projection)
    path.unlink()
    with pytest.raises(InputError, match=r"dsm\.tif"):
        read(root, source="stac")


def test_a_truncated_asset_breaks_off_with_its_name(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "cut.tif", terrain(600, 720), step=0.5)
    root = catalogue(tmp_path / "stac", [path])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"cut\.tif breaks off"):
        read(root, source="stac")


def test_an_asset_of_several_bands(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "rgb.tif", np.ones((3, 30, 36), np.float32))
    for number, projection in enumerate(["code", "none"]):
        root = catalogue(tmp_path / f"stac{number}", [path], projection)
        with pytest.raises(InputError, match=r"rgb\.tif.* 3 bands; a height model has one"):
            read(root, source="stac")


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")
def test_real_stac_items_are_planned_without_a_network() -> None:
    """Near the south pole, where a pixel's longitude is ten times its latitude."""
    items = DATA / "stac" / "earth-search" / "cop-dem-glo-30__10items.json"
    everywhere = Grid("EPSG:3031", 1000.0, -300_000.0, 300_000.0, (600, 600))
    source = source_of(items, everywhere, source="stac")
    assert source.rasters
    assert {raster.crs for raster in source.rasters} == {"EPSG:4326"}
    assert all(raster.href.startswith("s3://") for raster in source.rasters)
    assert source.rasters[0].resolution == pytest.approx((1 / 360, 1 / 3600))
    with pytest.raises(InputError, match="share ground"):
        source_of(items, GRID, source="stac")


# --- geometry of items --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Area", "Point"])
@pytest.mark.parametrize("step", [2.0, 30.0])
def test_a_plane_through_stac_is_not_shifted(tmp_path: Path, kind: str, step: float) -> None:
    edge = int(600 / step)
    rows, cols = np.mgrid[:edge, :edge] + 0.5
    left, top = LEFT - 90, TOP + 90

    def plane(x: Any, y: Any) -> Any:
        return 200 + 0.3 * (x - LEFT) - 0.2 * (y - TOP)

    values = plane(left + cols * step, top - rows * step).astype(np.float32)
    path = write_heights(tmp_path / "plane.tif", values, left, top, step)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(AREA_OR_POINT=kind)
    found = read(catalogue(tmp_path / "stac", [path]), source="stac")
    np.testing.assert_allclose(found, plane(*np.meshgrid(GRID.x(), GRID.y())), atol=1e-4)


@pytest.mark.parametrize("step", [2.0, 10.0, 30.0])
def test_items_side_by_side_are_one_surface(tmp_path: Path, step: float) -> None:
    edge = int(600 / step)
    heights, corner = terrain(edge, edge, 0.1), (LEFT - 47, TOP + 33)
    one = write_heights(tmp_path / "one.tif", heights, *corner, step)
    half = edge // 2 + 1
    parts = [
        write_heights(tmp_path / "a.tif", heights[:, :half], *corner, step),
        write_heights(
            tmp_path / "b.tif", heights[:, half:], corner[0] + half * step, corner[1], step
        ),
    ]
    found = read(catalogue(tmp_path / "stac", parts), source="stac")
    np.testing.assert_array_equal(found, read(one))


def real_items(name: str) -> list[pystac.Item]:
    described = json.loads((DATA / "stac" / name).read_text())
    return [pystac.Item.from_dict(one) for one in described.get("features", [described])]


REAL = [
    "earth-search/cop-dem-glo-30__10items.json",
    "cop-dem/Copernicus_DSM_COG_10_N53_00_W115_00_DEM__"
    "Copernicus_DSM_COG_10_N53_00_W115_00_DEM.json",
]


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside the project")
@pytest.mark.parametrize("name", REAL, ids=["south pole", "Alberta"])
@pytest.mark.parametrize("form", ["proj:epsg", "proj:code", "nine numbers"])
def test_real_items_over_files_of_their_lattice(tmp_path: Path, name: str, form: str) -> None:
    """GLO-30 with local files: pixels are points, and longitudes are thinned."""
    items = real_items(name)[:2]
    paths = []
    for item in items:
        rows, cols = item.properties["proj:shape"]
        transform = Affine(*item.properties["proj:transform"][:6])
        path = tmp_path / f"{item.id}.tif"
        longitudes = transform.c + (np.arange(cols) + 0.5) * transform.a
        heights = np.broadcast_to(longitudes + 2000, (rows, cols)).astype(np.float32)
        with rasterio.open(
            path, "w", driver="GTiff", count=1, height=rows, width=cols, dtype="float32",
            crs="EPSG:4326", transform=transform, compress="zstd", tiled=True,
        ) as target:  # fmt: skip
            target.write(heights, 1)
            target.update_tags(AREA_OR_POINT="Point")
        paths.append(path)
        item.assets = {"data": pystac.Asset(str(path))}
        item.clear_links()
        item.properties.pop("proj:code", None)
        item.properties.pop("proj:epsg", None)
        named = {"proj:epsg": 4326} if form == "proj:epsg" else {"proj:code": "EPSG:4326"}
        item.properties |= named
        if form == "nine numbers":
            item.properties["proj:transform"] = [*list(transform)[:6], 0, 0, 1]
    href = tmp_path / "items.json"
    href.write_text(
        json.dumps({"type": "FeatureCollection", "features": [i.to_dict() for i in items]})
    )
    _, south, east, north = items[0].bbox or [0.0] * 4
    lon, lat = east - 1e-4, (south + north) / 2
    crs = "EPSG:3031" if south < -60 else "EPSG:32612"
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    grid = Grid(crs, 10.0, round(x) - 150.0, round(y) + 150.0, (30, 30))
    found = read(href, grid, source="stac")
    np.testing.assert_array_equal(found, read(paths, grid))
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    wanted = to_degrees.transform(*np.meshgrid(grid.x(), grid.y()))[0] + 2000
    known = np.isfinite(found)
    assert known.any()
    if len(items) == 2:  # the next tile goes on where the first ends
        assert known.all()
    inside = to_degrees.transform(*np.meshgrid(grid.x(), grid.y()))[0] < east - 5e-3
    check = known & (inside if len(items) == 1 else True)
    np.testing.assert_allclose(found[check], wanted[check], atol=5e-4)


@pytest.mark.parametrize(
    ("lost", "field"),
    [
        (["proj:code"], r"proj:code \(or proj:epsg\)"),
        (["proj:transform"], "proj:transform"),
        (["proj:shape"], "proj:shape"),
    ],
)
def test_an_item_without_projection(tmp_path: Path, lost: list[str], field: str) -> None:
    """Its file has it; where that cannot be opened either, item and field are named."""
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    item, href = item_of(path), tmp_path / "item.json"
    for name in lost:
        del item.properties[name]
    item.save_object(include_self_link=False, dest_href=str(href))
    np.testing.assert_array_equal(read(href, source="stac"), read(path))
    path.unlink()
    with pytest.raises(
        InputError, match=rf"height: STAC item dsm lacks {field}, and its asset: .*"
    ):
        read(href, source="stac")


def test_an_item_that_lies_elsewhere_than_its_file(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    item, href = item_of(path), tmp_path / "item.json"
    item.properties["proj:transform"][2] += 5.0
    item.save_object(include_self_link=False, dest_href=str(href))
    with pytest.raises(InputError, match=r"STAC item dsm: .*was described as .*403205"):
        read(href, source="stac")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"raster:bands": [{"unit": "foot"}]}, "STAC item dsm: its heights are in 'foot'"),
        ({"proj:transform": [7.0, 7.0, LEFT, 7.0, -7.0, TOP]}, "STAC item dsm has rotated"),
    ],
)
def test_items_that_are_no_heights(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    path = write_heights(tmp_path / "dsm.tif", terrain(30, 36))
    item, href = item_of(path), tmp_path / "item.json"
    item.properties |= about
    item.save_object(include_self_link=False, dest_href=str(href))
    with pytest.raises(InputError, match=message):
        read(href, source="stac")


def test_the_missing_value_of_an_item(tmp_path: Path) -> None:
    heights = terrain(150, 180, 0.1)
    voids = np.where(np.isnan(heights), np.float32(-999999), heights)
    path = write_heights(tmp_path / "dsm.tif", voids, step=2.0, nodata=None)
    item, href = item_of(path), tmp_path / "item.json"
    item.assets["data"].extra_fields["raster:bands"] = [{"nodata": -999999.0}]
    item.save_object(include_self_link=False, dest_href=str(href))
    np.testing.assert_allclose(read(href, source="stac"), block_mean(heights, 5), rtol=1e-6)
