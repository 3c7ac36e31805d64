"""What a finished model errs on ground that it was not fitted on: what calibrates its spread."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from aeheight.batches import Batch, Ground, in_batches
from aeheight.errors import InputError
from aeheight.models import HeightModel
from aeheight.novelty import Sample
from aeheight.patches import Patch
from aeheight.predictor import full_precision
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings
from aeheight.splits import VALIDATION
from aeheight.spread import Errors, Spread, cells_of, enough, fit

Facts = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
"""Of pixels (n,): height and prior in metres, NaN where there is no prior; cell of ground."""

_log = logging.getLogger(__name__)


def facts_of(patch: Patch, piece: int, there: NDArray[np.bool_]) -> Facts:
    """Of the pixels (rows, columns) of a patch that are there; `piece` numbers the patches."""
    prior = np.full_like(patch.height, np.nan) if patch.prior is None else patch.prior
    return patch.height[there], prior[there], cells_of(piece, there)


def spread_of(
    model: HeightModel, ground: Ground, training: Sample, ridge: Ridge, settings: ModelSettings
) -> Spread | None:
    """The spread of a finished model, calibrated.

    Args:
        model: with the weights that are kept, on the device that is to run it.
        ground: whose validation ground judges the model.
        training: pixels of its training ground, with their `facts_of`.
        ridge: fitted on that ground.
        settings: of the model.

    Returns:
        None where there is too little ground to tell; the log says so.
    """
    if training.facts and enough(training.facts[2]):
        held_out, predicted = _judged(model, ground, settings)
        heights, _, cells = _facts(held_out)
        errors = Errors(held_out.codes, predicted - heights, cells)
        try:
            plain, same = _plain(model, training, held_out, ridge, settings)
            found = fit(plain, errors, same, settings.seed)
        except InputError:  # a fold of the ground without any relief
            found = None
        if found is not None:
            return found
    _log.warning("there is too little ground to tell how far heights may be off: no spread")
    return None


def _plain(
    model: HeightModel, training: Sample, held_out: Sample, ridge: Ridge, settings: ModelSettings
) -> tuple[Errors, NDArray[np.float64]]:
    """Errors of the prior, less their mean, or of the ridge: on training and held-out ground."""
    heights, prior, cells = _facts(training)
    there, prior_there, _ = _facts(held_out)
    if not model.needs_prior:
        plain = Errors.of_ridge(training.codes, heights, cells, settings.ridge_alpha, settings.seed)
        return plain, np.subtract(ridge.predict(held_out.codes), there, dtype=np.float64)
    known = np.isfinite(prior)
    errors = np.subtract(prior[known], heights[known], dtype=np.float64)
    bias = errors.mean()
    plain = Errors(training.codes[:, known], errors - bias, cells[known])
    return plain, np.subtract(prior_there, there, dtype=np.float64) - bias


def _facts(sample: Sample) -> Facts:
    none = np.empty(0, np.float32)
    heights, prior, cells, *_ = sample.facts or (none, none, np.empty(0, np.int64))
    return heights, prior, cells


def _judged(
    model: HeightModel, ground: Ground, settings: ModelSettings
) -> tuple[Sample, NDArray[np.float64]]:
    """Pixels of all validation ground with their `facts_of`, and the model's heights of them."""
    model.eval()
    found, piece = Sample(settings.seed), 0
    for batch in in_batches(ground, ground.validation(), settings.batch):
        for sample in zip(*(array.numpy() for array in _predicted(model, batch)), strict=True):
            codes, height, prior, predicted, there = sample
            facts = height[there], prior[there], cells_of(piece, there), predicted[there]
            found.add(codes[:, there], *facts)
            piece += 1
    predicted = found.facts[3] if found.facts else np.empty(0)
    return found, predicted.astype(np.float64)


def _predicted(model: HeightModel, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Codes, heights, priors, the model's heights, and where there is validation ground."""
    here = batch.to(model.device)
    with torch.inference_mode(), full_precision():
        heights = model(here.codes, here.prior).cpu()
        there = model.usable(here.codes, here.prior) & here.reference(VALIDATION)
    prior = torch.full_like(batch.height, torch.nan) if batch.prior is None else batch.prior
    return batch.codes, batch.height, prior, heights, there.cpu()
