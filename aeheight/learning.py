"""The loop that trains a network on what its base leaves over: Lightning's, one epoch at a time.

An epoch is the unit that can be taken up again. All that an epoch draws follows from the seed and
its number, and `Last` keeps the rest at its end; so a training that was killed ends, on a CPU, with
the weights of one that was not.
"""

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import lightning
import numpy as np
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from aeheight.batches import Batch, Epoch, Ground, in_batches
from aeheight.errors import InputError
from aeheight.journal import Journal, Last, Record
from aeheight.metrics import Stats
from aeheight.models import HeightModel
from aeheight.recipe import Average, Recipe
from aeheight.settings import ModelSettings
from aeheight.splits import TRAIN, VALIDATION
from aeheight.store import Store
from aeheight.sums import merge
from aeheight.windows import STRIDE

_LAST_LEARNING_RATE: Final = 0.01
_STATE: Final = "state"
"""The path that Lightning is told; `_LastIO` knows better."""
_NOTES: Final = ("lightning.pytorch", "lightning.fabric")
_LOOK: Final = 32
"""Steps after which a training that diverges is noticed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What trains; results depend on it, as they do on the versions of its libraries."""

    accelerator: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """`cpu` or `cuda`."""
    devices: int = field(default_factory=lambda: max(torch.cuda.device_count(), 1))
    """Processes that train together, each on a GPU of its own; each takes its share of a batch."""
    precision: str = ""
    """Lightning's name; empty: bfloat16 where a GPU has it, else float16, and float32 on a CPU."""

    def facts(self) -> dict[str, Any]:
        """What weights depend on: a training is taken up on such a machine alone."""
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "precision": self.chosen_precision(),
            "torch": torch.__version__,
        }

    def chosen_precision(self) -> Any:
        """Lightning's name of the precision; weights and losses are float32 in any case."""
        if self.precision or self.accelerator == "cpu":
            return self.precision or "32-true"
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


class _LastIO(TorchCheckpointIO):
    """Lightning's checkpoints at `_STATE` are `Last`'s; others, between processes, its own."""

    def __init__(self, last: Last) -> None:
        self._last = last

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, *rest: Any, **named: Any
    ) -> None:
        if path == _STATE:
            self._last.save(checkpoint)
        else:
            super().save_checkpoint(checkpoint, path, *rest, **named)

    def load_checkpoint(self, path: Any, *rest: Any, **named: Any) -> dict[str, Any]:
        if path != _STATE:
            found: dict[str, Any] = super().load_checkpoint(path, *rest, **named)
            return found
        state = self._last.load()
        assert state is not None
        return state


def validate(
    model: HeightModel, ground: Ground, batch: int, rank: int = 0, ranks: int = 1
) -> Stats:
    """Sums of the model's errors on validation ground, `batch` patches at a time.

    Where `n` is below `n_reference`, the model gave heights that are not finite.

    Args:
        model: to judge.
        ground: where.
        batch: patches at a time.
        rank: of `ranks` shares of all validation ground, the one that is wanted.
        ranks: 1: all of it.
    """
    training = model.training
    model.eval()
    spots = ground.validation()
    own = spots[len(spots) * rank // ranks : len(spots) * (rank + 1) // ranks]
    batches = in_batches(ground, own, batch)
    errors = merge(_errors(model, part.to(model.device)) for part in batches)
    model.train(training)
    return errors


def _errors(model: HeightModel, batch: Batch) -> Stats:
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
class Target:
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
class Course:
    """All that a training needs besides the model."""

    ground: Ground
    settings: ModelSettings
    recipe: Recipe
    target: Target
    on_progress: Callable[[Record], None] | None = None
    """Gets `epoch`, `patches`, `patches_of`, `patches_per_second` and, where it can be told,
    `eta_seconds`, every `every` seconds within an epoch."""
    every: float = 30.0
    """Seconds."""


class _Learner(lightning.LightningModule):
    """The training of a network on what its base leaves over."""

    def __init__(self, model: HeightModel, course: Course, journal: Journal, *, keep: bool) -> None:
        super().__init__()
        self.model, self._course, self._journal, self._keep = model, course, journal, keep
        self._average: Average | None = None
        self._taken_up: Mapping[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process, which must be as quiet."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _hush()

    def train_dataloader(self) -> Epoch:
        """The batches of the coming epoch."""
        course, number = self._course, self.current_epoch + 1
        return Epoch(
            course.ground,
            course.recipe.draw(course.ground, number),
            course.settings.batch,
            (course.settings.seed, number),
            course.recipe,
            self.global_rank,
            self.trainer.world_size,
        )

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate annealed along a cosine to a hundredth."""
        settings = self._course.settings
        rate, epochs = settings.learning_rate, settings.epochs
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=rate, weight_decay=settings.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=epochs, eta_min=rate * _LAST_LEARNING_RATE
        )
        return [optimizer], [schedule]

    def on_train_start(self) -> None:
        """Judge what the network starts from, unless a training is taken up."""
        if not self._journal.history:
            target = self._course.target
            self._note({"train_rmse": target.rmse})
            self._tell()
            self.model.start_at(target.mean)
        if decay := self._course.recipe.averaging:  # now that the weights lie on their device
            assert self.model.network is not None
            self._average = Average(self.model.network, decay)
            if self._taken_up:
                self._average.restore(self._taken_up)

    def on_train_epoch_start(self) -> None:
        """Begin the sums of an epoch, and what it draws."""
        draws = [self._course.settings.seed, self.current_epoch, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(draws).generate_state(1)[0]))
        # Squared errors, their number, patches, losses, steps.
        self._rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        self._sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        self._begun = self._told = time.monotonic()

    def on_train_batch_start(self, _: Batch, step: int) -> int | None:
        """End an epoch that diverged: nothing better comes of it."""
        alone = self.trainer.world_size == 1  # or one process would wait for the others
        if alone and step % _LOOK == 0 and not bool(self._sums[3].isfinite()):
            return -1
        return None

    def training_step(self, batch: Batch) -> Tensor:
        """The recipe's loss over the training pixels of a batch."""
        model = self.model
        there = model.usable(batch.codes, batch.prior) & batch.reference(TRAIN)
        missing = batch.height - model.base(batch.codes, batch.prior)
        target = torch.where(there, missing / model.scale, 0).float()
        output = model.output(batch.codes).float()
        output = output[:, 0] if output.shape[1] == 1 else output
        loss = self._course.recipe.loss(output, target, there, batch.height)
        self._add(output.detach(), target, there, loss.detach())
        return loss

    def _add(self, output: Tensor, target: Tensor, there: Tensor, loss: Tensor) -> None:
        squares, n = loss.new_zeros(()), loss.new_zeros(())
        if output.shape == target.shape:
            squares = (output - target).masked_fill(~there, 0).square().sum()
            n = there.sum()
        patches, step = loss.new_tensor(float(len(there))), loss.new_ones(())
        self._sums += torch.stack([each.double() for each in (squares, n, patches, loss, step)])

    def on_train_batch_end(self, *_: Any) -> None:
        """Let the average follow the weights, and tell how far the epoch is."""
        if self._average is not None:
            self._average.follow()
        now, tell = time.monotonic(), self._course.on_progress
        if tell and self.global_rank == 0 and now - self._told >= self._course.every:
            self._told = now
            tell(self._progress(now - self._begun))

    def _progress(self, seconds: float) -> Record:
        ranks = self.trainer.world_size
        done, every = float(self._sums[2]) * ranks, self.trainer.num_training_batches
        of = float(every * math.ceil(self._course.settings.batch / ranks) * ranks)
        record = {"epoch": float(self.current_epoch + 1), "patches": done, "patches_of": of}
        rest = self._journal.time_to_go(done / of)
        if rest is None:
            rest = seconds * (of * self._course.settings.epochs - done) / done
        return record | {"patches_per_second": done / seconds, "eta_seconds": rest}

    def on_train_epoch_end(self) -> None:
        """Validate, stop where that is due, and keep the state."""
        seconds = time.monotonic() - self._begun
        total = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        squares, n, patches, loss, steps = total.tolist()
        facts = {"loss": loss / steps, "patches_per_second": patches / seconds}
        facts["learning_rate"] = self._rate
        if n:
            facts["train_rmse"] = self.model.scale * math.sqrt(squares / n)
        with self._average.judged() if self._average else nullcontext():
            self.trainer.should_stop = self._note(facts)
        if self._keep:
            self.trainer.save_checkpoint(_STATE)
        self._tell()

    def _note(self, facts: Record) -> bool:
        rank, ranks = self.global_rank, self.trainer.world_size
        batch = math.ceil(self._course.settings.batch / ranks)
        errors = validate(self.model, self._course.ground, batch, rank, ranks)
        if ranks > 1:
            parts: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(parts, errors)
            errors = merge(parts)
        return self._journal.note(self.model, facts, errors)

    def _tell(self) -> None:
        if self.global_rank == 0:
            self._journal.tell()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What Lightning does not know of."""
        checkpoint["journal"] = self._journal.state()
        if self._average is not None:
            checkpoint["average"] = self._average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self._journal.restore(checkpoint["journal"])
        self._taken_up = checkpoint.get("average", {})


def learn(
    model: HeightModel, course: Course, journal: Journal, last: Last | None, machine: Machine
) -> None:
    """Train the model's network; `journal` then has the course and the best weights.

    Args:
        model: fresh, on the CPU.
        course: where, and how.
        journal: empty.
        last: keeps the state at the end of each epoch, and is taken up where it has one.
        machine: what trains.

    Raises:
        InputError: a batch is too small for batch normalisation.
    """
    _refuse_single_value(course.settings, machine.devices)
    with ExitStack() as until, _quiet():
        if last is None and machine.devices > 1:  # what the processes come to is told by it
            folder = until.enter_context(tempfile.TemporaryDirectory())
            last = Last(Store.at(folder), "last.ckpt", "")
        state = last.load() if last else None
        if state and _is_over(state, course.settings):
            journal.restore(state["journal"])
            return
        model.to(memory_format=torch.channels_last)
        trainer = _trainer(course.settings, machine, last)
        learner = _Learner(model, course, journal, keep=last is not None)
        trainer.fit(learner, ckpt_path=_STATE if state else None)
        if machine.devices > 1:
            assert last is not None
            if state := last.load():
                journal.restore(state["journal"])


def _is_over(state: Mapping[str, Any], settings: ModelSettings) -> bool:
    """Whether a training was killed after its last epoch."""
    history, waited = state["journal"]["history"], state["journal"]["waited"]
    ended = len(history) > settings.epochs or "diverged" in history[-1]
    return bool(ended or waited >= settings.patience)


def _refuse_single_value(settings: ModelSettings, devices: int) -> None:
    values = math.ceil(settings.batch / devices) * (settings.patch // STRIDE) ** 2
    if values < 2:
        raise InputError(
            f"batch {settings.batch} of patches of {settings.patch} px leaves batch normalisation "
            "one value: set model.batch to 2 or more, or model.patch to 64 or more"
        )


def _trainer(settings: ModelSettings, machine: Machine, last: Last | None) -> Any:
    several = machine.devices > 1
    return lightning.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        # Spawned, not started anew: the command's own process holds the run's lease.
        strategy="ddp_spawn" if several else "auto",
        sync_batchnorm=several and machine.accelerator == "cuda",
        precision=machine.chosen_precision(),
        max_epochs=settings.epochs,
        reload_dataloaders_every_n_epochs=1,
        plugins=[_LastIO(last)] if last else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what does not concern a user: Lightning's notes, and its use of an old name of torch."""
    levels = {name: logging.getLogger(name).level for name in _NOTES}
    try:
        with warnings.catch_warnings():
            _hush()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _hush() -> None:
    for name in _NOTES:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
