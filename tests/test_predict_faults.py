"""What may go wrong while a map is made, injected; then its bytes are those of an undisturbed run.

The driver is this process. Its workers are harmed in mid-shard: one layer of the shard is written,
the other is not.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import aeheight.connection
import aeheight.steps.run
from aeheight.cluster import LIMIT, Connection, Outcome, Task, run_shards
from aeheight.cube import Tree
from aeheight.errors import InputError
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger, Receipt
from aeheight.settings import load_region
from aeheight.steps import ingest, predict
from aeheight.steps.run import Options, Run
from aeheight.store import Store
from aeheight.template import Shard
from pipelines.fault_runs import SkippedError, cluster, differing, small_disk
from pipelines.faults import CRAMPED, RETURNED, TOLERANCE
from pipelines.world import World
from tests.conftest import THREADS
from tests.runs import Region, Regions, arrays, copied, small_settings
from tests.tasks import wait_for

SHARDS = 16
Drive = Callable[..., Outcome]
"""As `cluster.run_shards`."""


@pytest.fixture(scope="module")
def crew() -> Iterator[Connection]:
    """Two workers that may be harmed."""
    with Connection(workers=2) as connection:
        yield connection


@pytest.fixture
def unmapped(regions: Regions, small_run: Region) -> Region:
    """The small run without its map."""
    return without_map(copied(small_run, regions))


def without_map(region: Region) -> Region:
    for made in (region.heights, region.store / "heights.receipts"):
        shutil.rmtree(made, ignore_errors=True)
    return region


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Callable[[Drive], None]:
    """Puts another way to drive the shards into place."""

    def put(drive: Drive) -> None:
        monkeypatch.setattr(aeheight.steps.run, "run_shards", drive)

    return put


def mapped(region: Region, connection: Connection, *overrides: str, **options: Any) -> Outcome:
    """`aeheight predict`."""
    run = Run(load_region(region.path, overrides), Options(**options), connection)
    with run.held():
        return predict.execute(run)


def same_bytes(region: Region, sound: Region) -> None:
    assert not differing(sound.heights, region.heights)


# --- workers, schedulers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Harmed:
    """A task whose first attempt at some shards never gets past the first of their layers."""

    task: Task
    folder: Path
    """Remembers who was harmed."""
    killed: str = ""
    """This shard's worker is killed."""
    stopped: str = ""
    """This shard's worker is frozen."""
    endless: str = ""
    """This shard's task never ends."""

    def __call__(self, shard: Shard) -> Receipt:
        if shard.region.name in (self.killed, self.stopped, self.endless):
            with suppress(FileExistsError):
                (self.folder / shard.region.name).touch(exist_ok=False)
                self._harm_after_a_layer(shard)
        return self.task(shard)

    def _harm_after_a_layer(self, shard: Shard) -> None:
        write = Tree.write

        def half(tree: Tree, written: Shard, values: Any) -> str:
            digest = write(tree, written, values)
            if written.region == shard.region:
                self._harm(shard.region.name)
            return digest

        Tree.write = half

    def _harm(self, name: str) -> None:
        if name == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == self.stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)


def harming(limit: float = LIMIT, **harm: Any) -> Drive:
    def drive(client: Client, task: Task, *rest: Any) -> Outcome:
        return run_shards(client, Harmed(task, **harm), *rest, limit=limit)

    return drive


def named(row: int, col: int) -> str:
    return f"r{row:07d}-c{col:07d}-64x64"


def test_a_worker_that_is_killed_in_mid_shard(unmapped, small_run, crew, driven, tmp_path):
    driven(harming(folder=tmp_path, killed=named(64, 128)))
    outcome = mapped(unmapped, crew)
    assert (tmp_path / named(64, 128)).exists()
    assert (outcome.done, outcome.failed) == (SHARDS, {})
    same_bytes(unmapped, small_run)


@pytest.mark.slow
def test_workers_that_hang_in_mid_shard(unmapped, small_run, crew, driven, tmp_path, capsys):
    """One is frozen; on another a task never ends."""
    hung = {"stopped": named(0, 192), "endless": named(64, 64)}
    # Long enough for a worker that is started anew to load PyTorch and the model.
    driven(harming(15, folder=tmp_path, **hung))
    outcome = mapped(unmapped, crew)
    assert all((tmp_path / name).exists() for name in hung.values())
    assert (outcome.done, outcome.failed) == (SHARDS, {})
    assert "that worker is started anew, the shard done elsewhere" in capsys.readouterr().err
    same_bytes(unmapped, small_run)


def test_every_shard_by_two_workers_at_once(unmapped, small_run, crew, driven):
    def both(client: Client, task: Task, shards: Sequence[Shard], *_: Any) -> Outcome:
        client.wait_for_workers(2)
        pairs = [(shard, worker) for shard in shards for worker in client.nthreads()]
        twins = [client.submit(task, s, workers=[w], key=f"{s.name} {w}") for s, w in pairs]
        assert len(client.gather(twins)) == 2 * SHARDS
        return Outcome(len(shards), 0, {}, 0.0, 0)

    driven(both)
    mapped(unmapped, crew)
    same_bytes(unmapped, small_run)


@pytest.mark.slow
def test_a_scheduler_that_is_killed(unmapped, small_run, crew, tmp_path):
    with cluster(tmp_path) as there, Connection(there.address) as connection:
        connection.client()

        def kill() -> None:
            wait_for(lambda: unmapped.receipts("heights"), 60)
            there.scheduler.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ConnectionError, match="run again"):
            mapped(unmapped, connection)
        killer.join()
    done = len(unmapped.receipts("heights"))
    assert 0 < done < SHARDS
    outcome = mapped(unmapped, crew)
    assert (outcome.done, outcome.skipped, outcome.failed) == (SHARDS - done, done, {})
    same_bytes(unmapped, small_run)


# --- what runs out ------------------------------------------------------------------------------


def test_a_disk_that_is_full(unmapped, small_run, crew):
    try:
        with small_disk(unmapped.heights, "200k"):
            outcome = mapped(unmapped, crew)
            assert outcome.failed
            assert all("No space left on device" in reason for reason in outcome.failed.values())
            assert len(unmapped.receipts("heights")) == SHARDS - len(outcome.failed)
            more = ["mount", "-o", "remount,size=32m", str(unmapped.heights)]
            subprocess.run(more, check=True)
            assert mapped(unmapped, crew).failed == {}
            same_bytes(unmapped, small_run)
    except SkippedError as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_a_worker_without_memory_halves_its_batches(unmapped, small_run, tmp_path, capsys):
    """The receipts say so, and so does the command; heights differ by what is stated at most."""
    preload = tmp_path / "preload.py"
    preload.write_text(CRAMPED)
    larger = ("predict.batch=16", "predict.shard=128")
    with (
        cluster(tmp_path, 1, "--no-nanny", "--preload", str(preload), env=RETURNED) as there,
        Connection(there.address) as connection,
    ):
        outcome = mapped(unmapped, connection, *larger)
    assert (outcome.done, outcome.failed) == (4, {})
    remark = "out of memory with 16 windows of 128 px: 8 at a time"
    assert remark in capsys.readouterr().err
    ledger = Ledger(Store.at(unmapped.store / "heights.receipts"))
    assert any(remark in said for r in ledger.receipts(ledger.done()) for said in r.remarks)
    made, sound = arrays(unmapped.heights)["height"], arrays(small_run.heights)["height"]
    np.testing.assert_allclose(made, sound, rtol=0, atol=TOLERANCE)


# --- what changes on the way --------------------------------------------------------------------


def only(part: slice) -> Drive:
    """Drives some of the shards, as a driver does that dies or that finds others done."""

    def drive(client: Client, task: Task, shards: Sequence[Shard], *rest: Any) -> Outcome:
        return run_shards(client, task, list(shards)[part], *rest)

    return drive


@pytest.fixture
def half_mapped(unmapped: Region, crew: Connection, driven: Callable[[Drive], None]) -> Region:
    driven(only(slice(SHARDS // 2)))
    mapped(unmapped, crew)
    driven(run_shards)
    return unmapped


def test_changed_settings_are_refused_half_way(half_mapped, small_run, crew):
    before = len(half_mapped.receipts("heights"))
    with pytest.raises(InputError, match=r"predict\.halo: 32 -> 16"):
        mapped(half_mapped, crew, "predict.halo=16")
    assert len(half_mapped.receipts("heights")) == before == SHARDS // 2
    assert mapped(half_mapped, crew).skipped == before
    same_bytes(half_mapped, small_run)


def test_another_model_is_refused_half_way(half_mapped, small_run, crew, tmp_path):
    known = Checkpoint.from_bytes((small_run.store / "model" / "best.ckpt").read_bytes())
    other = tmp_path / "other.ckpt"
    other.write_bytes(replace(known, scale=1.01 * known.scale).to_bytes())
    with pytest.raises(InputError, match=rf"checkpoint: '{known.digest}' -> "):
        mapped(half_mapped, crew, checkpoint=str(other))
    assert mapped(half_mapped, crew).skipped == SHARDS // 2
    same_bytes(half_mapped, small_run)


# --- how the work is cut ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One way to make the same map."""

    cube: int
    """Shards of the cube, pixels."""
    shard: int
    """Shards of the map, pixels."""
    workers: int = 2
    backward: bool = False
    resumed: bool = False
    """Only half of the shards at first."""


CUTS = [
    Cut(32, 32),
    Cut(32, 64, backward=True, resumed=True),
    Cut(64, 64, workers=1, backward=True),
    Cut(64, 128, resumed=True),
    Cut(128, 128, workers=1, resumed=True),
]


@pytest.fixture(scope="module")
def cubes(
    world: World, crew: Connection, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Region]:
    """A region for each edge of the cube's shards, ingested."""
    regions = Regions(tmp_path_factory.mktemp("cuts"), small_settings(world))
    made = {}
    for edge in sorted({cut.cube for cut in CUTS}):
        made[edge] = regions.write(f"shards-of-{edge}", cube={"shard": edge})
        run = Run(load_region(made[edge].path), Options(), crew)
        assert ingest.execute(run).failed == {}
    return made


@pytest.fixture(scope="module")
def alone() -> Iterator[Connection]:
    """One worker with as many threads as each of two has."""
    with pytest.MonkeyPatch.context() as patch, Connection(workers=1) as connection:
        patch.setattr(aeheight.connection, "CPU_COUNT", int(THREADS))
        connection.client()
        yield connection


@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_the_same_bits_however_the_work_is_cut(cut, cubes, small_run, crew, alone, driven):
    """Where the map's shards are the same, its objects are too; else its pixels."""
    region, connection = cubes[cut.cube], crew if cut.workers == 2 else alone
    option, model = f"predict.shard={cut.shard}", str(small_run.store)
    without_map(region)
    step = -1 if cut.backward else 1
    total = (256 // cut.shard) ** 2
    if cut.resumed:
        driven(only(slice(None, None, 2 * step)))
        mapped(region, connection, option, checkpoint=model)
        assert len(region.receipts("heights")) == total // 2
    driven(only(slice(None, None, step)))
    outcome = mapped(region, connection, option, checkpoint=model)
    assert (outcome.done + outcome.skipped, outcome.failed) == (total, {})
    made, sound = arrays(region.heights), arrays(small_run.heights)
    for layer, expected in sound.items():
        np.testing.assert_array_equal(made[layer], expected, err_msg=layer)
    if cut.shard == 64:
        same_bytes(region, small_run)
