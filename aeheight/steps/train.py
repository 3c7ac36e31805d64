"""Train: patches straight from the cube to one checkpoint."""

import csv
import io
import json
import sys
from collections.abc import Mapping
from typing import Any

from aeheight import __version__, embeddings
from aeheight.cluster import Outcome, clock
from aeheight.errors import InputError, NotYetError
from aeheight.models import Checkpoint, Provenance
from aeheight.patches import CACHE_BYTES, FEWEST, Patches
from aeheight.receipts import Ledger
from aeheight.steps.run import BEST, Plan, Run
from aeheight.steps.split import record_split, split_settings
from aeheight.store import Store

_HISTORY = "history.csv"
_NETWORK_BYTES_PER_PIXEL = 4_300
"""One pixel of one patch while a U-Net++ with ResNet-18 trains in float32: measured 3,800 to 4,250
on batches of 16 patches of 64 to 256 px."""


def plan(run: Run) -> Plan:
    """What training would do, from the cube's metadata alone.

    Raises:
        InputError: there is no cube yet, or the region has no height.
    """
    _need_height(run)
    template, model = run.whole_cube().template, run.settings.model
    done = run.model.exists(BEST) and not run.options.overwrite
    Ledger(run.model).check(_model_settings(run), "train", made=done)
    pixels = sum(grid.shape[0] * grid.shape[1] for grid in template.grids)
    patches = model.patches_per_epoch or max(pixels * len(template.years) // model.patch**2, FEWEST)
    sample = model.patch**2 * (embeddings.BANDS + 9)
    network = 0 if model.architecture == "ridge" else _NETWORK_BYTES_PER_PIXEL
    return Plan(
        "train",
        {
            "architecture": model.architecture,
            "encoder": model.encoder,
            "corrects": run.settings.base,
            "patch_px": model.patch,
            "batch": model.batch,
            "patches_per_epoch_at_most": patches,
            "epochs_at_most": model.epochs,
            "bytes_per_patch": sample,
            "peak_bytes": 1_200_000_000
            + min(CACHE_BYTES, pixels * len(template.years) * (embeddings.BANDS + 9))
            + model.batch * sample
            + model.batch * model.patch**2 * network,
            "done": done,
        },
    )


def _model_settings(run: Run) -> dict[str, Any]:
    return {"model": run.settings.model.model_dump(mode="json"), "base": run.settings.base}


def _need_height(run: Run) -> None:
    if run.settings.height is None:
        raise InputError("training needs a reference: the region has no `height`")


def execute(run: Run) -> Outcome:
    """Train and keep the best checkpoint; does nothing where it is there already.

    Raises:
        InputError: no ground to train on, or changed settings.
    """
    _need_height(run)
    tree, settings = run.whole_cube(), run.settings
    if run.options.overwrite:
        for name in (BEST, _HISTORY, "settings.json"):
            run.model.remove(name)
        run.ledger("split").discard()
    split = record_split(run)
    Ledger(run.model).begin(
        {
            **_model_settings(run),
            "cube": tree.identity,
            "split": split_settings(settings),
        },
        made=run.model.exists(BEST),
    )
    if run.model.exists(BEST):
        return Outcome(0, 1, {}, 0.0, 0)
    # Here, not above: workers that predict need neither Lightning nor its seconds of loading.
    from aeheight.training import fit  # noqa: PLC0415

    assert settings.height is not None
    provenance = Provenance(
        cube=tree.identity,
        split=split,
        surface=settings.height.surface,
        vertical_datum=settings.height.vertical_datum,
        years=tree.template.years,
        embedding_version=embeddings.VERSION,
        code_version=__version__,
        pixel_metres=tree.template.grids[0].pixel_metres()[0],
    )
    model = settings.model
    ground = Patches(tree, model.patch, model.seed, model.patches_per_epoch)
    journal = _Journal(run)
    try:
        checkpoint = fit(ground, model, settings.base, provenance, journal.note)
    except SystemExit as stopped:  # what Lightning makes of an interrupt
        raise KeyboardInterrupt from stopped
    run.model.write(_HISTORY, _csv(checkpoint.history))
    run.model.write(BEST, checkpoint.to_bytes())
    seconds = max((record.get("seconds", 0.0) for record in checkpoint.history), default=0.0)
    return Outcome(1, 0, {}, seconds, 0)


class _Journal:
    """Shows every epoch as it ends."""

    def __init__(self, run: Run) -> None:
        self._as_json = run.options.as_json
        self._epochs = run.settings.model.epochs

    def note(self, record: Mapping[str, Any]) -> None:
        """One epoch."""
        if self._as_json:
            print(json.dumps({"step": "train", **record}), file=sys.stderr, flush=True)  # noqa: T201
            return
        print(_line(record, self._epochs), file=sys.stderr, flush=True)  # noqa: T201


def _line(record: Mapping[str, Any], epochs: int) -> str:
    parts = [f"train     epoch {record['epoch']:>3} of {epochs}"]
    parts += [
        f"{words} {record[key]:{form}}"
        for key, words, form in (
            ("train_rmse", "training RMSE [m]", ".2f"),
            ("validation_rmse", "validation RMSE [m]", ".2f"),
            ("validation_r2", "R²", ".3f"),
            ("patches_per_second", "patches/s", ".0f"),
        )
        if record.get(key) is not None
    ]
    if record["epoch"] == 0:
        parts.append("(what the network starts from)")
    elif "eta_seconds" in record:
        parts.append(f"to go {clock(record['eta_seconds'])}")
    if record.get("diverged"):
        parts.append("diverged: the best epoch before is kept")
    return "   ".join(parts)


def _csv(history: tuple[dict[str, float], ...]) -> bytes:
    text = io.StringIO()
    columns = sorted({key for record in history for key in record}, key=lambda k: (k != "epoch", k))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def load_checkpoint(run: Run) -> Checkpoint:
    """The model that `--checkpoint` names, else the run's own.

    Raises:
        InputError: there is none, or it is damaged.
    """
    named = run.options.checkpoint
    if named is None:
        folder, key = run.model, BEST
    elif named.endswith(".ckpt"):
        folder, key = Store.at(named.rpartition("/")[0] or "."), named.rpartition("/")[2]
    else:
        folder, key = Store.at(named).child("model"), BEST
    try:
        return Checkpoint.from_bytes(folder.read(key))
    except FileNotFoundError as error:
        missing = f"there is no checkpoint at {folder.uri}/{key}"
        if named is None:
            hint = "run aeheight train, or name a model with --checkpoint"
            raise NotYetError(f"{missing}; {hint}") from error
        hint = "--checkpoint takes a .ckpt file, or the store of a run that was trained"
        raise InputError(f"{missing}; {hint}") from error
