"""The study reproduced: a table that says what metrics.json says, beside what was published."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aeheight.cluster import Connection
from aeheight.cube import create
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.recipe import Recipe, mean_square
from aeheight.settings import load_region
from aeheight.splits import TEST
from aeheight.steps.run import Options, Run
from aeheight.steps.split import record_split
from pipelines.paper import SIDES, Study, half, main, share_cube
from pipelines.world import World
from tests.runs import Region, Regions, Result, arrays, run_here, small_settings, snapshot
from tests.test_index import plain_parquet, row_of
from tests.tifs import write_heights
from tests.trees import TEMPLATE

AREA = Path(__file__).parents[1] / "pipelines" / "regions" / "nouvelle_aquitaine.yaml"
PUBLISHED = {
    "mean height": ["-"] * 8,
    "ridge": ["0.64", "-", "-", "-", "0.38", "32.2", "-", "-"],
    "U-Net": ["0.97", "-", "-", "-", "0.78", "19.3", "-7.22", "-"],
}
"""Train, then test: R², RMSE, median, NMAD."""


def paper(*arguments: str | Path) -> Result:
    """The program in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Done:
    """A study that was carried out."""

    region: Region
    arguments: list[str]
    result: Result

    @property
    def folder(self) -> Path:
        return Path(f"{self.region.store}-paper") / "region"

    def metrics(self, name: str) -> Any:
        return json.loads((self.folder / name / "report" / "metrics.json").read_text())

    def table(self) -> list[list[str]]:
        """The cells of all rows below the head and the rule."""
        lines = [line for line in self.result.out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def done(world: World, scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """U-Net, and a region whose own model is the ridge."""
    regions = Regions(tmp_path_factory.mktemp("paper"), small_settings(world))
    model = {"architecture": "ridge", "encoder": "resnet34", "learning_rate": 0.1, "epochs": 1}
    region = regions.write("small", model=model, cube={"shard": 128, "chunk": 32})
    arguments = ["--models", "unet", "default", "--scheduler", scheduler]
    result = paper(region.path, *arguments)
    assert result.code == 0, result.err
    return Done(region, arguments, result)


def test_the_rows_in_order(done: Done) -> None:
    assert [row[:2] for row in done.table()] == [
        ["mean height", "study"],
        ["mean height", "here"],
        ["ridge", "study"],
        ["ridge", "here"],
        ["U-Net", "study"],
        ["U-Net", "here"],
        ["prior DEM", "here"],
        ["region's model (ridge)", "here"],
    ]


def test_the_published_figures(done: Done) -> None:
    assert {row[0]: row[2:] for row in done.table() if row[1] == "study"} == PUBLISHED


def test_the_numbers_are_those_of_the_reports(done: Done) -> None:
    unet, default = done.metrics("unet"), done.metrics("default")
    expected = {
        "mean height": unet["baselines"]["mean"],
        "ridge": unet["baselines"]["ridge"],
        "U-Net": unet["model"],
        "prior DEM": unet["baselines"]["prior"],
        "region's model (ridge)": default["model"],
    }
    for row in done.table():
        if row[1] == "here":
            splits = [expected[row[0]][name] for name in ("train", "test")]
            values = [f for s in splits for f in (s["r2"], s["rmse"], s["median"], s["nmad"])]
            assert [float(cell) for cell in row[2:]] == pytest.approx(values, abs=0.0051)


def test_what_is_told_is_written(done: Done) -> None:
    """paper.md is what was printed; paper.json has the numbers unrounded, and their sources."""
    assert (done.folder / "paper.md").read_text() == done.result.out.removesuffix("\n")
    facts = json.loads((done.folder / "paper.json").read_text())
    unet = done.metrics("unet")
    row = next(r for r in facts["rows"] if (r["model"], r["source"]) == ("U-Net", "here"))
    assert row["test"] == {k: unet["model"]["test"][k] for k in ("r2", "rmse", "median", "nmad")}
    made = facts["models"]["unet"]
    assert made["checkpoint"] == unet["provenance"]["model"]["checkpoint"]
    assert made["corrects"] == "none"
    assert facts["split"]["test"] == done.region.settings["split"]["test"]
    assert f"{unet['model']['test']['n']} test pixels" in done.result.out
    shift = unet["shift"]["test"]
    told = f"{shift['wasserstein_m']:.1f} m apart (Wasserstein-1), overlap {shift['overlap']:.2f}"
    assert told in done.result.out


def test_the_networks_have_the_setting_of_the_study(done: Done) -> None:
    """Whatever the region file says of its own model; `--set` reaches all but what makes a row."""
    made = json.loads((done.folder / "paper.json").read_text())["models"]["unet"]["settings"]
    given = done.region.settings["model"]
    assert (made["architecture"], made["encoder"], made["base"]) == ("unet", "resnet18", "none")
    assert (made["learning_rate"], made["weight_decay"]) == (1e-3, 1e-4)
    assert (made["patch"], made["epochs"]) == (given["patch"], given["epochs"])
    run = Run(load_region(done.region.path), Options(), Connection())
    overrides = ("model.learning_rate=0.01", "model.base=prior", "model.architecture=unetplusplus")
    study = Study(done.region.path, run, "region", overrides, quick=True, overwrite=False)
    model = study.run("unet").settings.model
    assert (model.learning_rate, model.base, model.architecture) == (0.01, "none", "unet")
    assert (model.epochs, study.store.uri) == (4, f"{done.region.store}-paper/region-quick")


def test_a_restart_does_nothing_again(done: Done) -> None:
    """But for the pages, which are written from the same sums."""
    store = done.folder.parent
    before = snapshot(store), snapshot(done.region.store)
    again = paper(done.region.path, *done.arguments)
    assert again.code == 0, again.err
    assert again.out == done.result.out
    assert again.err.count("train     done before") == 2
    after = snapshot(store), snapshot(done.region.store)
    for old, new in zip(before, after, strict=True):
        assert {name for name in old if old[name][1] != new[name][1]} == set()
        changed = {Path(name) for name in old if old[name] != new[name]}
        assert {p.parent.name for p in changed if p.stem != "paper"} <= {"report"}
        assert set(old) == set(new)


def test_the_cube_is_ingested_once(done: Done) -> None:
    """The models' cubes are the region's, by links; each draws its own split."""
    keys = [key for key in done.region.cube.rglob("*") if key.is_file()]
    assert any("embedding/c" in str(key) for key in keys)
    for key in keys:
        for name in ("unet", "default"):
            assert (done.folder / name / key.relative_to(done.region.store)).samefile(key)
    assert not (arrays(done.region.cube)["split"] == TEST).any()
    assert (arrays(done.folder / "unet" / "cube.zarr")["split"] == TEST).any()
    assert run_here("verify", done.region.path, *done.arguments[-2:]).code == 0


def test_a_cube_that_was_made_anew_is_shared_anew(
    done: Done, regions: Regions, scheduler: str
) -> None:
    source, target = regions.write("source"), regions.write("target")
    runs = [Run(load_region(each.path), Options(), Connection()) for each in (source, target)]
    identities = set()
    for _ in range(2):
        ingest = ("ingest", source.path, "--overwrite", "--scheduler", scheduler)
        assert run_here(*ingest).code == 0
        share_cube(runs[0], runs[1])
        assert runs[0].whole_cube().identity == runs[1].whole_cube().identity
        identities.add(runs[1].whole_cube().identity)
        record_split(runs[1])
        assert (arrays(target.cube)["split"] == TEST).any()
        before = snapshot(target.store)
        share_cube(runs[0], runs[1])
        assert snapshot(target.store) == before
    assert len(identities) == 2
    assert np.array_equal(arrays(target.cube)["embedding"], arrays(done.region.cube)["embedding"])


def test_one_side_tests_and_other_settings_are_refused(done: Done) -> None:
    arguments = ["--split", "north", "--models", "default", *done.arguments[-2:]]
    result = paper(done.region.path, *arguments)
    assert result.code == 0, result.err
    assert "the northern half tests" in result.out
    use = arrays(done.folder.parent / "north" / "default" / "cube.zarr")["split"]
    middle = use.shape[0] // 2
    assert (use[:middle] == TEST).all()
    assert not (use[middle:] == TEST).any()
    arguments += ["--set", "model.ridge_alpha=0.5"]
    refused = paper(done.region.path, *arguments)
    assert refused.code == 2
    assert "ridge_alpha: 0.001 -> 0.5" in refused.err
    taken = paper(done.region.path, *arguments, "--overwrite")
    assert taken.code == 0, taken.err
    assert taken.out != result.out


@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    resolution=st.sampled_from([10.0, 900.0, 0.25]),
)
def test_two_halves_are_the_whole(rows: int, columns: int, resolution: float) -> None:
    grid = Grid("EPSG:32631", resolution, 4000.0, 8000.0, (rows, columns))
    west, south, east, north = grid.bounds
    halves = {side: half(grid, side) for side in SIDES}
    assert halves["west"][:2] == [west, south]
    assert halves["east"][2:] == [east, north]
    assert halves["west"][2] == halves["east"][0]
    assert halves["south"][3] == halves["north"][1]
    for bounds in halves.values():
        size = [(bounds[2] - bounds[0]) / resolution, (bounds[3] - bounds[1]) / resolution]
        assert size == [round(each) for each in size]
        assert 2 * np.prod(size) == pytest.approx(rows * columns, abs=max(rows, columns))


def test_a_half_of_several_grids_is_refused(regions: Regions) -> None:
    region = regions.write("zones")
    run = Run(load_region(region.path), Options(), Connection())
    create(run.cube, TEMPLATE)
    study = Study(region.path, run, "west", (), quick=False, overwrite=False)
    with pytest.raises(InputError, match=r"has 2 grids \(utm10n, epsg4326\).*GeoJSON"):
        study.run("unet")


def test_a_region_without_height_is_refused(regions: Regions) -> None:
    region = regions.write("bare", height=None, prior=None, model={"base": "ridge"})
    result = paper(region.path)
    assert result.code == 2
    assert "the region has no `height`" in result.err
    assert not region.store.exists()


def test_all_region_files_are_read_before_work_begins(regions: Regions, tmp_path: Path) -> None:
    region = regions.write("first")
    result = paper(region.path, tmp_path / "absent.yaml")
    assert result.code == 2
    assert "cannot read the region file" in result.err
    assert not region.store.exists()


def test_the_area_of_the_study_is_planned_from_the_index_alone(tmp_path: Path) -> None:
    """With an index of made-up tiles on the real zone's lattice, and a raster in Lambert-93."""
    corners = [(x, y) for x in (245760, 327680) for y in (4915200, 4997120)]
    tiles = [f"2020/31N/x{i}-0000000000-0000000000.tiff" for i in range(4)]
    rows = [
        row_of("EPSG:32631", x, y, 2020, f"s3://nowhere/{tile}")
        for (x, y), tile in zip(corners, tiles, strict=True)
    ]
    index = plain_parquet(tmp_path / "index.parquet", rows)
    heights = np.full((400, 400), 100, np.float32)
    raster = write_heights(
        tmp_path / "rge.tif", heights, 440_000, 6_560_000, 500, nodata=-99999, crs="EPSG:2154"
    )
    overrides = [f"embeddings.href={index}", f"height.href={raster}", "prior=null"]
    overrides.append(f"store={tmp_path / 'store'}")
    flags = [flag for override in overrides for flag in ("--set", override)]
    result = run_here("ingest", AREA, "--plan", "--json", *flags)
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    (group,) = plan["groups"]
    assert group["crs"] == "EPSG:32631"
    assert np.prod(group["shape"]) * 1e-4 == pytest.approx(7865, abs=1)
    assert plan["covered_by_tiles"] == {"2020": 1.0}
    assert (plan["tiles"], plan["height_rasters"]) == (4, 1)


def test_the_area_of_the_study_has_its_split_and_setting() -> None:
    settings = load_region(AREA)
    assert settings.grid is not None
    assert isinstance(settings.split.test, tuple)
    west, south, east, north = settings.split.test
    assert (east - west) * (north - south) * 1e-6 == pytest.approx(2315, abs=2)
    assert settings.height is not None
    assert (settings.height.surface, settings.height.vertical_datum) == ("dtm", "EPSG:5720")
    assert settings.embeddings.years == (2020,)
    assert settings.model.patch == 512


def test_what_trains_here_is_the_loss_of_the_study() -> None:
    """The steps train by the product's recipe: were it another, the study would need its own."""
    assert Recipe().loss is mean_square
    assert Recipe().averaging is None
