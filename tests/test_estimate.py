"""A map's time: told before from a few windows, and the truth beside it after."""

import json
import shutil

import pytest

from aeheight.models import Checkpoint
from aeheight.steps.estimate import SESSIONS, Session, remember, sessions
from aeheight.store import Store
from tests.runs import copied, one_message, same_map, snapshot


def test_a_plan_tells_the_time_and_writes_nothing(aeheight, small_run, scheduler):
    before = sorted(small_run.store.rglob("*"))
    result = aeheight(
        *("predict", small_run.path, "--plan", "--overwrite", "--json", "--scheduler", scheduler)
    )
    assert result.code == 0
    plan = json.loads(result.out)
    assert plan["pending"] == 16
    assert plan["windows"] == 16
    assert plan["workers"] == 2
    assert plan["device"] == "cpu, float32"
    # 16 windows of two: eight batches in a plan that counts whole ones, one a shard.
    assert plan["estimated_seconds"] == pytest.approx(16 / plan["batches_per_second"], rel=0.01)
    assert plan["extra_computation"] == 8.0
    assert sorted(small_run.store.rglob("*")) == before


def test_a_plan_with_nothing_to_do_asks_no_worker(aeheight, small_run):
    plan = json.loads(aeheight("predict", small_run.path, "--plan", "--json").out)
    assert plan["pending"] == 0
    assert "workers" not in plan


def test_estimate_and_truth_stand_in_the_report(aeheight, small_run, regions, scheduler):
    """With a batch of one window there is enough to do for a calibration."""
    twin = copied(small_run, regions)
    one = ("--set", "predict.batch=1", "--scheduler", scheduler)
    assert aeheight("predict", twin.path, "--overwrite", *one).code == 0
    (session,) = json.loads((twin.store / "heights.receipts" / SESSIONS).read_text())
    assert session["estimate_seconds"] > 0
    assert session["seconds"] > 0
    assert (session["shards"], session["failed"], session["windows"]) == (16, 0, 16)
    assert aeheight("evaluate", twin.path, "--overwrite", *one).code == 0
    page = (twin.store / "report" / "index.html").read_text()
    assert "Estimate and truth" in page


def test_too_little_work_is_not_worth_a_calibration(aeheight, small_run, regions, scheduler):
    twin = copied(small_run, regions)
    few = ("--set", "predict.shard=128", "--overwrite", "--scheduler", scheduler)
    assert aeheight("predict", twin.path, *few).code == 0
    (session,) = json.loads((twin.store / "heights.receipts" / SESSIONS).read_text())
    assert session["estimate_seconds"] is None
    assert session["shards"] == 4


def test_sessions_are_kept_in_order(tmp_path):
    store = Store.at(tmp_path)
    assert sessions(store) == []
    for shards in (3, 5):
        remember(store, Session(None, 1.5, shards, 0, 9, 2, None))
    assert [session["shards"] for session in sessions(store)] == [3, 5]
    store.write(SESSIONS, b'[{"seco')
    assert sessions(store) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_workers_too_small_for_a_window_are_refused(aeheight, small_run, regions, overwrite):
    """Before anything is written: with smaller windows the same store will do."""
    twin = copied(small_run, regions)
    if not overwrite:
        shutil.rmtree(twin.heights)
        shutil.rmtree(twin.store / "heights.receipts")
    before = snapshot(twin.store)
    vast = ("--set", "predict.window=16384", "--set", "predict.batch=8", "--workers", "2")
    told = aeheight("predict", twin.path, "--plan", *vast, *["--overwrite"] * overwrite)
    assert told.code == 0
    assert "for windows of 16384 px, 8 at a time" in told.out
    result = aeheight("predict", twin.path, *vast, *["--overwrite"] * overwrite)
    assert result.code == 2
    one_message(result.err, "for windows of 16384 px, 8 at a time", "make predict.shard")
    assert snapshot(twin.store) == before


@pytest.mark.parametrize("verb", ["predict", "run"])
def test_a_gpu_that_nobody_has_is_asked_for_before_anything_is_lost(
    aeheight, small_run, regions, scheduler, verb
):
    twin = copied(small_run, regions)
    before = snapshot(twin.store)
    asked = (
        "--set",
        "predict.device=gpu",
        "--overwrite",
        "--scheduler",
        scheduler,
        "--patience",
        "1",
    )
    result = aeheight(verb, twin.path, *asked)
    assert result.code == 2
    one_message(result.err, "no worker declares a GPU")
    assert snapshot(twin.store) == before


def test_a_map_is_made_with_the_model_that_it_names(aeheight, small_run, regions, scheduler):
    """Begun with one model, interrupted before its first shard, and begun with another."""
    twin = copied(small_run, regions)
    shutil.rmtree(twin.heights)
    receipts = twin.store / "heights.receipts"
    for path in receipts.rglob("r*.json"):
        path.unlink()
    other = regions.write("other", model={"epochs": 1})
    shutil.copytree(twin.cube, other.cube)
    shutil.copytree(twin.store / "cube.receipts", other.store / "cube.receipts")
    at = ("--scheduler", scheduler)
    assert aeheight("train", other.path, *at).code == 0
    assert aeheight("predict", twin.path, "--checkpoint", other.store, *at).code == 0
    assert aeheight("predict", other.path, *at).code == 0
    same_map(twin, other)
    kept = Checkpoint.from_bytes((receipts / "model.ckpt").read_bytes())
    assert kept.digest == json.loads((receipts / "settings.json").read_text())["checkpoint"]
