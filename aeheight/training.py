"""Fitting a model to the training ground: one streaming pass, then the loop of `learning`.

The ground is anything that lists its patches and reads them: a cube, or arrays in a test.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight import kernel, novelty
from aeheight.batches import Ground
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from aeheight.journal import Journal, Last, Record
from aeheight.kernel import STIFFER, Kernel, Pixels
from aeheight.learning import Course, Machine, Target, learn, validate
from aeheight.metrics import Stats
from aeheight.models import Base, Checkpoint, HeightModel, Provenance
from aeheight.novelty import Sample
from aeheight.patches import Patch
from aeheight.predictor import full_precision
from aeheight.recipe import Recipe
from aeheight.residuals import facts_of, judged, spread_of
from aeheight.ridge import Ridge, RidgeSums
from aeheight.seams import Seams, measure
from aeheight.settings import ModelSettings
from aeheight.splits import TRAIN, UNUSED, VALIDATION

__all__ = ["Ground", "Last", "Machine", "Recipe", "Record", "fit"]

_SMALLEST_SCALE: Final = 1e-3
_SQUARE: Final = 640
"""Edge in pixels of the squares that seams are measured on: they tell halos of up to 288 px."""
_SQUARES: Final = 4
_PRODUCT: Final = Recipe()


def fit(
    ground: Ground,
    settings: ModelSettings,
    base: Base,
    provenance: Provenance,
    on_epoch: Callable[[Record], None] | None = None,
    *,
    recipe: Recipe = _PRODUCT,
    on_progress: Callable[[Record], None] | None = None,
    last: Last | None = None,
    machine: Machine | None = None,
) -> Checkpoint:
    """Train a model, and return the weights that had the best validation RMSE.

    The base alone takes part as epoch 0, so that a correction that does not help on validation
    ground is never kept. The same seed on the same machine gives the same weights.

    Args:
        ground: where to train.
        settings: what to train; `base` stands in for `settings.base`.
        base: what the network corrects.
        provenance: goes into the checkpoint.
        on_epoch: gets the record of each epoch as it ends, with `eta_seconds`: the time to go
            if training does not stop early.
        recipe: how the network is trained.
        on_progress: told within long epochs, as `Course.on_progress` says.
        last: keeps the state of the training at the end of each epoch; where it has one of this
            training, that is taken up. Removing it at the end is up to the caller.
        machine: what trains; None: all GPUs, or the CPU.

    Raises:
        InputError: no training or no validation ground, nothing to learn, heights that are
            infinite, or a batch too small.
    """
    if settings.architecture == "ridge":
        base = "ridge"
    machine = machine or Machine()
    survey = _survey(ground, base == "prior", settings.seed)
    ridge = survey.sums.solve(settings.ridge_alpha)
    bends = base == "ridge" and settings.architecture != "ridge" and recipe.bends
    bent = survey.kernel(settings) if bends else None
    target = survey.target(base, ridge, bent)
    journal = Journal(settings, on_epoch)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        scale = max(target.spread, _SMALLEST_SCALE)
        model = HeightModel(settings, base, ridge, scale, recipe.build, bent)
        if model.network is not None:
            survey.need_validation()
            course = Course(ground, settings, recipe, target, on_progress)
            learn(model, course, journal, last, machine)
        else:
            journal.note(model, {"train_rmse": target.rmse}, validate(model, ground, 1))
            journal.tell()
    _settle(model, journal.weights, machine)
    held_out = judged(model, ground, settings.seed)
    if base != "none" and model.network is not None:
        model.trust = held_out.trust
    return Checkpoint(
        model=settings,
        base=base,
        ridge=ridge,
        scale=model.scale,
        trust=model.trust,
        weights=journal.weights,
        provenance=provenance,
        history=tuple(journal.history),
        novelty=novelty.fit(survey.training, survey.validation, settings.seed),
        seams=_measured_seams(model, ground),
        kernel=bent,
        spread=spread_of(model, held_out, survey.training, ridge, settings),
    )


def _settle(model: HeightModel, weights: Mapping[str, Tensor], machine: Machine) -> None:
    """Make the model that which is kept, ready to be measured."""
    if model.network is not None and weights:
        model.network.load_state_dict(weights)
    model.to(machine.accelerator).eval()


def _measured_seams(model: HeightModel, ground: Ground) -> Seams | None:
    """What a crop of a halo leaves; None where there is nothing to measure."""
    spots = ground.squares(_SQUARE, _SQUARES)
    if model.network is None or not spots:
        return None

    def heights(codes: NDArray[np.int8], prior: NDArray[np.float32] | None) -> NDArray[np.float32]:
        given = None if prior is None else torch.tensor(prior, device=model.device)
        with torch.inference_mode(), full_precision():  # TF32 rounds by more than a seam
            result = model(torch.tensor(codes, device=model.device), given)
        found: NDArray[np.float32] = result.cpu().numpy()
        return found

    patches = (ground.read(spot) for spot in spots)
    return measure(heights, ((patch.codes, patch.prior) for patch in patches))


@dataclass(frozen=True, slots=True)
class _Survey:
    """The one streaming pass over the training ground."""

    sums: RidgeSums
    """Of all training pixels with an embedding and a reference."""
    evened: RidgeSums
    """The same, of evened embeddings."""
    prior: Stats
    """Errors of the prior on those that have one; empty where it is not needed."""
    training: Sample
    """Of those pixels, with their `facts_of`."""
    validation: Sample
    """Of all validation pixels with an embedding and a reference, with their heights."""
    validates: int
    """Validation pixels with an embedding, a reference and, where it is needed, a prior."""

    def need_validation(self) -> None:
        """Refuse ground on which no epoch can be judged.

        Raises:
            InputError: it is.
        """
        if not self.validates:
            raise InputError(
                "no validation pixel has both an embedding and a reference height: raise "
                "split.validation, or cut split.block or split.buffer"
            )

    def kernel(self, settings: ModelSettings) -> Kernel:
        """The base that carries furthest to ground unseen."""
        ridge = self.evened.solve(STIFFER * settings.ridge_alpha)
        return kernel.fit(ridge, _pixels(self.training), _pixels(self.validation))

    def target(self, base: Base, ridge: Ridge, bent: Kernel | None) -> Target:
        """What is left of the heights when the base is taken off."""
        if bent is not None:
            sample = _pixels(self.training)
            left = np.subtract(sample.heights, bent.predict(sample.codes), dtype=np.float64)
            return Target(0.0, float(np.sqrt(np.mean(np.square(left)))))
        if base == "ridge":
            return Target(0.0, self.sums.rmse(ridge))
        if base == "none":
            return Target(0.0, math.sqrt(self.sums.m2_y / self.sums.n))
        if self.prior.n == 0:
            raise InputError(
                f"the prior has no value on any of the {self.sums.n} training pixels: check its "
                "`href` and extent, or set model.base to ridge"
            )
        spread = math.sqrt(self.prior.m2_difference / self.prior.n)
        return Target(-self.prior.mean_difference, spread)


def _survey(ground: Ground, with_prior: bool, seed: int) -> _Survey:
    training, validation = Sample(seed), Sample(seed)
    sums = RidgeSums.of(np.empty((BANDS, 0), np.int8), np.empty(0, np.float32))
    evened = RidgeSums.of(np.empty((BANDS, 0), np.int8), np.empty(0, np.float32), evened=True)
    prior, validates = Stats.zero(), 0
    for patch in ground.sweep():
        _refuse_infinite(patch)
        there, held_out = patch.usable(TRAIN), patch.usable(VALIDATION)
        sums += RidgeSums.of(patch.codes[:, there], patch.height[there])
        evened += RidgeSums.of(patch.codes[:, there], patch.height[there], evened=True)
        training.add(patch.codes[:, there], *facts_of(patch, ground.block, there))
        validation.add(patch.codes[:, held_out], patch.height[held_out])
        if with_prior and patch.prior is not None:
            known = np.isfinite(patch.prior)
            prior += Stats.of(
                patch.prior, patch.height, reference_valid=there, predicted_valid=known
            )
            held_out &= known
        validates += int(held_out.sum())
    return _Survey(sums, evened, prior, training, validation, validates)


def _pixels(sample: Sample) -> Pixels:
    heights = sample.facts[0] if sample.facts else np.empty(0, np.float32)
    return Pixels(sample.codes, heights)


def _refuse_infinite(patch: Patch) -> None:
    """A missing height is NaN; an infinite one is a nodata value that nobody declared."""
    for name, values in (("height", patch.height), ("prior", patch.prior)):
        wrong = 0 if values is None else int((np.isinf(values) & (patch.use != UNUSED)).sum())
        if wrong:
            raise InputError(
                f"{wrong} pixels of `{name}` are infinite, which no height is: declare the value "
                f"as {name}.nodata and run aeheight ingest, or mend the source"
            )
