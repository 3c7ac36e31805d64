"""Connecting: to workers here, with GPUs or without, or to a scheduler of the same software."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from dask.system import CPU_COUNT
from distributed import Client

from aeheight import __version__
from aeheight.cluster import Connection
from aeheight.connection import software, visible_gpus
from aeheight.errors import InputError
from tests.tasks import Task, local_scheduler, notes, run, wait_for, worker_process


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")  # taken at its word
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("MKL_NUM_THREADS", "3")
        with Connection(workers=1) as connection:
            yield connection.client()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_worker_has_its_share_of_the_cores_from_its_first_moment(client: Client) -> None:
    """Dask itself starts workers with one thread; a library that is loaded early keeps to that.

    What the user set stands.
    """
    for seen in client.run(lambda: Path("/proc/self/environ").read_text().split("\0")).values():
        assert f"OMP_NUM_THREADS={CPU_COUNT}" in seen  # there is one worker
        assert "OMP_WAIT_POLICY=PASSIVE" in seen
        assert "MKL_NUM_THREADS=3" in seen


def test_more_gpus_than_are_visible_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(InputError, match=r"--gpus 3: 2 are visible"), Connection(gpus=3) as two:
        two.client()


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


# --- GPUs ---------------------------------------------------------------------------------------


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_a_worker_for_each_gpu(client: Client) -> None:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    seen = client.run(environment, "CUDA_VISIBLE_DEVICES")
    found = {
        worker["name"]: (worker["nthreads"], worker["resources"].get("GPU"), seen[address])
        for address, worker in workers.items()
    }
    assert found == {0: (2, None, ""), "gpu0": (4, 4, "0")}


@pytest.mark.parametrize(("device", "alone"), [("gpu", True), ("auto", True), ("cpu", False)])
def test_who_takes_the_tasks(client: Client, tmp_path: Path, device: str, alone: bool) -> None:
    outcome, _ = run(client, Task(tmp_path, seconds=0.1), device=device)
    assert outcome.done == 15
    processes = {path.read_text().split(" ")[0] for path in tmp_path.glob("*.begin.*")}
    assert len(processes) == (1 if alone else 2)


def test_without_gpus(tmp_path: Path) -> None:
    """Refused in the end by the connection, and at once by a step that finds them gone."""
    said: list[str] = []
    with (
        local_scheduler(1) as cluster,
        Connection(cluster.scheduler_address, patience=1, waiting=said.append) as connection,
    ):
        client = connection.client()
        for refuse in (
            lambda: connection.client("gpu"),
            lambda: run(client, Task(tmp_path), device="gpu"),
        ):
            with pytest.raises(InputError, match="no worker declares a GPU") as caught:
                refuse()
            assert "--resources GPU=4" in str(caught.value)
        assert said == [
            f"waiting for a worker with a GPU at {cluster.scheduler_address}, up to 1 s"
        ]
        assert not notes(tmp_path, "begin")
        assert run(client, Task(tmp_path), device="auto")[0].done == 15


def test_workers_here_without_gpus_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said: list[str] = []
    with (
        Connection(workers=1, waiting=said.append) as connection,
        pytest.raises(InputError, match="no worker declares a GPU"),
    ):
        connection.client("gpu")
    assert not said


def test_workers_and_gpus_that_join_late(tmp_path: Path) -> None:
    """Their nodes had yet to be started; the GPU's comes last, and takes all the work."""
    with ExitStack() as stack:
        cluster = stack.enter_context(local_scheduler(0))
        address, said = cluster.scheduler_address, []

        def join(what: str) -> None:
            said.append(what)
            resources = ["--resources", "GPU=1"] if "GPU" in what else []
            stack.enter_context(worker_process(address, *resources))

        connection = stack.enter_context(Connection(address, patience=60, waiting=join))
        client = connection.client("gpu")
        assert [what.split(" at ")[0] for what in said] == [
            "waiting for a worker",
            "waiting for a worker with a GPU",
        ]
        assert connection.client("gpu") is client
        assert run(client, Task(tmp_path), device="gpu")[0].done == 15
    assert len({path.read_text().split(" ")[0] for path in tmp_path.glob("*.begin.*")}) == 1


@pytest.mark.parametrize(
    ("chosen", "devices"),
    [("", []), ("-1", []), ("0", ["0"]), ("2, GPU-ab", ["2", "GPU-ab"]), ("0,-1,1", ["0"])],
)
def test_gpus_that_are_chosen(
    chosen: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == devices


# --- software -----------------------------------------------------------------------------------

OTHER = {
    "another aeheight": ("import aeheight\naeheight.__version__ = '0.0.9'", "aeheight 0.0.9, "),
    "no aeheight": ("import sys\nsys.modules['aeheight'] = None", "no aeheight, "),
    "another dask": ("import distributed\ndistributed.__version__ = '1.0'", "distributed 1.0, "),
}


def python(folder: Path, code: str) -> Path:
    (folder / "sitecustomize.py").write_text(code)
    return folder


@pytest.mark.parametrize("kind", OTHER)
def test_a_worker_of_other_software(tmp_path: Path, kind: str) -> None:
    code, told = OTHER[kind]
    with (
        local_scheduler(0) as cluster,
        worker_process(cluster.scheduler_address, python=python(tmp_path, code)),
        Connection(cluster.scheduler_address) as connection,
        pytest.raises(InputError, match="install the same") as caught,
    ):
        connection.client()
    assert re.search(f"the worker tcp://[0-9.:]+ has .*{re.escape(told)}", str(caught.value))
    assert f"the driver has aeheight {__version__}, " in str(caught.value)


@contextmanager
def joining_later(address: str, folder: Path, code: str) -> Iterator[None]:
    """A worker of other software joins once two shards are done."""
    over = threading.Event()

    def join() -> None:
        wait_for(lambda: notes(folder, "end").total() >= 2)
        with worker_process(address, python=python(folder, code)):
            over.wait()

    joining = threading.Thread(target=join)
    joining.start()
    try:
        yield
    finally:
        over.set()
        joining.join()


@pytest.mark.parametrize("kind", ["another aeheight", "another dask"])
def test_a_worker_of_other_software_that_joins_later(tmp_path: Path, kind: str) -> None:
    code, told = OTHER[kind]
    with (
        local_scheduler(1) as cluster,
        Connection(cluster.scheduler_address) as connection,
        joining_later(cluster.scheduler_address, tmp_path, code),
        pytest.raises(InputError, match=f"the worker tcp://.*{told}.*driver has"),
    ):
        run(connection.client(), Task(tmp_path, seconds=0.5))
    assert notes(tmp_path, "end").total() >= 2


def test_a_worker_without_aeheight_that_joins_later_costs_nothing(tmp_path: Path) -> None:
    """Its first task ends it, for it cannot even read it."""
    code, _ = OTHER["no aeheight"]
    with (
        local_scheduler(1) as cluster,
        Connection(cluster.scheduler_address) as connection,
        joining_later(cluster.scheduler_address, tmp_path, code),
    ):
        outcome, _ = run(connection.client(), Task(tmp_path, seconds=0.2))
    assert (outcome.done, outcome.failed) == (15, {})


def test_what_the_software_is() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.fullmatch(
        rf"aeheight {re.escape(__version__)}, distributed [0-9.]+, Python {version}", software()
    )


# --- what a driver shows, and its end ------------------------------------------------------------


def page(address: str) -> str:
    with urllib.request.urlopen(address) as answer:
        return answer.read().decode()


def test_the_dashboard_is_named_and_serves_the_metrics_of_both(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    with Connection(workers=1, gpus=0, announce=lambda *words: said.append(words)) as connection:
        assert not said
        client = connection.client()
        connection.client()
        run(client, Task(tmp_path))
        ((address, hint),) = said
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", address)
        assert "aeheight[dashboard]" in hint or not hint
        metrics = page(address.replace("status", "metrics"))
    assert "dask_scheduler_workers{" in metrics
    assert re.search(r'aeheight_shards_total\{state="done",step="test"\} [1-9]', metrics)
    assert re.search(r'aeheight_shard_duration_seconds_count\{step="test"\} [1-9]', metrics)


DRIVER = """
import os
from aeheight.cluster import Connection
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    with Connection(workers=2) as connection:
        client = connection.client()
        print("up", flush=True)
        input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    """Also one that is stopped, which no watch inside the worker would notice."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, script], cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"up\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [each for each in family if "spawn_main" in " ".join(each.cmdline())]
        assert len(workers) == 3
        workers[0].send_signal(signal.SIGSTOP)
        driver.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
