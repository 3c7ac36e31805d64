"""The whole chain on a small world: what a run leaves, and that the numbers are true."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr

from aeheight.embeddings import ATTRIBUTION
from aeheight.models import Checkpoint
from aeheight.relief import gradient, steepness
from aeheight.steps.evaluate import round_edges
from pipelines.world import World
from tests.runs import arrays, same_map

METRICS = {
    *("n", "coverage", "mean", "median", "std", "nmad", "mae", "rmse", "r2", "pearson"),
    *("le68", "le90", "le95", "p5", "p95", "min", "max"),
}
SPLITS = {"train": 1, "validation": 2, "test": 3}
DATA = Path(__file__).parents[2] / "shared" / "data"
REGIONS = Path(__file__).parents[1] / "pipelines" / "regions"


def mosaic(world: World) -> np.ndarray:
    """The world's tiles side by side as rasterio reads them, north-up: (64, size, size)."""
    west, _, _, north = world.bounds
    out = np.full((64, world.size, world.size), -128, np.int8)
    for path in world.embeddings.rglob("*.tiff"):
        with rasterio.open(path) as tile:
            assert tile.transform.e > 0  # bottom-up, as real tiles are
            codes, top = tile.read()[:, ::-1], tile.transform.f + tile.transform.e * tile.height
            row, col = round((north - top) / 10), round((tile.transform.c - west) / 10)
        out[:, row : row + codes.shape[1], col : col + codes.shape[2]] = codes
    return out


def test_a_run_leaves_what_the_contract_says(small_run):
    for name in (
        *("cube.zarr/zarr.json", "heights.zarr/zarr.json", "model/best.ckpt", "model/history.csv"),
        *("report/index.html", "report/metrics.json"),
    ):
        assert (small_run.store / name).is_file(), name
    assert not (small_run.store / "lease.json").exists()
    page = (small_run.store / "report" / "index.html").read_text()
    assert "</html>" in page
    assert ATTRIBUTION in page


@pytest.mark.parametrize("name", ["cube.zarr", "heights.zarr"])
def test_the_trees_are_as_promised(name, small_run, world):
    promised = {
        "cube.zarr": {
            "embedding": (("time", "band", "y", "x"), "int8", -128),
            "height": (("y", "x"), "float32", "NaN"),
            "prior": (("y", "x"), "float32", "NaN"),
            "split": (("y", "x"), "uint8", 0),
        },
        "heights.zarr": dict.fromkeys(
            ("height", "novelty", "spread"), (("time", "y", "x"), "float32", "NaN")
        ),
    }[name]
    with xr.open_datatree(small_run.store / name, engine="zarr") as tree:
        assert not tree.dataset.data_vars
        assert list(tree.children) == ["utm31n"]
        group = tree["utm31n"]
        assert {
            layer: (array.dims, str(array.dtype), array.attrs["nodata"])
            for layer, array in group.data_vars.items()
        } == promised
        for layer, array in group.data_vars.items():
            assert array.attrs["grid_mapping"] == "spatial_ref"
            if layer == "embedding":  # xarray would read it as float
                assert "_FillValue" not in array.attrs | array.encoding
        west, south, east, north = world.bounds
        np.testing.assert_array_equal(group.x, np.arange(west + 5, east, 10))
        np.testing.assert_array_equal(group.y, np.arange(north - 5, south, -10))
        assert list(group.time.to_numpy()) == [np.datetime64("2021-01-01")]
        assert group.attrs["proj:code"] == world.crs
        assert group.attrs["spatial:bbox"] == list(world.bounds)
        assert group["spatial_ref"].attrs["grid_mapping_name"] == "transverse_mercator"


def test_embeddings_are_the_tiles_bit_for_bit(small_run, world):
    codes = arrays(small_run.cube)["embedding"]
    wanted = mosaic(world)
    assert (wanted == -128).any(), "the world must have nodata"
    np.testing.assert_array_equal(codes[0], wanted)


def test_reference_is_the_mean_of_the_finer_model(small_run, world):
    """Of the four pixels of 5 m below each of 10 m, where one file holds all four."""
    wanted: np.ndarray = np.full((256, 256), np.nan, np.float32)
    known = np.zeros((512, 512), bool)
    west, _, _, north = world.bounds
    for path in world.height.parent.rglob("*.tif"):
        whole: np.ndarray = np.full((512, 512), np.nan, np.float32)
        with rasterio.open(path) as raster:
            values = raster.read(1, masked=True).filled(np.nan)
            row = round((north - raster.transform.f) / 5)
            col = round((raster.transform.c - west) / 5)
        top, left = max(row, 0), max(col, 0)  # files may reach past the grid
        part = values[top - row : 512 - row, left - col : 512 - col]
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        mean = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
        wanted = np.where(np.isnan(wanted), mean, wanted)
        known |= ~np.isnan(whole)
    height = arrays(small_run.cube)["height"]
    complete = ~np.isnan(wanted)
    assert complete.mean() > 0.98
    np.testing.assert_allclose(height[complete], wanted[complete], atol=1e-3)
    # A pixel without any height below it has none: nothing is filled in.
    np.testing.assert_array_equal(~np.isnan(height), known.reshape(256, 2, 256, 2).any((1, 3)))


def test_split_is_the_eastern_half_and_blocks_of_the_west(small_run):
    use = arrays(small_run.cube)["split"]
    assert (use[:, 128:] == 3).all()
    assert not (use[:, :128] == 3).any()
    assert {0, 1, 2} <= set(np.unique(use[:, :128]))
    assert not np.isin(use[:, 126:128], (1, 2)).any()  # the buffer before test ground


def test_map_is_there_exactly_where_embeddings_are(small_run):
    known = (arrays(small_run.cube)["embedding"][0] != -128).all(axis=0)
    heights = arrays(small_run.heights)["height"][0]
    np.testing.assert_array_equal(np.isfinite(heights), known)


def numpy_metrics(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The metrics of the contract by their formulas, of whole arrays; the reference is known."""
    there = ~np.isnan(predicted)
    p, r = predicted[there].astype(np.float64), reference[there].astype(np.float64)
    d = p - r
    return {
        "n": d.size,
        "coverage": there.mean(),
        "mean": d.mean(),
        "median": np.median(d),
        "std": d.std(),
        "nmad": 1.4826 * np.median(np.abs(d - np.median(d))),
        "mae": np.abs(d).mean(),
        "rmse": np.sqrt((d**2).mean()),
        "r2": 1 - (d**2).sum() / ((r - r.mean()) ** 2).sum(),
        "pearson": np.corrcoef(p, r)[0, 1] if p.std() else None,
        "le68": np.quantile(np.abs(d), 0.68),
        "le90": np.quantile(np.abs(d), 0.9),
        "le95": np.quantile(np.abs(d), 0.95),
        "p5": np.quantile(d, 0.05),
        "p95": np.quantile(d, 0.95),
        "min": d.min(),
        "max": d.max(),
    }


def same_metrics(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Moments to rounding; what comes from the histogram within its stated bounds."""
    bounds = dict.fromkeys(("median", "le68", "le90", "le95", "p5", "p95"), 0.005)
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            bound = 1e-6 + (bounds | {"nmad": 0.0149}).get(name, 0)
            # A ridge of one block and of the whole array differ in the last bit of a float32.
            assert found[name] == pytest.approx(value, abs=bound, rel=1e-6), name


def test_metrics_are_those_of_numpy_on_whole_arrays(small_run):
    cube, metrics = arrays(small_run.cube), small_run.metrics()
    codes, reference, use = cube["embedding"][0], cube["height"], cube["split"]
    known = (codes != -128).all(axis=0)
    checkpoint = Checkpoint.from_bytes((small_run.store / "model" / "best.ckpt").read_bytes())
    trained = known & (use == 1) & ~np.isnan(reference)
    predictors = {
        "mean": np.full_like(reference, reference[trained].mean(dtype=np.float64)),
        "ridge": checkpoint.ridge.predict(codes),
        "prior": cube["prior"].copy(),
    }
    if checkpoint.kernel is not None:
        predictors["kernel"] = checkpoint.kernel.predict(codes)
    for values in predictors.values():
        values[~known] = np.nan
    predictors["model"] = arrays(small_run.heights)["height"][0]
    tables = {"model": metrics["model"], **metrics["baselines"]}
    assert set(tables) == set(predictors)
    for name, values in predictors.items():
        assert set(tables[name]) == {*SPLITS, "all"}
        for split, row in tables[name].items():
            judged = ~np.isnan(reference) & ((use == SPLITS.get(split)) | (split == "all"))
            if name == "kernel" and split in ("train", "all"):  # what it was fitted to
                assert set(row.values()) == {0, None}
                continue
            wanted = numpy_metrics(values[judged], reference[judged])
            if name == "mean":  # a constant: its correlation is rounding, or undefined
                wanted.pop("pearson")
            same_metrics(row, wanted)


def test_metrics_json_has_the_contracts_form(small_run):
    metrics = small_run.metrics()
    assert set(metrics) == {
        *("model", "baselines", "by", "intervals", "zones", "shift", "correlation", "provenance"),
        *("skill", "regression", "confidence", "coregistration", "seams"),
    }
    assert metrics["zones"] == []
    rows = [
        row
        for table in (metrics["model"], *metrics["baselines"].values())
        for row in table.values()
    ]
    for row in rows:
        assert set(row) == METRICS
        assert all(
            v is None or (isinstance(v, int | float) and math.isfinite(v)) for v in row.values()
        )
    named = {"aspect", "zone"}
    measured = {"slope", "height", "predicted", "roughness", "distance", "novelty"}
    assert set(metrics["by"]) == named | measured
    for name, rows in metrics["by"].items():
        for row in rows:
            classed = {"class"} if name in named else set()
            assert set(row) == METRICS | {"split", "lo", "hi"} | classed
    provenance = metrics["provenance"]
    assert provenance["reference"]["surface"] == "dsm"
    assert provenance["reference"]["vertical_datum"] == "EPSG:5773"
    assert provenance["model"]["seed"] == 0
    assert len(provenance["embeddings"]["files"]) == 4
    assert provenance["settings"]["name"] == "small"


def test_skill_and_lines_are_those_of_numpy(small_run):
    cube, metrics = arrays(small_run.cube), small_run.metrics()
    predicted = arrays(small_run.heights)["height"][0].astype(np.float64)
    judged = ~np.isnan(predicted) & ~np.isnan(cube["height"]) & (cube["split"] == 3)
    p, r = predicted[judged], cube["height"][judged].astype(np.float64)
    slope, start = np.polyfit(r, p, 1)
    found = metrics["regression"]["test"]
    assert found["slope"] == pytest.approx(slope, rel=1e-6)
    assert found["intercept_m"] == pytest.approx(start, abs=1e-4)
    assert found["slope_of_reference"] == pytest.approx(np.polyfit(p, r, 1)[0], rel=1e-6)
    prior = cube["prior"][judged]
    skill = 1 - np.mean((p - r) ** 2) / np.mean((prior - r) ** 2)
    assert metrics["skill"]["test"]["prior"] == pytest.approx(skill, rel=1e-6)


def test_confidence_shift_and_seams_are_told(small_run):
    metrics = small_run.metrics()
    sure = metrics["confidence"]
    assert sure["block_px"] % 16 == 0
    assert sure["draws"] == 1000
    for name, row in sure["metrics"].items():
        assert row["value"] == metrics["model"]["test"][name]
        assert row["lo"] < row["hi"]
        assert row["lo"] <= row["value"] + 0.2 * (row["hi"] - row["lo"])
    shift = metrics["coregistration"]
    assert shift["refused"] is None
    assert shift["coregistered"]["rmse"] <= shift["raw"]["rmse"] + 1e-9
    # Shards of the map are 64 px, as its windows' cores are: lines at 64, 128, 192.
    for row in metrics["seams"].values():
        assert row["every_px"] == 64
        assert row["pairs"] > 0.9 * 2 * 3 * 256
        assert row["lo"] < 1.1
    page = (small_run.store / "report" / "index.html").read_text()
    for words in ("How sure these figures are", "What the map adds", "Do seams show?"):
        assert words in page


def test_rows_by_height_are_those_of_numpy(small_run):
    cube = arrays(small_run.cube)
    reference, use = cube["height"], cube["split"]
    predicted = arrays(small_run.heights)["height"][0]
    rows = small_run.metrics()["by"]["height"]
    for row in rows:
        judged = (reference >= row["lo"]) & (reference < row["hi"])
        judged &= (use == SPLITS.get(row["split"])) | (row["split"] == "all")
        same_metrics(row, numpy_metrics(predicted[judged], reference[judged]))
    whole = small_run.metrics()["model"]
    for split, table in whole.items():
        assert sum(row["n"] for row in rows if row["split"] == split) == table["n"]


def test_rows_by_slope_hold_every_pixel_with_known_neighbours(small_run):
    reference = arrays(small_run.cube)["height"]
    predicted = arrays(small_run.heights)["height"][0]
    framed = np.pad(reference, 1, constant_values=np.nan)
    steep = steepness(*gradient(framed, 10.0, 10.0))
    judged = ~np.isnan(steep) & ~np.isnan(reference) & ~np.isnan(predicted)
    rows = [row for row in small_run.metrics()["by"]["slope"] if row["split"] == "all"]
    assert sum(row["n"] for row in rows) == judged.sum()
    for row in rows:
        inside = judged & (steep >= row["lo"]) & (steep < row["hi"])
        assert row["n"] == inside.sum()


@pytest.mark.parametrize(("rise_y", "rise_x"), [(0.0, 0.0), (0.3, 0.0), (0.0, -1.0), (0.2, 0.7)])
def test_slope_of_a_plane_is_known(rise_y, rise_x):
    y, x = np.mgrid[:6, :7]
    plane = (rise_y * 20 * y + rise_x * 10 * x).astype(np.float32)
    wanted = math.degrees(math.atan(math.hypot(rise_y, rise_x)))
    found = steepness(*gradient(plane, 20.0, 10.0))
    np.testing.assert_allclose(found, np.full((4, 5), wanted), atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(3.2, 118.0), (-4.0, 0.5), (0.0, 0.0), (12, 8848)])
def test_class_edges_span_the_heights_in_at_most_ten_classes(low, high):
    edges = round_edges(low, high)
    assert edges[0] <= low
    assert high < edges[-1]
    assert 2 <= len(edges) <= 11


def test_ridge_beats_the_mean_on_ground_that_trained_nothing(small_run):
    baselines = small_run.metrics()["baselines"]
    assert baselines["ridge"]["test"]["r2"] > 0.4
    assert baselines["ridge"]["test"]["rmse"] < 0.7 * baselines["mean"]["test"]["rmse"]


def test_the_network_improved_on_the_ridge_it_started_from(small_run):
    metrics = small_run.metrics()
    ridge = metrics["baselines"]["ridge"]["validation"]["rmse"]
    assert metrics["model"]["validation"]["rmse"] <= ridge


def test_other_shards_give_the_same_bits_and_other_threads_the_same_heights(
    aeheight, regions, small_run, scheduler
):
    wanted = arrays(small_run.heights)["height"]
    region = regions.write("cut", cube={"shard": 96})
    trained = ("--checkpoint", small_run.store)
    assert aeheight("ingest", region.path, "--scheduler", scheduler).code == 0
    assert aeheight("predict", region.path, *trained, "--scheduler", scheduler).code == 0
    np.testing.assert_array_equal(arrays(region.heights)["height"], wanted)
    # One worker has more threads than one of two: the last bits may differ, the heights may not.
    assert aeheight("predict", region.path, *trained, "--overwrite", "--workers", "1").code == 0
    np.testing.assert_allclose(arrays(region.heights)["height"], wanted, atol=1e-3)


def test_a_region_without_a_reference_is_mapped_by_a_model_trained_elsewhere(
    aeheight, regions, small_run, scheduler
):
    region = regions.write("blind", height=None, prior=None)
    result = aeheight("run", region.path, "--checkpoint", small_run.store, "--scheduler", scheduler)
    assert result.code == 0, result.err
    assert set(arrays(region.cube)) == {"embedding"}
    np.testing.assert_array_equal(
        arrays(region.heights)["height"], arrays(small_run.heights)["height"]
    )
    for verb in ("train", "evaluate"):
        result = aeheight(verb, region.path)
        assert result.code == 2
        assert "the region has no `height`" in result.err


def test_a_region_that_only_tests(aeheight, regions, small_run, scheduler):
    region = regions.write("judge", split={"test": 1.0, "validation": 0.0})
    trained = ("--checkpoint", small_run.store, "--scheduler", scheduler)
    result = aeheight("run", region.path, *trained)
    assert result.code == 0, result.err
    assert not (region.store / "model").exists()
    same_map(region, small_run)  # which a cluster on this machine made
    here, there = region.metrics(), small_run.metrics()
    assert here["model"]["train"]["n"] == here["model"]["validation"]["n"] == 0
    assert here["model"]["train"]["rmse"] is None
    assert here["model"]["test"] == here["model"]["all"]
    same_metrics(here["model"]["test"], there["model"]["all"])
    # The baselines are those fitted where the model was trained.
    for name in ("mean", "ridge"):
        same_metrics(here["baselines"][name]["test"], there["baselines"][name]["all"])
    # Another split of ground that trained nothing is judged anew, not refused for ever.
    again = ("--set", "split.validation=0.5", "--set", "split.test=0.5", "--scheduler", scheduler)
    refused = aeheight("evaluate", region.path, *again)
    assert refused.code == 2
    assert "split.test: 1.0 -> 0.5" in refused.err
    assert aeheight("evaluate", region.path, *again, "--overwrite").code == 0
    assert region.metrics()["model"]["validation"]["n"] > 0


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")


@needs_data
@pytest.mark.slow
def test_northern_california(aeheight, tmp_path, scheduler):
    """Real embeddings and heights; the network is trained for show, the ridge is what it is."""
    short = ("model.epochs=1", "model.patches_per_epoch=16", "predict.batch=1")
    changes = [part for change in (*short, f"store={tmp_path}") for part in ("--set", change)]
    result = aeheight("run", REGIONS / "norcal.yaml", *changes, "--scheduler", scheduler)
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    model, ridge = metrics["model"]["test"], metrics["baselines"]["ridge"]["test"]
    assert ridge["r2"] >= 0.9
    assert model["n"] == ridge["n"] > 1000
    assert model["rmse"] <= 1.05 * ridge["rmse"]


@needs_data
@pytest.mark.slow
def test_a_real_tile_goes_through(aeheight, regions, small_run, scheduler):
    path = DATA / "wisconsin_10m" / "aef_format_bottomup_1024px.tif"
    real = {
        "height": None,
        "prior": None,
        "embeddings": {"href": str(path), "year": 2024},
        "cube": {"shard": 256, "chunk": 128},
        "predict": {"window": 256, "halo": 32, "batch": 1},
    }
    whole = regions.write("whole", grid=None, **real)
    assert aeheight("ingest", whole.path, "--scheduler", scheduler).code == 0
    with rasterio.open(path) as tile:
        assert tile.transform.e > 0
        wanted, crs, (west, one, _, other) = tile.read()[:, ::-1], str(tile.crs), tile.bounds
    np.testing.assert_array_equal(arrays(whole.cube)["embedding"][0], wanted)
    # A part that cuts the tile's blocks, mapped: 300 x 400 px from row 512, column 500.
    left, top = west + 5000, max(one, other) - 5120
    grid = {"crs": crs, "resolution": 10, "bounds": [left, top - 3000, left + 4000, top]}
    part = regions.write("part", grid=grid, **real)
    result = aeheight("run", part.path, "--checkpoint", small_run.store, "--scheduler", scheduler)
    assert result.code == 0, result.err
    codes = arrays(part.cube)["embedding"][0]
    np.testing.assert_array_equal(codes, wanted[:, 512:812, 500:900])
    known = (codes != -128).all(axis=0)
    np.testing.assert_array_equal(np.isfinite(arrays(part.heights)["height"][0]), known)
