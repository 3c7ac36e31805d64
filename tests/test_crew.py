"""Workers that hang: found, killed and replaced, and their shards done elsewhere."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dask import config
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from aeheight.cluster import Connection
from aeheight.crew import Crew
from tests.tasks import SHARDS, Task, local_scheduler, names, notes, run, wait_for, worker_process


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Connection(workers=2) as connection:
        yield connection.client()


def processes(folder: Path) -> set[int]:
    """Who began a shard."""
    return {int(path.read_text().split(" ")[0]) for path in folder.glob("*.begin.*")}


def alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != "zombie"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopping", "hanging"])
def test_a_worker_that_hangs(client: Client, tmp_path: Path, how: str) -> None:
    """Whether its heartbeats end with it or go on."""
    client.wait_for_workers(2, timeout=60)
    outcome, shown = run(client, Task(tmp_path, **{how: SHARDS[6].name}), limit=3)
    assert (outcome.done, outcome.failed) == (15, {})
    assert set(notes(tmp_path, "end")) == set(names(SHARDS))
    assert notes(tmp_path, "begin")[names(SHARDS)[6]] == 2
    warnings = [line for line in shown.splitlines() if "started anew" in line]
    assert 1 <= len(warnings) <= 2  # two threads stop with a process
    assert all("tcp://127.0.0.1:" in line for line in warnings)
    # A process that stops may keep to itself what it had finished: then that is named.
    assert how == "stopping" or SHARDS[6].name in warnings[0]
    assert sum(alive(process) for process in processes(tmp_path)) <= 2


@pytest.mark.slow
def test_a_shard_that_always_hangs_is_given_up(client: Client, tmp_path: Path) -> None:
    client.wait_for_workers(2, timeout=60)
    outcome, shown = run(client, Task(tmp_path, hopeless=SHARDS[2].name), limit=3)
    (name,) = outcome.failed
    assert name == SHARDS[2].name  # the limit grows where the other shards take long
    assert re.fullmatch(r"hung 3 workers, each for over \d+ s", outcome.failed[name])
    assert notes(tmp_path, "begin")[names(SHARDS)[2]] == 3
    assert set(notes(tmp_path, "end")) == set(names(SHARDS)) - {names(SHARDS)[2]}
    assert shown.count("started anew, the shard done elsewhere") == 2
    assert shown.count("started anew, the shard given up") == 1


@pytest.mark.slow
def test_a_worker_that_hangs_without_a_nanny(tmp_path: Path) -> None:
    """The scheduler forgets it; the late riser finds its place taken and does no harm."""
    with (
        local_scheduler(0) as cluster,
        worker_process(cluster.scheduler_address) as one,
        worker_process(cluster.scheduler_address) as other,
        Connection(cluster.scheduler_address) as connection,
    ):
        client = connection.client()
        client.wait_for_workers(2, timeout=60)
        task = Task(tmp_path, seconds=0.02, stopping=SHARDS[3].name)
        outcome, shown = run(client, task, limit=3)
        assert (outcome.done, outcome.failed) == (15, {})
        assert "started anew" in shown
        assert len(client.nthreads()) == 1
        (frozen,) = [p for p in (one, other) if psutil.Process(p.pid).status() == "stopped"]
        frozen.send_signal(signal.SIGCONT)
        wait_for(lambda: notes(tmp_path, "end")[names(SHARDS)[3]] == 2)
    assert set(notes(tmp_path, "end")) == set(names(SHARDS))


def test_workers_that_are_lost_for_good_are_started_again(tmp_path: Path) -> None:
    """As when one dies before its nanny knows that it lives: the cluster forgets both."""
    with (
        config.set({"distributed.deploy.lost-worker-timeout": "50ms"}),
        Connection(workers=2, gpus=0) as connection,
    ):
        client = connection.client()
        for nanny in list(client.cluster.workers.values()):
            client.cluster.sync(nanny.close)
        wait_for(lambda: not client.cluster.workers)
        outcome, _ = run(client, Task(tmp_path, seconds=0.05))
        assert (outcome.done, outcome.failed) == (15, {})
        wait_for(lambda: len(client.cluster.workers) == 2)


class Asked:
    """Answers as a client does, of one worker that holds some tasks."""

    cluster = None

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: list[tuple[str, str]] = []

    def nthreads(self) -> dict[str, int]:
        return {"tcp://a:1": self.slots}

    def processing(self) -> dict[str, list[tuple[str, str]]]:
        return {"tcp://a:1": self.held}


@given(
    order=st.permutations(range(9)),
    held=st.sets(st.integers(0, 8)),
    slots=st.integers(1, 4),
    foreign=st.booleans(),
)
def test_those_that_wait_are_not_blamed(
    order: list[int], held: set[int], slots: int, foreign: bool
) -> None:
    """A worker runs, of what it holds, what was submitted first."""
    client = Asked(slots)
    crew = Crew(client, gpu=False, limit=0)  # whatever runs is late at the next look
    crew.refresh()
    client.held = [("p", str(number)) for number in held] + [("q", "x")] * foreign
    keys = [("p", str(number)) for number in order]
    running = [number for number in order if number in held][:slots]
    expected = {"tcp://a:1": [("p", str(number)) for number in running]} if running else {}
    assert crew.hung(keys) == {}
    assert crew.hung(keys) == expected


def test_the_limit_grows_with_what_tasks_take() -> None:
    crew = Crew(Asked(1), gpu=False, limit=600)
    crew.took(2)
    assert crew.limit == 600
    crew.took(100)
    crew.took(3)
    assert crew.limit == 2000
