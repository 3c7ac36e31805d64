"""What is done: a receipt for every finished shard, the settings it was made with, one driver.

A missing chunk says nothing (an all-nodata chunk is never written), so what is done is what has a
receipt: one small object beside the store, left by the worker after the shard is whole.
"""

import json
import logging
import os
import platform
import signal
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import Any, NoReturn

import numpy as np
import psutil
from numpy.typing import NDArray

from aeheight import __version__
from aeheight.cube import Tree, checksum
from aeheight.errors import InputError
from aeheight.memory import peak_bytes
from aeheight.settings import differences, fingerprint
from aeheight.store import Store
from aeheight.template import Shard

FORMAT = 2
_SETTINGS = "settings.json"
_LEASE = "lease.json"
_LEASE_SECONDS = 60.0
_READERS = 16
"""Receipts that are read at the same time: a store answers many as fast as one."""
_log = logging.getLogger(__name__)


@cache
def versions() -> dict[str, str]:
    """What the receipts and reports say of the code that ran."""
    libraries = ("dask", "numpy", "rasterio", "torch", "zarr")
    return {
        "aeheight": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


@dataclass(frozen=True, slots=True)
class Receipt:
    """The proof that one shard is whole."""

    shard: str
    """`Shard.name`."""
    checksum: str
    """Of the shard's values (`cube.checksum`), or of the object's bytes."""
    pixels: int
    valid: int
    """Pixels that are not nodata."""
    minimum: float | None
    """Over the valid values, as stored (codes for embeddings, metres for heights)."""
    maximum: float | None
    mean: float | None
    settings: str
    """Fingerprint of the settings (and checkpoint) it was made with."""
    seconds: float
    """From first read to written."""
    inputs: str = ""
    """`Shard.inputs`: fingerprint of what it was made from."""
    further: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the layers that were written with it, by name."""
    remarks: tuple[str, ...] = ()
    """What a user should know of how it was made."""
    device: str = ""
    """What computed it, such as `cpu, float32`; empty: nothing that depends on it."""
    peak: int = 0
    """Bytes, the most that the worker had held by then; 0: not known."""
    versions: Mapping[str, str] = field(default_factory=versions)
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self), indent=1).encode()


def receipt_for(
    shard: Shard,
    values: NDArray[Any],
    digest: str,
    valid: NDArray[np.bool_],
    settings: str,
    started: float,
) -> Receipt:
    """The receipt of an array that has been written.

    Args:
        shard: what was written.
        values: (bands,) rows, columns.
        digest: `checksum(values)`.
        valid: (rows, columns) pixels that are not nodata.
        settings: fingerprint of the settings.
        started: `time.monotonic()` before the first read.
    """
    low, high, mean = _statistics(values, valid)
    return Receipt(
        shard.name,
        digest,
        shard.region.size,
        int(valid.sum()),
        low,
        high,
        mean,
        settings,
        round(time.monotonic() - started, 3),
        shard.inputs,
        peak=peak_bytes(),
    )


def _statistics(
    values: NDArray[Any], valid: NDArray[np.bool_]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Minimum, maximum and mean of the valid values, plane by plane: nothing is copied whole."""
    if not valid.any():
        return None, None, None
    every = bool(valid.all())
    planes = values.reshape(-1, *valid.shape)
    if values.dtype == np.int8:
        parts = [_of_codes(plane, valid, every=every) for plane in planes]
    else:
        chosen = (plane if every else plane[valid] for plane in planes)
        parts = [(float(c.min()), float(c.max()), float(c.sum(dtype=np.float64))) for c in chosen]
    lows, highs, sums = zip(*parts, strict=True)
    return min(lows), max(highs), sum(sums) / (len(parts) * int(valid.sum()))


def _of_codes(
    plane: NDArray[np.int8], valid: NDArray[np.bool_], *, every: bool
) -> tuple[float, float, float]:
    """Minimum, maximum and sum of the valid codes: others stand in for the rest, by bit masks.

    Choosing them by index would take twice as long, and a copy.
    """
    gaps = 0
    if not every:
        keep = -valid.view(np.int8)  # all bits of a valid pixel
        stand_in = plane.flat[valid.argmax()]
        gaps = valid.size - int(valid.sum())
        plane = (plane & keep) | (stand_in & ~keep)
    total = int(plane.sum(axis=-1, dtype=np.int32).sum(dtype=np.int64))
    excess = gaps * int(stand_in) if gaps else 0
    return float(plane.min()), float(plane.max()), float(total - excess)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The receipts of one step.

    They lie in a folder named by the fingerprint of their settings, so that what a straggler of
    older settings leaves behind can never count as done.
    """

    store: Store
    """Where they lie: `RUN/cube.receipts`."""
    key: str = ""
    """Fingerprint of the settings; empty: that of the settings recorded there."""

    def begin(self, settings: Mapping[str, Any], *, made: bool | None = None) -> "Ledger":
        """Take up the work with these settings; returns the ledger of their receipts.

        Args:
            settings: all that the result depends on.
            made: whether anything was made with the recorded settings; None: whether there is a
                receipt. Nothing made, nothing to keep: the settings may change.

        Raises:
            InputError: there are receipts of other settings; shows what differs.
        """
        wanted = json.loads(json.dumps(settings))
        found = self.settings()
        changed = [] if found is None else differences(found, wanted)
        if changed and (self._any() if made is None else made):
            self.refuse(changed, "run that step with --overwrite")
        if found is None or changed:
            self.store.write(_SETTINGS, json.dumps(wanted, indent=1, sort_keys=True).encode())
        return replace(self, key=fingerprint(wanted))

    def check(self, settings: Mapping[str, Any], step: str, *, made: bool | None = None) -> None:
        """Refuse what `begin` would refuse, without writing: for plans, and for later steps.

        Args:
            settings: some or all of what the result depends on.
            step: the verb that makes it, for the remedy.
            made: as in `begin`.

        Raises:
            InputError: something was made with other settings; shows what differs.
        """
        found = self.settings()
        if found is None:
            return
        wanted = json.loads(json.dumps(settings))
        changed = differences({key: found.get(key) for key in wanted}, wanted)
        if changed and (self._any() if made is None else made):
            self.refuse(changed, f"run aeheight {step} --overwrite")

    def refuse(self, changed: list[str], remedy: str) -> NoReturn:
        """End with what differs from the settings of what is there, and the remedy.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.store.uri}: begun with other settings:\n  "
            + "\n  ".join(changed)
            + f"\nset them back, or {remedy} to make it anew"
        )

    def settings(self) -> dict[str, Any] | None:
        """The settings of the receipts, or None before the first."""
        try:
            return self.store.read_json(_SETTINGS)
        except FileNotFoundError:
            return None

    def current(self) -> "Ledger":
        """The ledger of the recorded settings (itself, where it is one already)."""
        if self.key:
            return self
        settings = self.settings()
        return replace(self, key="none" if settings is None else fingerprint(settings))

    def done(self) -> dict[str, str]:
        """Names of the shards that have a receipt, and what each was made from (its `inputs`).

        A shard with two receipts was made twice from different inputs, and nobody knows which of
        the two lies there: it counts as not done.
        """
        found: dict[str, list[str]] = {}
        for name, inputs in self._entries():
            found.setdefault(name, []).append(inputs)
        return {name: inputs[0] for name, inputs in found.items() if len(inputs) == 1}

    def _any(self) -> bool:
        return next(self._entries(), None) is not None

    def _entries(self) -> Iterator[tuple[str, str]]:
        """Name and inputs of every receipt."""
        folder = self.current().key + "/"
        for key in self.store.keys(folder):
            if key.endswith(".json"):
                name, _, inputs = key.removeprefix(folder).removesuffix(".json").partition("~")
                yield name, inputs

    def _entry(self, name: str, inputs: str) -> str:
        """Where a receipt lies; its name says what the shard was made from."""
        return f"{self.current().key}/{name}" + (f"~{inputs}" if inputs else "") + ".json"

    def pending(self, shards: Iterable[Shard]) -> list[Shard]:
        """The shards without a receipt, or made from other inputs, in order.

        A shard that does not say its inputs is done with any.
        """
        done = self.done()
        return [
            shard
            for shard in shards
            if not _is_made(shard, [done[shard.name]] if shard.name in done else [])
        ]

    def finished(self) -> list[Shard]:
        """Every shard that has a receipt, with what it was made from, by name."""
        return [replace(Shard.parse(n), inputs=made) for n, made in sorted(self.done().items())]

    def take_up(self, shards: Iterable[Shard]) -> list[Shard]:
        """What is pending, without the receipts of what it was made from before."""
        found: dict[str, list[str]] = {}
        for name, inputs in self._entries():
            found.setdefault(name, []).append(inputs)
        pending = [shard for shard in shards if not _is_made(shard, found.get(shard.name, []))]
        stale = [
            self._entry(shard.name, made) for shard in pending for made in found.get(shard.name, [])
        ]
        if stale:
            self.store.remove_many(stale)
        return pending

    def leave(self, receipt: Receipt) -> None:
        """Write the receipt of a shard that is whole."""
        entry = replace(self, key=receipt.settings)._entry(receipt.shard, receipt.inputs)
        self.store.write(entry, receipt.to_bytes())

    def receipt(self, name: str) -> Receipt:
        """The receipt of a shard.

        Raises:
            FileNotFoundError: it has none.
            InputError: it is damaged, or its format is another version's.
        """
        for receipt in self.receipts([name]):
            return receipt
        raise FileNotFoundError(f"{name} has no receipt in {self.store.uri}")

    def receipts(self, names: Iterable[str]) -> Iterator[Receipt]:
        """The receipts of those shards that have one, in order; read side by side.

        Raises:
            InputError: one is damaged, or its format is another version's.
        """
        ledger = self.current()
        done = ledger.done()
        entries = [ledger._entry(name, done[name]) for name in names if name in done]
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(entries), 64 * _READERS):
                yield from pool.map(ledger._load, entries[first : first + 64 * _READERS])

    def _load(self, entry: str) -> Receipt:
        found = self.store.read_json(entry)
        if found.get("format") != FORMAT:
            raise InputError(
                f"the receipt {entry} has format {found.get('format')}, this version reads "
                f"{FORMAT}; use the version that made it, or --overwrite"
            )
        return Receipt(**found | {"remarks": tuple(found.get("remarks", ()))})

    def forget(self, names: Collection[str]) -> None:
        """Remove every receipt of some shards, so that they are made again."""
        if not names:
            return
        doomed = [self._entry(name, inputs) for name, inputs in self._entries() if name in names]
        self.store.remove_many(doomed)

    def discard(self) -> None:
        """Remove all receipts and the record of the settings."""
        self.store.remove()


def _is_made(shard: Shard, inputs: Sequence[str]) -> bool:
    """Whether a shard with receipts of these inputs is done: with one, of its own inputs."""
    return len(inputs) == 1 and (not shard.inputs or inputs[0] == shard.inputs)


@dataclass(frozen=True, slots=True)
class Damage:
    """A shard whose pixels are not those of its receipt."""

    shard: str
    reason: str


def verify(tree: Tree, ledger: Ledger) -> Iterator[Damage | None]:
    """Read every finished shard again and compare its checksum: None where it is sound."""
    for shard in ledger.finished():
        try:
            inspect(tree, ledger, shard)
        except OSError as error:
            yield Damage(shard.name, str(error))
        else:
            yield None


def inspect(tree: Tree, ledger: Ledger, shard: Shard) -> Receipt:
    """Read a finished shard again; returns its receipt.

    Args:
        tree: that holds it.
        ledger: of its receipt.
        shard: of `Ledger.finished`.

    Raises:
        OSError: it cannot be read, or its pixels are not those of its receipt.
    """
    ledger = ledger.current()
    receipt = ledger._load(ledger._entry(shard.name, shard.inputs))
    for layer, expected in {shard.layer: receipt.checksum, **receipt.further}.items():
        found = checksum(tree.read(shard.group, layer, shard.year, shard.region))
        if found == expected:
            continue
        key = tree.key(replace(shard, layer=layer))
        if receipt.valid and not tree.store.exists(key):
            raise OSError(f"{key} is missing")
        raise OSError(f"{key}: checksum {found}, not {expected}")
    return receipt


@contextmanager
def lease(store: Store) -> Iterator[None]:
    """Hold a run as its only driver; renewed while held, given back at the end.

    A driver that was killed on this machine is noticed at once; one of another machine is waited
    for until its lease runs out. A driver that loses its lease is interrupted.

    Raises:
        InputError: another driver holds it and is alive; says which.
        KeyboardInterrupt: another driver took it, since this one slept for longer than a minute.
    """
    token = uuid.uuid4().hex
    _acquire(store, token)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(_LEASE_SECONDS / 4):
            # A store that is out of reach for a moment is tried again.
            with suppress(OSError, InputError):
                if _holder(store).get("token", token) != token:
                    _log.error("another driver has taken %s: this one stops", store.uri)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                store.write(_LEASE, _claim(token))

    keeper = threading.Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _holder(store).get("token") == token:
            store.remove(_LEASE)


def _claim(token: str) -> bytes:
    return json.dumps(
        {
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "expires": time.time() + _LEASE_SECONDS,
        }
    ).encode()


def _holder(store: Store) -> dict[str, Any]:
    try:
        return store.read_json(_LEASE)
    except FileNotFoundError:
        return {}


def _acquire(store: Store, token: str) -> None:
    if store.create(_LEASE, _claim(token)):
        return
    first = holder = _holder(store)
    while holder and _is_alive(holder):
        here = holder["host"] == socket.gethostname()
        if here or holder["expires"] > first["expires"] or holder["token"] != first["token"]:
            raise InputError(
                f"{store.uri} is held by another driver (process {holder['pid']} on "
                f"{holder['host']}); wait until it ends"
            )
        # Nobody can ask another machine whether the process lives: a living one renews its lease.
        time.sleep(1)
        holder = _holder(store)
    # The holder is gone. Two may see that at once: the one that then reads its own token has it.
    store.write(_LEASE, _claim(token))
    time.sleep(0.2)
    if _holder(store).get("token") != token:
        raise InputError(f"{store.uri} was taken by another driver just now; wait until it ends")


def _is_alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return bool(holder["expires"] > time.time())
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["process_started"]) < 1.0
        # A killed process whose parent has not yet looked stays in the table.
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
