"""What may go wrong at any time: interruptions, damage, torn files, a full disk."""

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

import numpy as np
import pytest

from tests.runs import Region, arrays, copied, flip, one_message, same_map, snapshot, whole_shards

# Interruptions.


@contextmanager
def started(
    command: list[str], verb: str, region: Region, *arguments: str | Path
) -> "Iterator[subprocess.Popen[str]]":
    """The command in a process group of its own, which has finished at least one shard.

    Whatever happens, nothing of the group outlives the block.
    """
    words = [*command, verb, str(region.path), *map(str, arguments), "--workers", "2"]
    ledger = {"ingest": "cube", "predict": "heights"}[verb]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        while not region.receipts(ledger):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_control_c_ends_with_one_message(command, regions):
    region = regions.write("small", cube={"shard": 16, "chunk": 16})
    with started(command, "ingest", region) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    one_message(error, "interrupted; finished shards are kept, run again to go on")
    assert 0 < whole_shards(region, "cube") < 768
    assert not (region.store / "lease.json").exists()


def test_a_driver_that_is_told_to_stop(aeheight, regions, small_run, scheduler):
    """SIGTERM, as a cluster ends a pod: to the driver alone, here to this very process."""
    region = regions.write("small", cube={"shard": 32}, predict={"shard": 32})
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
    assert 0 < whole_shards(region) < 64


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(aeheight, command, regions, small_run, scheduler):
    region = regions.write("small", cube={"shard": 32}, predict={"shard": 32})
    at, model = ("--scheduler", scheduler), ("--checkpoint", small_run.store)
    assert aeheight("ingest", region.path, *at).code == 0
    with started(command, "predict", region, *model) as process:
        second = aeheight("predict", region.path, *model, *at)  # while the first is at it
        assert second.code == 2
        one_message(second.err, "held by another driver", str(process.pid))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = whole_shards(region)
    assert 0 < done < 64
    status = json.loads(aeheight("status", region.path, "--json").out)
    assert status["steps"]["predict"] == {"done": done, "total": 64}
    result = aeheight("predict", region.path, *model, *at)
    assert result.code == 0
    assert f"{64 - done} shards done" in result.out
    assert whole_shards(region) == 64
    same_map(region, small_run)


# Damage.


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
    made = {name for name in after if after[name] != before.get(name)} - set(broken)
    # The same shard of the map's other layers comes with it, with the same bytes.
    made -= {f"heights.zarr/utm31n/{layer}/c/0/2/3" for layer in ("novelty", "spread")}
    made -= {"heights.receipts/sessions.json"}
    assert len(made) == len(broken)
    shards = {name.removesuffix(".json").partition("~")[0].split("/", 2)[2] for name in made}
    assert shards == set(broken.values())
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
    assert whole_shards(twin) == 16 - len(failed)
    unfinished = aeheight("evaluate", twin.path)
    assert unfinished.code == 2
    one_message(unfinished.err, "shards of the map are missing; run aeheight predict")
    assert aeheight("verify", twin.path, "--repair", "--scheduler", scheduler).code == 0
    assert aeheight("predict", twin.path, "--scheduler", scheduler).code == 0
    same_map(twin, small_run)


# Sources that tear, and a disk that is full.


def test_a_tile_that_breaks_off_fails_its_shards_alone(aeheight, regions, world, scheduler):
    tiles = regions.folder / "tiles"
    shutil.copytree(world.embeddings, tiles)
    torn = sorted(tiles.rglob("*.tiff"))[0]
    whole = torn.read_bytes()
    third = len(whole) // 3  # of its pixels; what a header tells is met at the plan
    torn.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
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
    assert whole_shards(region, "cube") < 48
    subprocess.run(["mount", "-o", "remount,size=32m", str(tiny_disk)], check=True)
    assert aeheight("ingest", region.path, *at).code == 0
    made, sound = arrays(region.cube), arrays(small_run.cube)
    for layer in ("embedding", "height", "prior"):
        np.testing.assert_array_equal(made[layer], sound[layer])
