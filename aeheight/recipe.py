"""What experiments vary of a training: plain functions, with the product's choice as defaults."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aeheight import models
from aeheight.patches import Patch
from aeheight.settings import ModelSettings


def mean_square(
    output: torch.Tensor, target: torch.Tensor, there: torch.Tensor, height: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over the training pixels of a batch; 0 where there are none.

    Args:
        output: (n, h, w) what the network gave, in units of the scale.
        target: (n, h, w) float32, (reference - base) / scale; 0 where not `there`.
        there: (n, h, w) bool, the training pixels.
        height: (n, h, w) float32, the reference in metres; anything where not `there`.
    """
    errors = (output - target).masked_fill(~there, 0)
    return errors.square().sum() / there.sum().clamp(min=1)


def eight_ways(patches: Sequence[Patch], rng: np.random.Generator) -> Sequence[Patch]:
    """Each square patch laid in one of its eight ways: four turns, mirrored or not."""
    ways = rng.integers(8, size=len(patches))
    return [_laid(patch, int(way)) for patch, way in zip(patches, ways, strict=True)]


def _laid(patch: Patch, way: int) -> Patch:
    def lay(array: NDArray[Any]) -> NDArray[Any]:
        mirrored = array[..., ::-1] if way >= 4 else array
        return np.rot90(mirrored, way % 4, axes=(-2, -1))

    prior = None if patch.prior is None else lay(patch.prior)
    return Patch(lay(patch.codes), lay(patch.height), prior, lay(patch.use))


def drawn(ground: Any, number: int) -> Sequence[Any]:
    """The spots of epoch `number` as the ground draws them."""
    spots: Sequence[Any] = ground.epoch(number)
    return spots


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained. All functions must be pure but for the generators given to them.

    Functions that draw from torch's own generator (a dropout, noise in a module) are seeded too.
    """

    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = (
        mean_square
    )
    """`loss(output, target, there, height)`, as in `mean_square`, a scalar. A network that gives
    several channels while it trains hands them over as (n, channels, h, w)."""
    prepare: Callable[[Sequence[Patch], np.random.Generator], Sequence[Patch]] = eight_ways
    """`prepare(patches, rng)`: the patches of one batch, on the host, changed for training."""
    build: Callable[[ModelSettings], torch.nn.Module] = models.build
    """The network: (n, 64, h, w) float32 to (n, 1, h, w) while it is judged; it must be zero at
    first, so that it begins as its base."""
    draw: Callable[[Any, int], Sequence[Any]] = drawn
    """`draw(ground, number)`: the spots of an epoch, from 1; equal for equal numbers."""
    bends: bool = True
    """Whether the base `ridge` bends where training ground is near (`kernel`); False: the plain
    ridge regression."""
    averaging: float | None = None
    """Decay a step of the moving average of the weights that is judged and kept; None: the weights
    as they are."""


class Average:
    """The moving average of a network's weights (Polyak and Juditsky 1992), step by step.

    In the first steps the decay is smaller, so that the start is soon forgotten.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self._network, self._decay, self._steps = network, decay, 0
        self._mean = {k: t.detach().clone() for k, t in network.state_dict().items()}

    def follow(self) -> None:
        """Take in the weights of one more step; counters are copied."""
        self._steps += 1
        keep = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, tensor in self._network.state_dict().items():
            if tensor.is_floating_point():
                self._mean[name].lerp_(tensor, 1 - keep)
            else:
                self._mean[name].copy_(tensor)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Meanwhile the network has the averaged weights."""
        own = {k: t.detach().clone() for k, t in self._network.state_dict().items()}
        self._network.load_state_dict(self._mean)
        try:
            yield
        finally:
            self._network.load_state_dict(own)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {"steps": self._steps, "mean": self._mean}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another average ended."""
        self._steps = state["steps"]
        for name, tensor in state["mean"].items():
            self._mean[name].copy_(tensor)
