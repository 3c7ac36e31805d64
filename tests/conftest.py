"""What the tests share: a small world, one finished run on it, a Dask cluster, the command."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from dask.system import CPU_COUNT

from aeheight.cli import main
from pipelines.world import World, make_world

WORKERS = 2
THREADS = str(max(CPU_COUNT // WORKERS, 1))
"""Of a worker under `--workers 2`: heights are the same bits for the same number of threads."""


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Region:
    """A region file and its store."""

    path: Path
    settings: dict[str, Any]

    @property
    def store(self) -> Path:
        return Path(self.settings["store"])

    @property
    def cube(self) -> Path:
        return self.store / "cube.zarr"

    @property
    def heights(self) -> Path:
        return self.store / "heights.zarr"

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.store / "report" / "metrics.json").read_text())

    def receipts(self, name: str) -> list[Path]:
        """Of `cube`, `split`, `heights` or `report`."""
        return sorted((self.store / f"{name}.receipts").glob("*/*/*/*.json"))


@dataclass(frozen=True)
class Regions:
    """Writes region files into a folder."""

    folder: Path
    base: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, **changes: Any) -> Region:
        """A region file and a store of that name; mappings are merged, anything else replaced."""
        settings = deepcopy(self.base) | {"name": "small", "store": str(self.folder / name)}
        for key, value in changes.items():
            old = settings.get(key)
            merge = isinstance(value, dict) and isinstance(old, dict)
            settings[key] = old | value if merge else value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return Region(path, settings)


def small_settings(world: World) -> dict[str, Any]:
    """As pipelines/regions/demo.yaml, in small; the network corrects the ridge."""
    west, south, east, north = world.bounds
    about = {"surface": "dsm", "vertical_datum": "EPSG:5773"}
    return {
        "grid": {"crs": world.crs, "resolution": 10, "bounds": list(world.bounds)},
        "embeddings": {"source": "cog", "href": str(world.embeddings), "year": 2021},
        "height": {"source": "stac", "href": str(world.height), **about},
        "prior": {"source": "raster", "href": str(world.prior), **about},
        "cube": {"shard": 64, "chunk": 32},
        "split": {
            "test": [(west + east) / 2, south, east, north],
            "validation": 0.2,
            "block": 16,
            "buffer": 2,
        },
        "model": {
            "architecture": "unetplusplus",
            "base": "ridge",
            "patch": 32,
            "batch": 8,
            "epochs": 2,
            "patches_per_epoch": 16,
        },
        "predict": {"window": 128, "halo": 32, "batch": 2},
    }


def run_here(*arguments: str | Path) -> Result:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Result(code, out.getvalue(), err.getvalue())


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
    result = run_here("run", region.path, "--workers", str(WORKERS))
    assert result.code == 0, result.err
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
