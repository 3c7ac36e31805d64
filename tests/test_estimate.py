"""A map's time: told before from a few windows, and the truth beside it after."""

import json

import pytest

from aeheight.steps.estimate import SESSIONS, Pace, Session, remember, sessions
from aeheight.store import Store
from tests.runs import copied, one_message, snapshot


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
    assert plan["estimated_seconds"] >= 0
    assert plan["windows_per_second"] > 0
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


def test_too_little_work_is_not_worth_a_calibration(small_run):
    (session,) = json.loads((small_run.store / "heights.receipts" / SESSIONS).read_text())
    assert session["estimate_seconds"] is None
    assert session["shards"] == 16


def test_sessions_are_kept_in_order(tmp_path):
    store = Store.at(tmp_path)
    assert sessions(store) == []
    for shards in (3, 5):
        remember(store, Session(None, 1.5, shards, 0, 9, None, None))
    assert [session["shards"] for session in sessions(store)] == [3, 5]


@pytest.mark.parametrize(("windows", "seconds"), [(0, 0.0), (10, 4.0), (900_000, 360_000.0)])
def test_pace_is_of_all_workers_together(windows, seconds):
    pace = Pace(2.5, 4, "cpu")
    assert pace.seconds(windows) == seconds
    assert pace.facts(windows)["estimated_seconds"] == seconds


def test_workers_too_small_for_a_window_are_refused(aeheight, small_run, regions):
    twin = copied(small_run, regions)
    before = snapshot(twin.heights)
    vast = ("--set", "predict.window=16384", "--set", "predict.batch=8")
    result = aeheight("predict", twin.path, "--overwrite", "--workers", "2", *vast)
    assert result.code == 2
    one_message(result.err, "for windows of 16384 px, 8 at a time", "make predict.shard")
    assert snapshot(twin.heights) == before
