"""The showcase of sources: every case is the same as its truth, and its checks see what is not."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeheight.embeddings import NODATA
from aeheight.settings import load_region
from pipelines import truth
from pipelines.sources import CASES, EXACT, REGION, Place, main, show
from tests.tifs import DATA


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("showcase")


def shown(name: str, runs: Path, scheduler: str, capsys: pytest.CaptureFixture[str]) -> Place:
    """A case, run with the small world."""
    place = Place(name, runs, DATA, size=256)
    result = show(place, ["--scheduler", scheduler])
    out = capsys.readouterr().out
    if result == "skipped":
        pytest.skip(out.splitlines()[1])
    assert result == "same", out
    assert "DIFFERENT" not in out
    assert out.count("\nsame ") == out.count("bit for bit") + out.count(" RMS ")
    return place


@pytest.mark.parametrize("name", sorted(set(CASES) - {"two-zones", "larger-grid", "s3"}))
def test_a_case(name: str, runs: Path, scheduler: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown(name, runs, scheduler, capsys)


def moved(cube: xr.DataTree, east: float, north: float) -> xr.DataTree:
    """The same pixels, said to lie some metres away."""
    groups = {str(name): group.to_dataset() for name, group in cube.children.items()}
    return xr.DataTree.from_dict(
        {name: ds.assign_coords(x=ds.x + east, y=ds.y + north) for name, ds in groups.items()}
    )


def test_two_zones_and_a_check_that_sees(
    runs: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shown("two-zones", runs, scheduler, capsys)
    world = place.world()
    with xr.open_datatree(place.folder / "run" / "cube.zarr", engine="zarr") as cube:
        assert set(cube.children) == {"utm31n", "utm32n"}
        eastward = moved(cube, 10, 0)
        assert not any(finding.holds for finding in truth.same_zones(world, eastward))
        half = moved(cube, 0, 5)
        assert not any(finding.holds for finding in truth.same_heights(world, half))


def test_a_larger_grid_and_a_check_that_sees(
    runs: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shown("larger-grid", runs, scheduler, capsys)
    with xr.open_datatree(place.folder / "run" / "cube.zarr", engine="zarr") as cube:
        whole = cube["utm16n"].ds
        assert whole.sizes["y"] == whole.sizes["x"] == 160
        for change in ({"y": 80, "x": 80}, {"y": 0, "x": 0}):  # inside, and in the nodata around
            codes = whole["embedding"].copy(deep=True)
            place_of_one = {"time": 0, "band": 3, **change}
            codes[place_of_one] = 1 if int(codes[place_of_one]) != 1 else 2
            changed = xr.DataTree.from_dict({"utm16n": whole.assign(embedding=codes)})
            (finding,) = truth.same_codes(DATA / EXACT, changed)
            assert not finding.holds
            assert "1 differ" in finding.text


def test_nothing_at_all_is_not_the_same() -> None:
    nothing = np.full((64, 4, 4), NODATA, np.int8)
    assert not truth.equal("x", nothing, nothing).holds
    unknown = np.full((4, 4), np.nan)
    with pytest.warns(RuntimeWarning):
        assert not truth.near("x", unknown, unknown, truth.Allowed(1, 1)).holds


def test_near_counts_what_is_known_in_one_only() -> None:
    heights = np.arange(16.0).reshape(4, 4)
    holed = heights.copy()
    holed[0, 0] = np.nan
    assert truth.near("x", heights, heights, truth.Allowed(0, 0)).holds
    assert not truth.near("x", holed, heights, truth.Allowed(0, 0)).holds
    assert not truth.near("x", heights, holed, truth.Allowed(0, 0)).holds
    assert truth.near("x", heights, holed, truth.Allowed(0, 0, odd=1)).holds
    assert not truth.near("x", heights + 0.5, heights, truth.Allowed(1, 0.1)).holds
    assert not truth.near("x", heights + 0.5, heights, truth.Allowed(0.1, 1)).holds


def test_an_ingest_that_fails_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(Place("mosaic", runs, DATA), ["--set", "cube.shard=100"]) == "failed"
    assert "exit code 2" in capsys.readouterr().out


def test_the_program_skips_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "nowhere", "tile", "stac", "s3"]) == 0
    out = capsys.readouterr().out
    assert "nowhere/wisconsin_10m/aef_format_bottomup_1024px.tif is missing" in out
    assert "AWS_ENDPOINT_URL" in out
    assert out.endswith("s3                 skipped\n")


def test_the_program_names_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tiles"])
    assert stop.value.code == 2
    assert "there is no case 'tiles'; there are tile, larger-grid" in capsys.readouterr().err


def test_a_foreign_folder_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    world = tmp_path / "runs" / "two-zones-world"
    world.mkdir(parents=True)
    (world / "thesis.txt").write_text("precious")
    assert main(["two-zones"]) == 2
    assert "holds no demo world" in capsys.readouterr().err
    assert (world / "thesis.txt").read_text() == "precious"


def test_the_region_file_is_of_the_world_that_the_program_makes() -> None:
    settings = load_region(REGION)
    assert settings.grid is None
    assert settings.height is not None
    hrefs = [settings.embeddings.href, settings.height.href]
    assert all("runs/two-zones-world/" in settings.resolve(str(href)) for href in hrefs)
