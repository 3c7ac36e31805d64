"""What was once asked for is kept up: mosaics, pyramids and the catalogue, whatever happens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from pyproj import CRS
from rio_cogeo.cogeo import cog_validate

from aeheight.cube import open_tree
from aeheight.receipts import Ledger, receipt_for
from aeheight.store import Store
from tests.runs import Region, flip, run_here, snapshot
from tests.test_calibrate import EAST, WEST, Map, make_map
from tests.test_export_step import files, twin_of

SMALL = ("--set", "export.tile=256", "--set", "export.block=128")
MOSAIC = ("--set", "export.crs=EPSG:3310")
COARSE = ("--set", "export.resolution=200")
ZONES = tuple(replace(grid, shape=(150, 140)) for grid in (WEST, EAST))
"""Of two levels each."""
PYRAMIDS = ("--set", "export.pyramids=true")


@pytest.fixture(scope="module")
def workers(scheduler):
    """Where the commands of this file compute."""
    return "--scheduler", scheduler


@pytest.fixture(scope="module")
def done(tmp_path_factory, workers) -> Map:
    """Two zones, a coarse mosaic and pyramids; tests must leave it as it is."""
    made = make_map(tmp_path_factory.mktemp("kept"), grids=ZONES)
    asked = (*SMALL, *MOSAIC, *COARSE, *PYRAMIDS)
    result = run_here("export", made.region.path, *asked, *workers)
    assert result.code == 0, result.err
    return made


def content(region: Region) -> dict[str, bytes]:
    """Every file of an export."""
    root = region.store / "export"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def catalogue(region: Region) -> dict[str, Any]:
    return json.loads((region.store / "export" / "collection.json").read_text())


def linked(region: Region) -> set[str]:
    """Every file that the collection leads to; all must be there, and inside of the export."""
    root = (region.store / "export").resolve()
    found, left = set(), [root / "collection.json"]
    while left:
        path = left.pop()
        assert path.exists(), path
        name = str(path.relative_to(root))
        if name in found:
            continue
        found.add(name)
        if path.suffix == ".json":
            told = json.loads(path.read_text())
            each = [*told["links"], *told["assets"].values()]
            left += [(path.parent / one["href"]).resolve() for one in each]
    return found


def raise_heights(region: Region, group: str) -> None:
    """One shard of the map of 2021 is made anew, 40 m higher."""
    tree = open_tree(Store.at(region.heights))
    ledger = Ledger(Store.at(region.store / "heights.receipts"))
    shard = next(s for s in tree.template.shards("height") if s.group == group and s.year == 2021)
    values = tree.read(group, "height", 2021, shard.region) + np.float32(40)
    later = replace(shard, inputs="later")
    digest = tree.write(later, values)
    beside = ledger.receipt(shard.name).further
    ledger.forget([shard.name])
    made = receipt_for(later, values, digest, ~np.isnan(values), ledger.current().key, 0.0)
    ledger.leave(replace(made, further=beside))


def outcome(region: Region, workers, *settings: str) -> str:
    """What a finished export told."""
    result = run_here("export", region.path, *SMALL, *settings, *workers)
    assert result.code == 0, result.err
    return result.out


# Mosaics.


def test_a_mosaic_can_be_added_and_changed(tmp_path, workers):
    made = make_map(tmp_path, grids=(WEST, EAST))
    assert "4 shards done" in outcome(made.region, workers)
    plain = content(made.region)
    told = outcome(made.region, workers, *MOSAIC)
    assert "2 shards done" in told
    assert "4 done before" in told
    found = content(made.region)
    zones = {key for key in plain if key.startswith("utm")}
    assert {key: found[key] for key in zones} == {key: plain[key] for key in zones}
    (path,) = files(made.region, "mosaic-epsg3310/2021/height-*.tif")
    assert cog_validate(path, strict=True)[0]
    with rasterio.open(path) as opened:
        assert CRS.from_wkt(opened.crs.to_wkt()).sub_crs_list[0].to_epsg() == 3310
        assert np.isfinite(opened.read(1)).mean() > 0.8
    assert linked(made.region) == set(found)
    assert "2 shards done" in outcome(made.region, workers, *MOSAIC, *COARSE)
    (other,) = files(made.region, "mosaic-epsg3310/2021/height-*.tif")
    assert other != path
    assert linked(made.region) == set(content(made.region))
    assert run_here("verify", made.region.path, *workers).code == 0


def test_mosaics_and_pyramids_follow_the_map_without_being_asked_for_again(done, tmp_path, workers):
    """Against an export made anew from the changed map: every byte."""
    twin = twin_of(done, tmp_path)
    raise_heights(twin, "utm10n")
    before = content(twin)
    plan = json.loads(run_here("export", twin.path, *SMALL, "--plan", "--json").out)
    assert plan["mosaics"][0].startswith("EPSG:3310")
    assert plan["pending"] > 2
    outcome(twin, workers)
    after = content(twin)
    (key,) = (k for k in after if k.startswith("mosaic-epsg3310/2021/height-"))
    assert after[key] != before[key]
    outcome(twin, workers, "--overwrite", *MOSAIC, *COARSE, *PYRAMIDS)
    assert after == content(twin)


def test_a_second_mosaic_leaves_the_first_as_it_is(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    before = content(twin)
    outcome(twin, workers, "--set", "export.crs=EPSG:3857", "--set", "export.resolution=300")
    after = content(twin)
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed == {"collection.json"}
    assert {f"mosaic-epsg{code}-2022-{name}" for code in (3310, 3857)
            for name in ("quicklook", "hillshade")} <= set(catalogue(twin)["assets"])  # fmt: skip
    told = linked(twin)
    assert {key for key in after if not key.startswith("pyramids.zarr")} <= told
    outcome(twin, workers, "--overwrite")
    assert not [key for key in content(twin) if key.startswith(("mosaic", "pyramids"))]


# Damage.


DAMAGED = [
    "mosaic-epsg3310/2022/height-*.tif",
    "pyramids.zarr/utm10n/1/zarr.json",
    "model.json",
    "mosaic-epsg3310/2021/quicklook.png",
    "utm11n/2021/hillshade.png",
    "collection.json",
    "model.ckpt",
    "pyramids.zarr/zarr.json",
    "pyramids.zarr/utm11n/0/novelty/zarr.json",
    "pyramids.zarr/utm10n/0/x/c/0",
]


def test_every_file_is_verified_and_mended_though_nothing_is_asked_for(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    before, root = snapshot(twin.store / "export"), twin.store / "export"
    for number, pattern in enumerate(DAMAGED):
        (path,) = root.glob(pattern)
        path.unlink() if number % 2 else flip(path)
        if number < 4:  # the others lie in the same shards as these
            found = run_here("verify", twin.path, *workers)
            assert found.code == 1
            assert str(path.relative_to(root)) in found.out
            assert run_here("verify", twin.path, "--repair", *workers).code == 0
    assert run_here("verify", twin.path, "--repair", *workers).code == 0
    after = snapshot(root)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    pixels = [key for key in before if key.startswith("pyramids.zarr") and "height/c" in key]
    assert [after[key] for key in pixels] == [before[key] for key in pixels]


def test_all_files_have_a_receipt(done):
    """Whatever lies in the folder, `verify` looks at it."""
    ledger = Ledger(Store.at(done.region.store / "export.receipts"))
    known = set()
    for receipt in ledger.receipts(ledger.done()):
        known |= {key for key in receipt.further if "/" in key or "." in key}
        if "/height/" in receipt.shard and receipt.valid:
            group, _, year, region = receipt.shard.split("/")
            layers = ("height", *(name for name in receipt.further if name != "item"))
            known |= {f"{group}/{year}/{layer}-{region}.tif" for layer in layers}
            known.add(f"{group}/{year}/{region}.json")
    assert known == set(content(done.region))


# Names.


def test_a_renamed_region_is_named_so_everywhere(done, tmp_path, workers):
    twin = twin_of(done, tmp_path)
    outcome(twin, workers, "--set", "name=other")
    assert catalogue(twin)["id"] == "other"
    items = [path for path in files(twin, "*.json") if path.name.startswith(("r", "model"))]
    assert len(items) == 2 * 3 + 1
    for path in items:
        told = json.loads(path.read_text())
        assert told["collection"] == "other"
        assert told["id"].startswith("other-")
    with rasterio.open(files(twin, "utm10n/2021/height-*.tif")[0]) as opened:
        assert opened.tags()["TIFFTAG_IMAGEDESCRIPTION"].endswith("other, 2021")
    outcome(twin, workers)
    assert content(twin) == content(done.region)


def test_a_note_and_newer_libraries_change_the_collection_alone(
    done, tmp_path, workers, monkeypatch
):
    twin = twin_of(done, tmp_path)
    before = content(twin)
    told = outcome(twin, workers, "--set", "note=Beware.")
    assert "0 shards done" in told
    assert catalogue(twin)["description"].startswith("Beware. ")
    monkeypatch.setattr(
        "aeheight.steps.wanted.versions", lambda: {"aeheight": "9.9", "rasterio": "9.8"}
    )
    assert "0 shards done" in outcome(twin, workers)
    assert catalogue(twin)["summaries"]["processing:software"][0]["aeheight"] == "9.9"
    after = content(twin)
    assert {key for key in before if after[key] != before[key]} == {"collection.json"}


# Interruption.


def cut(monkeypatch, region: Region, method: str, below: str, number: int) -> None:
    """Let a method of this process's stores fail from the so-manieth time on, below a folder."""
    real, calls = getattr(Store, method), []

    def broken(self, asked, *given):
        place = f"{self.uri}/{asked}".removeprefix(f"{region.store}/")
        calls.extend([place] * place.startswith(below))
        if calls[number:] and place.startswith(below):
            raise OSError("cut off")
        return real(self, asked, *given)

    monkeypatch.setattr(Store, method, broken)


@pytest.mark.parametrize("number", range(4))
def test_cut_off_while_files_are_removed_nothing_is_called_done(
    done, tmp_path, workers, monkeypatch, number
):
    """At each of the removals of a repair: catalogue, its receipt, receipts, files."""
    twin = twin_of(done, tmp_path)
    flip(files(twin, "utm10n/2021/spread-*.tif")[0])
    with monkeypatch.context() as patch:
        cut(patch, twin, "remove_many", "export", number)
        assert run_here("verify", twin.path, "--repair", *workers).code == 1
    if (twin.store / "export" / "collection.json").exists():
        linked(twin)
    outcome(twin, workers)
    if number < 3:  # the damaged tile still has its receipt
        assert run_here("verify", twin.path, "--repair", *workers).code == 0
    assert content(twin) == content(done.region)


@pytest.mark.parametrize(("method", "number"), [("write", 0), ("write", 40), ("remove_many", 2)])
def test_pyramids_cut_off_as_they_begin_anew(done, tmp_path, workers, monkeypatch, method, number):
    """Under another name; with the old one again all is as it was: nothing empty counts as done."""
    twin = twin_of(done, tmp_path)
    place = "export/pyramids.zarr" if method == "write" else "export"
    with monkeypatch.context() as patch:
        cut(patch, twin, method, place, number)
        asked = ("--set", "name=other")
        assert run_here("export", twin.path, *SMALL, *asked, *workers).code == 1
    outcome(twin, workers)
    assert content(twin) == content(done.region)
    with xr.open_datatree(twin.store / "export" / "pyramids.zarr", engine="zarr") as tree:
        assert np.isfinite(tree["utm11n/1"]["height"].to_numpy()).any()


def test_pyramids_that_were_begun_are_finished(done, tmp_path, workers, monkeypatch):
    """Asked for once, and cut off in their metadata: the plain command makes them."""
    twin = twin_of(done, tmp_path)
    for name in ("export", "export.receipts"):
        shutil.rmtree(twin.store / name)
    with monkeypatch.context() as patch:
        cut(patch, twin, "write", "export/pyramids.zarr", 7)
        asked = (*MOSAIC, *COARSE, *PYRAMIDS)
        assert run_here("export", twin.path, *SMALL, *asked, *workers).code == 1
    outcome(twin, workers)
    assert content(twin) == content(done.region)


def test_the_metadata_is_consolidated(done):
    root: Path = done.region.store / "export" / "pyramids.zarr"
    told = json.loads((root / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert {f"{key}/zarr.json" for key in told} == {
        str(path.relative_to(root)) for path in root.rglob("*/zarr.json")
    }
