"""The command: exit codes, messages, what is kept, and what never happens."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine

from aeheight.cube import open_tree
from aeheight.receipts import Ledger, lease, verify
from aeheight.store import Store
from aeheight.windows import Region

STEPS = ("ingest", "train", "predict", "evaluate")


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and hash of every file."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.blake2b(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def copied(region: Any, regions: Any, name: str = "copy") -> Any:
    """Another region file with a copy of a store (checkpoints are linked: they are large)."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".ckpt") else shutil.copy2)(source, target)

    twin = regions.write(name)
    shutil.copytree(region.store, twin.store, copy_function=copy)
    return twin


def heights(region: Any) -> np.ndarray:
    """The whole map."""
    with xr.open_zarr(region.heights, group="utm31n", chunks=None) as found:
        return found["height"].to_numpy()


def every_receipt_is_true(region: Any) -> int:
    """How many shards of the map have a receipt, each of which must be whole."""
    tree = open_tree(Store.at(region.heights))
    checked = list(verify(tree, Ledger(Store.at(region.store / "heights.receipts"))))
    assert not any(checked)
    return len(checked)


def one_message(error: str, *words: str) -> None:
    """One clear message on stderr, and no traceback."""
    assert "Traceback" not in error
    assert error.count("aeheight: ") == 1, error
    for word in words:
        assert word in error


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
        assert [json.loads(line)["step"] for line in result.out.splitlines()] == list(planned)
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


# Interruptions.


def start_predict(command: list[str], region: Any, model: Any) -> "subprocess.Popen[str]":
    """Predict in a process group of its own; returns once it has finished another shard."""
    before = len(region.receipts("heights"))
    process = subprocess.Popen(
        [*command, "predict", str(region.path), "--checkpoint", str(model), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(region.receipts("heights")) == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Whatever happens, nothing of the process group outlives the test."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    aeheight, command, regions, small_run, scheduler
):
    region = regions.write("cut", cube={"shard": 32})
    predict = ("predict", region.path, "--checkpoint", small_run.store, "--scheduler", scheduler)
    assert aeheight("ingest", region.path, "--scheduler", scheduler).code == 0
    for number, how in enumerate((signal.SIGINT, signal.SIGKILL)):
        process = start_predict(command, region, small_run.store)
        with ended(process):
            second = aeheight(*predict)  # another driver, while the first is at it
            assert second.code == 2
            one_message(second.err, "held by another driver", str(process.pid))
            os.killpg(process.pid, how)  # as Ctrl-C does: all of the terminal's processes
            _, error = process.communicate(timeout=60)
        if how == signal.SIGINT:
            assert process.returncode == 1
            one_message(error, "interrupted; finished shards are kept, run again to go on")
        done = every_receipt_is_true(region)
        assert number < done < 64
        status = json.loads(aeheight("status", region.path, "--json").out)
        assert status["steps"]["predict"] == {"done": done, "total": 64}
    result = aeheight(*predict)
    assert result.code == 0
    assert f"{64 - done} shards done" in result.out
    assert every_receipt_is_true(region) == 64
    np.testing.assert_array_equal(heights(region), heights(small_run))


def test_a_driver_that_is_told_to_stop(aeheight, regions, small_run, scheduler):
    """SIGTERM, as a cluster ends a pod: to the driver alone, here to this very process."""
    region = regions.write("cut", cube={"shard": 32})
    at = ("--scheduler", scheduler)
    assert aeheight("ingest", region.path, *at).code == 0

    def stop() -> None:
        while not region.receipts("heights"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the command end too soon
    try:
        threading.Thread(target=stop, daemon=True).start()
        result = aeheight("predict", region.path, "--checkpoint", small_run.store, *at)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.code == 1
    one_message(result.err, "interrupted; finished shards are kept, run again to go on")
    assert not (region.store / "lease.json").exists()
    assert 0 < every_receipt_is_true(region) < 64


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
    assert not np.array_equal(heights(twin), heights(small_run), equal_nan=True)
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


def test_a_cube_is_made_from_the_same_files_throughout(aeheight, regions, world, scheduler):
    tiles = regions.folder / "tiles"
    shutil.copytree(world.embeddings, tiles)
    kept, away = sorted(tiles.rglob("*.tiff"))[-1], regions.folder / "away.tiff"
    region = regions.write("moving", embeddings={"href": "tiles"}, height=None, prior=None)
    kept.rename(away)
    assert aeheight("ingest", region.path, "--scheduler", scheduler).code == 0
    away.rename(kept)
    region.receipts("cube")[0].unlink()  # as after an interruption
    result = aeheight("ingest", region.path)
    assert result.code == 2
    one_message(result.err, f"new: {kept}", "--overwrite")


# Damage.


def flip(path: Path) -> None:
    """Turn one byte over in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_verify_finds_one_flipped_byte_and_mends_just_that(aeheight, small_run, regions, scheduler):
    sound = aeheight("verify", small_run.path)
    assert sound.code == 0
    assert sound.out.count(" 0 damaged") == 3
    twin = copied(small_run, regions)
    before = snapshot(twin.store)
    broken = {
        "cube.zarr/utm31n/embedding/c/0/0/1/2": "utm31n/embedding/2021/r0000064-c0000128-64x64",
        "cube.zarr/utm31n/split/c/3/0": "utm31n/split/static/r0000192-c0000000-64x64",
        "heights.zarr/utm31n/height/c/0/2/3": "utm31n/height/2021/r0000128-c0000192-64x64",
    }
    for path in broken:
        flip(twin.store / path)
    result = aeheight("verify", twin.path)
    assert result.code == 1
    assert result.out.count("  damaged ") == len(broken)
    for shard in broken.values():
        assert f"damaged {shard}: " in result.out
    assert aeheight("verify", twin.path, "--repair", "--scheduler", scheduler).code == 0
    after = snapshot(twin.store)
    assert {name: digest for name, (_, digest) in after.items() if "receipts" not in name} == {
        name: digest for name, (_, digest) in before.items() if "receipts" not in name
    }
    ledgers = ("cube", "split", "heights")
    receipts = {
        f"{name}.receipts/{shard}.json"
        for name, shard in zip(ledgers, broken.values(), strict=True)
    }
    assert {name for name in after if after[name] != before[name]} == {*broken, *receipts}
    assert aeheight("verify", twin.path).code == 0


def test_a_damaged_shard_of_the_cube_never_becomes_a_height(
    aeheight, small_run, regions, scheduler
):
    twin = copied(small_run, regions)
    flip(twin.store / "cube.zarr/utm31n/embedding/c/0/0/1/1")
    result = aeheight("predict", twin.path, "--overwrite", "--scheduler", scheduler)
    assert result.code == 1
    assert "Traceback" not in result.err + result.out
    failed = [line for line in result.out.splitlines() if line.startswith("  failed ")]
    assert 1 <= len(failed) < 16
    assert all("aeheight verify" in line for line in failed)
    assert every_receipt_is_true(twin) == 16 - len(failed)
    unfinished = aeheight("evaluate", twin.path)
    assert unfinished.code == 2
    one_message(unfinished.err, "shards of the map are missing; run aeheight predict")
    assert aeheight("verify", twin.path, "--repair", "--scheduler", scheduler).code == 0
    assert aeheight("predict", twin.path, "--scheduler", scheduler).code == 0
    np.testing.assert_array_equal(heights(twin), heights(small_run))


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


def test_a_tile_that_breaks_off_fails_its_shards_alone(aeheight, regions, world, scheduler):
    tiles = regions.folder / "tiles"
    shutil.copytree(world.embeddings, tiles)
    torn = sorted(tiles.rglob("*.tiff"))[0]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) * 2 // 3])
    region = regions.write("torn", embeddings={"href": "tiles"}, height=None, prior=None)
    result = aeheight("ingest", region.path, "--scheduler", scheduler)
    assert result.code == 1
    assert "Traceback" not in result.err + result.out
    assert torn.name in result.out
    assert "run the same command again" in result.out
    assert 0 < len(region.receipts("cube")) < 16
    torn.write_bytes(whole)
    assert aeheight("ingest", region.path, "--scheduler", scheduler).code == 0
    assert aeheight("verify", region.path).code == 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(aeheight, regions, tiny_disk, small_run, scheduler):
    at = ("--scheduler", scheduler)
    region = regions.write("full", store=str(tiny_disk / "run"))
    result = aeheight("ingest", region.path, *at)
    assert result.code == 1
    assert "Traceback" not in result.err + result.out
    assert "No space left on device" in result.out + result.err
    tree, ledger = open_tree(Store.at(region.cube)), Store.at(region.store / "cube.receipts")
    checked = list(verify(tree, Ledger(ledger)))
    assert len(checked) < 48
    assert not any(checked)
    subprocess.run(["mount", "-o", "remount,size=32m", str(tiny_disk)], check=True)
    assert aeheight("ingest", region.path, *at).code == 0
    for layer, year in (("embedding", 2021), ("height", None), ("prior", None)):
        made, sound = (
            open_tree(Store.at(store)).read("utm31n", layer, year, Region(0, 0, 256, 256))
            for store in (region.cube, small_run.cube)
        )
        np.testing.assert_array_equal(made, sound)


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
    assert all(verb in aeheight("--help").out for verb in (*STEPS, "run", "status", "verify"))
    shown = aeheight("run", "--help").out
    options = ("--plan", "--overwrite", "--set", "--json", "--workers", "--scheduler")
    assert all(option in shown for option in (*options, "--checkpoint"))
    assert aeheight("--version").out.startswith("aeheight ")
