"""The course of a training: what each epoch reached, its best weights, and its state on disk."""

import io
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aeheight.metrics import Stats
from aeheight.models import HeightModel
from aeheight.settings import ModelSettings
from aeheight.store import Store

Record = dict[str, float]
"""What an epoch reached; epoch 0 is the base alone.

`epoch`, `loss` (as the recipe counts it) and `train_rmse` (metres), both while the weights moved;
`validation_rmse` (metres), `validation_r2`, `learning_rate`, `patches_per_second`, `seconds` since
the start; what does not exist is left out. An epoch whose numbers were not finite has `diverged`
instead, and is the last.
"""

STATE_FORMAT: Final = 1

_log = logging.getLogger(__name__)


class Journal:
    """The course of a training: the records, and the weights of the best epoch."""

    def __init__(
        self, settings: ModelSettings, on_epoch: Callable[[Record], None] | None = None
    ) -> None:
        self.history: list[Record] = []
        self.weights: Mapping[str, Tensor] = {}
        self._settings, self._on_epoch = settings, on_epoch
        self._best, self._waited, self._ends = math.inf, 0, False
        self._start = time.monotonic()

    def note(self, model: HeightModel, facts: Record, errors: Stats) -> bool:
        """Note the end of an epoch; returns whether training should stop.

        Args:
            model: with the weights that were judged.
            facts: of the epoch's record.
            errors: on all validation ground.
        """
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
        record["seconds"] = time.monotonic() - self._start
        self.history.append(record)
        self._ends = not finite or self._waited >= self._settings.patience
        return self._ends

    def tell(self) -> None:
        """Tell of the epoch that was noted last, once it is kept."""
        record = self.history[-1]
        if "diverged" in record:
            self._warn()
        if self._on_epoch:
            self._on_epoch(
                record | {"eta_seconds": 0.0 if self._ends else self.time_to_go() or 0.0}
            )

    def _warn(self) -> None:
        _log.warning(
            "training diverged in epoch %d and ends; the weights of the best epoch are kept. "
            "Lower model.learning_rate (%g), or look for wild heights in the reference",
            len(self.history) - 1,
            self._settings.learning_rate,
        )

    def _keep_best(self, model: HeightModel, rmse: float) -> None:
        self._waited += 1
        if rmse < self._best and model.network is not None:
            self._best, self._waited = rmse, 0
            self.weights = _copied(model.network)

    def time_to_go(self, share: float = 0.0) -> float | None:
        """Seconds to the last epoch, judged by those so far; None: there is none to judge by.

        Args:
            share: of the coming epoch that is done.
        """
        done = len(self.history) - 1
        if done <= 0 or self._settings.architecture == "ridge":
            return None
        each = (self.history[-1]["seconds"] - self.history[0]["seconds"]) / done
        return each * (self._settings.epochs - done - share)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "history": self.history,
            "weights": dict(self.weights),
            "best": self._best,
            "waited": self._waited,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another journal ended."""
        self.history, self.weights = list(state["history"]), state["weights"]
        self._best, self._waited = state["best"], state["waited"]
        self._start = time.monotonic() - self.history[-1]["seconds"]


def _copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }


@dataclass(frozen=True, slots=True)
class Last:
    """Where a training leaves its state at the end of each epoch, to be taken up again."""

    store: Store
    name: str
    """Of the object; it is put in place as a whole or not at all."""
    key: str
    """Fingerprint of all that the training depends on: another's state is not taken up."""

    def load(self) -> dict[str, Any] | None:
        """The state; None where there is none of this training."""
        try:
            data = self.store.read(self.name)
        except FileNotFoundError:
            return None
        try:
            state: dict[str, Any] = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True
            )
        except Exception as error:  # damaged bytes fail anywhere, with any error
            _log.warning(
                "%s/%s is damaged (%s): training begins anew",
                self.store.uri, self.name, type(error).__name__,
            )  # fmt: skip
            return None
        if (state.get("key"), state.get("state_format")) != (self.key, STATE_FORMAT):
            _log.warning(
                "%s/%s is of another training (other ground, settings or version): training begins "
                "anew",
                self.store.uri, self.name,
            )  # fmt: skip
            return None
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Put a state in place of the last."""
        buffer = io.BytesIO()
        torch.save({**state, "key": self.key, "state_format": STATE_FORMAT}, buffer)
        self.store.write(self.name, buffer.getvalue())
