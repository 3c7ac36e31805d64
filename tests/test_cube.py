"""The tree: made once, read by others with coordinates and CRS, written in any order."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 (registers .rio)
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from aeheight.cube import Tree, checksum, create, find, open_cube, open_tree
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import CubeSettings
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template
from aeheight.windows import Region, whole
from tests.trees import (
    DEGREES,
    LAYERS,
    TEMPLATE,
    UTM,
    bytes_of,
    full_disk,
    full_tree,
    mosaic,
    values_for,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "cube.zarr")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, dict[str, np.ndarray]]:
    return full_tree(Store.at(tmp_path_factory.mktemp("full") / "cube.zarr"))


# --- shards and templates -----------------------------------------------------------------------


def test_shards_cover_every_pixel_once() -> None:
    for layer in LAYERS:
        for grid in TEMPLATE.grids:
            times = np.zeros(grid.shape, int)
            for shard in TEMPLATE.shards(layer.name):
                if shard.group == grid.name:
                    times[shard.region.slices] += 1
            assert np.unique(times).tolist() == [2 if layer.timed else 1]


def test_shard_names_parse_back_and_differ() -> None:
    shards = [shard for layer in LAYERS for shard in TEMPLATE.shards(layer.name)]
    assert [Shard.parse(shard.name) for shard in shards] == shards
    assert len({shard.name for shard in shards}) == len(shards)
    assert "utm10n/embedding/2022/r0000032-c0000064-18x6" in {shard.name for shard in shards}
    assert "epsg4326/height/static/r0000000-c0000032-20x1" in {shard.name for shard in shards}


def test_template_survives_its_description() -> None:
    described = json.loads(json.dumps(TEMPLATE.describe()))
    assert described["layers"]["embedding"]["nodata"] == -128
    assert described["layers"]["height"]["nodata"] == "NaN"


def test_checksum_sees_type_shape_and_values() -> None:
    values = np.arange(12, dtype=np.int8).reshape(3, 4)
    sums = {
        checksum(values),
        checksum(values.astype(np.uint8)),
        checksum(values.reshape(4, 3)),
        checksum(values + 1),
    }
    assert len(sums) == 4
    assert checksum(np.asfortranarray(values)) == checksum(values)
    assert checksum(values[:, ::-1][:, ::-1]) == checksum(values)


# --- create and open ----------------------------------------------------------------------------


def test_create_and_open(store: Store) -> None:
    made = create(store, TEMPLATE)
    opened = open_tree(store)
    assert opened.identity == made.identity
    assert opened.template.describe() == TEMPLATE.describe()
    assert opened.template.grids == TEMPLATE.grids
    assert opened.template.years == TEMPLATE.years
    assert opened.template.cut == TEMPLATE.cut
    assert [layer.dims for layer in opened.template.layers] == [
        ("time", "band", "y", "x"),
        ("y", "x"),
        ("y", "x"),
    ]


def test_creating_again_opens_and_keeps_the_pixels(store: Store) -> None:
    tree = create(store, TEMPLATE)
    shard = TEMPLATE.shards("height")[0]
    values = values_for(shard)
    tree.write(shard, values)
    before = bytes_of(tree)
    again = create(store, TEMPLATE)
    assert again.identity == tree.identity
    assert bytes_of(again) == before


def test_two_trees_two_identities(tmp_path: Path) -> None:
    one, two = (create(Store.at(tmp_path / name), TEMPLATE) for name in "ab")
    assert one.identity != two.identity


def test_made_anew_in_the_same_place_is_another_tree(store: Store) -> None:
    old = create(store, TEMPLATE)
    store.remove()
    new = create(store, replace(TEMPLATE, years=(2021,)))
    assert new.identity != old.identity
    shard = replace(TEMPLATE.shards("embedding")[0], year=2021)
    values = values_for(shard)
    new.write(shard, values)
    assert np.array_equal(open_tree(store).read("utm10n", "embedding", 2021, shard.region), values)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        (replace(TEMPLATE, years=(2020, 2021)), "years: .*2022.* -> .*2021"),
        (replace(TEMPLATE, cut=CubeSettings(shard=48, chunk=16)), "cut.shard: 32 -> 48"),
        (
            replace(TEMPLATE, grids=(replace(UTM, left=403210.0), DEGREES)),
            "utm10n.left: 403200.0 -> 403210.0",
        ),
        (replace(TEMPLATE, layers=LAYERS[:2]), "layers.split"),
        (
            replace(TEMPLATE, layers=(LAYERS[0], replace(LAYERS[1], nodata=-1.0), LAYERS[2])),
            "layers.height.nodata: 'NaN' -> -1",
        ),
    ],
)
def test_another_template_is_refused_with_the_difference(
    store: Store, changed: Template, shown: str
) -> None:
    tree = create(store, TEMPLATE)
    before = bytes_of(tree)
    with pytest.raises(InputError, match=shown) as caught:
        create(store, changed)
    assert "--overwrite" in str(caught.value)
    assert bytes_of(tree) == before


def test_a_half_made_tree_is_taken_up(store: Store) -> None:
    """The driver died before the metadata was consolidated."""
    identity = create(store, TEMPLATE).identity
    metadata = json.loads(store.read("zarr.json"))
    del metadata["consolidated_metadata"]
    store.write("zarr.json", json.dumps(metadata).encode())
    store.remove("utm10n/split")
    assert find(store) is None
    with pytest.raises(InputError, match="no cube"):
        open_tree(store)
    tree = create(store, TEMPLATE)
    assert tree.identity != identity
    shard = TEMPLATE.shards("split")[-1]
    tree.write(shard, values_for(shard))


def test_no_tree(store: Store) -> None:
    assert find(store) is None
    for opening in (lambda: open_tree(store), lambda: open_cube(store.uri)):
        with pytest.raises(InputError, match="run the step that makes it"):
            opening()
    assert not Path(store.uri).exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_foreign_zarr_is_refused_and_kept(store: Store, zarr_format: int) -> None:
    group = zarr.open_group(store.uri, mode="w", zarr_format=zarr_format)
    group.create_array("a", shape=(3,), dtype="int8")[:] = 5
    with pytest.raises(InputError, match="did not make"):
        create(store, TEMPLATE)
    assert zarr.open_group(store.uri, mode="r")["a"][:].tolist() == [5, 5, 5]


@pytest.mark.parametrize("name", ["thesis.txt", "zarr.json"])
@pytest.mark.parametrize("content", ["", "[]", "my life's work"])
def test_a_folder_of_other_things_is_refused_and_kept(
    store: Store, name: str, content: str
) -> None:
    store.write(name, content.encode())
    with pytest.raises(InputError, match="did not make"):
        create(store, TEMPLATE)
    assert store.read(name) == content.encode()


def test_an_unknown_format_is_refused(store: Store) -> None:
    create(store, TEMPLATE)
    metadata = json.loads(store.read("zarr.json"))
    metadata["attributes"]["aeheight"]["format"] = 99
    store.write("zarr.json", json.dumps(metadata).encode())
    with pytest.raises(InputError, match="format 99, this version reads 2"):
        create(store, TEMPLATE)


def test_a_full_disk_while_creating_is_an_oserror_and_can_be_taken_up(store: Store) -> None:
    with full_disk(600), pytest.raises(OSError, match=r"cannot create .*File too large") as caught:
        create(store, TEMPLATE)
    assert "\n" not in str(caught.value)
    assert find(store) is None
    assert create(store, TEMPLATE).template.describe() == TEMPLATE.describe()


# --- what others read ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", TEMPLATE.grids, ids=lambda grid: grid.name)
@pytest.mark.parametrize("way", ["open_cube", "open_datatree", "open_zarr"])
def test_xarray_reads_coordinates_crs_and_values(
    full: tuple[Tree, dict[str, np.ndarray]], grid: Grid, way: str
) -> None:
    tree, written = full
    uri = tree.store.uri
    if way == "open_cube":
        ds = open_cube(uri)[grid.name].to_dataset()
    elif way == "open_datatree":
        ds = xr.open_datatree(uri, engine="zarr")[grid.name].to_dataset()
    else:
        ds = xr.open_zarr(uri, group=grid.name, consolidated=False)
    np.testing.assert_array_equal(
        ds.x, grid.left + (np.arange(grid.shape[1]) + 0.5) * grid.resolution
    )
    np.testing.assert_array_equal(
        ds.y, grid.top - (np.arange(grid.shape[0]) + 0.5) * grid.resolution
    )
    assert [str(day) for day in ds.time.values.astype("datetime64[D]")] == [
        "2020-01-01",
        "2022-01-01",
    ]
    for layer in LAYERS:
        array = ds[layer.name]
        assert array.dtype == np.dtype(layer.dtype)
        assert array.dims == layer.dims
        assert "_FillValue" not in array.attrs
        assert "_FillValue" not in array.encoding
        assert array.rio.crs.to_epsg() == int(grid.crs.split(":")[1])
        with warnings.catch_warnings():  # rioxarray multiplies affines the old way
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            found = [array.rio.transform(recalc=recalc) for recalc in (False, True)]
        assert all(np.allclose(affine, grid.transform, rtol=1e-12, atol=0) for affine in found)
        year = 2022 if layer.timed else None
        plane = array.sel(time="2022-01-01") if layer.timed else array
        np.testing.assert_array_equal(plane, mosaic(written, grid.name, layer.name, year))
    assert ds.embedding.attrs["nodata"] == -128
    assert ds.embedding.attrs["long_name"] == "codes"
    assert ds.height.attrs["units"] == "m"


def test_consolidated_zarr_3(full: tuple[Tree, dict[str, np.ndarray]]) -> None:
    root = json.loads(full[0].store.read("zarr.json"))
    assert root["zarr_format"] == 3
    known = root["consolidated_metadata"]["metadata"]
    assert {"utm10n", "utm10n/embedding", "epsg4326/height", "epsg4326/spatial_ref"} <= set(known)
    embedding = known["utm10n/embedding"]
    assert embedding["fill_value"] == -128
    assert embedding["chunk_grid"]["configuration"]["chunk_shape"] == [1, 3, 32, 32]
    sharding = embedding["codecs"][0]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 3, 16, 16]
    assert not [name for name, entry in known.items() if "/" not in name and "shape" in entry]


def test_geozarr_attributes(full: tuple[Tree, dict[str, np.ndarray]]) -> None:
    root = zarr.open_group(full[0].store.uri, mode="r")
    about = dict(root["utm10n"].attrs)
    assert about["proj:code"] == "EPSG:32610"
    assert about["spatial:dimensions"] == ["y", "x"]
    assert about["spatial:transform"] == [10, 0, 403200, 0, -10, 4279500]
    assert about["spatial:bbox"] == [403200, 4279000, 403900, 4279500]
    assert about["spatial:shape"] == [50, 70]
    assert [entry["name"] for entry in about["zarr_conventions"]] == ["proj:", "spatial:"]
    assert dict(root["epsg4326"].attrs)["proj:code"] == "EPSG:4326"


def test_cf_grid_mapping(full: tuple[Tree, dict[str, np.ndarray]]) -> None:
    root = zarr.open_group(full[0].store.uri, mode="r")
    for name in ("utm10n", "epsg4326"):
        mapping = dict(root[name]["spatial_ref"].attrs)
        epsg = 32610 if name == "utm10n" else 4326
        assert CRS.from_cf(mapping).to_epsg() == epsg
        assert CRS.from_wkt(mapping["spatial_ref"]).to_epsg() == epsg
    assert dict(root["epsg4326"]["y"].attrs)["units"] == "degrees_north"
    assert dict(root["utm10n"]["y"].attrs)["standard_name"] == "projection_y_coordinate"


def test_a_crs_without_a_code(store: Store) -> None:
    wkt = CRS.from_proj4("+proj=laea +lat_0=50 +lon_0=8 +ellps=GRS80 +units=m").to_wkt()
    grid = Grid(wkt, 10.0, 0.0, 0.0, (5, 6))
    create(store, replace(TEMPLATE, grids=(grid,)))
    ds = open_cube(store.uri)[grid.name].to_dataset()
    assert CRS.from_user_input(ds.height.rio.crs) == CRS.from_wkt(wkt)
    assert "proj:wkt2" in ds.attrs
    assert open_tree(store).template.grids == (grid,)


# --- reading ------------------------------------------------------------------------------------


@given(
    row=st.integers(-40, 80),
    col=st.integers(-40, 100),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    layer=st.sampled_from(LAYERS),
)
@settings(max_examples=60, deadline=None)
def test_read_any_region_gives_nodata_past_the_edges(
    full: tuple[Tree, dict[str, np.ndarray]],
    row: int,
    col: int,
    height: int,
    width: int,
    layer: Layer,
) -> None:
    tree, written = full
    year = 2020 if layer.timed else None
    whole_layer = mosaic(written, "utm10n", layer.name, year)
    margin = [(0, 0)] * (whole_layer.ndim - 2) + [(40, 140)] * 2
    padded = np.pad(whole_layer, margin, constant_values=np.dtype(layer.dtype).type(layer.nodata))
    wanted = padded[..., row + 40 : row + 40 + height, col + 40 : col + 40 + width]
    found = tree.read("utm10n", layer.name, year, Region(row, col, height, width))
    assert found.dtype == np.dtype(layer.dtype)
    np.testing.assert_array_equal(found, wanted)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_shards_in_any_order_and_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any order, some never, some twice: the last values of each, nodata elsewhere."""
    tree = create(Store.at(tmp_path_factory.mktemp("order") / "cube.zarr"), TEMPLATE)
    shards = TEMPLATE.shards("height") + TEMPLATE.shards("embedding")
    order = data.draw(st.lists(st.sampled_from(shards), max_size=20))
    written = {}
    for shard in order:
        written[shard.name] = values_for(shard)
        assert tree.write(shard, written[shard.name]) == checksum(written[shard.name])
    fresh = open_tree(tree.store)
    for layer, year in (("height", None), ("embedding", 2020), ("embedding", 2022)):
        found = fresh.read("utm10n", layer, year, whole(UTM.shape))
        np.testing.assert_array_equal(found, mosaic(written, "utm10n", layer, year))


def test_nodata_over_values_takes_them_away(store: Store) -> None:
    tree = create(store, TEMPLATE)
    shard = TEMPLATE.shards("height")[0]
    tree.write(shard, values_for(shard))
    nothing = np.full(shard.region.shape, np.nan, np.float32)
    digest = tree.write(shard, nothing)
    found = tree.read(shard.group, "height", None, shard.region)
    assert np.isnan(found).all()
    assert checksum(found) == digest


def test_any_nan_is_the_same_nan_to_the_checksum(store: Store) -> None:
    """Zarr leaves out an all-NaN chunk; a NaN with a sign would come back without it."""
    tree = create(store, TEMPLATE)
    shard = TEMPLATE.shards("height")[0]
    negative = np.full(shard.region.shape, 0xFFC00001, np.uint32).view(np.float32)
    digest = tree.write(shard, negative)
    assert checksum(tree.read(shard.group, "height", None, shard.region)) == digest


@pytest.mark.parametrize("decode", [False, True])
def test_what_is_opened_can_be_written_elsewhere(
    store: Store, tmp_path: Path, decode: bool
) -> None:
    """A crop to a GeoTIFF and to Zarr, whatever the cube is stored as."""
    full_tree(store)
    group = open_cube(store.uri, decode=decode)[UTM.name].to_dataset()
    part = group.isel(time=0, y=slice(3, 40), x=slice(5, 61))
    wanted = part.embedding.to_numpy()
    assert wanted.dtype == ("float32" if decode else "int8")
    assert len(np.unique(wanted[np.isfinite(wanted)])) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # rioxarray's use of affine
        part.embedding.rio.to_raster(tmp_path / "part.tif")
    with rasterio.open(tmp_path / "part.tif") as written:
        np.testing.assert_array_equal(written.read(), wanted)
        assert written.crs.to_epsg() == 32610
        assert written.bounds.left == UTM.left + 5 * UTM.resolution
    part.compute().to_zarr(tmp_path / "part.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "part.zarr", consolidated=False)
    np.testing.assert_array_equal(again.embedding, wanted)
    np.testing.assert_array_equal(again.height, part.height)


def test_the_store_of_a_run_is_no_cube(store: Store) -> None:
    full_tree(store)
    with pytest.raises(InputError, match=r"is a run's store: name .*/cube\.zarr"):
        open_cube(str(Path(store.uri).parent))
