"""The base that a network corrects: a linear regression, bent where training ground is near.

A linear regression of height carries to ground that is unlike all that trained it; what bends the
relation must not. So bumps stand on some of the training pixels in the space of the embeddings, and
are fitted to what the linear term leaves. A bump is exactly 0 beyond its reach: where training has
never been, the base is the linear term to the bit.

A ridge regression on radial functions (Poggio & Girosi 1990, doi:10.1109/5.58326) of compact
support (Wendland 1995, doi:10.1007/BF02123482), over a linear mean as in kriging with a trend.
What it gains on ground unseen, and what else was tried, stands in pipelines/EXPERIMENTS.md.

Distances are taken between codes as they are stored, and are exact in float32 (see `novelty`).
What follows is products and sums of two numbers each, in a fixed order: a pixel has the same bits
wherever it lies and whatever computes it. The square of the reach is a power of 2, so that a bump
is an integer to the fourth power and its unit goes into the weights without rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight import loops
from aeheight.embeddings import valid
from aeheight.ridge import Ridge

MOST: Final = 512
"""Bumps at most: more gain little and cost time for every pixel of a map."""

SQUARED_REACH: Final = 2**17
"""Squared steps of the code from its centre at which a bump ends: 362 steps, where half of all
pairs of pixels of a region lie 320 apart."""

STIFFER: Final = 3.0
"""The linear term is penalised so many times as strongly as the ridge that is the baseline."""

_PENALTY: Final = 1.0
"""Of the bumps' squared weights: a pure number, since bumps are 0 to 1 high and weights metres like
heights. It is the variance of the noise over the prior variance of a weight, and stands beside sums
over all sampled pixels (20,000 at most), which are divided by no count."""

BLOCK: Final = 1_024
"""Pixels whose bumps are held at once: 2 MiB, which stay in a CPU's cache."""

_UNIT: Final = 1 / SQUARED_REACH**4
_FEWEST = 64


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """Heights from embeddings, pixel by pixel: a linear term and bumps."""

    ridge: Ridge
    """The linear term; `evened` where `fit` made it for a network."""
    centres: NDArray[np.int8]
    """(m, 64) codes that the bumps stand on; m is a power of 2, or 0: no bumps."""
    weights: NDArray[np.float32]
    """(m,) metres."""

    @classmethod
    def of(cls, ridge: Ridge) -> "Kernel":
        """A linear term alone."""
        return cls(ridge, np.empty((0, len(ridge.weights)), np.int8), np.empty(0, np.float32))

    @property
    def doubled(self) -> NDArray[np.float32]:
        """(m, 64) twice the centres."""
        return np.multiply(self.centres, 2, dtype=np.float32)

    @property
    def rooms(self) -> NDArray[np.float32]:
        """(m, 1) squared reach less the squared length of each centre."""
        squares: NDArray[np.float32] = np.square(self.centres, dtype=np.float32).sum(axis=1)
        return SQUARED_REACH - squares[:, None]

    @property
    def steps(self) -> NDArray[np.float32]:
        """(m, 1) metres that a bump adds for each unit of what `raised` gives."""
        return (self.weights * np.float32(_UNIT))[:, None]

    def predict(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Heights in metres of codes (64, ...): shape (...), NaN where there is no embedding."""
        total = self.ridge.total(codes) + self.bent(codes)
        return np.where(valid(codes), total, np.nan).astype(np.float32)

    def bent(self, codes: NDArray[np.int8]) -> NDArray[np.float64]:
        """What the bumps add to the linear term, metres: codes (64, ...) to (...).

        Another device gives the same bits with `doubled`, `rooms` and `steps` moved there, and the
        operations of `loops.bumps` in the same order. It must not run under autocast.
        """
        flat = codes.reshape(len(codes), -1)
        added = np.zeros(flat.shape[1], np.float32)
        doubled, rooms, steps = self.doubled, self.rooms[:, 0], self.steps[:, 0]
        for start in range(0, flat.shape[1], BLOCK) if len(steps) else ():
            part = slice(start, start + BLOCK)
            q = flat[:, part].astype(np.float32)
            added[part] = loops.bumps(doubled @ q, rooms, (q * q).sum(axis=0), steps)
        return added.reshape(codes.shape[1:]).astype(np.float64)

    def raised(self, codes: NDArray[np.int8]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Blocks of the pixels (64, n), and (m, block) how high each bump is there, unscaled.

        `max(0, R^2 - d^2)^4`, d the distance of pixel and centre, R the reach.
        """
        doubled, rooms = self.doubled, self.rooms
        for start in range(0, codes.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            q = codes[:, part].astype(np.float32)
            bumps = np.maximum(rooms + doubled @ q - (q * q).sum(axis=0), 0)
            bumps *= bumps
            bumps *= bumps
            yield part, bumps


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """Some pixels of one use, each with an embedding and a reference."""

    codes: NDArray[np.int8]
    """(64, n)."""
    heights: NDArray[np.float32]
    """(n,) metres."""


def fit(ridge: Ridge, training: Pixels, held_out: Pixels) -> Kernel:
    """Bumps for what a linear term leaves of the heights, as high as held-out ground confirms.

    All bumps are scaled by the factor from 0 to 1 that makes them fit the held-out pixels best;
    with none of those, or where bumps do not help there, the linear term stays alone.

    Args:
        ridge: the linear term, fitted on all training ground.
        training: a sample of that ground; bumps stand on pixels taken evenly out of it.
        held_out: a sample of ground that was kept apart in space.
    """
    n = training.heights.size
    count = min(MOST, 2 ** (n.bit_length() - 1)) if n >= _FEWEST else 0
    if not count or not held_out.heights.size:
        return Kernel.of(ridge)
    centres = np.ascontiguousarray(training.codes[:, :: n // count][:, :count].T)
    kernel = Kernel(
        ridge, centres, _solve(Kernel(ridge, centres, np.ones(count, np.float32)), training)
    )
    share = _confirmed(kernel, held_out)
    if share == 0:
        return Kernel.of(ridge)
    return Kernel(ridge, centres, (kernel.weights * share).astype(np.float32))


def _solve(kernel: Kernel, training: Pixels) -> NDArray[np.float32]:
    """(m,) weights of bumps in metres: `(K K' + penalty I) w = K r`, r what the ridge leaves."""
    left = _left(kernel.ridge, training)
    count = len(kernel.centres)
    squares, products = _PENALTY * np.eye(count), np.zeros(count)
    for part, raised in kernel.raised(training.codes):
        bumps = raised.astype(np.float64) * _UNIT
        squares += bumps @ bumps.T
        products += bumps @ left[part]
    return np.linalg.solve(squares, products).astype(np.float32)


def _confirmed(kernel: Kernel, held_out: Pixels) -> float:
    """The factor, 0 to 1, by which the bumps fit what the linear term leaves of held-out ground."""
    added, left = kernel.bent(held_out.codes), _left(kernel.ridge, held_out)
    scale = float(added @ added)
    return min(max(float(added @ left) / scale, 0.0), 1.0) if scale > 0 else 0.0


def _left(ridge: Ridge, pixels: Pixels) -> NDArray[np.float64]:
    return pixels.heights - ridge.total(pixels.codes)
