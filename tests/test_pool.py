"""The pool against what its promises are, and the order of blocks against plain loops."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.pool import Pool, shuffled, stretch


def loads(log, size=10):
    def load(key):
        log.append(key)
        return np.full(size, key, np.uint8)

    return load


def test_the_value_asked_for_longest_ago_makes_room():
    log = []
    pool = Pool(loads(log), room=20)
    for key in (1, 2, 1, 3, 1, 2):
        assert (pool.get(key) == key).all()
        assert pool.bytes <= 20
    assert log == [1, 2, 3, 2]
    assert pool.loaded == 40


def test_what_is_over_is_dropped_at_once():
    pool = Pool(loads([]), room=100)
    pool.expect({1: 2, 2: 1})
    held = []
    for key in (1, 2, 3, 1):
        pool.get(key)
        held.append(pool.bytes)
    assert held == [10, 10, 20, 10]


def test_threads_load_a_value_once():
    log, begun = [], threading.Barrier(4)

    def load(key):
        log.append(key)
        time.sleep(0.05)
        return np.zeros(10)

    pool = Pool(load, room=1000)

    def ask(key):
        begun.wait()
        return pool.get(key)

    with ThreadPoolExecutor(4) as threads:
        values = list(threads.map(ask, [7, 7, 7, 7]))
    assert log == [7]
    assert all(value is values[0] for value in values)


def test_a_failure_reaches_all_and_is_not_kept():
    fails = [OSError("gone")]

    def load(key):
        if fails:
            raise fails.pop()
        return np.zeros(1)

    pool = Pool(load, room=10)
    with pytest.raises(OSError, match="gone"):
        pool.get(1)
    assert (pool.get(1) == 0).all()
    assert pool.bytes == 8


def peak(blocks, sizes, order):
    """The most that is in use at a time, by a plain loop."""
    left, most = Counter(blocks), 0
    live = set()
    for index in order:
        live.add(blocks[index])
        most = max(most, sum(sizes[block] for block in live))
        left[blocks[index]] -= 1
        if not left[blocks[index]]:
            live.remove(blocks[index])
    return most


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=80),
    st.lists(st.integers(1, 9), min_size=13, max_size=13),
    st.integers(18, 120),
    st.integers(0, 1000),
)
def test_an_order_has_each_spot_once_and_what_is_in_use_has_room(blocks, sizes, room, seed):
    order = shuffled(blocks, sizes.__getitem__, room, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(blocks)))
    assert peak(blocks, sizes, order) <= room


def test_batches_are_of_many_blocks_from_the_first_to_the_last():
    blocks = np.repeat(np.arange(100), 16)

    def order(room):
        return np.array(shuffled(blocks.tolist(), lambda _: 1, room, np.random.default_rng(0)))

    tight = order(16)
    mixed = [len(set(blocks[tight[i : i + 16]])) for i in range(0, 1600, 16)]
    assert min(mixed) >= 4
    assert np.mean(mixed) > 8
    assert peak(blocks.tolist(), [1] * 100, tight) == 16
    assert abs(np.corrcoef(blocks[order(100)], np.arange(1600))[0, 1]) < 0.1


@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 79), st.integers(1, 60), st.data())
def test_stretches_part_a_line(size, edge, shift, least, data):
    least, shift = min(least, size), shift % edge
    place = data.draw(st.integers(0, size - 1))
    start, stop = stretch(place, size, edge, shift, least)
    assert 0 <= start <= place < stop <= size
    assert stop - start >= min(least, edge)
    assert {stretch(p, size, edge, shift, least) for p in (start, stop - 1)} == {(start, stop)}
    assert all(cut % edge == shift or cut in (0, size) for cut in (start, stop))
