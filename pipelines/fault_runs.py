"""What faults are injected into: a small part of the demo region, and the processes that map it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import yaml
from dask.system import CPU_COUNT

REGION = Path(__file__).parent / "regions" / "demo.yaml"
WORKERS = 2
"""Worker processes of every run, unless it says another number."""
THREADS = str(max(CPU_COUNT // WORKERS, 1))
"""Threads of the network in each, as `--workers 2` gives: the same number, the same bits."""
_PART = {
    "grid": {"crs": "EPSG:32631", "resolution": 10, "bounds": [433790, 5091090, 438910, 5096210]},
    "cube": {"shard": 128, "chunk": 64},
    "predict": {"window": 128, "halo": 32, "batch": 4},
}
"""The middle of the demo region, 512 x 512 px: 16 shards of the map, of four windows each."""
_PATIENCE = 240.0
"""Seconds that anything here may take."""


class UnexpectedError(Exception):
    """Something did not happen as aeheight promises."""


class SkippedError(Exception):
    """A fault cannot be injected here; says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left behind."""

    code: int
    text: str
    """All that it printed."""
    log: Path
    """Where that is kept."""

    def expect(self, code: int, *words: str) -> "Result":
        """Itself, if it is as expected.

        Raises:
            UnexpectedError: another exit code, or words are missing.
        """
        missing = [word for word in words if word not in self.text]
        if self.code != code or missing or "Traceback" in self.text:
            wanted = [f"exit code {code}", *map(repr, missing), "no traceback"]
            raise UnexpectedError(
                f"wanted {', '.join(wanted)}; got exit code {self.code}, see {self.log}"
            )
        return self

    def line(self, word: str) -> str:
        """The first line with a word."""
        return next((line.strip() for line in self.text.splitlines() if word in line), "")


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so.

    Raises:
        UnexpectedError: it is not so for minutes.
    """
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise UnexpectedError(f"waited in vain for {what}")
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Driver:
    """A command at work."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(encoding="utf-8")

    def workers(self) -> list[psutil.Process]:
        """Its worker processes; all of their threads have a shard until the last few."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until something is so, while it works.

        Raises:
            UnexpectedError: it ended before.
        """
        wait_for(lambda: condition() or self.process.poll() is not None, what)
        if not condition():
            raise UnexpectedError(f"the command ended before {what}, see {self.log}")

    def kill(self) -> None:
        """End it and what it started, as `kill -9` does."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait()

    def end(self) -> Result:
        """Wait for it."""
        wait_for(lambda: self.process.poll() is not None, f"the end of the command, see {self.log}")
        return Result(self.process.returncode, self.said(), self.log)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the demo region, and where its run lies."""

    settings: Mapping[str, Any]
    folder: Path
    """Holds the region file and the store."""
    model: Path
    """The run whose model predicts."""

    @property
    def store(self) -> Path:
        """Where the run lies."""
        return self.folder / "run"

    @property
    def heights(self) -> Path:
        """The map."""
        return self.store / "heights.zarr"

    def receipts(self) -> list[Path]:
        """Of the shards of the map."""
        return sorted((self.store / "heights.receipts").rglob("r*-c*-*x*.json"))

    @contextmanager
    def started(self, verb: str, *options: str, change: str = "") -> Iterator[Driver]:
        """The command as a process of its own; whatever happens, it ends with the block.

        Args:
            verb: such as `predict`, which is given the model.
            options: further ones.
            change: Python that the driver runs first.
        """
        model = ["--checkpoint", str(self.model)] if verb == "predict" else []
        place = [] if "--scheduler" in options else ["--workers", str(WORKERS)]
        main = f"import sys\n{change}\nfrom aeheight.cli import main\nsys.exit(main())"
        words = [verb, str(self.folder / "region.yaml"), *model, *place, *options]
        log = self.folder / f"{verb}-{time.time_ns()}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", main, *words], stdout=file, stderr=subprocess.STDOUT
            )
        driver = Driver(process, log)
        try:
            yield driver
        finally:
            driver.kill()

    def run(self, verb: str, *options: str, change: str = "") -> Result:
        """The command, to its end."""
        with self.started(verb, *options, change=change) as driver:
            return driver.end()

    def half(self, *options: str, change: str = "") -> int:
        """Predict until the driver is killed with -9 on the way; returns the shards done."""
        with self.started("predict", *options, change=change) as driver:
            driver.wait_until(self.receipts, "a shard was done")
            driver.kill()
        return len(self.receipts())

    def codes(self) -> list[Path]:
        """The cube's objects of embeddings, by name."""
        found = (self.store / "cube.zarr").glob("*/embedding/c/**/*")
        return sorted(path for path in found if path.is_file())

    def copied(self, name: str) -> "Part":
        """Another part beside it, with a copy of the cube and no map yet."""
        twin = write_part(self.folder.parent / name, self.settings, self.model)
        for made in ("cube.zarr", "cube.receipts"):
            shutil.copytree(self.store / made, twin.store / made)
        return twin


def write_part(folder: Path, settings: Mapping[str, Any], model: Path) -> Part:
    """A part's region file, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part = Part(settings, folder, model)
    named = {**settings, "store": str(part.store)}
    (folder / "region.yaml").write_text(yaml.safe_dump(named, sort_keys=False), encoding="utf-8")
    return part


def demo_part(folder: Path, model: Path) -> Part:
    """The part of the demo region that faults are shown on, ingested and predicted undisturbed.

    Raises:
        UnexpectedError: a command failed.
    """
    settings = yaml.safe_load(REGION.read_text(encoding="utf-8")) | _PART
    for key in ("embeddings", "height", "prior"):
        settings[key]["href"] = str((REGION.parent / settings[key]["href"]).resolve())
    part = write_part(folder, settings, model)
    for verb in ("ingest", "predict"):
        part.run(verb).expect(0, " 0 failed")
    return part


def recut(part: Part, name: str, **changes: Mapping[str, Any]) -> Part:
    """The same ground with other settings; nothing of it is made yet."""
    settings = {**part.settings, **{k: {**part.settings[k], **v} for k, v in changes.items()}}
    return replace(write_part(part.folder.parent / name, settings, part.model), settings=settings)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A scheduler with workers that no driver owns."""

    address: str
    scheduler: "subprocess.Popen[bytes]"

    @property
    def option(self) -> tuple[str, str]:
        """Of a command that is to use it."""
        return "--scheduler", self.address


@contextmanager
def cluster(
    folder: Path,
    workers: int = WORKERS,
    *options: str,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Cluster]:
    """Start one; it ends with the block.

    Args:
        folder: for its files.
        workers: processes of one task at a time.
        options: of each worker; left out, it has no nanny.
        env: for the processes.
    """
    contact = folder / f"scheduler-{time.time_ns()}.json"
    shared = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(contact)]
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = dict.fromkeys(threads, THREADS) | {"OMP_WAIT_POLICY": "PASSIVE", **env}
    worker = ["worker", "--nthreads", "1", *(options or ["--no-nanny"])]
    with ExitStack() as stack, (folder / "cluster.log").open("ab") as log:

        def start(words: list[str]) -> "subprocess.Popen[bytes]":
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words, *shared],
                env=os.environ | quiet | {"DASK_TEMPORARY_DIRECTORY": str(folder)},
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        scheduler = start(["scheduler", "--port", "0"])
        for _ in range(workers):
            start(worker)
        wait_for(lambda: contact.exists() and contact.stat().st_size, "the scheduler")
        yield Cluster(json.loads(contact.read_text(encoding="utf-8"))["address"], scheduler)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own that is soon full; it ends with the block.

    Args:
        folder: not there yet.
        size: such as `512k`.

    Raises:
        SkippedError: there is no right to mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise SkippedError(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def flip(path: Path, offset: int) -> None:
    """Turn one byte of a file over."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def objects(tree: Path) -> dict[str, bytes]:
    """Every object of a tree, without the token that it drew when it was made."""
    found = {
        str(path.relative_to(tree)): path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }
    root = json.loads(found["zarr.json"])
    del root["attributes"]["aeheight"]["identity"]
    return found | {"zarr.json": json.dumps(root).encode()}


def differing(one: Path, other: Path) -> list[str]:
    """The objects that differ between two trees, or that one of them lacks."""
    a, b = objects(one), objects(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
