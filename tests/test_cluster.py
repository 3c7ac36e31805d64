"""Shards over real workers: each once, failures listed, bounded in flight, workers may die."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from dask import config
from distributed import Client, LocalCluster

from aeheight.cluster import Connection, Outcome
from aeheight.errors import InputError
from aeheight.receipts import Receipt
from aeheight.template import Shard
from tests.tasks import (
    SHARDS,
    Task,
    local_scheduler,
    names,
    notes,
    run,
    scheduler_process,
    wait_for,
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Connection(workers=2) as connection:
        yield connection.client()


# --- running ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 15])
def test_every_shard_runs_once(client: Client, tmp_path: Path, count: int) -> None:
    """Whether there are fewer shards than fit in flight (8), just as many, or more."""
    shards = SHARDS[:count]
    outcome, _ = run(client, Task(tmp_path), shards)
    assert notes(tmp_path, "end") == Counter(names(shards))
    assert (outcome.done, outcome.skipped, outcome.failed) == (count, 0, {})
    assert outcome.pixels == sum(shard.region.size for shard in shards)


def test_work_goes_to_other_processes(client: Client, tmp_path: Path) -> None:
    run(client, Task(tmp_path, seconds=0.05))
    processes = {path.read_text().split()[0] for path in tmp_path.glob("*.begin.*")}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_the_same_work_again_runs_again_under_the_same_keys(client: Client, tmp_path: Path) -> None:
    """Receipts say what is done; nothing is remembered in the cluster."""
    keys = []
    for _ in range(2):
        known = set(tmp_path.glob("*.begin.*"))
        run(client, Task(tmp_path), SHARDS[:6])
        new = set(tmp_path.glob("*.begin.*")) - known
        keys.append(sorted(path.read_text().split(" ", 1)[1] for path in new))
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 6
    assert set(notes(tmp_path, "end").values()) == {2}


def test_two_stores_may_share_a_scheduler(client: Client, tmp_path: Path) -> None:
    """The same settings and shards at the same time: neither may pass for the other's."""
    folders = [tmp_path / "a", tmp_path / "b"]

    def drive(folder: Path) -> Outcome:
        folder.mkdir()
        with Connection(client.scheduler.address) as connection:
            return run(connection.client(), Task(folder, seconds=0.02))[0]

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(drive, folders))
    assert [outcome.done for outcome in outcomes] == [15, 15]
    for folder in folders:
        assert notes(folder, "end") == Counter(names(SHARDS))


def test_a_failing_task_is_listed_and_the_others_finish(client: Client, tmp_path: Path) -> None:
    failing = frozenset(shard.name for shard in (SHARDS[0], SHARDS[7], SHARDS[14]))
    outcome, shown = run(client, Task(tmp_path, failing=failing))
    assert set(outcome.failed) == failing
    assert outcome.failed[SHARDS[7].name] == f"{names(SHARDS)[7]} has no ground and a second line"
    assert outcome.done == 12
    assert notes(tmp_path, "end") == Counter(names([s for s in SHARDS if s.name not in failing]))
    assert set(notes(tmp_path, "begin").values()) == {1}
    assert outcome.pixels == 12 * 64
    assert shown.splitlines()[-1].startswith("test         12 of 15 shards done, 3 failed, 0 left")


def raises(error: BaseException) -> Callable[[Shard], Receipt]:
    def task(_shard: Shard) -> Receipt:
        raise error

    return task


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (InputError("mend it"), "mend it"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError: "),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_why_it_failed_is_one_line(client: Client, error: Exception, reason: str) -> None:
    outcome, _ = run(client, raises(error), SHARDS[:1])
    assert outcome.failed == {SHARDS[0].name: reason}


class Drawn(list[Shard]):
    """Shards that note, whenever one is taken, how many are taken but not ended."""

    def __init__(self, folder: Path, at: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__(SHARDS)
        self.folder = folder
        self.at = at or {}
        self.in_flight: list[int] = []

    def __iter__(self) -> Iterator[Shard]:
        for number, shard in enumerate(super().__iter__()):
            self.at.get(number, lambda: None)()
            self.in_flight.append(number + 1 - notes(self.folder, "end").total())
            yield shard


def test_no_more_is_in_flight_than_two_tasks_a_thread(client: Client, tmp_path: Path) -> None:
    """Of two threads each on two workers."""
    shards = Drawn(tmp_path)
    run(client, Task(tmp_path, seconds=0.05), shards)
    assert 4 < max(shards.in_flight) <= 8


def test_results_are_released(client: Client, tmp_path: Path) -> None:
    run(client, Task(tmp_path))
    wait_for(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


# --- workers and schedulers that die ------------------------------------------------------------


def test_a_killed_worker_loses_no_shard(client: Client, tmp_path: Path) -> None:
    task = Task(tmp_path, seconds=0.03, dying=SHARDS[6].name)
    outcome, _ = run(client, task)
    assert (outcome.done, outcome.failed) == (15, {})
    ends, begins = notes(tmp_path, "end"), notes(tmp_path, "begin")
    assert set(ends) == set(names(SHARDS))
    assert begins[names(SHARDS)[6]] == 2
    # What the dead worker had finished and not yet handed over is in flight: at most 8 tasks.
    assert ends.total() <= 15 + 8
    client.wait_for_workers(2, timeout=60)


@pytest.fixture
def strict() -> Iterator[Client]:
    """Where Dask gives a task up when two workers have died with it, whoever killed them."""
    with config.set({"distributed.scheduler.allowed-failures": 1}), Connection(None, 2) as opened:
        yield opened.client()


def test_a_shard_that_kills_every_worker_is_given_up_alone(strict: Client, tmp_path: Path) -> None:
    """Those that waited behind it are done."""
    outcome, shown = run(strict, Task(tmp_path, seconds=0.02, deadly=SHARDS[2].name))
    assert set(outcome.failed) == {SHARDS[2].name}
    assert outcome.failed[SHARDS[2].name].startswith("KilledWorker: 4 workers died with it, ")
    assert notes(tmp_path, "begin")[names(SHARDS)[2]] == 4
    assert outcome.done == 14
    assert set(notes(tmp_path, "end")) == set(names(SHARDS)) - {names(SHARDS)[2]}
    assert "14 of 15 shards done, 1 failed, 0 left" in shown.splitlines()[-1]


def test_workers_that_keep_dying_cost_no_shard(strict: Client, tmp_path: Path) -> None:
    """As spot nodes do: more often than Dask allows, and by no shard's fault."""

    def die() -> None:
        for _ in range(3):
            known = notes(tmp_path, "end").total()
            wait_for(lambda known=known: notes(tmp_path, "end").total() > known)
            for begun in tmp_path.glob("*.begin.*"):
                with suppress(ProcessLookupError, ValueError):
                    os.kill(int(begun.read_text().split(" ")[0]), signal.SIGKILL)

    killer = threading.Thread(target=die)
    killer.start()
    outcome, _ = run(strict, Task(tmp_path, seconds=0.3))
    killer.join()
    assert (outcome.done, outcome.failed) == (15, {})
    assert set(notes(tmp_path, "end")) == set(names(SHARDS))


def test_a_scheduler_that_goes_away(tmp_path: Path) -> None:
    with scheduler_process(1) as (process, address), Connection(address) as connection:
        client = connection.client()

        def kill() -> None:
            wait_for(lambda: notes(tmp_path, "end").total() >= 2)
            process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ConnectionError, match="run again"):
            run(client, Task(tmp_path, seconds=0.1))
        killer.join()
    assert notes(tmp_path, "end").total() < 15


def test_workers_that_join_later_get_work(tmp_path: Path) -> None:
    with local_scheduler(1) as cluster, Connection(cluster.scheduler_address) as connection:
        client = connection.client()

        def grow() -> None:
            cluster.scale(3)
            client.wait_for_workers(3, timeout=30)

        shards = Drawn(tmp_path, {4: grow})
        outcome, _ = run(client, Task(tmp_path, seconds=0.3), shards)
    assert outcome.done == 15
    assert max(shards.in_flight[:4]) <= 2
    assert 3 < max(shards.in_flight) <= 6


def scaled(cluster: LocalCluster, folder: Path) -> Callable[[], None]:
    """Takes all workers away after the third shard, and starts others a second later."""

    def scale() -> None:
        wait_for(lambda: notes(folder, "end").total() >= 3)
        cluster.scale(0)
        wait_for(lambda: not cluster.scheduler.workers)
        time.sleep(1)
        cluster.scale(2)

    return scale


def test_no_worker_for_a_while(tmp_path: Path) -> None:
    with local_scheduler(2) as cluster, Connection(cluster.scheduler_address) as connection:
        scaling = threading.Thread(target=scaled(cluster, tmp_path))
        client = connection.client()
        scaling.start()
        outcome, _ = run(client, Task(tmp_path, seconds=0.1))
        scaling.join()
    assert (outcome.done, outcome.failed) == (15, {})
    assert set(notes(tmp_path, "end")) == set(names(SHARDS))


def test_an_adaptive_cluster(tmp_path: Path) -> None:
    with local_scheduler(1) as cluster, Connection(cluster.scheduler_address) as connection:
        client = connection.client()
        cluster.adapt(minimum=0, maximum=3, interval="50ms", wait_count=1, target_duration="100ms")
        for attempt in range(2):
            wait_for(lambda: not cluster.scheduler.workers)
            outcome, _ = run(client, Task(tmp_path, seconds=0.1))
            assert (outcome.done, outcome.failed) == (15, {}), attempt
