"""Years and ground are added to a tree, and nothing that is there is lost, wherever it stops."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from aeheight import cube
from aeheight.cube import Tree, create, open_tree, remove_tree
from aeheight.errors import InputError
from aeheight.receipts import Ledger, receipt_for
from aeheight.store import Store
from aeheight.template import Shard
from tests.trees import TEMPLATE, UTM, full_tree, mosaic, values_for

YEARS = [(2020, 2022, 2023), (2019, 2020, 2022), (2020, 2021, 2022), (2017, 2020, 2021, 2022, 2025)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "cube.zarr")


def note(store: Store) -> bool:
    """Whether the tree is half grown."""
    return Path(f"{store.uri}.growing/note.json").exists()


def same(tree: Tree, written: dict[str, np.ndarray]) -> None:
    """Every shard that was written is there, and no other year holds anything."""
    for layer in tree.template.layers:
        for shard in tree.template.shards(layer.name):
            found = tree.read(shard.group, shard.layer, shard.year, shard.region)
            empty = np.full_like(found, layer.nodata)
            np.testing.assert_array_equal(found, written.get(shard.name, empty), shard.name)


@pytest.mark.parametrize("years", YEARS)
def test_years_are_added_wherever_they_fall(store: Store, years: tuple[int, ...]) -> None:
    old, written = full_tree(store)
    grown = create(store, replace(TEMPLATE, years=years))
    assert grown.identity == old.identity
    assert grown.version != old.version
    same(grown, written)
    for shard in grown.template.shards("embedding"):
        if shard.year not in TEMPLATE.years:
            written[shard.name] = values_for(shard)
            grown.write(shard, written[shard.name])
    same(open_tree(store), written)
    with xr.open_datatree(store.uri, engine="zarr") as tree:
        group = tree[UTM.name].to_dataset()
        assert [int(t.dt.year) for t in group.time] == list(years)
        for k, year in enumerate(years):
            np.testing.assert_array_equal(
                group.embedding.isel(time=k), mosaic(written, UTM.name, "embedding", 2020)
                if year == 2020 else group.embedding.isel(time=k)
            )  # fmt: skip


class Killed(BaseException):
    """The driver ends here."""


def kill_after(changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver ends when it is about to change a store once more."""
    left = [changes]

    def counted(name: str) -> None:
        real = getattr(Store, name)

        def once(self: Store, *arguments: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(self, *arguments)

        monkeypatch.setattr(Store, name, once)

    for name in ("copy", "write", "remove"):
        counted(name)


def test_growing_is_taken_up_wherever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Store.at(tmp_path / "origin.zarr")
    _, written = full_tree(origin)
    wanted, changes, killed = replace(TEMPLATE, years=(2019, 2020, 2022)), 0, True
    while killed:
        store = Store.at(tmp_path / f"{changes}.zarr")
        shutil.copytree(origin.uri, store.uri)
        kill_after(changes, monkeypatch)
        try:
            create(store, wanted)
            killed = False
        except Killed:
            monkeypatch.undo()
            if note(store):
                with pytest.raises(InputError, match="interrupted while it was given more years"):
                    open_tree(store)
        monkeypatch.undo()
        same(create(store, wanted), written)
        assert not note(store)
        changes += 3
    assert changes > 20


def test_killed_while_growing_and_the_mind_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, written = full_tree(store)
    monkeypatch.setattr(cube, "_rewrite_metadata", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        create(store, replace(TEMPLATE, years=(2019, 2020, 2022)))
    monkeypatch.undo()
    with pytest.raises(InputError, match="years"):
        create(store, TEMPLATE)
    same(open_tree(store), written)


def test_what_was_killed_while_growing_can_be_discarded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_tree(store)
    monkeypatch.setattr(cube, "_rewrite_metadata", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        create(store, replace(TEMPLATE, years=(2019, 2020, 2022)))
    monkeypatch.undo()
    remove_tree(store)
    assert not note(store)
    same(create(store, TEMPLATE), {})


def test_a_straggler_does_not_write_where_another_year_lies(store: Store) -> None:
    """Its year has moved along the axis since it opened the tree."""
    old, written = full_tree(store)
    create(store, replace(TEMPLATE, years=(2019, 2020, 2022)))
    late = next(shard for shard in TEMPLATE.shards("embedding") if shard.year == 2022)
    with pytest.raises(OSError, match="has changed since it was opened"):
        old.write(late, values_for(late))
    same(open_tree(store), written)
    remove_tree(store)
    create(store, TEMPLATE)
    with pytest.raises(OSError, match="has changed since it was opened"):
        old.write(late, values_for(late))


def test_ground_is_added(store: Store) -> None:
    some = replace(TEMPLATE, ground=(((0, 1, 2),), ()))
    tree = create(store, some)
    assert [shard.name for shard in tree.template.shards("height")] == [
        "utm10n/height/static/r0000000-c0000032-32x32"
    ]
    more = replace(TEMPLATE, ground=(((0, 0, 3),), None))
    assert len(create(store, more).template.shards("height")) == 3 + 2
    with pytest.raises(InputError, match="ground"):
        create(store, some)


def test_what_else_changes_is_refused(store: Store) -> None:
    create(store, TEMPLATE)
    with pytest.raises(InputError, match=r"years: \[2020, 2022\] -> \[2022\]"):
        create(store, replace(TEMPLATE, years=(2022,)))
    with pytest.raises(InputError, match=r"grids\.utm10n\.left"):
        create(store, replace(TEMPLATE, grids=(replace(UTM, left=0.0), TEMPLATE.grids[1])))


# --- receipts that know what a shard was made from ----------------------------------------------


def receipt(shard: Shard, ledger: Ledger) -> None:
    values = np.zeros(shard.region.shape, np.float32)
    ledger.leave(receipt_for(shard, values, "0", values == 0, ledger.key, 0.0))


def test_a_shard_of_other_inputs_is_pending(tmp_path: Path) -> None:
    ledger = Ledger(Store.at(tmp_path)).begin({"a": 1})
    first, second = TEMPLATE.shards("height")[:2]
    made = replace(first, inputs="abc")
    receipt(made, ledger)
    receipt(second, ledger)
    assert ledger.done() == {first.name: "abc", second.name: ""}
    assert ledger.pending([made]) == []
    assert ledger.pending([first]) == []  # whoever does not know the inputs, takes any
    other = replace(first, inputs="xyz")
    assert ledger.pending([other, second]) == [first]
    assert ledger.receipt(first.name).inputs == "abc"
    assert ledger.take_up([other]) == [other]
    assert first.name not in ledger.done()


def test_a_shard_that_was_made_twice_from_different_inputs_is_not_done(tmp_path: Path) -> None:
    """A straggler of a driver that knew fewer tiles may write after all."""
    ledger = Ledger(Store.at(tmp_path)).begin({"a": 1})
    shard = TEMPLATE.shards("height")[0]
    for inputs in ("abc", "xyz"):
        receipt(replace(shard, inputs=inputs), ledger)
    assert ledger.done() == {}
    for inputs in ("abc", "xyz", ""):
        assert ledger.pending([replace(shard, inputs=inputs)]) == [shard]
    assert ledger.take_up([replace(shard, inputs="xyz")])
    receipt(replace(shard, inputs="xyz"), ledger)
    assert ledger.done() == {shard.name: "xyz"}


def test_many_receipts_are_read_in_order(tmp_path: Path) -> None:
    ledger = Ledger(Store.at(tmp_path)).begin({"a": 1})
    shards = TEMPLATE.shards("embedding")
    for shard in shards:
        receipt(shard, ledger)
    names = [shard.name for shard in reversed(shards)]
    assert [found.shard for found in ledger.receipts([*names, "no such shard"])] == names
