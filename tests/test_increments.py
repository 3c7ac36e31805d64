"""Tiles and years that come later: only what they touch is made again, and what stands on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio

from pipelines.world import World
from tests.runs import (
    Region,
    Regions,
    Result,
    arrays,
    flip,
    one_message,
    same_map,
    snapshot,
    whole_shards,
)

Command = Callable[..., Result]


def tiles_of(world: World, folder: Path) -> list[Path]:
    """A copy of the world's tiles."""
    shutil.copytree(world.embeddings, folder)
    return sorted(folder.rglob("*.tiff"))


def pending(aeheight: Command, verb: str, region: Region) -> int:
    result = aeheight(verb, region.path, "--plan", "--json")
    assert result.code == 0, result.err
    return int(json.loads(result.out)["pending"])


def changed(before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]]) -> set[str]:
    """Files of a tree that were written since, or are new."""
    return {name for name, state in after.items() if before.get(name) != state}


def test_a_tile_that_comes_later(world: World, regions: Regions, aeheight: Command) -> None:
    tiles = tiles_of(world, regions.folder / "tiles")
    late = regions.folder / "late.tiff"
    shutil.move(tiles[-1], late)
    region = regions.write("late", embeddings={"href": "tiles"}, height=None, prior=None)
    assert aeheight("ingest", region.path).code == 0
    before, first = snapshot(region.cube), arrays(region.cube)["embedding"]

    shutil.move(late, tiles[-1])
    touched = pending(aeheight, "ingest", region)
    assert 0 < touched < len(region.receipts("cube"))
    result = aeheight("ingest", region.path)
    assert result.code == 0
    assert f"{touched} shards done" in result.out
    data = {name for name in changed(before, snapshot(region.cube)) if "/embedding/c/" in name}
    assert len(data) == touched
    assert whole_shards(region, "cube") == len(region.receipts("cube"))

    whole = regions.write("whole", height=None, prior=None)
    assert aeheight("ingest", whole.path).code == 0
    np.testing.assert_array_equal(arrays(region.cube)["embedding"], arrays(whole.cube)["embedding"])
    assert (first != arrays(region.cube)["embedding"]).any()

    # The same files in another folder are the same files; one that is gone is missed.
    shutil.move(regions.folder / "tiles", regions.folder / "moved")
    region = regions.write("late", embeddings={"href": "moved"}, height=None, prior=None)
    assert pending(aeheight, "ingest", region) == 0
    (regions.folder / "moved" / tiles[-1].relative_to(regions.folder / "tiles")).unlink()
    before = snapshot(region.store)
    for arguments in ([], ["--plan"]):
        result = aeheight("ingest", region.path, *arguments)
        assert result.code == 2
        one_message(result.err, "1 of the files", "no longer there", tiles[-1].name, "--overwrite")
    assert snapshot(region.store) == before


def write_year(world: World, folder: Path, year: int, shift: int) -> None:
    """The world's tiles as those of another year: each code of another band."""
    for tile in sorted(world.embeddings.rglob("*.tiff")):
        target = folder / str(year) / tile.parent.name / tile.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(tile) as source:
            profile, codes = source.profile, source.read()
        with rasterio.open(target, "w", **profile) as copy:
            copy.write(np.roll(codes, shift, axis=0))


def test_years_that_come_later(world: World, regions: Regions, aeheight: Command) -> None:
    """One before and one after the first: what is there moves along the axis, as it is."""
    folder = regions.folder / "tiles"
    tiles_of(world, folder)
    for year, shift in ((2019, 3), (2023, 7)):
        write_year(world, folder, year, shift)
    region = regions.write("years", embeddings={"href": "tiles", "year": 2021}, prior=None)
    assert aeheight("ingest", region.path).code == 0
    first = arrays(region.cube)

    region = regions.write(
        "years", embeddings={"href": "tiles", "year": [2019, 2021, 2023]}, prior=None
    )
    shards = len(region.receipts("cube"))
    result = aeheight("train", region.path)
    assert result.code == 2
    one_message(result.err, "years", "run aeheight ingest")
    codes = first["embedding"].shape[2] // 64 * (first["embedding"].shape[3] // 64)
    assert pending(aeheight, "ingest", region) == 2 * codes
    result = aeheight("ingest", region.path)
    assert result.code == 0, result.err
    assert f"{2 * codes} shards done" in result.out
    assert f"{shards} done before" in result.out
    now = arrays(region.cube)
    np.testing.assert_array_equal(now["height"], first["height"])
    np.testing.assert_array_equal(now["embedding"][1], first["embedding"][0])
    np.testing.assert_array_equal(now["embedding"][0], np.roll(first["embedding"][0], 3, axis=0))
    np.testing.assert_array_equal(now["embedding"][2], np.roll(first["embedding"][0], 7, axis=0))
    whole_shards(region, "cube")

    region = regions.write("years", embeddings={"href": "tiles", "year": 2021}, prior=None)
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, "years: [2019, 2021, 2023] -> [2021]", "--overwrite")


def test_what_stands_on_a_cube_follows_it(
    world: World, regions: Regions, aeheight: Command
) -> None:
    """Map and report are made again where a late tile is seen; then they are a fresh run's."""
    tiles = tiles_of(world, regions.folder / "tiles")
    late = regions.folder / "late.tiff"
    shutil.move(tiles[-1], late)
    changes = {
        "embeddings": {"href": "tiles"},
        "model": {"architecture": "ridge", "base": "none"},
        "predict": {"window": 64, "halo": 16, "batch": 2},
    }
    region = regions.write("follows", **changes)
    result = aeheight("run", region.path)
    assert result.code == 0, result.err
    shutil.move(late, tiles[-1])
    before = snapshot(region.heights)
    assert aeheight("ingest", region.path).code == 0
    shards = len(region.receipts("heights"))
    touched = pending(aeheight, "predict", region)
    assert 0 < touched < shards
    result = aeheight("run", region.path)
    assert result.code == 0, result.err
    made_again = {n for n in changed(before, snapshot(region.heights)) if "/height/c/" in n}
    assert len(made_again) == touched
    fresh = regions.write("fresh", **changes)
    result = aeheight("run", fresh.path, "--checkpoint", region.store)
    assert result.code == 0, result.err
    same_map(region, fresh)
    assert region.metrics()["model"] == fresh.metrics()["model"]


def test_a_tile_outside_the_grid_is_refused_where_tiles_fix_it(
    world: World, regions: Regions, aeheight: Command
) -> None:
    tiles = tiles_of(world, regions.folder / "tiles")
    late = regions.folder / "late.tiff"
    for tile in tiles[2:]:
        shutil.move(tile, late)
    region = regions.write(
        "grows", embeddings={"href": "tiles"}, height=None, prior=None, grid=None
    )
    assert aeheight("ingest", region.path).code == 0
    shutil.move(late, tiles[2])
    for verb in (("ingest",), ("ingest", "--plan")):
        result = aeheight(verb[0], region.path, *verb[1:])
        assert result.code == 2
        one_message(result.err, "another grid", "utm31n: [431230.0", "aoi", "--overwrite")


def test_files_of_equal_names_are_counted(
    world: World, regions: Regions, aeheight: Command
) -> None:
    """Two folders with a `dem.tif` each: the disk of one is not there today."""
    for name in ("west", "east"):
        (regions.folder / name).mkdir()
        shutil.copy2(world.prior, regions.folder / name / "dem.tif")
    about = {"surface": "dsm", "vertical_datum": "EPSG:5773"}
    height = {"source": "raster", "href": ["west", "east"], **about}
    region = regions.write("names", height=height, prior=None)
    assert aeheight("ingest", region.path).code == 0
    (regions.folder / "east" / "dem.tif").rename(regions.folder / "elsewhere.tif")
    (regions.folder / "east" / "other.tif").symlink_to(world.prior)
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, "1 of the files", "no longer there")


def test_a_file_that_was_corrected_is_read_again(
    world: World, regions: Regions, aeheight: Command
) -> None:
    """In place, header and size the same; and its heights move the report's classes."""
    path = regions.folder / "dsm.tif"
    with rasterio.open(world.prior) as source:
        profile, heights = source.profile, source.read(1)
    profile = {k: profile[k] for k in ("width", "height", "crs", "transform", "dtype", "count")}

    def write(values: np.ndarray) -> None:
        with rasterio.open(path, "w", driver="GTiff", **profile) as target:
            target.write(values, 1)

    write(heights)
    size = path.stat().st_size
    about = {"surface": "dsm", "vertical_datum": "EPSG:5773"}
    region = regions.write(
        "corrected",
        height={"source": "raster", "href": "dsm.tif", **about},
        prior=None,
        model={"architecture": "ridge", "base": "none"},
        predict={"window": 64, "halo": 16, "batch": 2},
    )
    assert aeheight("run", region.path).code == 0
    before = arrays(region.cube)["height"]
    write(heights + 900)
    assert path.stat().st_size == size
    result = aeheight("run", region.path)
    assert result.code == 0, result.err
    np.testing.assert_allclose(arrays(region.cube)["height"], before + 900, atol=1e-3)
    assert min(row["lo"] for row in region.metrics()["by"]["height"]) > 800


def test_repair_of_the_only_shard_keeps_the_cube(
    regions: Regions, aeheight: Command, scheduler: str
) -> None:
    at = ("--scheduler", scheduler)
    region = regions.write("single", height=None, prior=None, cube={"shard": 256, "chunk": 128})
    assert aeheight("ingest", region.path, *at).code == 0
    identity = json.loads((region.cube / "zarr.json").read_text())["attributes"]["aeheight"]
    flip(region.cube / "utm31n" / "embedding" / "c" / "0" / "0" / "0" / "0")
    assert aeheight("verify", region.path, *at).code == 1
    assert aeheight("verify", region.path, "--repair", *at).code == 0
    assert aeheight("verify", region.path, *at).code == 0
    now = json.loads((region.cube / "zarr.json").read_text())["attributes"]["aeheight"]
    assert now["identity"] == identity["identity"]


def test_heights_may_come_later_and_be_named_better(
    world: World, regions: Regions, aeheight: Command
) -> None:
    """A cube of embeddings gets heights; a mended `nodata` makes only these again."""
    path = regions.folder / "dsm.tif"
    with rasterio.open(world.prior) as source:
        profile, heights = source.profile, source.read(1)
    heights[:40] = -9999
    profile = {k: profile[k] for k in ("width", "height", "crs", "transform", "dtype", "count")}
    with rasterio.open(path, "w", driver="GTiff", **profile) as target:
        target.write(heights, 1)
    region = regions.write("later", height=None, prior=None)
    assert aeheight("ingest", region.path).code == 0
    codes = arrays(region.cube)["embedding"]
    before = snapshot(region.cube / "utm31n" / "embedding" / "c")

    height = {"source": "raster", "href": "dsm.tif", "surface": "dsm",
              "vertical_datum": "EPSG:5773"}  # fmt: skip
    region = regions.write("later", height=height, prior=None)
    result = aeheight("ingest", region.path)
    assert result.code == 1
    assert "-9999" in result.out
    assert "nodata" in result.out
    region = regions.write("later", height=height | {"nodata": -9999}, prior=None)
    result = aeheight("ingest", region.path)
    assert result.code == 0, result.err
    assert "16 done before" in result.out
    assert snapshot(region.cube / "utm31n" / "embedding" / "c") == before
    found = arrays(region.cube)
    assert set(found) == {"embedding", "height", "split"}
    np.testing.assert_array_equal(found["embedding"], codes)
    assert np.nanmin(found["height"]) > 0
    region = regions.write("later", height=None, prior=None)
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, "taken away", "--overwrite")
