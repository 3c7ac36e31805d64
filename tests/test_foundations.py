"""What a step builds on must be whole, of the same settings, and what it says it is."""

import json
import shutil

import numpy as np
import pytest

from tests.runs import arrays, copied, flip, one_message

RIDGE = {"architecture": "ridge"}


@pytest.fixture
def at(scheduler):
    return ("--scheduler", scheduler)


@pytest.fixture
def ridge(aeheight, regions, at):
    """A finished run with the ridge, which may be changed."""
    region = regions.write("ridge", model=RIDGE)
    assert aeheight("run", region.path, *at).code == 0
    return region


def test_nothing_builds_on_a_cube_with_a_missing_shard(aeheight, regions, at, small_run):
    region = regions.write("small")
    assert aeheight("ingest", region.path, *at).code == 0
    region.receipts("cube")[0].unlink()
    for words in (["train"], ["predict", "--checkpoint", small_run.store], ["evaluate"]):
        refused = aeheight(words[0], region.path, *words[1:], *at)
        assert refused.code == 2
        one_message(refused.err, "1 shards of the cube are missing; run aeheight ingest")
    assert aeheight("ingest", region.path, *at).code == 0
    assert aeheight("predict", region.path, "--checkpoint", small_run.store, *at).code == 0


def test_a_map_of_an_older_cube_is_not_judged_against_the_new(aeheight, ridge, at):
    assert aeheight("ingest", ridge.path, "--overwrite", *at).code == 0
    refused = aeheight("evaluate", ridge.path, *at)
    assert refused.code == 2
    one_message(refused.err, "map of an older cube", "predict --overwrite")
    steps = json.loads(aeheight("status", ridge.path, "--json").out)["steps"]
    assert {step: counts["done"] for step, counts in steps.items()} == {
        "ingest": steps["ingest"]["total"], "split": 0, "train": 0, "predict": 0, "evaluate": 0,
    }  # fmt: skip


def test_a_step_refuses_a_region_file_that_is_not_its_cubes(aeheight, ridge, at):
    refused = aeheight("evaluate", ridge.path, "--overwrite", "--set", "height.surface=dtm", *at)
    assert refused.code == 2
    one_message(refused.err, "height.surface: 'dsm' -> 'dtm'", "ingest --overwrite")
    assert ridge.metrics()["provenance"]["reference"]["surface"] == "dsm"


def test_the_report_tells_the_settings_of_the_map_not_of_the_day(aeheight, ridge, at):
    changed = ("--set", "predict.halo=16", "--set", "model.ridge_alpha=9")
    assert aeheight("evaluate", ridge.path, "--overwrite", *changed, *at).code == 0
    settings = ridge.metrics()["provenance"]["settings"]
    assert settings["predict"]["halo"] == 32
    assert settings["model"]["ridge_alpha"] == 1e-3


def test_another_split_file_is_another_split(aeheight, regions, world, at, tmp_path):
    def area(west, south, east, north):
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        (tmp_path / "test.geojson").write_text(
            json.dumps({"type": "Polygon", "coordinates": [ring]})
        )

    area(2.0, 45.9, 2.128, 46.2)  # cuts the small world in two
    region = regions.write("halves", model=RIDGE, split={"test": "test.geojson"})
    assert aeheight("run", region.path, *at).code == 0
    assert all(region.metrics()["model"][split]["n"] for split in ("train", "test"))
    area(2.128, 45.9, 2.3, 46.2)
    refused = aeheight("evaluate", region.path, "--overwrite", *at)
    assert refused.code == 2
    one_message(refused.err, "another split of this very ground")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("split.test=[0, 0, 1, 1]", ("split.test", "holds no ground of the grid")),
        ("split.validation=0.0001", ("rounds to none", "split.block")),
        ("split.test=no.geojson", ("no.geojson", "no GeoJSON")),
        ("model.encoder=resnt18", ("resnt18", "resnet18")),
        ("predict.window=250", ("window (250)", "multiples of 32")),
    ],
)
def test_a_wrong_setting_may_be_mended_without_overwriting(aeheight, regions, at, changed, words):
    region = regions.write("small", model={"epochs": 1, "patches_per_epoch": 8})
    refused = aeheight("run", region.path, "--set", changed, *at)
    assert refused.code == 2
    one_message(refused.err, *words)
    assert not (region.store / "model" / "best.ckpt").exists()
    assert aeheight("run", region.path, "--plan", "--set", changed).code == 2
    if "window" not in changed:
        assert aeheight("run", region.path, *at).code == 0


def test_repair_uses_the_model_that_made_the_map(aeheight, regions, small_run, at):
    region = copied(small_run, regions)
    shutil.rmtree(region.store / "model")
    before = arrays(region.heights)
    flip(next(path for path in sorted(region.heights.rglob("c/0/*/*")) if path.is_file()))
    assert aeheight("verify", region.path).code == 1
    assert aeheight("verify", region.path, "--repair", *at).code == 0
    after = arrays(region.heights)
    assert all(np.array_equal(after[name], before[name], equal_nan=True) for name in before)


def test_a_damaged_part_of_the_report_is_named(aeheight, ridge, at):
    part = next((ridge.store / "report.receipts").rglob("*.npz"))
    part.write_bytes(b"nothing")
    (ridge.store / "report" / "index.html").unlink()
    refused = aeheight("evaluate", ridge.path, *at)
    assert refused.code == 2
    one_message(refused.err, part.name, "is damaged", "evaluate --overwrite")
    assert aeheight("evaluate", ridge.path, "--overwrite", *at).code == 0


def test_overwriting_waits_for_the_scheduler(aeheight, ridge):
    before = arrays(ridge.heights)
    refused = aeheight(
        "predict", ridge.path, "--overwrite", "--scheduler", "tcp://127.0.0.1:1"
    )  # fmt: skip
    assert refused.code == 2
    assert arrays(ridge.heights).keys() == before.keys()
    assert ridge.receipts("heights")


def test_overwriting_leaves_what_is_not_its_own(aeheight, ridge, at):
    mine = [ridge.store / "model" / "mine.txt", ridge.store / "report" / "mine.txt"]
    for path in mine:
        path.write_text("mine")
    for verb in ("train", "predict", "evaluate"):
        assert aeheight(verb, ridge.path, "--overwrite", *at).code == 0
    assert all(path.read_text() == "mine" for path in mine)
