"""Train: patches straight from cubes to one checkpoint."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aeheight import __version__, embeddings
from aeheight.cluster import Outcome, clock
from aeheight.cube import Tree
from aeheight.errors import InputError, NotYetError
from aeheight.events import EVENTS, tensorboard, to_csv
from aeheight.journal import Last
from aeheight.models import Checkpoint, Provenance
from aeheight.patches import CACHE_BYTES, FEWEST, PIXEL_BYTES, Patches
from aeheight.receipts import Ledger
from aeheight.settings import fingerprint
from aeheight.steps.also import Other, cube_content, other_cubes
from aeheight.steps.run import BEST, Plan, Run
from aeheight.steps.split import check_split, need_ground, record_split, split_settings
from aeheight.store import Store

_HISTORY = "history.csv"
_LAST = "last.ckpt"
"""The state of a training that is under way."""
_GROUND = "ground.json"
"""What the cubes were made from when the model was trained."""
_NETWORK_BYTES_PER_PIXEL = 4_300
"""One pixel of one patch while a U-Net++ with ResNet-18 trains in float32: measured 3,800 to 4,250
on batches of 16 patches of 64 to 256 px."""
_BATCHES_HELD = 6
"""Batches in memory while one is worked on: read ahead, stacked, and on the device."""


def plan(run: Run) -> Plan:
    """What training would do, from the cube's metadata alone.

    Raises:
        InputError: there is no cube yet, or the region has no height.
    """
    _need_height(run)
    tree, model = run.whole_cube(), run.settings.model
    trees = [tree, *(other.tree for other in other_cubes(run.settings, tree))]
    check_split(run.settings, tree.template.grids, trains=not run.settings.also)
    done = run.model.exists(BEST) and not run.options.overwrite
    begun = not done and run.model.exists(_LAST) and not run.options.overwrite
    Ledger(run.model).check(_model_settings(run), "train", made=done or begun)
    pixels = sum(
        grid.shape[0] * grid.shape[1] * len(each.template.years)
        for each in trees
        for grid in each.template.grids
    )
    patches = model.patches_per_epoch or max(pixels // model.patch**2, FEWEST)
    sample = model.patch**2 * PIXEL_BYTES
    network = 0 if model.architecture == "ridge" else _NETWORK_BYTES_PER_PIXEL
    return Plan(
        "train",
        {
            "architecture": model.architecture,
            "encoder": model.encoder,
            "corrects": run.settings.base,
            **({"also": list(run.settings.also)} if run.settings.also else {}),
            "patch_px": model.patch,
            "batch": model.batch,
            "patches_per_epoch_at_most": patches,
            "epochs_at_most": model.epochs,
            "bytes_per_patch": sample,
            "peak_bytes": 1_200_000_000
            + min(CACHE_BYTES, pixels * PIXEL_BYTES)
            + _BATCHES_HELD * model.batch * sample
            + model.batch * model.patch**2 * network,
            **({"takes_up_a_training": True} if begun else {}),
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

    A training that was stopped is taken up after its last whole epoch.

    Raises:
        InputError: no ground to train on, or changed settings.
    """
    _need_height(run)
    tree, others = run.whole_cube(), other_cubes(run.settings, run.open_cube())
    if run.options.overwrite:
        for name in (BEST, _LAST, _HISTORY, EVENTS, _GROUND, "settings.json"):
            run.model.remove(name)
        run.ledger("split").discard()
    split = record_split(run)
    asked = _asked(run, tree, others)
    done = run.model.exists(BEST)
    Ledger(run.model).begin(asked, made=done or run.model.exists(_LAST))
    ground = {
        "cube": cube_content(run.ledger("cube")),
        **{other.tree.identity: other.content for other in others},
    }
    if done:
        run.model.remove(_LAST)  # where the last run was stopped just before it did so
        _tell_of_change(run, ground)
        return Outcome(0, 1, {}, 0.0, 0)
    need_ground(run)
    checkpoint = _trained(run, tree, others, split, asked | {"ground": ground})
    run.model.write(_GROUND, json.dumps(ground).encode())
    run.model.write(BEST, checkpoint.to_bytes())
    run.model.remove(_LAST)
    seconds = max((record.get("seconds", 0.0) for record in checkpoint.history), default=0.0)
    return Outcome(1, 0, {}, seconds, 0)


def _asked(run: Run, tree: Tree, others: Sequence[Other]) -> dict[str, Any]:
    """All that a model depends on, besides what the cubes hold."""
    asked = _model_settings(run) | {
        "cube": tree.identity,
        "split": split_settings(run.settings),
    }
    also = [[other.tree.identity, other.split] for other in others]
    return asked | ({"also": also} if also else {})


def _tell_of_change(run: Run, ground: Mapping[str, str]) -> None:
    """A cube that was given tiles or years keeps its model, but not unsaid."""
    if run.model.exists(_GROUND) and run.model.read_json(_GROUND) != ground:
        _say(
            run.options.as_json,
            {"step": "train", "note": "the cube has changed since"},
            "train     the cube has been given other tiles, years or heights since the model was "
            "trained; it is kept. aeheight train --overwrite trains it anew",
        )


def _trained(
    run: Run, tree: Tree, others: Sequence[Other], split: str, asked: Mapping[str, Any]
) -> Checkpoint:
    # Here, not above: workers that predict need neither Lightning nor its seconds of loading.
    from aeheight.training import Machine, fit  # noqa: PLC0415

    settings, model = run.settings, run.settings.model
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
        also=tuple(other.further for other in others) or None,
    )
    ground = Patches(
        tree,
        model.patch,
        model.seed,
        model.patches_per_epoch,
        block=settings.split.block,
        also=[other.tree for other in others],
    )
    machine = Machine()
    key = fingerprint({**asked, "version": __version__, "machine": machine.facts()})
    last = Last(run.model, _LAST, key)
    journal = _Journal(run.model, model.epochs, last, as_json=run.options.as_json)
    _tell_of_ground(run, others)
    try:
        checkpoint = fit(
            ground,
            model,
            settings.base,
            provenance,
            journal.note,
            on_progress=journal.progress,
            last=last,
            machine=machine,
        )
    except SystemExit as stopped:  # what Lightning makes of an interrupt
        raise KeyboardInterrupt from stopped
    journal.close(checkpoint.history)
    _tell_of_trust(run, checkpoint)
    return checkpoint


def _tell_of_ground(run: Run, others: Sequence[Other]) -> None:
    """What goes into the training besides the region's own cube, and what was done before."""
    if others:
        also = [str(store) for store in run.settings.also]
        _say(
            run.options.as_json,
            {"step": "train", "also": also},
            f"train     with the ground of {', '.join(also)} too",
        )
    if run.model.exists(_LAST):
        _say(
            run.options.as_json,
            {"step": "train", "note": "goes on"},
            "train     was interrupted before: it goes on at the end of its last epoch",
        )


def _tell_of_trust(run: Run, checkpoint: Checkpoint) -> None:
    """How much of the network will be in the map."""
    if not checkpoint.weights or checkpoint.base == "none":
        return
    trust = checkpoint.trust
    proven = (
        f"{trust.relief:.0%} of the detail and {trust.level:.0%} of the level that the network adds"
        if checkpoint.corrects
        else "nothing of what the network adds: the map will be its base alone"
    )
    _say(
        run.options.as_json,
        {"step": "train", "trust": trust.to_dict()},
        f"train     held-out ground proves {proven}",
    )


@dataclass(slots=True)
class _Journal:
    """Shows every epoch as it ends, and keeps the logs."""

    model: Store
    epochs: int
    last: Last
    as_json: bool
    started: float = field(default_factory=time.time)
    records: list[Mapping[str, float]] = field(default_factory=list)

    def note(self, record: Mapping[str, Any]) -> None:
        """One epoch."""
        _say(self.as_json, {"step": "train", **record}, _line(record, self.epochs))
        if record["epoch"] and not self.records:
            self._recall(record)
        self.records.append({key: value for key, value in record.items() if key != "eta_seconds"})
        self._keep()

    def _recall(self, record: Mapping[str, Any]) -> None:
        """The epochs before a training was taken up, also one that ended but was not told of."""
        self.started = time.time() - record["seconds"]
        state = self.last.load()  # the state is kept before an epoch is told
        known = state["journal"]["history"] if state else []
        self.records = [row for row in known if row["epoch"] < record["epoch"]]

    def close(self, history: Sequence[Mapping[str, float]]) -> None:
        """All epochs: the last may have ended just before a training was killed."""
        if not self.records:
            self.started = time.time() - history[-1]["seconds"]
        self.records = list(history)
        self._keep()

    def _keep(self) -> None:
        self.model.write(_HISTORY, to_csv(self.records))
        self.model.write(EVENTS, tensorboard(self.records, self.started))

    def progress(self, record: Mapping[str, Any]) -> None:
        """Within an epoch."""
        line = (
            f"train     epoch {record['epoch']:>3.0f} of {self.epochs}   "
            f"{record['patches']:,.0f} of {record['patches_of']:,.0f} patches   "
            f"patches/s {record['patches_per_second']:.0f}   to go {clock(record['eta_seconds'])}"
        )
        _say(self.as_json, {"step": "train", **record}, line)


def _say(as_json: bool, facts: Mapping[str, Any], line: str) -> None:
    print(json.dumps(facts) if as_json else line, file=sys.stderr, flush=True)  # noqa: T201


def _line(record: Mapping[str, Any], epochs: int) -> str:
    parts = [f"train     epoch {record['epoch']:>3} of {epochs}"]
    parts += [
        f"{words} {record[key]:{form}}"
        for key, words, form in (
            ("loss", "loss", ".4g"),
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


def load_checkpoint(run: Run) -> Checkpoint:
    """The model that `--checkpoint` names, else the run's own.

    Raises:
        InputError: there is none, it is damaged, or the run's own is of a cube that is gone.
    """
    named = run.options.checkpoint
    if named is None:
        folder, key = run.model, BEST
        _refuse_other_cube(run)
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


def _refuse_other_cube(run: Run) -> None:
    trained = (Ledger(run.model).settings() or {}).get("cube")
    if trained is None or not run.model.exists(BEST):
        return
    if (here := run.open_cube().identity) != trained:
        raise InputError(
            f"the cube has been made anew since the model of this run was trained (on {trained}, "
            f"and {here} lies there now): run aeheight train --overwrite, or name the model with "
            "--checkpoint to use it as it is"
        )
