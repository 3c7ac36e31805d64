"""A worker that retires: what it has begun is done once, and nothing more is begun on it."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from aeheight.cluster import Connection
from aeheight.retire import main, retire
from tests.tasks import SHARDS, Task, local_scheduler, names, notes, run, wait_for, worker_process


@contextmanager
def amid(action: Callable[[], None], folder: Path, shards: int = 3) -> Iterator[None]:
    """Something else happens once some shards are done."""

    def act() -> None:
        wait_for(lambda: notes(folder, "end").total() >= shards)
        action()

    acting = threading.Thread(target=act)
    acting.start()
    try:
        yield
    finally:
        acting.join()


def processes(folder: Path) -> Counter[int]:
    """How many shards each process began."""
    return Counter(int(path.read_text().split(" ")[0]) for path in folder.glob("*.begin.*"))


def test_what_is_begun_is_done_once_and_nothing_more_is_begun(tmp_path: Path) -> None:
    told = []
    with local_scheduler(0) as cluster, ExitStack() as stack:
        address = cluster.scheduler_address
        one, other = (stack.enter_context(worker_process(address, "--name", name)) for name in "ab")
        connection = stack.enter_context(Connection(address))
        client = connection.client()
        client.wait_for_workers(2, timeout=60)
        with amid(lambda: told.append(retire(address, "a", 60)), tmp_path):
            outcome, _ = run(client, Task(tmp_path, seconds=0.5))
        assert told == ["a is retired"]
        assert (outcome.done, outcome.failed) == (15, {})
        assert notes(tmp_path, "begin") == notes(tmp_path, "end") == Counter(names(SHARDS))
        seen = processes(tmp_path)
        assert 0 < seen[one.pid] < 5 < seen[other.pid]
        assert one.wait(30) == 0  # forgotten by the scheduler, it ends by itself
        assert psutil.pid_exists(other.pid)


@pytest.mark.slow
def test_the_only_worker_retires_and_another_joins(tmp_path: Path) -> None:
    with local_scheduler(0) as cluster, ExitStack() as stack:
        address = cluster.scheduler_address
        stack.enter_context(worker_process(address, "--name", "a"))
        connection = stack.enter_context(Connection(address))

        def replace() -> None:
            assert retire(address, "a", 60) == "a is retired"
            stack.enter_context(worker_process(address, "--name", "b"))

        with amid(replace, tmp_path):
            outcome, _ = run(connection.client(), Task(tmp_path, seconds=0.1))
    assert (outcome.done, outcome.failed) == (15, {})
    assert notes(tmp_path, "begin") == Counter(names(SHARDS))


@pytest.mark.slow
def test_what_takes_too_long_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    with local_scheduler(0) as cluster, ExitStack() as stack:
        address = cluster.scheduler_address
        for name in "ab":
            stack.enter_context(worker_process(address, "--name", name))
        connection = stack.enter_context(Connection(address))
        client = connection.client()
        client.wait_for_workers(2, timeout=60)

        def late() -> None:
            told.append(main(["--scheduler", address, "--name", "a", "--patience", "1.5"]))

        with amid(late, tmp_path, 2):
            run(client, Task(tmp_path, seconds=5), SHARDS[:4])
    assert told == [1]
    assert "1 tasks were not finished within 1.5 s" in capsys.readouterr().err
    assert set(notes(tmp_path, "end")) == set(names(SHARDS[:4]))


def test_a_worker_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with local_scheduler(0) as cluster:
        assert main(["--scheduler", cluster.scheduler_address, "--name", "x"]) == 0
        told = capsys.readouterr().out
    assert told == f"no worker x is known at {cluster.scheduler_address}\n"


def test_nobody_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setenv("POD_NAME", "x")
    assert main(["--patience", "0.3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "x is not retired in order: no Dask scheduler answers at tcp://127.0.0.1:1 ("
    )
    assert "Traceback" not in told


def test_whom(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_NAME", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["--scheduler", "tcp://127.0.0.1:1"])
    assert "give --scheduler and --name" in capsys.readouterr().err
