"""Shards over real workers: each once, failures listed, bounded in flight, workers may die."""

import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, get_worker

from aeheight.cluster import Connection, Outcome, Progress, clock, run_shards
from aeheight.errors import InputError
from aeheight.receipts import Receipt
from aeheight.template import Shard
from aeheight.windows import tile

SHARDS = [Shard("utm10n", "height", 2021, region) for region in tile((24, 40), 8)]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Connection(workers=2) as connection:
        yield connection.client()


@dataclass(frozen=True)
class Task:
    """Leaves a file when it begins and a file when it ends."""

    folder: Path
    seconds: float = 0.0
    failing: frozenset[str] = frozenset()
    dying: str = ""
    """The first attempt at this shard kills its worker."""
    deadly: str = ""
    """Every attempt at this shard kills its worker."""

    def __call__(self, shard: Shard) -> Receipt:
        begun = self._count(shard)
        self._note(shard, "begin", f"{os.getpid()} {get_worker().get_current_task()}")
        if shard.name == self.deadly or (shard.name == self.dying and not begun):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        if shard.name in self.failing:
            raise ValueError(f"{shard.region.name} has no ground\nand a second line")
        self._note(shard, "end", "")
        return Receipt(shard.name, "d", shard.region.size, 0, None, None, None, "s", 0.0)

    def _count(self, shard: Shard) -> int:
        return len(list(self.folder.glob(f"{shard.region.name}.begin.*")))

    def _note(self, shard: Shard, what: str, text: str) -> None:
        path = self.folder / f"{shard.region.name}.{what}.{uuid.uuid4().hex}"
        path.write_text(text)


def notes(folder: Path, what: str) -> Counter[str]:
    return Counter(path.name.split(".")[0] for path in folder.glob(f"*.{what}.*"))


def names(shards: list[Shard]) -> list[str]:
    return [shard.region.name for shard in shards]


def run(
    client: Client, task: Callable[[Shard], Receipt], shards: list[Shard] = SHARDS
) -> tuple[Outcome, str]:
    stream = io.StringIO()
    progress = Progress("test", len(shards), stream=stream, interval=0)
    return run_shards(client, task, shards, progress), stream.getvalue()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# --- running ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 15])
def test_every_shard_runs_once(client: Client, tmp_path: Path, count: int) -> None:
    """Whether there are fewer shards than fit in flight (4), just as many, or more."""
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
        keys.append(sorted(path.read_text().split()[1] for path in new))
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
    shards = Drawn(tmp_path)
    run(client, Task(tmp_path, seconds=0.05), shards)
    assert 2 < max(shards.in_flight) <= 4


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
    # What the dead worker had finished and not yet handed over is in flight: at most 4 tasks.
    assert ends.total() <= 15 + 4
    client.wait_for_workers(2, timeout=60)


def test_a_shard_that_kills_every_worker_is_given_up(client: Client, tmp_path: Path) -> None:
    """Dask may give up a shard that waited behind it too: it is listed, and the next run has it."""
    client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 1))
    outcome, _ = run(client, Task(tmp_path, seconds=0.02, deadly=SHARDS[2].name))
    assert outcome.failed[SHARDS[2].name].startswith("KilledWorker: ")
    assert outcome.done == 15 - len(outcome.failed) >= 12
    again = [shard for shard in SHARDS if shard.name in outcome.failed and shard != SHARDS[2]]
    run(client, Task(tmp_path), again)
    assert set(notes(tmp_path, "end")) == set(names(SHARDS)) - {names(SHARDS)[2]}
    client.wait_for_workers(2, timeout=60)


@contextmanager
def scheduler_process(workers: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A scheduler with workers, in a process of its own."""
    code = f"""
import time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster({workers}, threads_per_worker=1, processes=False, protocol="tcp://",
                      dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


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


@contextmanager
def local_scheduler(workers: int) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    ) as cluster:
        yield cluster


def test_workers_that_join_later_get_work(tmp_path: Path) -> None:
    with local_scheduler(1) as cluster, Connection(cluster.scheduler_address) as connection:
        client = connection.client()

        def grow() -> None:
            cluster.scale(3)
            client.wait_for_workers(3, timeout=30)

        shards = Drawn(tmp_path, {4: grow})
        outcome, _ = run(client, Task(tmp_path, seconds=0.05), shards)
    assert outcome.done == 15
    assert max(shards.in_flight[:4]) <= 2
    assert 3 < max(shards.in_flight) <= 6


# --- connecting ---------------------------------------------------------------------------------


def test_nothing_is_started_before_it_is_needed() -> None:
    with Connection("tcp://127.0.0.1:1"):
        pass


def test_the_client_is_the_same_at_every_call(client: Client) -> None:
    with Connection(client.scheduler.address) as connection:
        assert connection.client() is connection.client()
        assert len(connection.client().nthreads()) == 2


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:{}", "nonsense", "tcp://127.0.0.1", "foo://a:1"]
)
def test_no_scheduler_answers(address: str) -> None:
    with socket.socket() as free:  # bound, but nobody listens
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
        with (
            Connection(address, patience=0.5) as connection,
            pytest.raises(InputError, match="no Dask scheduler answers") as caught,
        ):
            connection.client()
    assert address in str(caught.value)
    assert "--scheduler" in str(caught.value)
    # distributed waits for itself when a client that failed is collected while another starts.
    del caught
    gc.collect()


def test_a_scheduler_without_workers() -> None:
    with (
        local_scheduler(0) as cluster,
        Connection(cluster.scheduler_address, patience=0.5) as connection,
        pytest.raises(InputError, match="no worker joined") as caught,
    ):
        connection.client()
    assert cluster.scheduler_address in str(caught.value)


# --- progress -----------------------------------------------------------------------------------


def shown(progress: Progress) -> list[str]:
    assert isinstance(progress.stream, io.StringIO)
    return progress.stream.getvalue().splitlines()


def test_a_line_for_people() -> None:
    progress = Progress("ingest", 10, done=3, failed=1, pixels=4_000_000)
    assert progress.line(8.0) == (
        "ingest        3 of 10 shards done, 1 failed, 6 left   0.50 Mpx/s   0:12 to go"
    )


def test_a_line_for_machines() -> None:
    progress = Progress("ingest", 10, as_json=True, done=3, failed=1, pixels=4_000_000)
    assert json.loads(progress.line(8.0)) == {
        "step": "ingest",
        "done": 3,
        "failed": 1,
        "left": 6,
        "pixels_per_second": 500_000,
        "seconds_to_go": 12.0,
    }


def test_failed_shards_add_no_pixels() -> None:
    progress = Progress("x", 3, stream=io.StringIO(), interval=0)
    progress.step(100)
    progress.step(100, failed=True)
    assert (progress.done, progress.failed, progress.pixels) == (1, 1, 100)
    assert len(shown(progress)) == 2


def test_lines_come_at_intervals_and_at_the_end() -> None:
    progress = Progress("x", 50, stream=io.StringIO(), interval=3600)
    for _ in range(50):
        progress.step(1)
    lines = shown(progress)
    assert len(lines) <= 2
    assert "50 of 50 shards done, 0 failed, 0 left" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
