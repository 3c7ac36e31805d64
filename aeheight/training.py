"""Fitting a model to the training ground: one streaming pass, then Lightning's loop.

The ground is anything that lists its patches and reads them: a cube, or arrays in a test.
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight import novelty
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from aeheight.metrics import Stats, merge
from aeheight.models import Base, Checkpoint, HeightModel, Provenance
from aeheight.novelty import Sample
from aeheight.patches import TRAIN, VALIDATION, Patch
from aeheight.predictor import full_precision
from aeheight.ridge import Ridge, RidgeSums
from aeheight.seams import Seams, measure
from aeheight.settings import ModelSettings
from aeheight.windows import STRIDE

Record = dict[str, float]
"""What an epoch reached; epoch 0 is the base alone.

`epoch`, `train_rmse` (metres, while the weights moved), `validation_rmse` (metres),
`validation_r2`, `patches_per_second`, `seconds` since the start; what does not exist is left out.
An epoch whose numbers were not finite has `diverged` instead, and is the last.
"""

_SMALLEST_SCALE: Final = 1e-3
_SQUARE: Final = 640
"""Edge in pixels of the squares that seams are measured on: they tell halos of up to 288 px."""
_SQUARES: Final = 4
_LAST_LEARNING_RATE: Final = 0.01

_log = logging.getLogger(__name__)


class Ground(Protocol):
    """Ground to train on, in patches. `sweep` runs first; `read` is never called twice at once."""

    def sweep(self) -> Iterator[Patch]:
        """All training ground once, in pieces of any shape."""

    def epoch(self, number: int) -> Sequence[Any]:
        """Spots of the training patches of epoch `number`, from 1: equal for equal numbers."""

    def validation(self) -> Sequence[Any]:
        """Spots of patches that cover every validation pixel once, without overlap."""

    def squares(self, edge: int, count: int) -> Sequence[Any]:
        """Spots of up to `count` squares of up to `edge` px, to measure seams on; may be none."""

    def read(self, spot: Any) -> Patch:
        """The patch of a spot: square, its edge a multiple of 32 px."""


def fit(
    ground: Ground,
    settings: ModelSettings,
    base: Base,
    provenance: Provenance,
    on_epoch: Callable[[Record], None] | None = None,
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

    Raises:
        InputError: no training or no validation ground, nothing to learn, or a batch too small.
    """
    if settings.architecture == "ridge":
        base = "ridge"
    survey = _survey(ground, base == "prior", settings.seed)
    ridge = survey.sums.solve(settings.ridge_alpha)
    target = survey.target(base, ridge)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = HeightModel(settings, base, ridge, max(target.spread, _SMALLEST_SCALE))
        journal = _Journal(settings, on_epoch)
        if model.network is not None:
            _train(model, ground, settings, target, journal)
        else:
            journal.note(model, {"train_rmse": target.rmse}, validate(model, ground, 1))
    seams = _measured_seams(model, ground, journal.weights)
    return Checkpoint(
        model=settings,
        base=base,
        ridge=ridge,
        scale=model.scale,
        weights=journal.weights,
        provenance=provenance,
        history=tuple(journal.history),
        novelty=novelty.fit(survey.training, survey.validation, settings.seed),
        seams=seams,
    )


def _measured_seams(
    model: HeightModel, ground: Ground, weights: Mapping[str, Tensor]
) -> Seams | None:
    """What a crop of a halo leaves with these weights; None where there is nothing to measure."""
    spots = ground.squares(_SQUARE, _SQUARES)
    if model.network is None or not weights or not spots:
        return None
    model.network.load_state_dict(weights)
    model.eval()

    def heights(codes: NDArray[np.int8], prior: NDArray[np.float32] | None) -> NDArray[np.float32]:
        given = None if prior is None else torch.tensor(prior, device=model.device)
        with torch.inference_mode(), full_precision():  # TF32 rounds by more than a seam
            result = model(torch.tensor(codes, device=model.device), given)
        found: NDArray[np.float32] = result.cpu().numpy()
        return found

    patches = (ground.read(spot) for spot in spots)
    return measure(heights, ((patch.codes, patch.prior) for patch in patches))


def validate(model: HeightModel, ground: Ground, batch: int) -> Stats:
    """Sums of the model's errors on all validation ground, `batch` patches at a time.

    Where `n` is below `n_reference`, the model gave heights that are not finite.
    """
    training = model.training
    model.eval()
    patches = (ground.read(spot) for spot in ground.validation())
    errors = merge(_errors(model, part.to(model.device)) for part in _batched(patches, batch))
    model.train(training)
    return errors


def _errors(model: HeightModel, batch: "_Batch") -> Stats:
    with torch.inference_mode():
        heights = model(batch.codes, batch.prior)
        there = model.usable(batch.codes, batch.prior) & batch.reference(VALIDATION)
    return Stats.of(
        heights.cpu().numpy(),
        batch.height.cpu().numpy(),
        reference_valid=there.cpu().numpy(),
        predicted_valid=heights.isfinite().cpu().numpy(),
    )


@dataclass(frozen=True, slots=True)
class _Target:
    """What the network has to learn: height - base on the training ground."""

    mean: float
    """Metres."""
    spread: float
    """Standard deviation, metres."""

    @property
    def rmse(self) -> float:
        """Root mean square of height - base, metres."""
        return math.hypot(self.mean, self.spread)


@dataclass(frozen=True, slots=True)
class _Survey:
    """The one streaming pass over the training ground."""

    sums: RidgeSums
    """Of all training pixels with an embedding and a reference."""
    prior: Stats
    """Errors of the prior on those that have one; empty where it is not needed."""
    training: Sample
    """Of those pixels."""
    validation: Sample
    """Of all validation pixels with an embedding and a reference."""

    def target(self, base: Base, ridge: Ridge) -> _Target:
        """What is left of the heights when the base is taken off."""
        if base == "ridge":
            return _Target(0.0, self.sums.rmse(ridge))
        if base == "none":
            return _Target(0.0, math.sqrt(self.sums.m2_y / self.sums.n))
        if self.prior.n == 0:
            raise InputError(
                f"the prior has no value on any of the {self.sums.n} training pixels: check its "
                "`href` and extent, or set model.base to ridge"
            )
        spread = math.sqrt(self.prior.m2_difference / self.prior.n)
        return _Target(-self.prior.mean_difference, spread)


def _survey(ground: Ground, with_prior: bool, seed: int) -> _Survey:
    training, validation = Sample(seed), Sample(seed)
    sums = RidgeSums.of(np.empty((BANDS, 0), np.int8), np.empty(0, np.float32))
    prior = Stats.zero()
    for patch in ground.sweep():
        there = patch.usable(TRAIN)
        sums += RidgeSums.of(patch.codes[:, there], patch.height[there])
        training.add(patch.codes[:, there])
        validation.add(patch.codes[:, patch.usable(VALIDATION)])
        if with_prior and patch.prior is not None:
            known = np.isfinite(patch.prior)
            prior += Stats.of(
                patch.prior, patch.height, reference_valid=there, predicted_valid=known
            )
    return _Survey(sums, prior, training, validation)


class _Batch(NamedTuple):
    """Patches side by side."""

    codes: Tensor
    """(n, 64, p, p) int8."""
    height: Tensor
    """(n, p, p) float32, metres; NaN where there is no reference."""
    use: Tensor
    """(n, p, p) uint8."""
    prior: Tensor | None
    """(n, p, p) float32, metres; NaN where there is none."""

    def to(self, device: torch.device) -> "_Batch":
        """The same patches on a device."""
        prior = None if self.prior is None else self.prior.to(device)
        return _Batch(self.codes.to(device), self.height.to(device), self.use.to(device), prior)

    def reference(self, use: int) -> Tensor:
        """(n, p, p) bool: where there is a reference on ground of that use."""
        return self.height.isfinite() & (self.use == use)


def _batched(patches: Iterator[Patch], size: int) -> Iterator[_Batch]:
    while part := list(itertools.islice(patches, size)):
        priors = [patch.prior for patch in part if patch.prior is not None]
        yield _Batch(
            codes=_stacked([patch.codes for patch in part]),
            height=_stacked([patch.height for patch in part]),
            use=_stacked([patch.use for patch in part]),
            prior=_stacked(priors) if len(priors) == len(part) else None,
        )


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The batches of one epoch, each patch laid one of a square's eight ways, drawn by the seed.

    The last batch is filled up from the first patches, since batch normalisation needs several.
    One thread reads the next batch while the network works on this one.
    """

    ground: Ground
    spots: Sequence[Any]
    batch: int
    seed: Sequence[int]

    def __len__(self) -> int:
        return math.ceil(len(self.spots) / self.batch)

    def __iter__(self) -> Iterator[_Batch]:
        batches = _batched(self._patches(), self.batch)
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = reader.submit(next, batches, None)
                yield batch

    def _patches(self) -> Iterator[Patch]:
        size = len(self) * self.batch
        ways = np.random.default_rng(self.seed).integers(8, size=size)
        for spot, way in zip(itertools.cycle(self.spots), ways, strict=False):
            yield _laid(self.ground.read(spot), int(way))


def _laid(patch: Patch, way: int) -> Patch:
    """A square patch in one of its eight ways: four turns, mirrored or not."""

    def lay(array: NDArray[Any]) -> NDArray[Any]:
        mirrored = array[..., ::-1] if way >= 4 else array
        return np.rot90(mirrored, way % 4, axes=(-2, -1))

    prior = None if patch.prior is None else lay(patch.prior)
    return Patch(lay(patch.codes), lay(patch.height), prior, lay(patch.use))


class _Journal:
    """The course of a training: the records, and the weights of the best epoch."""

    def __init__(
        self, settings: ModelSettings, on_epoch: Callable[[Record], None] | None = None
    ) -> None:
        self.history: list[Record] = []
        self.weights: Mapping[str, Tensor] = {}
        self._settings, self._on_epoch = settings, on_epoch
        self._best, self._waited = math.inf, 0
        self._start = time.monotonic()

    def note(self, model: HeightModel, facts: Record, errors: Stats) -> bool:
        """Note the end of an epoch; returns whether training should stop."""
        record = {"epoch": len(self.history)} | facts
        finite = errors.n == errors.n_reference and all(map(math.isfinite, facts.values()))
        if finite:
            summary = errors.summary()
            for name in ("rmse", "r2"):
                if (value := summary[name]) is not None:
                    record[f"validation_{name}"] = float(value)
            self._keep_best(model, record.get("validation_rmse", math.inf))
        else:
            record = {"epoch": len(self.history), "diverged": 1.0}
            _log.warning(
                "training diverged in epoch %d and ends; the weights of the best epoch are kept. "
                "Lower model.learning_rate (%g), or look for wild heights in the reference",
                len(self.history),
                self._settings.learning_rate,
            )
        record["seconds"] = time.monotonic() - self._start
        self.history.append(record)
        stop = not finite or self._waited >= self._settings.patience
        if self._on_epoch:
            self._on_epoch(record | {"eta_seconds": 0.0 if stop else self._time_to_go()})
        return stop

    def _keep_best(self, model: HeightModel, rmse: float) -> None:
        self._waited += 1
        if rmse < self._best and model.network is not None:
            self._best, self._waited = rmse, 0
            self.weights = {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in model.network.state_dict().items()
            }

    def _time_to_go(self) -> float:
        """Seconds, judged by the epochs so far; 0 while there is none to judge by."""
        done = len(self.history) - 1
        if done == 0 or self._settings.architecture == "ridge":
            return 0.0
        each = (self.history[-1]["seconds"] - self.history[0]["seconds"]) / done
        return each * (self._settings.epochs - done)


class _Correction(lightning.LightningModule):
    """The training of a network on what its base leaves over."""

    def __init__(
        self, model: HeightModel, ground: Ground, settings: ModelSettings, journal: _Journal
    ) -> None:
        super().__init__()
        self.model, self._ground, self._settings, self._journal = model, ground, settings, journal

    def train_dataloader(self) -> _Epoch:
        """The batches of the coming epoch."""
        number = self.current_epoch + 1
        spots = self._ground.epoch(number)
        return _Epoch(self._ground, spots, self._settings.batch, (self._settings.seed, number))

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate annealed along a cosine to a hundredth."""
        rate, epochs = self._settings.learning_rate, self._settings.epochs
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=rate, weight_decay=self._settings.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=epochs, eta_min=rate * _LAST_LEARNING_RATE
        )
        return [optimizer], [schedule]

    def on_train_epoch_start(self) -> None:
        """Begin the sums of an epoch."""
        self._squares = torch.zeros((), dtype=torch.float64, device=self.device)
        self._n, self._patches, self._start = torch.zeros_like(self._squares), 0, time.monotonic()

    def training_step(self, batch: _Batch) -> Tensor:
        """Mean squared error in units of the scale over the training pixels of a batch."""
        model = self.model
        there = model.usable(batch.codes, batch.prior) & batch.reference(TRAIN)
        missing = batch.height - model.base(batch.codes, batch.prior)
        target = torch.where(there, missing / model.scale, 0).float()
        errors = (model.correction(batch.codes) - target).masked_fill(~there, 0)
        squares, n = errors.square().sum(), there.sum()
        self._squares += squares.detach()
        self._n += n
        self._patches += len(there)
        return squares / n.clamp(min=1)

    def on_train_epoch_end(self) -> None:
        """Validate, and stop where that is due."""
        seconds = time.monotonic() - self._start
        rmse = self.model.scale * float((self._squares / self._n.clamp(min=1)).sqrt())
        facts = {"train_rmse": rmse, "patches_per_second": self._patches / seconds}
        errors = validate(self.model, self._ground, self._settings.batch)
        self.trainer.should_stop = self._journal.note(self.model, facts, errors)


def _train(
    model: HeightModel,
    ground: Ground,
    settings: ModelSettings,
    target: _Target,
    journal: _Journal,
) -> None:
    if settings.batch * (settings.patch // STRIDE) ** 2 < 2:
        raise InputError(
            f"batch {settings.batch} of patches of {settings.patch} px leaves batch normalisation "
            "one value: set model.batch to 2 or more, or model.patch to 64 or more"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).to(memory_format=torch.channels_last)
    errors = validate(model, ground, settings.batch)
    if errors.n_reference == 0:
        raise InputError(
            "no validation pixel has both an embedding and a reference height: raise "
            "split.validation, or cut split.block or split.buffer"
        )
    journal.note(model, {"train_rmse": target.rmse}, errors)
    model.start_at(target.mean)
    with _quiet():
        trainer = lightning.Trainer(
            accelerator=device,
            devices=1,
            max_epochs=settings.epochs,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Correction(model, ground, settings, journal))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what does not concern a user: Lightning's notes, and its use of an old name of torch."""
    notes = logging.getLogger("lightning.pytorch")
    level = notes.level
    notes.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        notes.setLevel(level)
