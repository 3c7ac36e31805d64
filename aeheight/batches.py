"""Batches of patches: read ahead by several threads, prepared and stacked, always in order."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight.patches import Patch
from aeheight.recipe import Recipe

BATCHES_AHEAD: Final = 4
"""Batches in memory besides the one that is worked on: half of them as patches, half stacked."""

T = TypeVar("T")
R = TypeVar("R")


class Ground(Protocol):
    """Ground to train on, in patches. `sweep` runs first."""

    @property
    def block(self) -> int:
        """Edge in pixels of a block of ground: errors within one go together."""

    def sweep(self) -> Iterator[Patch]:
        """All ground that trains or validates once, in pieces of any shape."""

    def epoch(self, number: int) -> Sequence[Any]:
        """Spots of the training patches of epoch `number`, from 1: equal for equal numbers."""

    def validation(self) -> Sequence[Any]:
        """Spots of patches that cover every validation pixel once, without overlap."""

    def squares(self, edge: int, count: int) -> Sequence[Any]:
        """Spots of up to `count` squares of up to `edge` px, to measure seams on; may be none."""

    def read(self, spot: Any, margin: int = 0) -> Patch:
        """The patch of a spot: square, its edge a multiple of 32 px. Threads call it at once.

        With `margin`, a multiple of 32, so many more pixels of the ground on every side.
        """


class Batch(NamedTuple):
    """Patches side by side."""

    codes: Tensor
    """(n, 64, p, p) int8."""
    height: Tensor
    """(n, p, p) float32, metres; NaN where there is no reference."""
    use: Tensor
    """(n, p, p) uint8."""
    prior: Tensor | None
    """(n, p, p) float32, metres; NaN where there is none."""

    def to(self, device: torch.device) -> "Batch":
        """The same patches on a device."""
        prior = None if self.prior is None else self.prior.to(device)
        return Batch(self.codes.to(device), self.height.to(device), self.use.to(device), prior)

    def reference(self, use: int) -> Tensor:
        """(n, p, p) bool: where there is a reference on ground of that use."""
        return self.height.isfinite() & (self.use == use)


def stack(patches: Sequence[Patch]) -> Batch:
    """Patches of one shape as a batch; in pinned memory where there is a GPU to take it."""
    priors = [patch.prior for patch in patches if patch.prior is not None]
    return Batch(
        codes=_stacked([patch.codes for patch in patches]),
        height=_stacked([patch.height for patch in patches]),
        use=_stacked([patch.use for patch in patches]),
        prior=_stacked(priors) if len(priors) == len(patches) else None,
    )


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked.pin_memory() if torch.cuda.is_available() else stacked


def in_batches(ground: Ground, spots: Sequence[Any], size: int) -> Iterator[Batch]:
    """The patches of spots in their order; the last batch holds what is left."""
    with _readers() as pool:
        yield from map(stack, _parted(_ahead(pool, ground.read, spots, 2 * size), size))


@dataclass(frozen=True, slots=True)
class Epoch:
    """The batches of one epoch, prepared as the recipe says with what the seed draws.

    The last batch is filled up from the first patches, since batch normalisation needs several.
    The share of a rank, of several processes that train together, is a stretch of the spots: what
    lies near each other in their order is read by one of them.
    """

    ground: Ground
    spots: Sequence[Any]
    """Of all ranks."""
    batch: int
    """Patches of a batch of all ranks together."""
    seed: Sequence[int]
    recipe: Recipe
    rank: int = 0
    ranks: int = 1

    @property
    def share(self) -> int:
        """Patches of one batch of this rank."""
        return math.ceil(self.batch / self.ranks)

    def __len__(self) -> int:
        return math.ceil(len(self.spots) / (self.share * self.ranks))

    def __iter__(self) -> Iterator[Batch]:
        number = len(self) * self.share
        every = itertools.cycle(self.spots)
        own = itertools.islice(every, self.rank * number, (self.rank + 1) * number)
        rng = np.random.default_rng([*self.seed, *([self.rank] if self.rank else [])])
        ahead = BATCHES_AHEAD // 2
        with _readers() as pool:
            patches = _ahead(pool, self.ground.read, own, ahead * self.share)
            # In order, by one thread: all draw from the one generator.
            prepared = (self.recipe.prepare(part, rng) for part in _parted(patches, self.share))
            yield from _ahead(pool, stack, prepared, ahead)


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as this process has cores; what they have not begun is dropped at the end."""
    pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="patches")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], number: int
) -> Iterator[R]:
    """A function of each item, in order, while up to `number` of the next are worked on."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _parted(patches: Iterator[Patch], size: int) -> Iterator[list[Patch]]:
    while part := list(itertools.islice(patches, size)):
        yield part
