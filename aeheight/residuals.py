"""What a finished model errs on held-out ground: what its correction earns, how far it may be off.

The validation ground is gone over once. The same ground chose the epoch that is kept, so what is
told here is a little kinder than what other ground will say.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from aeheight.batches import Ground
from aeheight.errors import InputError
from aeheight.models import HeightModel
from aeheight.novelty import Sample
from aeheight.patches import Patch
from aeheight.predictor import full_precision
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings
from aeheight.splits import VALIDATION
from aeheight.spread import Errors, Spread, enough, fit
from aeheight.trust import RADIUS, Held, Trust, earned
from aeheight.windows import STRIDE

Facts = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
"""Of pixels (n,): height and prior in metres, NaN where there is no prior; block of ground."""

MARGIN: Final = -(-RADIUS // STRIDE) * STRIDE
"""Pixels around a patch that the model sees too: a level is the mean over `RADIUS` of them."""

_log = logging.getLogger(__name__)


def facts_of(patch: Patch, block: int, there: NDArray[np.bool_]) -> Facts:
    """Of the pixels (rows, columns) of a patch that are there; `block` is the edge of a block."""
    prior = np.full_like(patch.height, np.nan) if patch.prior is None else patch.prior
    return patch.height[there], prior[there], patch.blocks(block)[there]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model makes of the validation ground."""

    trust: Trust
    """What its correction earned there."""
    sample: Sample
    """Of the pixels, with their `facts_of`, and (n,) metres each: base, relief and level."""

    def errors(self, trust: Trust) -> Errors:
        """Of the sampled pixels, with as much of the correction as is believed."""
        heights, _, blocks = _facts(self.sample)
        none = np.empty(0)
        base, relief, level = self.sample.facts[3:] or (none, none, none)
        predicted = base + trust.relief * relief + trust.level * level
        return Errors(self.sample.codes, predicted - heights, blocks)


def judged(model: HeightModel, ground: Ground, seed: int) -> Judged:
    """Go over the validation ground once.

    Args:
        model: with the weights that are kept, on the device that is to run it.
        ground: whose validation ground judges it.
        seed: of the sample.
    """
    sample = Sample(seed)
    return Judged(earned(_held_out(model, ground, sample)), sample)


def _held_out(model: HeightModel, ground: Ground, sample: Sample) -> Iterator[Held]:
    """The validation ground, patch by patch, its pixels offered to the sample."""
    model.eval()
    for spot in ground.validation():
        patch = ground.read(spot, MARGIN)
        base, relief, level = (part[_CORE] for part in _parts(model, patch))
        core = patch.core(MARGIN)
        there = core.usable(VALIDATION) & np.isfinite(base)
        height, prior, blocks = facts_of(core, ground.block, there)
        told = base[there], relief[there], level[there]
        sample.add(core.codes[:, there], height, prior, blocks, *told)
        yield Held(height - told[0], *told[1:], blocks)


_CORE: Final = (slice(MARGIN, -MARGIN),) * 2


def _parts(model: HeightModel, patch: Patch) -> tuple[NDArray[np.float64], ...]:
    """Base, NaN where the model tells no height, relief and level: (p, p) metres each."""
    codes = torch.from_numpy(patch.codes)[None].to(model.device)
    prior = None if patch.prior is None else torch.from_numpy(patch.prior)[None].to(model.device)
    with torch.inference_mode(), full_precision():
        base = torch.where(model.usable(codes, prior), model.base(codes, prior), torch.nan)
        parts = model.parts(codes) if model.network is not None else (base * 0, base * 0)
    relief, level = (model.scale * part[0].double().cpu().numpy() for part in parts)
    return base[0].cpu().numpy(), relief, level


def spread_of(
    model: HeightModel, held_out: Judged, training: Sample, ridge: Ridge, settings: ModelSettings
) -> Spread | None:
    """The spread of a finished model, calibrated.

    Args:
        model: whose trust is settled.
        held_out: what it makes of the validation ground.
        training: pixels of its training ground, with their `facts_of`.
        ridge: fitted on that ground.
        settings: of the model.

    Returns:
        None where there is too little ground to tell; the log says so.
    """
    if training.facts and enough(training.facts[2]):
        try:
            plain, same = _plain(model, training, held_out.sample, ridge, settings)
            found = fit(plain, held_out.errors(model.trust), same, settings.seed)
        except InputError:  # a fold of the ground without any relief
            found = None
        if found is not None:
            return found
    _log.warning(
        "there is too little ground to tell how far heights may be off (ten blocks of the split at "
        "least): no spread"
    )
    return None


def _plain(
    model: HeightModel, training: Sample, held_out: Sample, ridge: Ridge, settings: ModelSettings
) -> tuple[Errors, NDArray[np.float64]]:
    """Errors of the prior, less their mean, or of the ridge: on training and held-out ground."""
    heights, prior, blocks = _facts(training)
    there, prior_there, _ = _facts(held_out)
    if not model.needs_prior:
        plain = Errors.of_ridge(
            training.codes, heights, blocks, settings.ridge_alpha, settings.seed
        )
        return plain, np.subtract(ridge.predict(held_out.codes), there, dtype=np.float64)
    known = np.isfinite(prior)
    errors = np.subtract(prior[known], heights[known], dtype=np.float64)
    bias = errors.mean()
    plain = Errors(training.codes[:, known], errors - bias, blocks[known])
    return plain, np.subtract(prior_there, there, dtype=np.float64) - bias


def _facts(sample: Sample) -> Facts:
    none = np.empty(0, np.float32)
    heights, prior, blocks, *_ = sample.facts or (none, none, np.empty(0, np.int64))
    return heights, prior, blocks
