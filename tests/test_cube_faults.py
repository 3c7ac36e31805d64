"""The tree under faults: refused writes, a full disk, flipped bits, truncated shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aeheight.cube import Tree, create
from aeheight.receipts import Ledger, receipt_for, verify
from aeheight.store import Store
from aeheight.template import Shard
from aeheight.windows import Region, whole
from tests.trees import TEMPLATE, UTM, bytes_of, full_disk, full_tree, values_for


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "cube.zarr")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, dict[str, np.ndarray]]:
    return full_tree(Store.at(tmp_path_factory.mktemp("full") / "cube.zarr"))


def object_path(tree: Tree, *key: int | str) -> Path:
    return Path(tree.store.uri).joinpath(*map(str, key))


# --- refused writes -----------------------------------------------------------------------------

HEIGHT = TEMPLATE.shards("height")[0]
CODES = TEMPLATE.shards("embedding")[0]


def at(shard: Shard, *region: int) -> Shard:
    return replace(shard, region=Region(*region))


@pytest.mark.parametrize(
    ("shard", "shape", "dtype"),
    [
        pytest.param(HEIGHT, (32, 32), "float64", id="wrong type"),
        pytest.param(HEIGHT, (32, 32), ">f4", id="other byte order"),
        pytest.param(HEIGHT, (32, 31), "float32", id="too small"),
        pytest.param(HEIGHT, (1, 32, 32), "float32", id="one axis more"),
        pytest.param(HEIGHT, (), "float32", id="a scalar"),
        pytest.param(CODES, (2, 32, 32), "int8", id="a band less"),
        pytest.param(CODES, (1, 3, 32, 32), "int8", id="with time axis"),
        pytest.param(CODES, (3, 32, 32), "uint8", id="unsigned"),
        pytest.param(at(HEIGHT, 0, 0, 16, 16), (16, 16), "float32", id="a chunk"),
        pytest.param(at(HEIGHT, 16, 0, 32, 32), (32, 32), "float32", id="between shards"),
        pytest.param(at(HEIGHT, 0, 0, 50, 32), (50, 32), "float32", id="two shards"),
        pytest.param(at(HEIGHT, 32, 64, 32, 32), (32, 32), "float32", id="past the edge"),
        pytest.param(at(HEIGHT, 64, 0, 32, 32), (32, 32), "float32", id="outside"),
        pytest.param(at(HEIGHT, -32, 0, 32, 32), (32, 32), "float32", id="before the edge"),
        pytest.param(replace(HEIGHT, year=2020), (32, 32), "float32", id="a year too much"),
        pytest.param(replace(CODES, year=None), (3, 32, 32), "int8", id="no year"),
        pytest.param(replace(CODES, year=2021), (3, 32, 32), "int8", id="another year"),
    ],
)
def test_what_is_no_whole_shard_is_refused_before_a_byte_goes_out(
    full: tuple[Tree, dict[str, np.ndarray]], shard: Shard, shape: tuple[int, ...], dtype: str
) -> None:
    tree = full[0]
    before = bytes_of(tree)
    with pytest.raises(ValueError, match=shard.name):
        tree.write(shard, np.ones(shape, dtype))
    assert bytes_of(tree) == before


def test_a_full_disk_is_an_oserror_and_the_old_shard_stays(store: Store) -> None:
    tree = create(store, TEMPLATE)
    values = values_for(HEIGHT)
    tree.write(HEIGHT, values)
    with full_disk(1000), pytest.raises(OSError, match=r"cannot write .*too large") as caught:
        tree.write(HEIGHT, values_for(HEIGHT))
    assert "\n" not in str(caught.value)
    assert "utm10n/height/c/0/0" in str(caught.value)
    np.testing.assert_array_equal(tree.read("utm10n", "height", None, HEIGHT.region), values)


# --- damage -------------------------------------------------------------------------------------


def damaged(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("shard", "key"),
    [
        (HEIGHT, ("utm10n", "height", "c", 0, 0)),
        (TEMPLATE.shards("height")[5], ("utm10n", "height", "c", 1, 2)),
        (CODES, ("utm10n", "embedding", "c", 0, 0, 0, 0)),
        (TEMPLATE.shards("split")[0], ("utm10n", "split", "c", 0, 0)),
    ],
    ids=["height", "edge", "embedding", "split"],
)
def test_a_flipped_bit_anywhere_is_found(
    store: Store, shard: Shard, key: tuple[int | str, ...]
) -> None:
    tree, ledger = create(store, TEMPLATE), Ledger(Store.at(f"{store.uri}.receipts"), "s")
    values = values_for(shard)
    valid = np.ones(shard.region.shape, bool)
    ledger.leave(receipt_for(shard, values, tree.write(shard, values), valid, "s", 0.0))
    path = object_path(tree, *key)
    sound = path.read_bytes()
    assert list(verify(tree, ledger)) == [None]
    positions = {
        *range(0, len(sound), max(len(sound) // 60, 1)),
        *range(len(sound) - 70, len(sound)),
    }
    for position in sorted(positions):
        damaged(path, position)
        with pytest.raises(OSError, match="cannot be read"):
            tree.read(shard.group, shard.layer, shard.year, shard.region)
        path.write_bytes(sound)
    damaged(path, len(sound) // 2)
    (found,) = verify(tree, ledger)
    assert found is not None
    assert found.shard == shard.name


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_shard_is_found(store: Store, keep: float) -> None:
    tree, ledger = create(store, TEMPLATE), Ledger(Store.at(f"{store.uri}.receipts"), "s")
    values = values_for(HEIGHT)
    valid = ~np.isnan(values)
    ledger.leave(receipt_for(HEIGHT, values, tree.write(HEIGHT, values), valid, "s", 0.0))
    path = object_path(tree, "utm10n", "height", "c", 0, 0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    (found,) = verify(tree, ledger)
    assert found is not None
    path.unlink()
    (found,) = verify(tree, ledger)
    assert found is not None
    assert "is missing" in found.reason


@pytest.mark.parametrize("number", [0, 5], ids=["whole", "clipped by the edge"])
@pytest.mark.parametrize("position", [20, -3, None], ids=["chunk", "index", "truncated"])
def test_a_damaged_shard_can_be_written_again(
    store: Store, number: int, position: int | None
) -> None:
    """Zarr reads what is there before it writes: the damage must not stand in the way."""
    tree, shard = create(store, TEMPLATE), TEMPLATE.shards("height")[number]
    tree.write(shard, values_for(shard))
    path = object_path(
        tree, "utm10n", "height", "c", shard.region.row // 32, shard.region.col // 32
    )
    if position is None:
        path.write_bytes(path.read_bytes()[:50])
    else:
        damaged(path, position)
    values = values_for(shard)
    tree.write(shard, values)
    np.testing.assert_array_equal(tree.read("utm10n", "height", None, shard.region), values)


def test_damage_elsewhere_leaves_a_shard_readable(store: Store) -> None:
    tree = create(store, TEMPLATE)
    first, second = TEMPLATE.shards("height")[:2]
    values = values_for(second)
    tree.write(first, values_for(first))
    tree.write(second, values)
    damaged(object_path(tree, "utm10n", "height", "c", 0, 0), 20)
    np.testing.assert_array_equal(tree.read("utm10n", "height", None, second.region), values)
    with pytest.raises(OSError, match="utm10n/height"):
        tree.read("utm10n", "height", None, whole(UTM.shape))
