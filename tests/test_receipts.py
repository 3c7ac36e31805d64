"""What is done is what has a receipt; other settings are refused; one driver holds a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from aeheight import receipts
from aeheight.cube import Tree, create
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.receipts import Ledger, lease, receipt_for, verify
from aeheight.settings import CubeSettings, fingerprint
from aeheight.store import Store
from aeheight.template import Layer, Shard, Template
from aeheight.windows import Region

GRID = Grid("EPSG:32610", 10.0, 403200.0, 4279500.0, (50, 70))
TEMPLATE = Template(
    (GRID,),
    (
        Layer("height", "float32", np.nan),
        Layer("embedding", "int8", -128, timed=True, bands=("A00", "A01")),
    ),
    (2021,),
    CubeSettings(shard=32, chunk=16),
    "test",
)
SHARDS = TEMPLATE.shards("height") + TEMPLATE.shards("embedding")
SETTINGS = {
    "cube": {"shard": 32, "chunk": 16},
    "height": {"href": ["a.tif", "b.tif"]},
    "prior": None,
}
ROOT = Path(__file__).parents[1]

HOLDER = """
import sys, time
from aeheight.receipts import lease
from aeheight.store import Store
from aeheight.windows import Region
with lease(Store(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "run")


@pytest.fixture
def ledger(store: Store) -> Ledger:
    return Ledger(store.child("cube.receipts"))


@pytest.fixture
def tree(store: Store) -> Tree:
    return create(store.child("cube.zarr"), TEMPLATE)


def receipt_of(shard: Shard, settings: str | None = None) -> receipts.Receipt:
    settings = settings or fingerprint(SETTINGS)
    values = np.arange(shard.region.size, dtype=np.float32).reshape(shard.region.shape)
    return receipt_for(shard, values, "0" * 32, values >= 5, settings, time.monotonic())


# --- receipts -----------------------------------------------------------------------------------


def test_pending_leave_receipt_forget_discard(ledger: Ledger) -> None:
    assert ledger.done() == {}
    assert ledger.pending(SHARDS) == SHARDS
    ledger.begin(SETTINGS)
    assert ledger.pending(SHARDS) == SHARDS
    for shard in SHARDS[3:]:
        ledger.leave(receipt_of(shard))
    assert set(ledger.done()) == {shard.name for shard in SHARDS[3:]}
    assert ledger.pending(SHARDS) == SHARDS[:3]
    assert ledger.receipt(SHARDS[3].name) == receipt_of_again(ledger, SHARDS[3])
    ledger.forget([SHARDS[5].name])
    assert ledger.pending(SHARDS) == [*SHARDS[:3], SHARDS[5]]
    ledger.discard()
    assert ledger.pending(SHARDS) == SHARDS
    assert ledger.settings() is None


def receipt_of_again(ledger: Ledger, shard: Shard) -> receipts.Receipt:
    """The same receipt but for the seconds, which are a clock's, and the memory held so far."""
    found = ledger.receipt(shard.name)
    fresh = as_dict(receipt_of(shard))
    measured = {"seconds": found.seconds, "peak": found.peak}
    return receipts.Receipt(**{**fresh, **measured, "remarks": ()})


def as_dict(receipt: receipts.Receipt) -> dict[str, object]:
    return json.loads(receipt.to_bytes())


def test_a_receipt_says_what_numpy_says() -> None:
    shard = SHARDS[0]
    rng = np.random.default_rng(0)
    values = rng.normal(50, 20, shard.region.shape).astype(np.float32)
    values[rng.random(shard.region.shape) < 0.2] = np.nan
    receipt = receipt_for(shard, values, "d", ~np.isnan(values), "s", time.monotonic())
    assert receipt.pixels == 32 * 32
    assert receipt.valid == np.isfinite(values).sum()
    assert receipt.minimum == np.nanmin(values)
    assert receipt.maximum == np.nanmax(values)
    assert receipt.mean == pytest.approx(np.nanmean(values.astype(np.float64)), rel=1e-12)
    assert (receipt.shard, receipt.checksum, receipt.settings) == (shard.name, "d", "s")
    assert {"aeheight", "numpy", "python"} <= set(receipt.versions)


def test_a_receipt_of_codes_counts_pixels_not_values() -> None:
    shard = TEMPLATE.shards("embedding")[0]
    codes = np.full((2, 32, 32), -128, np.int8)
    codes[:, 4, 5:7] = [[10, 20], [-30, 40]]
    receipt = receipt_for(shard, codes, "d", codes[0] != -128, "s", time.monotonic())
    assert (receipt.valid, receipt.minimum, receipt.maximum, receipt.mean) == (2, -30, 40, 10)


def test_a_receipt_of_nothing() -> None:
    shard = SHARDS[0]
    values = np.full(shard.region.shape, np.nan, np.float32)
    receipt = receipt_for(shard, values, "d", ~np.isnan(values), "s", time.monotonic())
    assert (receipt.valid, receipt.minimum, receipt.maximum, receipt.mean) == (0, None, None, None)
    json.loads(receipt.to_bytes(), parse_constant=pytest.fail)


def test_a_receipt_takes_no_more_memory_than_the_shard() -> None:
    """The codes of a full shard are 64 MB: as float64 they would be 512."""
    codes = np.ones((64, 256, 256), np.int8)
    shard = Shard("utm10n", "embedding", 2021, Region(0, 0, 256, 256))
    tracemalloc.start()
    try:
        receipt_for(shard, codes, "d", codes[0] != -128, "s", time.monotonic())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * codes.nbytes


def test_an_unknown_receipt_format_is_refused(ledger: Ledger) -> None:
    name = SHARDS[0].name
    ledger = ledger.begin(SETTINGS)
    ledger.leave(receipt_of(SHARDS[0]))
    described = json.loads(ledger.store.read(f"{ledger.key}/{name}.json"))
    ledger.store.write(f"{ledger.key}/{name}.json", json.dumps(described | {"format": 99}).encode())
    with pytest.raises(InputError, match="format 99, this version reads 2"):
        ledger.receipt(name)


def test_no_receipt(ledger: Ledger) -> None:
    with pytest.raises(FileNotFoundError):
        ledger.receipt(SHARDS[0].name)
    ledger.forget([SHARDS[0].name])


def test_what_lies_beside_the_receipts_is_no_receipt(ledger: Ledger) -> None:
    ledger.begin(SETTINGS)
    ledger.store.write("sources.json", b"{}")
    ledger.store.write("model.ckpt", b"")
    assert ledger.done() == {}


# --- settings -----------------------------------------------------------------------------------


def test_the_same_settings_go_on_with_the_same_fingerprint(ledger: Ledger) -> None:
    first = ledger.begin(SETTINGS)
    assert ledger.begin(json.loads(json.dumps(SETTINGS))) == first
    assert ledger.begin(dict(reversed(SETTINGS.items()))) == first
    # JSON knows no tuples.
    assert ledger.begin(SETTINGS | {"height": {"href": ("a.tif", "b.tif")}}) == first


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"cube": {"shard": 64, "chunk": 16}}, "cube.shard: 32 -> 64"),
        ({"height": {"href": ["a.tif"]}}, "height.href: .* -> .'a.tif'."),
        ({"prior": {"href": "c.tif"}}, "prior: None -> "),
        ({"more": 1}, "more: None -> 1"),
    ],
)
def test_changed_settings_are_refused_and_named(
    ledger: Ledger, changed: dict[str, object], shown: str
) -> None:
    ledger.begin(SETTINGS)
    ledger.leave(receipt_of(SHARDS[0]))
    with pytest.raises(InputError, match=shown) as caught:
        ledger.begin(SETTINGS | changed)
    assert "--overwrite" in str(caught.value)
    assert ledger.settings() == SETTINGS
    assert set(ledger.done()) == {SHARDS[0].name}
    ledger.discard()
    ledger.begin(SETTINGS | changed)


def test_settings_may_change_while_nothing_is_made(ledger: Ledger) -> None:
    ledger.begin(SETTINGS)
    ledger.begin(SETTINGS | {"more": 1})
    assert ledger.settings() == SETTINGS | {"more": 1}
    with pytest.raises(InputError, match="more: 1 -> None"):
        ledger.begin(SETTINGS, made=True)


def test_a_straggler_of_other_settings_does_not_count(ledger: Ledger) -> None:
    ledger = ledger.begin(SETTINGS)
    ledger.leave(receipt_of(SHARDS[0], "other settings"))
    assert ledger.done() == {}
    assert ledger.pending(SHARDS) == SHARDS
    assert Ledger(ledger.store).done() == {}


# --- verify -------------------------------------------------------------------------------------


def test_verify_names_the_damaged_shards_only(tree: Tree, ledger: Ledger) -> None:
    ledger = Ledger(ledger.store, "s")
    rng = np.random.default_rng(0)
    for shard in SHARDS:
        shape = ((2,) if shard.layer == "embedding" else ()) + shard.region.shape
        dtype = "int8" if shard.layer == "embedding" else "float32"
        values = rng.integers(-100, 100, shape).astype(dtype)
        valid = np.ones(shard.region.shape, bool)
        ledger.leave(receipt_for(shard, values, tree.write(shard, values), valid, "s", 0.0))
    assert list(verify(tree, ledger)) == [None] * len(SHARDS)

    # A byte that the codec finds, a shard that vanished, and one that was written by another.
    path = Path(tree.store.uri, "utm10n", "height", "c", "0", "0")
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    Path(tree.store.uri, "utm10n", "height", "c", "1", "2").unlink()
    tree.write(SHARDS[-1], np.zeros((2, *SHARDS[-1].region.shape), np.int8))
    damages = {damage.shard: damage.reason for damage in verify(tree, ledger) if damage}
    wanted = [SHARDS[0], TEMPLATE.shards("height")[-1], SHARDS[-1]]
    assert set(damages) == {shard.name for shard in wanted}
    assert "cannot be read" in damages[SHARDS[0].name]
    assert "checksum" in damages[SHARDS[-1].name]


# --- the lease ----------------------------------------------------------------------------------


@pytest.fixture
def holder(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.uri], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def claim(store: Store) -> dict[str, object]:
    return json.loads(store.read("lease.json"))


def test_the_lease_is_given_back(store: Store) -> None:
    with lease(store):
        assert claim(store)["pid"] == os.getpid()
    assert not store.exists("lease.json")
    with lease(store):
        pass


def test_the_lease_is_given_back_after_an_error(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), lease(store):
        1 / 0  # noqa: B018
    assert not store.exists("lease.json")


def test_a_second_driver_is_refused_in_the_same_process(store: Store) -> None:
    with lease(store):
        with pytest.raises(InputError, match="held by another driver"), lease(store):
            pytest.fail("two drivers")
        assert claim(store)["pid"] == os.getpid()


def test_a_second_driver_is_refused_while_the_first_lives_and_not_after_kill_9(
    store: Store, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InputError, match=f"process {holder.pid}"), lease(store):
        pytest.fail("two drivers")
    holder.send_signal(signal.SIGKILL)
    while not is_zombie(holder.pid):
        time.sleep(0.01)
    # Nobody has waited for it yet: it is still in the process table, and dead all the same.
    with lease(store):
        assert claim(store)["pid"] == os.getpid()
    holder.wait()
    assert not store.exists("lease.json")


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_reused_process_number_is_no_holder(store: Store) -> None:
    with lease(store):
        held = claim(store)
    store.write("lease.json", json.dumps(held | {"process_started": 1.0}).encode())
    with lease(store):
        pass


def elsewhere(store: Store, seconds: float) -> None:
    """The lease of a driver on another machine, for so many seconds more."""
    with suppress(FileNotFoundError):
        held = claim(store)
    held |= {"host": "elsewhere", "token": "theirs", "expires": time.time() + seconds}
    store.write("lease.json", json.dumps(held).encode())


def test_a_dead_drivers_lease_of_another_machine_is_waited_for(store: Store) -> None:
    with lease(store):
        elsewhere(store, 1.5)
    assert claim(store)["token"] == "theirs"
    started = time.time()
    with lease(store):
        assert time.time() - started > 1
        assert claim(store)["token"] != "theirs"


def test_a_living_drivers_lease_of_another_machine_is_left(store: Store) -> None:
    with lease(store):
        elsewhere(store, 30)
    renewal = threading.Timer(1.5, elsewhere, (store, 60))
    renewal.start()
    with pytest.raises(InputError, match=r"held by another driver .* on elsewhere"), lease(store):
        pytest.fail("two drivers")
    renewal.join()
    assert claim(store)["token"] == "theirs"


def test_of_many_drivers_one_gets_the_lease(store: Store) -> None:
    refused, ready = threading.Semaphore(0), threading.Barrier(6)

    def drive(_number: int) -> bool:
        ready.wait()
        try:
            with lease(store):
                return all(refused.acquire(timeout=20) for _ in range(5))
        except InputError:
            refused.release()
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(drive, range(6))) == [False] * 5 + [True]


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(receipts, "_LEASE_SECONDS", 0.2)
    return 0.2


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_the_lease_is_renewed(store: Store, short_lease: float) -> None:
    with lease(store):
        first = claim(store)
        wait_for(lambda: claim(store)["expires"] > first["expires"] + 3 * short_lease)
        assert claim(store)["token"] == first["token"]


def test_a_store_out_of_reach_does_not_end_the_renewing(store: Store, short_lease: float) -> None:
    path = Path(store.uri, "lease.json")

    def in_the_way() -> bool:
        path.unlink(missing_ok=True)
        with suppress(FileExistsError):  # it was renewed just then
            path.mkdir()
        return path.is_dir()

    with lease(store):
        first = claim(store)
        wait_for(in_the_way)
        (path / "x").write_text("no file can replace a folder that is not empty")
        time.sleep(2 * short_lease)
        shutil.rmtree(path)
        wait_for(lambda: store.exists("lease.json"))
        assert claim(store)["token"] == first["token"]
    assert not store.exists("lease.json")


def test_a_lease_that_was_taken_over_is_left_to_its_new_holder(
    store: Store, short_lease: float
) -> None:
    """A machine that slept past its expiry stops, and leaves the lease to who took it."""
    with pytest.raises(KeyboardInterrupt), lease(store):  # noqa: PT012
        other = claim(store) | {"token": "theirs", "host": "elsewhere"}

        def taken_over() -> bool:
            """Not if it was just being renewed."""
            store.write("lease.json", json.dumps(other).encode())
            time.sleep(short_lease / 2)
            return claim(store)["token"] == "theirs"

        wait_for(taken_over)
        time.sleep(20 * short_lease)
        pytest.fail("a driver without a lease went on")
    assert claim(store)["token"] == "theirs"
