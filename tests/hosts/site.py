"""A scheduler, workers and drivers, each on a host of its own, over mutual TLS."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.conftest import THREADS
from tests.hosts.network import Host, certificates, network, tls

ROOT = Path(__file__).parents[2]
TTL = 20
"""Seconds after which a silent worker is forgotten."""
WORKERS = ("one", "two", "three")
NOTHING: Mapping[str, str | None] = MappingProxyType({})
_PATIENCE = 120.0


def wait_for(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)


@dataclass
class Command:
    """A process on a host."""

    process: "subprocess.Popen[bytes]"
    log: Path
    began: float = field(default_factory=time.monotonic)

    def said(self) -> str:
        return self.log.read_text()

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it said."""
        return self.process.wait(_PATIENCE), self.said()


@dataclass
class Site:
    """The hosts, and what runs on them."""

    folder: Path
    hosts: dict[str, Host]
    secrets: Path
    running: dict[str, Command] = field(default_factory=dict)
    """By the name of its host: the scheduler and the workers."""

    @property
    def address(self) -> str:
        return f"tls://{self.hosts['scheduler'].address}:8786"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    def dwell(self, seconds: float) -> None:
        """Forget what was begun; every layer of a shard takes so long from now on."""
        for note in self.notes.iterdir():
            note.unlink()
        (self.notes / "seconds").write_text(str(seconds))

    def noted(self, what: str, worker: str = "*") -> Counter[str]:
        """Shards that were begun, or ended, how often; by one worker or all."""
        return Counter(path.name.split(".")[0] for path in self.notes.glob(f"*.{worker}.*.{what}"))

    def start(self, host: str, *words: str, env: Mapping[str, str | None] = NOTHING) -> Command:
        """A Python module as a process; variables that are None are left out."""
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        all_ = (
            os.environ
            | dict.fromkeys(threads, THREADS)
            | {"PYTHONPATH": str(ROOT), "DASK_TEMPORARY_DIRECTORY": str(self.folder)}
            | {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{TTL}s"}
            | {"SLOW_FOLDER": str(self.notes)}
            | tls(self.secrets)
            | env
        )
        log = self.folder / f"{host}-{time.time_ns()}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.hosts[host].command(sys.executable, "-m", *words),
                cwd=ROOT,
                env={name: value for name, value in all_.items() if value is not None},
                stdout=out,
                stderr=out,
            )
        return Command(process, log)

    def start_scheduler(self) -> None:
        words = ["scheduler", "--protocol", "tls", "--no-dashboard"]
        self.running["scheduler"] = self.start(
            "scheduler", "dask", *words, "--host", self.hosts["scheduler"].address
        )

    def start_worker(self, name: str, *words: str, env: Mapping[str, str | None] = NOTHING) -> None:
        flags = ["--protocol", "tls", "--no-nanny", "--no-dashboard", "--nthreads", "2"]
        flags += ["--preload", "tests.hosts.slow", "--name", name]
        flags += ["--host", self.hosts[name].address]
        self.running[name] = self.start(
            name, "dask", "worker", self.address, *flags, *words, env=env
        )

    def whole(self) -> "Site":
        """Itself, with every host at work."""
        if "scheduler" not in self.running or not self.running["scheduler"].alive():
            self.start_scheduler()
        for name in WORKERS:
            if name not in self.running or not self.running[name].alive():
                self.start_worker(name)
        wait_for(lambda: all(map(self.joined, WORKERS)), "the workers")
        return self

    def joined(self, name: str) -> bool:
        return "Registered to:" in self.running[name].said()

    def drive(self, *words: str | Path, env: Mapping[str, str | None] = NOTHING) -> Command:
        """`aeheight ... --scheduler`, on the driver's host."""
        options = [] if "--scheduler" in words else ["--scheduler", self.address]
        return self.start("driver", "aeheight.cli", *map(str, words), *options, env=env)

    def stop(self) -> None:
        for command in self.running.values():
            command.kill()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Hosts without anything on them yet; all ends with the block."""
    (folder / "notes").mkdir()
    with network("scheduler", *WORKERS, "driver") as hosts:
        there = Site(folder, hosts, certificates(folder / "tls"))
        there.dwell(0)
        try:
            yield there
        finally:
            there.stop()
