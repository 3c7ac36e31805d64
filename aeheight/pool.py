"""Ground held in memory while patches are drawn from it: each block is decoded once, then dropped.

Spots in a wholly random order would decode every block of a large cube again and again. Here the
blocks come in a random order, a number of them is held at a time, and patches are drawn at random
from all that are held: a shuffle by a window, as `tf.data` and WebDataset shuffle records, but of
ground.
"""

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=_Sized)


class Pool(Generic[K, V]):
    """What was loaded lately, up to a number of bytes; what is known to be over is dropped at once.

    Threads may ask at the same time: a value is loaded by the first of them, the others wait.
    """

    def __init__(self, load: Callable[[K], V], room: int) -> None:
        """An empty pool.

        Args:
            load: reads the value of a key.
            room: bytes of the values that are kept; the latest is kept in any case.
        """
        self._load, self._room = load, room
        self._held: OrderedDict[K, Future[V]] = OrderedDict()
        self._uses: Counter[K] = Counter()
        self._lock = threading.Lock()
        self.bytes = 0
        """Of the values that are held."""
        self.loaded = 0
        """Bytes of all values that were ever loaded."""

    def __reduce__(self) -> tuple[type["Pool[K, V]"], tuple[Callable[[K], V], int]]:
        """Another process begins with an empty one."""
        return type(self), (self._load, self._room)

    def expect(self, uses: Mapping[K, int]) -> None:
        """How often each key will be asked for: after the last time its value is dropped.

        Keys that are not named stay for as long as there is room.
        """
        with self._lock:
            self._uses = Counter(uses)

    def get(self, key: K) -> V:
        """The value of a key; what `load` raises is raised to all who wait for it."""
        with self._lock:
            mine = key not in self._held
            future = self._held.setdefault(key, Future())
            self._held.move_to_end(key)
        if mine:
            self._fill(key, future)
        value = future.result()
        self._count(key)
        return value

    def _fill(self, key: K, future: "Future[V]") -> None:
        try:
            value = self._load(key)
        except BaseException as error:
            with self._lock:
                del self._held[key]
            future.set_exception(error)
            return
        future.set_result(value)
        with self._lock:
            self.bytes += value.nbytes
            self.loaded += value.nbytes
            while self.bytes > self._room and (oldest := self._oldest(key)) is not None:
                self._drop(oldest)

    def _oldest(self, but: K) -> K | None:
        """The key that was asked for longest ago, of those whose values are here."""
        return next((k for k, future in self._held.items() if k != but and future.done()), None)

    def _count(self, key: K) -> None:
        with self._lock:
            if key in self._uses:
                self._uses[key] -= 1
                if not self._uses[key]:
                    del self._uses[key]
                    self._drop(key)

    def _drop(self, key: K) -> None:
        future = self._held.pop(key, None)
        if future is not None:
            self.bytes -= future.result().nbytes


def shuffled(
    blocks: Sequence[K], size: Callable[[K], int], room: int, rng: np.random.Generator
) -> list[int]:
    """An order of spots by the blocks that they lie in, as random as the memory allows.

    The blocks come in a random order. Each gives its spots at random times, from when a number of
    blocks before it are left until none is; as many are in use when it all begins and ends. That
    number is the largest for which all blocks in use have room, and 1 at least.

    Args:
        blocks: of each spot.
        size: bytes of a block.
        room: bytes.
        rng: draws the order.

    Returns:
        Indices of the spots.
    """
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks))}
    number = np.array([numbers[block] for block in blocks])
    turn, share = rng.permutation(len(numbers))[number], rng.random(len(blocks))
    sizes = np.array([size(block) for block in numbers])

    def order(hold: int) -> NDArray[np.intp]:
        begin = np.maximum(turn - hold, 0)
        end = np.minimum(turn + 1, max(len(numbers) - hold, 1))
        return np.argsort(begin + (end - begin) * share, kind="stable")

    low, high = 1, len(numbers)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _peak(number[order(middle)], sizes) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return [int(i) for i in order(low)]


def _peak(numbers: NDArray[np.intp], sizes: NDArray[np.intp]) -> int:
    """The most bytes in use at a time, each block from its first spot to its last."""
    change = np.zeros(len(numbers) + 1, dtype=np.int64)
    _, first = np.unique(numbers, return_index=True)
    _, after = np.unique(numbers[::-1], return_index=True)
    np.add.at(change, first, sizes)
    np.add.at(change, len(numbers) - after, -sizes)
    return int(change.cumsum().max())


def stretch(place: int, size: int, edge: int, shift: int, least: int) -> tuple[int, int]:
    """The stretch (start, stop) of a line in which a pixel lies, where stretches part the line.

    Args:
        place: 0 to `size` - 1.
        size: of the line.
        edge: of a stretch.
        shift: where the first cut lies, below `edge`.
        least: no stretch is shorter; those at the ends are joined to their neighbours instead.
    """
    cuts = [cut for cut in range(shift, size, edge) if least <= cut <= size - least]
    line = [0, *cuts, size]
    after = bisect_right(line, place, hi=len(line) - 1)
    return line[after - 1], line[after]
