"""What the tests share: a small world, one finished run on it, a Dask cluster, the command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dask.system import CPU_COUNT

from pipelines.world import World, make_world
from tests.runs import Region, Regions, Result, believe, run_here, small_settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others


def pytest_configure() -> None:
    """A job in the background is started deaf to Ctrl-C, and so would be what the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


WORKERS = 2
THREADS = str(max(CPU_COUNT // WORKERS, 1))
"""Of a worker under `--workers 2`: heights are the same bits for the same number of threads."""


@pytest.fixture(scope="session")
def aeheight() -> Callable[..., Result]:
    """The command in this process: `aeheight("run", path)`."""
    return run_here


@pytest.fixture(scope="session")
def command() -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "aeheight.cli"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A made-up world of 256 x 256 pixels in the real formats."""
    return make_world(tmp_path_factory.mktemp("world") / "world", size=256)


@pytest.fixture(scope="session")
def small_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Region:
    """A finished `aeheight run` on the small world; tests must leave it as it is."""
    regions = Regions(tmp_path_factory.mktemp("small"), small_settings(world))
    region = regions.write("small")
    for verb in ("ingest", "train", "run"):
        result = run_here(verb, region.path, "--workers", str(WORKERS))
        assert result.code == 0, result.err
        if verb == "train":
            believe(region)
    return region


@pytest.fixture
def regions(world: World, tmp_path: Path) -> Regions:
    """Writes other region files of the small world."""
    return Regions(tmp_path, small_settings(world))


@pytest.fixture(scope="session")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Dask scheduler with two workers, each a process on this machine."""
    folder = tmp_path_factory.mktemp("dask")
    contact = folder / "scheduler.json"
    at = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(contact)]
    quiet = {"DASK_LOGGING__DISTRIBUTED": "critical", "OMP_NUM_THREADS": THREADS}
    quiet |= {"MKL_NUM_THREADS": THREADS, "OPENBLAS_NUM_THREADS": THREADS}
    quiet |= {"OMP_WAIT_POLICY": "PASSIVE", "DASK_TEMPORARY_DIRECTORY": str(folder)}
    roles = [["scheduler", "--port", "0"]] + WORKERS * [["worker", "--nthreads", "1", "--no-nanny"]]
    with contextlib.ExitStack() as started:
        for role in roles:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *role, *at],
                env=os.environ | quiet,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            started.enter_context(process)  # waits for its end,
            started.callback(process.kill)  # which this brings about first
        yield _address(contact)


def _address(contact: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(contact.read_text())["address"])
        time.sleep(0.05)
    raise TimeoutError("the Dask scheduler did not come up")
