"""The command: exit codes, messages, what is kept, and what never happens."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from aeheight.receipts import lease
from aeheight.store import Store
from tests.runs import STEPS, copied, flip, one_message, same_map, snapshot
from tests.tasks import local_scheduler, worker_process

# What is done stays done.


def test_a_rerun_does_nothing(aeheight, small_run):
    before = snapshot(small_run.store)
    result = aeheight("run", small_run.path, "--workers", "2")
    assert result.code == 0
    assert result.out.count("done before") == len(STEPS)
    assert snapshot(small_run.store) == before


def test_status_before_and_after(aeheight, small_run, regions):
    fresh = regions.write("fresh")
    result = aeheight("status", fresh.path)
    assert result.code == 0
    assert result.out.count("not begun") >= 2
    assert not fresh.store.exists()
    result = aeheight("status", small_run.path, "--json")
    steps = json.loads(result.out)["steps"]
    assert set(STEPS) <= set(steps)
    assert all(counts["done"] == counts["total"] > 0 for counts in steps.values())


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize("verb", [*STEPS, "run"])
def test_a_plan_prints_and_writes_nothing(verb, flags, aeheight, small_run, regions):
    fresh = regions.write("fresh")
    result = aeheight(verb, fresh.path, "--plan", *flags)
    assert not fresh.store.exists()
    assert result.code == (0 if verb in ("ingest", "run") else 2)
    before = snapshot(small_run.store)
    result = aeheight(verb, small_run.path, "--plan", "--overwrite", *flags)
    assert result.code == 0
    assert snapshot(small_run.store) == before
    planned = STEPS if verb == "run" else [verb]
    if flags:
        plans = [json.loads(line) for line in result.out.splitlines()]
        assert [plan["step"] for plan in plans] == list(planned)
        assert all(plan.get("pending", 16) >= 16 and not plan.get("done") for plan in plans)
    else:
        assert [line for line in result.out.splitlines() if line[0] != " "] == list(planned)


def test_json_is_json_line_by_line(aeheight, regions, scheduler):
    region = regions.write("json")
    result = aeheight("ingest", region.path, "--json", "--scheduler", scheduler)
    assert result.code == 0
    (told,) = map(json.loads, result.out.splitlines())
    assert told["step"] == "ingest"
    assert told["done"] == 48
    progress = [json.loads(line) for line in result.err.splitlines()]
    assert progress[-1]["left"] == 0
    result = aeheight("ingest", region.path, "--json", "--set", "cube.shard=128")
    assert result.code == 2
    assert "cube.shard" in json.loads(result.err)["error"] or "cut.shard" in result.err


def test_the_dashboard_is_named_before_the_work(aeheight, regions):
    region = regions.write("watched", height=None, prior=None)
    result = aeheight("ingest", region.path, "--workers", "1")
    assert result.code == 0
    assert re.search(r"^dashboard http://127\.0\.0\.1:\d+/status", result.err, re.MULTILINE)
    result = aeheight("ingest", region.path, "--workers", "1", "--overwrite", "--json")
    assert result.code == 0
    said = [json.loads(line) for line in result.err.splitlines()]
    assert said[0]["dashboard"].startswith("http://127.0.0.1:")
    assert said[-1]["left"] == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_is_waited_for_is_said(flags, aeheight, regions):
    """On stderr, before the worker is there."""
    fresh = regions.write("fresh")
    with local_scheduler(0) as cluster, ExitStack() as joined:
        address = cluster.scheduler_address
        later = threading.Timer(1, lambda: joined.enter_context(worker_process(address)))
        later.start()
        result = aeheight("ingest", fresh.path, "--scheduler", address, *flags)
        later.join()
    assert result.code == 0
    told = f"waiting for a worker at {address}, up to 600 s"
    said = (
        [json.loads(line).get("waiting") for line in result.err.splitlines()]
        if flags
        else (result.err.splitlines())
    )
    assert said.count(told) == 1


def test_a_port_for_metrics_that_is_taken(aeheight, regions):
    region = regions.write("watched")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = aeheight("ingest", region.path, "--metrics-port", str(port))
    assert result.code == 2
    one_message(result.err, f"port {port}", "--metrics-port")
    assert not region.store.exists()


def test_two_drivers_at_once(aeheight, small_run):
    with lease(Store.at(small_run.store)):
        for verb in (*STEPS, "run"):
            result = aeheight(verb, small_run.path)
            assert result.code == 2
            one_message(result.err, "held by another driver", str(os.getpid()))
        assert aeheight("status", small_run.path).code == 0
    assert not (small_run.store / "lease.json").exists()


# Changed settings.


@pytest.mark.parametrize(
    ("verb", "change", "named"),
    [
        ("ingest", "cube.shard=128", ".shard: 64 -> 128"),
        ("ingest", "height.surface=dtm", ".surface: 'dsm' -> 'dtm'"),
        ("train", "model.seed=1", "model.seed: 0 -> 1"),
        ("train", "split.block=8", "split.block: 16 -> 8"),
        ("predict", "predict.halo=0", "predict.halo: 32 -> 0"),
        ("evaluate", "split.seed=3", "another split of this very ground"),
    ],
)
def test_changed_settings_are_refused_and_named(verb, change, named, aeheight, small_run):
    before = snapshot(small_run.store)
    result = aeheight(verb, small_run.path, "--set", change)
    assert result.code == 2
    one_message(result.err, named, "--overwrite")
    assert snapshot(small_run.store) == before


def test_another_model_and_another_cube_are_refused_until_overwritten(
    aeheight, small_run, regions, scheduler
):
    at = ("--scheduler", scheduler)
    twin = copied(small_run, regions)
    ridge = regions.write("ridge", model={"architecture": "ridge"})
    shutil.copytree(small_run.cube, ridge.cube)
    shutil.copytree(small_run.store / "cube.receipts", ridge.store / "cube.receipts")
    assert aeheight("train", ridge.path).code == 0
    result = aeheight("predict", twin.path, "--checkpoint", ridge.store, *at)
    assert result.code == 2
    one_message(result.err, "checkpoint: ", "--overwrite")
    overwrite = ("--overwrite", *at)
    assert aeheight("predict", twin.path, "--checkpoint", ridge.store, *overwrite).code == 0
    with pytest.raises(AssertionError):
        same_map(twin, small_run)
    # The report speaks of the map that was there before.
    result = aeheight("evaluate", twin.path, *at)
    assert result.code == 2
    one_message(result.err, "checkpoint: ")
    assert aeheight("evaluate", twin.path, *overwrite).code == 0
    metrics = twin.metrics()
    assert metrics["model"]["test"] == metrics["baselines"]["ridge"]["test"]
    # A cube made anew is another cube.
    assert aeheight("ingest", twin.path, *overwrite).code == 0
    result = aeheight("predict", twin.path, "--checkpoint", ridge.store)
    assert result.code == 2
    one_message(result.err, "cube: ", "--overwrite")


def test_receipts_prove_nothing_of_a_tree_that_is_gone(aeheight, small_run, regions):
    for name in ("cube", "heights"):
        twin = copied(small_run, regions, name)
        shutil.rmtree(twin.store / f"{name}.zarr")
        result = aeheight({"cube": "ingest", "heights": "predict"}[name], twin.path)
        assert result.code == 2
        one_message(result.err, "--overwrite")


# Bad input.


def raster(path: Path, bands: int = 64, dtype: str = "int8", crs: str = "EPSG:32631") -> str:
    """A small raster of ones in the corner of the world."""
    shape = {"count": bands, "width": 64, "height": 64, "dtype": dtype}
    place = {"crs": crs, "transform": Affine(10, 0, 431_230, 0, -10, 5_098_770)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place) as made:
        made.write(np.ones((bands, 64, 64), dtype))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embeddings": {"href": "no/such/folder"}}, ["embeddings.href", "no/such/folder"]),
        ({"embeddings": {"year": 2019}}, ["no tile of [2019]", "there are [2021]"]),
        ({"height": {"href": "no/such.json"}}, ["height.href", "no/such.json"]),
        ({"grid": {"bounds": [0, 0, 640, 640]}}, ["no tile touches the grid"]),
        ({"grid": {"bounds": [431235, 5096210, 433795, 5098770]}}, ["never resampled"]),
        ({"prior": {"vertical_datum": "EPSG:3855"}}, ["EPSG:5773", "EPSG:3855"]),
        ({"model": {"epoch": 3}}, ["model.epoch", "did you mean 'epochs'?"]),
        ({"model": {"patch": 33}}, ["multiple of 32"]),
        ({"heigth": None}, ["heigth", "did you mean 'height'?"]),
    ],
)
def test_bad_settings_end_with_one_message(changes, words, aeheight, regions):
    region = regions.write("bad", **changes)
    for flags in ([], ["--plan"]):
        result = aeheight("ingest", region.path, *flags)
        assert result.code == 2
        one_message(result.err, *words)
    assert not list(region.store.rglob("*"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"bands": 3}, ["3 bands instead of 64"]),
        ({"dtype": "uint8"}, ["uint8 instead of int8"]),
        ({"crs": "EPSG:32632"}, ["no tile touches the grid", "EPSG:32631"]),
    ],
)
def test_a_raster_that_is_no_tile_is_refused(kind, words, aeheight, regions):
    path = raster(regions.folder / "wrong.tif", **kind)
    region = regions.write("bad", embeddings={"href": path}, height=None, prior=None)
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, *words)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "VERB"),
        (("fly", "x.yaml"), "invalid choice"),
        (("run",), "REGION.yaml"),
        (("run", "x.yaml", "--workers", "none"), "'none' is no whole number above 0"),
        (("run", "x.yaml", "--workers", "0"), "'0' is no whole number above 0"),
        (("run", "x.yaml", "--gpus", "-1"), "'-1' is no whole number"),
        (("verify", "x.yaml", "--metrics-port", "65536"), "'65536' is no port"),
        (("run", "x.yaml", "--metrics-port", "0"), "'0' is no port"),
        (("status", "x.yaml"), "cannot read the region file x.yaml"),
    ],
)
def test_bad_command_lines(arguments, word, aeheight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = aeheight(*arguments)
    assert result.code == 2
    assert word in result.err


def test_steps_out_of_order_say_which_comes_first(aeheight, regions):
    fresh = regions.write("fresh")
    for verb in ("train", "predict", "evaluate"):
        result = aeheight(verb, fresh.path)
        assert result.code == 2
        one_message(result.err, "aeheight ingest")
    result = aeheight("verify", fresh.path)
    assert result.code == 2
    one_message(result.err, "nothing to verify")


def test_what_is_no_checkpoint_is_refused_and_discards_nothing(aeheight, small_run, regions):
    best = small_run.store / "model" / "best.ckpt"
    data = best.read_bytes()
    torn, junk, bent = (regions.folder / f"{name}.ckpt" for name in ("torn", "junk", "bent"))
    torn.write_bytes(data[: len(data) // 2])
    junk.write_bytes(b"no checkpoint at all")
    bent.write_bytes(data)
    flip(bent)
    before = snapshot(small_run.store)
    for path in (torn, junk, bent, regions.folder / "none.ckpt", regions.folder):
        result = aeheight("predict", small_run.path, "--overwrite", "--checkpoint", path)
        assert result.code == 2
        one_message(result.err, "checkpoint")
    assert snapshot(small_run.store) == before


def test_a_run_without_a_model_is_refused_before_it_ingests(aeheight, regions):
    blind = regions.write("blind", height=None, prior=None)
    for flags in ([], ["--checkpoint", regions.folder / "none.ckpt"]):
        result = aeheight("run", blind.path, *flags)
        assert result.code == 2
        one_message(result.err, "--checkpoint")
    assert not blind.store.exists()


def test_a_file_in_the_way_of_the_store(aeheight, regions):
    region = regions.write("taken")
    region.store.write_text("mine")
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, str(region.store), "is a file")
    assert region.store.read_text() == "mine"


def test_something_else_in_the_way_of_the_cube(aeheight, regions):
    region = regions.write("taken")
    region.cube.mkdir(parents=True)
    (region.cube / "thesis.txt").write_text("mine")
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, "did not make")
    assert (region.cube / "thesis.txt").read_text() == "mine"


def shell(command: list[str], *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """The command as a user calls it."""
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_the_process_says_what_is_wrong_and_ends_with_2(command, regions):
    missing = shell(command, "run", regions.folder / "none.yaml")
    assert missing.returncode == 2
    one_message(missing.stderr, "none.yaml", "No such file")
    unknown = shell(command, "run", regions.write("typo", modle={}).path)
    assert unknown.returncode == 2
    one_message(unknown.stderr, "modle: unknown key; did you mean 'model'?")
    assert not missing.stdout + unknown.stdout
    wrong = raster(regions.folder / "wrong.tif", bands=4)
    region = regions.write("bad", embeddings={"href": wrong}, height=None, prior=None)
    refused = shell(command, "ingest", region.path)
    assert refused.returncode == 2
    one_message(refused.stderr, "4 bands instead of 64")


def test_help_names_every_verb_and_option(aeheight):
    verbs = (*STEPS, "run", "status", "verify", "compare")
    assert all(verb in aeheight("--help").out for verb in verbs)
    shown = aeheight("run", "--help").out
    options = ("--plan", "--overwrite", "--set", "--json", "--workers", "--scheduler")
    options += ("--checkpoint", "--gpus", "--metrics-port")
    assert all(option in shown for option in options)
    assert aeheight("--version").out.startswith("aeheight ")
