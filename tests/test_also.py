"""Training on several runs' cubes: what counts, what is recorded, and what is refused."""

import shutil

import numpy as np
import pytest

from aeheight.cube import open_tree
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger
from aeheight.splits import TRAIN, VALIDATION
from aeheight.store import Store
from tests.runs import arrays, copied, one_message

RIDGE = {"architecture": "ridge"}


@pytest.fixture
def pair(aeheight, small_run, world, regions):
    """The finished run, which trains in the west of the world, and one that tests in the east."""
    west, south, east, north = world.bounds
    middle = (west + east) / 2
    return small_run, that_tests(aeheight, regions, [middle, south, east, north])


def that_tests(aeheight, regions, bounds):
    """An ingested run that tests all its ground."""
    other = regions.write(
        "other", split={"test": 1.0, "validation": 0.0}, model=RIDGE, grid={"bounds": bounds}
    )
    assert aeheight("ingest", other.path).code == 0
    return other


def checkpoint(region):
    return Checkpoint.from_bytes((region.store / "model" / "best.ckpt").read_bytes())


def with_also(regions, region, *stores, **changes):
    return regions.write(region.path.stem, **{
        **{key: region.settings[key] for key in ("split", "grid")}, "model": RIDGE,
        "also": [str(store) for store in stores], **changes,
    })  # fmt: skip


def test_a_run_without_training_ground_trains_on_anothers(aeheight, pair, regions):
    """The ridge of another cube's training pixels alone is that cube's own."""
    trained, tests = pair
    region = with_also(regions, tests, trained.store)
    planned = aeheight("train", region.path, "--plan")
    assert str(trained.store) in planned.out
    result = aeheight("train", region.path)
    assert result.code == 0, result.err
    found, known = checkpoint(region), checkpoint(trained)
    assert found.ridge.n == known.ridge.n
    assert found.ridge.intercept == known.ridge.intercept
    assert found.history[0]["validation_rmse"] > 0
    tree = open_tree(Store.at(trained.cube))
    (further,) = found.provenance.also
    assert further.cube == tree.identity
    assert further.years == (2021,)
    assert further.split == known.provenance.split
    assert found.provenance.cube == open_tree(Store.at(region.cube)).identity
    assert Checkpoint.from_bytes(found.to_bytes()).digest == found.digest
    # Another cube makes another model.
    result = aeheight("train", with_also(regions, tests).path)
    assert result.code == 2
    one_message(result.err, "also:")


def test_a_cube_that_was_trained_on_too_is_judged_by_its_own_split_alone(
    aeheight, pair, regions, scheduler
):
    """Under another split its training pixels would be told as test."""
    at = ("--scheduler", scheduler)
    trained, tests = pair
    learnt = with_also(regions, tests, trained.store)
    assert aeheight("train", learnt.path, *at).code == 0
    judged = copied(trained, regions, "judged")
    named = ("--checkpoint", str(learnt.store), "--overwrite", *at)
    assert aeheight("predict", judged.path, *named).code == 0
    refused = aeheight("evaluate", judged.path, "--overwrite", "--set", "split.seed=3", *at)
    assert refused.code == 2
    one_message(refused.err, "another split of this very ground")
    result = aeheight("evaluate", judged.path, "--overwrite", *at)
    assert result.code == 0, result.err


def test_what_cannot_be_trained_on_together_is_named(aeheight, pair, regions):
    trained, tests = pair

    def refused(*words, **changes):
        region = with_also(regions, tests, changes.pop("store", trained.store), **changes)
        for verb in (["train"], ["train", "--plan"]):
            result = aeheight(*verb, region.path)
            assert result.code == 2, result.err
            one_message(result.err, "also", *words)

    refused("no cube at", "aeheight ingest", store=regions.folder / "nowhere")
    refused("is the same cube as this run itself", store=tests.store)


def test_ground_that_tests_here_and_trains_there_is_refused(aeheight, small_run, regions, world):
    """The northern half tests; the other run trains and validates on the west of all."""
    west, south, east, north = world.bounds
    middle = (south + north) / 2
    tests = that_tests(aeheight, regions, [west, middle, east, north])
    known = arrays(small_run.cube)
    half = len(known["split"]) // 2
    taught = np.isin(known["split"][:half], (TRAIN, VALIDATION))
    count = int((taught & ~np.isnan(known["height"][:half])).sum())
    assert count
    region = with_also(regions, tests, small_run.store)
    for verb in (["train", "--plan"], ["train"]):
        result = aeheight(*verb, region.path)
        assert result.code == 2, result.err
        one_message(result.err, f"also: {small_run.store}", f" {count} pixels", "do not overlap")
    assert not (region.store / "model" / "best.ckpt").exists()


def test_a_cube_that_is_not_whole_or_has_no_split_is_named(aeheight, pair, regions):
    trained, tests = pair
    half = copied(trained, regions, "half")
    region = with_also(regions, tests, half.store)
    Ledger(Store.at(half.store / "split.receipts")).discard()
    one_message(aeheight("train", region.path).err, "no whole split", "aeheight train or evaluate")
    shutil.copytree(trained.store / "split.receipts", half.store / "split.receipts",
                    dirs_exist_ok=True)  # fmt: skip
    half.receipts("cube")[0].unlink()
    one_message(aeheight("train", region.path).err, "1 shards of the cube", "aeheight ingest")


def test_heights_of_another_meaning_are_named(aeheight, pair, regions):
    trained, tests = pair
    other = copied(trained, regions, "terrain")
    asked = other.store / "cube.receipts" / "asked.json"
    asked.write_text(asked.read_text().replace('"dsm"', '"dtm"').replace("EPSG:5773", "EPSG:3855"))
    region = with_also(regions, tests, other.store)
    one_message(
        aeheight("train", region.path).err,
        "height.surface: dtm, here dsm",
        "height.vertical_datum: EPSG:3855, here EPSG:5773",
        "take it out of `also`",
    )
