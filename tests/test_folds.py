"""Folds and regions left out: every block tests once, and the table says what metrics.json says."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from aeheight.embeddings import NODATA
from aeheight.shift import Heights, shift
from aeheight.splits import TEST, TRAIN
from pipelines.folds import PREDICTORS, Trial, main, page
from pipelines.world import World
from tests.runs import Region, Regions, Result, arrays, small_settings, snapshot

QUICK = {
    "grid": None,
    "split": {"block": 16, "buffer": 2, "test": 0.5, "validation": 0.2},
    "model": {"architecture": "ridge", "base": "none"},
}


def folds(*arguments: str | Path) -> Result:
    """The program in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def cells(text: str) -> list[list[str]]:
    """Of all rows of a table below the head and the rule."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@dataclass(frozen=True)
class Done:
    """Folds that were carried out."""

    region: Region
    arguments: list[str | Path]
    result: Result

    @property
    def beside(self) -> Path:
        return Path(f"{self.region.store}-folds")

    def metrics(self, fold: int) -> dict:
        return json.loads((self.beside / f"2/{fold}/report/metrics.json").read_text())


@pytest.fixture(scope="module")
def done(world: World, scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    regions = Regions(tmp_path_factory.mktemp("folds"), small_settings(world))
    region = regions.write("dealt", **{key: QUICK[key] for key in ("split", "model")})
    arguments = [region.path, "--folds", "2", "--scheduler", scheduler]
    result = folds(*arguments)
    assert result.code == 0, result.err
    return Done(region, arguments, result)


def test_every_pixel_tests_once_over_all_folds(done):
    tested = sum(
        (arrays(done.beside / f"2/{fold}/cube.zarr")["split"] == TEST).astype(int)
        for fold in range(2)
    )
    assert (tested == 1).all()


def test_the_table_is_that_of_every_fold_s_metrics(done):
    rows = cells(done.result.out)
    assert [row[0] for row in rows] == ["fold 0", "fold 1"]
    for fold, row in enumerate(rows):
        found = done.metrics(fold)
        tables = {"model": found["model"], **found["baselines"]}
        wanted = [str(found["model"]["test"]["n"])]
        wanted.append(f"{found['shift']['test']['wasserstein_m']:.1f}")
        wanted.append(f"{found['shift']['test']['overlap']:.2f}")
        length = found["correlation"]["length_px"]
        wanted.append("-" if length is None else f"{length:.1f}")
        for name in filter(tables.__contains__, PREDICTORS):
            wanted += [f"{tables[name]['test']['rmse']:.2f}", f"{tables[name]['test']['r2']:.3f}"]
        assert row[1:] == wanted
    worst = max(range(2), key=lambda fold: done.metrics(fold)["model"]["test"]["rmse"])
    assert f"- Worst: fold {worst}" in done.result.out
    assert "- Against ridge: no worse on 2 of 2; RMSE 0.0 % lower" in done.result.out
    assert (done.beside / "2/folds.md").read_text() == done.result.out.removesuffix("\n")
    facts = json.loads((done.beside / "2/folds.json").read_text())
    assert facts["trials"][1]["test"]["model"] == done.metrics(1)["model"]["test"]


def test_the_cube_is_ingested_once(done):
    assert done.result.err.count("ingest    48 shards to do") == 1
    own, shared = (arrays(cube) for cube in (done.region.cube, done.beside / "2/1/cube.zarr"))
    np.testing.assert_array_equal(own["embedding"], shared["embedding"])
    assert not own["split"].any()


def test_again_does_nothing_again(done):
    before = snapshot(done.beside)
    again = folds(*done.arguments)
    after = snapshot(done.beside)
    assert again.code == 0
    assert again.out == done.result.out
    written = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).name for name in written} <= {"folds.md", "folds.json"}


def mean_height(cube, chosen=True):
    """Over the pixels that have an embedding and a reference."""
    known = chosen & (cube["embedding"][0, 0] != NODATA) & ~np.isnan(cube["height"])
    return cube["height"][known].mean(dtype=float)


@pytest.mark.slow
def test_each_region_is_judged_by_a_model_of_the_others(tmp_path, world, scheduler):
    """Two halves of the world as two regions: either is judged by a ridge of the other."""
    west, south, east, north = world.bounds
    middle = (west + east) / 2
    regions = Regions(tmp_path, small_settings(world))
    halves = {"west": [west, south, middle, north], "east": [middle, south, east, north]}
    files = parts(regions, world, halves)
    result = folds("--leave-one-out", *(file.path for file in files), "--scheduler", scheduler)
    assert result.code == 0, result.err
    cubes = {name: arrays(file.cube) for name, file in zip(halves, files, strict=True)}
    rows = {row[0]: row for row in cells(result.out)}
    for name, other in (("west", "east"), ("east", "west")):
        metrics = json.loads(
            (tmp_path / f"{name}-folds/left-out/tested/report/metrics.json").read_text()
        )
        assert metrics["model"]["test"] == metrics["model"]["all"]
        heights = {one: Heights.of(cubes[one]["height"]) for one in cubes}
        moved = shift({"test": heights[name]}, heights[other])["test"]["wasserstein_m"]
        assert rows[name][2] == f"{moved:.1f}"
        assert metrics["shift"]["test"]["wasserstein_m"] is None
        assert metrics["correlation"]["buffer_px"] is None
        # What is learnt is the others' training ground, and nothing else.
        ground = arrays(tmp_path / f"{other}-folds/left-out/ground/cube.zarr")
        assert not (ground["split"] == TEST).any()
        bias = float(mean_height(ground, ground["split"] == TRAIN) - mean_height(cubes[name]))
        assert metrics["baselines"]["mean"]["test"]["mean"] == pytest.approx(bias, abs=1e-3)


def test_regions_that_share_ground_are_refused_before_anything_is_trained(
    tmp_path, world, scheduler
):
    """Only the last two overlap, by one column of pixels."""
    west, south, east, north = world.bounds
    middle, step = (west + east) / 2, (east - west) / 4
    bounds = {
        "a": [west, south, west + step, north],
        "b": [west + step, south, middle + 10, north],
        "c": [middle, south, east, north],
    }
    files = parts(Regions(tmp_path, small_settings(world)), world, bounds)
    result = folds("--leave-one-out", *(file.path for file in files), "--scheduler", scheduler)
    assert result.code == 2, result.err
    (message,) = (line for line in result.err.splitlines() if line.startswith("folds: "))
    for word in ("also", "c-folds/left-out/ground", "pixels of ground that this run tests"):
        assert word in message
    assert not list(tmp_path.rglob("best.ckpt"))


def parts(regions, world, bounds):
    """A region file for each part of the world."""
    return [
        regions.write(
            name,
            grid={"crs": world.crs, "resolution": 10, "bounds": wanted},
            split=QUICK["split"],
            model=QUICK["model"],
        )
        for name, wanted in bounds.items()
    ]


def trial(name, model, ridge, n=100):
    row = {"n": n, "rmse": model, "r2": None if model is None else 0.5}
    return Trial(
        name,
        "runs/x",
        {"model": row, "ridge": {"n": n, "rmse": ridge, "r2": 0.4}},
        {"wasserstein_m": None, "overlap": None},
        {"length_px": None, "buffer_px": 2},
    )


def test_the_worst_and_the_least_gain_are_named():
    text = page("x", [trial("a", 10.0, 20.0), trial("b", 30.0, 60.0), trial("c", 22.0, 20.0)])
    assert "- Worst: b, RMSE 30.00 m." in text
    assert "- Against ridge: no worse on 2 of 3; RMSE 30.0 % lower on average, -10.0 %" in text
    assert "the least (c)" in text
    assert cells(text)[0] == ["a", "100", "-", "-", "-", "10.00", "0.500", "20.00", "0.400"]


def test_a_fold_without_test_pixels_is_no_fold_to_judge_by():
    empty = trial("b", None, None, n=0)
    text = page("x", [trial("a", 10.0, 20.0), empty])
    assert "- Worst: a" in text
    assert "no worse on 1 of 1" in text
    assert "No trial has a test pixel" in page("x", [empty])


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (["--folds", "999"], {}, ("split.folds", "999 folds", "fewer")),
        ([], {"height": None, "prior": None}, ("no `height`",)),
        (["--leave-one-out"], {}, ("two regions or more",)),
        (["--set", "model.epoch=3"], {}, ("did you mean 'epochs'",)),
    ],
)
def test_bad_input_is_one_message(arguments, changes, words, regions, done, scheduler):
    region = regions.write("bad", **{**QUICK, "grid": small(done)["grid"], **changes})
    result = folds(region.path, *arguments, "--scheduler", scheduler)
    assert result.code == 2
    (message,) = (line for line in result.err.splitlines() if line.startswith("folds: "))
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err + message


@pytest.mark.parametrize("stores", [["one"], ["one", "one"]])
def test_regions_to_leave_out_are_counted_before_any_is_ingested(regions, stores):
    files = [
        regions.write(f"file{number}", store=str(regions.folder / store))
        for number, store in enumerate(stores)
    ]
    result = folds("--leave-one-out", *(file.path for file in files))
    assert result.code == 2
    for word in ("two regions or more", "store of its own", str(files[-1].path)):
        assert word in result.err
    assert not files[0].store.exists()


def small(done):
    return done.region.settings


@pytest.mark.parametrize("folds", ["1", "0", "-3", "x"])
def test_fewer_than_two_folds_are_no_folds(folds, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["region.yaml", "--folds", folds])
    assert "above 1" in capsys.readouterr().err
