"""Faults, injected into real runs of `aeheight predict`: what happens, and what the map is then.

    python -m pipelines.faults [--run runs/demo] [NAME ...]

A fault is a function: it harms a copy of a small part of the demo region before the command maps it
or while it does, sees that the command does what is promised, lets it go on, and tells what it saw.
Every command is a process of its own. Then every object of the map is compared, byte for byte, with
the map of an undisturbed run. All of it lies under `runs/faults`.
"""

import argparse
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import xarray as xr

from aeheight.errors import InputError
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger
from aeheight.store import Store
from pipelines.fault_runs import (
    Part,
    Result,
    SkippedError,
    UnexpectedError,
    cluster,
    demo_part,
    differing,
    flip,
    recut,
    small_disk,
)

FOLDER = Path("runs/faults")
SHARDS = 16
"""Of the map of the part."""
TOLERANCE = 0.001
"""Metres, where a batch was halved."""


# --- who may die ----------------------------------------------------------------------------------


def worker(part: Part, _sound: Part) -> str:
    """A worker is killed (kill -9) in mid-shard: its shards are done elsewhere."""
    with part.started("predict") as driver:
        driver.wait_until(part.receipts, "a shard was done")
        driver.workers()[0].kill()
        result = driver.end().expect(0, f"{SHARDS} shards done", " 0 failed")
    return f"exit 0: {_counts(result)}"


def scheduler(part: Part, _sound: Part) -> str:
    """The scheduler is killed (kill -9): the driver says so, the next one goes on."""
    with cluster(part.folder) as there, part.started("predict", *there.option) as driver:
        driver.wait_until(part.receipts, "a shard was done")
        there.scheduler.kill()
        lost = driver.end().expect(1, "the scheduler went away", "run again")
    left = SHARDS - len(part.receipts())
    with cluster(part.folder) as there:
        again = part.run("predict", *there.option).expect(0, f"{left} shards done", " 0 failed")
    return f"exit 1: {lost.line('went away').partition('(')[0]}; again, exit 0: {_counts(again)}"


def driver(part: Part, _sound: Part) -> str:
    """The driver is killed (kill -9): its workers end with it, the same command goes on."""
    with part.started("predict") as first:
        first.wait_until(part.receipts, "a shard was done")
        workers = first.workers()
        first.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
    if alive:
        raise UnexpectedError(f"{len(alive)} workers outlived their driver")
    left = SHARDS - len(part.receipts())
    again = part.run("predict").expect(0, f"{left} shards done", " 0 failed")
    return f"killed, and no worker lived on; again, exit 0: {_counts(again)}"


_PATIENT = """
import functools, aeheight.steps.run as steps
steps.run_shards = functools.partial(steps.run_shards, limit=2)
"""
"""A driver that gives a shard 2 s (or, as the command, 20 times the longest that was done), where
the command gives it 10 minutes."""
_HANGING = """
import os, signal, time
from contextlib import suppress
from pathlib import Path
import aeheight.steps.predict as step

compute = step.compute

def hang(*arguments):
    row_and_column = arguments[-1].row, arguments[-1].col
    for where, how in (((0, 256), stop), ((128, 128), wait)):
        if row_and_column == where:
            with suppress(FileExistsError):
                Path({folder!r}, how.__name__).touch(exist_ok=False)
                how()
    return compute(*arguments)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def wait():
    time.sleep(3600)

def dask_setup(worker):
    step.compute = hang
"""
"""Workers of which one stops in mid-shard, and one task never ends; at the first attempt."""


def hang(part: Part, _sound: Part) -> str:
    """A worker is frozen (SIGSTOP) in mid-shard, and a task never ends: both are done elsewhere."""
    preload = _preload(part, _HANGING.format(folder=str(part.folder)))
    with cluster(part.folder, 3, "--nanny", "--preload", preload) as there:
        result = part.run("predict", *there.option, change=_PATIENT)
    result.expect(0, f"{SHARDS} shards done", " 0 failed", "that worker is started anew")
    if not (part.folder / "stop").exists() or not (part.folder / "wait").exists():
        raise UnexpectedError("nothing hung")
    warning = result.line("started anew").partition(" takes ")[2]
    return f"{result.text.count('started anew')} x 'takes {warning}'; exit 0: {_counts(result)}"


_BOTH = """
import aeheight.cluster, aeheight.steps.run as steps

def run_shards(client, task, shards, *rest):
    pairs = [(shard, worker) for shard in shards for worker in client.nthreads()]
    twins = [client.submit(task, s, workers=[w], key=f"{s.name} {w}") for s, w in pairs]
    client.gather(twins)
    return aeheight.cluster.Outcome(len(shards), 0, {}, 0.0, 0)

steps.run_shards = run_shards
"""
"""A driver that gives every shard to all workers at once."""


def twice(part: Part, _sound: Part) -> str:
    """Every shard is computed by two workers at the same time."""
    part.run("predict", change=_BOTH).expect(0, f"{SHARDS} shards done")
    return f"exit 0: {SHARDS} shards, computed and written by both workers at the same time"


# --- what may run out -----------------------------------------------------------------------------


def disk(part: Part, _sound: Part) -> str:
    """The map's disk is full: what does not fit is listed; with more room the command goes on."""
    aside = part.store / "aside"
    with small_disk(part.heights, "512k"):
        full = part.run("predict").expect(
            1, "No space left on device", "run the same command again"
        )
        left = SHARDS - len(part.receipts())
        subprocess.run(["mount", "-o", "remount,size=64m", str(part.heights)], check=True)
        again = part.run("predict").expect(0, f"{left} shards done", " 0 failed")
        shutil.copytree(part.heights, aside)
    part.heights.rmdir()
    aside.rename(part.heights)
    return f"exit 1: No space left on device, {_counts(full)}; with room, exit 0: {_counts(again)}"


CRAMPED = """
import resource
import psutil
import aeheight.steps.predict as step

compute = step.compute

def cramp(*arguments):
    values = compute(*arguments)
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        room = psutil.Process().memory_info().vms + 200_000_000
        resource.setrlimit(resource.RLIMIT_AS, (room, -1))
    return values

def dask_setup(worker):
    step.compute = cramp
"""
"""Workers that get no more than 200 MB after their first shard (with which all threads have begun):
16 windows of 128 px take 330."""
RETURNED = {
    "MALLOC_MMAP_THRESHOLD_": "1000000",
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""The C library keeps nothing of what is freed, so that the limit is felt."""


def memory(part: Part, sound: Part) -> str:
    """The device is out of memory: the batch is halved, and the receipts say so."""
    larger = ("--set", "predict.shard=256", "--set", "predict.batch=16")
    with cluster(part.folder, 1, "--preload", _preload(part, CRAMPED), env=RETURNED) as there:
        result = part.run("predict", *there.option, *larger)
    result.expect(0, "out of memory with 16 windows of 128 px: 8 at a time", " 0 failed")
    ledger = Ledger(Store.at(part.store / "heights.receipts"))
    remarks = {remark: None for each in ledger.receipts(ledger.done()) for remark in each.remarks}
    if not remarks:
        raise UnexpectedError("no batch was halved")
    if (apart := _apart(part, sound)) > TOLERANCE:
        raise UnexpectedError(f"the map is {apart:g} m off")
    return f"exit 0: {'; '.join(remarks)}; at most {apart:.2g} m off ({TOLERANCE} is stated)"


def _apart(one: Part, other: Part) -> float:
    """The largest difference between two maps, metres; infinite where one lacks a pixel."""
    a, b = (_pixels(part)["height"] for part in (one, other))
    same_ground = np.array_equal(np.isnan(a), np.isnan(b))
    return float(np.nanmax(abs(a - b))) if same_ground else float("inf")


def _pixels(part: Part) -> dict[str, np.ndarray]:
    """Every layer of a map, read by xarray alone."""
    with xr.open_datatree(part.heights, engine="zarr") as tree:
        (group,) = tree.children.values()
        return {str(name): values.to_numpy() for name, values in group.data_vars.items()}


# --- what may be damaged or changed ---------------------------------------------------------------


def input_(part: Part, _sound: Part) -> str:
    """A chunk of the cube is damaged: its shard fails, the rest is done; it can be repaired."""
    flip(part.codes()[0], 1000)
    name = "height/2021/r0000000-c0000000-128x128"
    failed = part.run("predict").expect(1, name, f"{SHARDS - 1} shards done", " 1 failed")
    part.run("verify").expect(1, f"damaged {failed.line(name).split()[-1].split('/')[0]}/embedding")
    part.run("verify", "--repair").expect(0)
    again = part.run("predict").expect(0, "1 shards done", f"{SHARDS - 1} done before")
    return f"exit 1: {failed.line(name)}; verify 1, --repair 0; again, exit 0: {_counts(again)}"


def output(part: Part, _sound: Part) -> str:
    """A chunk of the map is damaged: verify finds it, --repair mends only it."""
    part.run("predict").expect(0)
    before = _written(part)
    broken = sorted(part.heights.glob("*/height/c/0/1/2"))[0]
    flip(broken, 1000)
    found = part.run("verify").expect(1, "1 damaged", "height/2021/r0000128-c0000256-128x128")
    part.run("verify", "--repair").expect(0, "1 shards done", f"{SHARDS - 1} done before")
    part.run("verify").expect(0)
    touched = {path for path, time in _written(part).items() if time != before[path]}
    if touched != {broken, Path(str(broken).replace("/height/", "/novelty/"))}:
        raise UnexpectedError(f"--repair wrote {sorted(map(str, touched))}")
    return f"verify 1: {found.line('  damaged ').partition(':')[0]}; --repair 0 wrote just that"


def _written(part: Part) -> dict[Path, int]:
    """When each object of a map was written."""
    return {path: path.stat().st_mtime_ns for path in part.heights.glob("*/*/c/*/*/*")}


def settings(part: Part, _sound: Part) -> str:
    """Settings change half-way: refused, with the difference; set back, the command goes on."""
    left = SHARDS - part.half()
    refused = part.run("predict", "--set", "predict.halo=16").expect(2, "predict.halo: 32 -> 16")
    part.run("predict").expect(0, f"{left} shards done")
    return f"exit 2: {refused.line('predict.halo')}; set back, exit 0: {left} shards done"


def checkpoint(part: Part, _sound: Part) -> str:
    """Another model, half-way: refused, with the difference; with the first one it goes on."""
    left = SHARDS - part.half()
    known = Checkpoint.from_bytes((part.model / "model" / "best.ckpt").read_bytes())
    other = part.folder / "other.ckpt"
    other.write_bytes(replace(known, scale=1.01 * known.scale).to_bytes())
    refused = replace(part, model=other).run("predict").expect(2, "checkpoint:", known.digest)
    part.run("predict").expect(0, f"{left} shards done")
    told = " ".join(word.strip("'")[:16] for word in refused.line("checkpoint:").split())
    return f"exit 2: {told}; with the first, exit 0: {left} shards done"


# --- how it may be cut ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to make the same map."""

    cube: int
    """Shards of the cube, pixels."""
    shard: int
    """Shards of the map, pixels."""
    workers: int = 2
    reverse: bool = False
    """The last shard first."""
    resumed: bool = False
    """Killed half-way, and run again."""

    def __str__(self) -> str:
        order = "backward" if self.reverse else "forward"
        text = f"cube shards of {self.cube} px, map shards of {self.shard} px, "
        return text + f"{self.workers} workers, {order}" + ", resumed" * self.resumed


CUTS = (
    Cut(64, 64, reverse=True),
    Cut(64, 128, workers=1),
    Cut(64, 256, workers=1, resumed=True),
    Cut(128, 128, workers=1, reverse=True, resumed=True),
    Cut(128, 128, workers=4),
    Cut(128, 256, reverse=True),
    Cut(256, 256, workers=1, reverse=True, resumed=True),
)
_REVERSED = """
import aeheight.steps.run as steps
run_shards = steps.run_shards
steps.run_shards = lambda client, task, shards, *rest: run_shards(client, task, shards[::-1], *rest)
"""
"""A driver that hands out the last shard first."""


def cuts(part: Part, sound: Part) -> str:
    """The same ground in other shards, by other workers, in other orders, in one go or resumed."""
    for number, cut in enumerate(CUTS):
        other = recut(
            part, f"cuts-{number}", cube={"shard": cut.cube}, predict={"shard": cut.shard}
        )
        _make(other, cut)
        pixels, expected = _pixels(other), _pixels(sound)
        if any(not np.array_equal(pixels[k], expected[k], equal_nan=True) for k in expected):
            raise UnexpectedError(f"{cut}: at most {_apart(other, sound):g} m off")
        whole = cut.shard == 128  # as in the undisturbed run
        if whole and (wrong := differing(sound.heights, other.heights)):
            raise UnexpectedError(f"{cut}: {wrong} differ")
        print(f"          {cut}: the same {'objects' if whole else 'pixels'}", flush=True)
    part.run("predict").expect(0)
    return f"{len(CUTS)} ways to make the same map: bit for bit the same pixels"


def _make(part: Part, cut: Cut) -> None:
    change = _REVERSED * cut.reverse
    part.run("ingest").expect(0, " 0 failed")
    with cluster(part.folder, cut.workers) as there:
        if cut.resumed and part.half(*there.option, change=change) == (512 // cut.shard) ** 2:
            raise UnexpectedError(f"{cut}: nothing was left to resume")
        part.run("predict", *there.option, change=change).expect(0, " 0 failed")


# --- the program ----------------------------------------------------------------------------------

Fault = Callable[[Part, Part], str]
FAULTS: dict[str, Fault] = {
    fault.__name__.rstrip("_"): fault
    for fault in (worker, scheduler, driver, hang, twice, disk, memory, input_, output, settings,
                  checkpoint, cuts)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a fault."""

    fault: str
    happened: str
    seconds: float
    equal: str
    """To the undisturbed map, byte for byte: `yes`, `no`, `within ...`; `-` where skipped."""

    @property
    def as_promised(self) -> bool:
        """Whether nothing went another way."""
        return self.equal != "no"

    def __str__(self) -> str:
        lines = textwrap.wrap(self.happened.replace(f"{Path.cwd()}/", ""), 88) or [""]
        head = f"{self.fault:11}{lines[0]:90}{self.seconds:5.0f} s   {self.equal}"
        return "\n".join([head, *(" " * 11 + line for line in lines[1:])])


def show(name: str, sound: Part) -> Seen:
    """Inject a fault and compare the map."""
    print(f"\n{name.upper()}  {FAULTS[name].__doc__}", flush=True)
    started = time.monotonic()
    part = sound.copied(name)
    try:
        happened = FAULTS[name](part, sound)
        equal = _judged(part, sound, happened) if name != "memory" else f"within {TOLERANCE} m"
    except SkippedError as reason:
        happened, equal = f"skipped: {reason}", "-"
    except UnexpectedError as error:
        happened, equal = str(error), "no"
    seen = Seen(name, happened, time.monotonic() - started, equal)
    print(seen, flush=True)
    return seen


def _judged(part: Part, sound: Part, happened: str) -> str:
    if wrong := differing(sound.heights, part.heights):
        raise UnexpectedError(f"{happened}; but the map differs in {', '.join(wrong)}")
    return "yes"


def _counts(result: Result) -> str:
    """`15 shards done, 1 done before, 0 failed`, of what predict said at its end."""
    told = result.line("shards done in").removeprefix("predict").split(",")
    return ", ".join([told[0].partition(" in ")[0].strip(), *(text.strip() for text in told[1:])])


def _preload(part: Part, code: str) -> str:
    """A file that workers run first."""
    path = part.folder / "preload.py"
    path.write_text(code, encoding="utf-8")
    return str(path)


def _check(run: Path) -> None:
    """A trained run must be there, and the sources of the demo region.

    Raises:
        InputError: it is not; says what makes it.
    """
    model = run / "model" / "best.ckpt"
    if not model.exists():
        raise InputError(f"there is no model at {model}; run `make demo` first")
    if Checkpoint.from_bytes(model.read_bytes()).seams is None:
        raise InputError(
            f"{model} is of an older aeheight, which measured no halo: train it again with "
            "`aeheight train pipelines/regions/demo.yaml --overwrite`"
        )
    if not Path("runs/demo-world").exists():
        raise InputError("there is no runs/demo-world; run `make demo` first")


def main(argv: Sequence[str] | None = None) -> int:
    """Show the faults named, or all; the exit code: 1 where one did not go as promised."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="pipelines.faults", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="store of a run that was trained"
    )
    arguments = parser.parse_args(argv)
    names = list(FAULTS) if arguments.names in ([], ["all"]) else arguments.names
    if unknown := sorted(set(names) - set(FAULTS)):
        parser.error(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    try:
        _check(arguments.run)
        print("a part of the demo region, ingested and predicted undisturbed", flush=True)
        sound = demo_part(FOLDER / "undisturbed", arguments.run)
    except (InputError, UnexpectedError) as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    seen = [show(name, sound) for name in names]
    print(f"\n{'fault':11}{'what happened':88}{'time':>9}   equal bytes", *seen, sep="\n")
    return int(not all(each.as_promised for each in seen))


if __name__ == "__main__":
    sys.exit(main())
