"""The steps in order: run, plan, status, verify."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from aeheight.cluster import Outcome, Progress, Task, run_shards
from aeheight.cube import Tree, find, open_tree
from aeheight.errors import InputError, NotYetError
from aeheight.receipts import Ledger, Receipt, inspect
from aeheight.steps.run import BEST, Plan, Run
from aeheight.store import Store
from aeheight.template import Shard, Template

Say = Callable[[dict[str, Any], list[str]], None]
"""Takes the facts for machines and the lines for people."""

STEPS = ("ingest", "train", "predict", "evaluate")


def _step(name: str) -> ModuleType:
    """A step's module, loaded when it is needed: `status` and `verify` need no PyTorch."""
    return import_module(f"aeheight.steps.{name}")


def steps_of(run: Run, verb: str) -> list[str]:
    """The steps that a verb stands for.

    Raises:
        InputError: a run that would find itself without a model after it has ingested.
    """
    if verb != "run":
        return [verb]
    if run.options.checkpoint is None:
        if run.settings.height is None:
            raise InputError(
                "the region has no `height` to train a model on; name a reference height model, "
                "or a model trained elsewhere with --checkpoint"
            )
        return list(STEPS)
    _step("train").load_checkpoint(run)
    return ["ingest", "predict"] + ["evaluate"] * (run.settings.height is not None)


def _check(run: Run, steps: Sequence[str]) -> None:
    """Meet what is wrong with later steps before the first begins.

    Raises:
        InputError: an unknown encoder, a split's file, or windows that do not fit the network.
    """
    predict = run.settings.predict
    if "train" in steps:
        import_module("aeheight.models").build(run.settings.model)
        _step("split").split_settings(run.settings)
        if "predict" in steps and run.settings.model.architecture != "ridge":
            _step("cover").check_windows(predict)
    elif "predict" in steps and run.options.checkpoint is not None:
        checkpoint = _step("train").load_checkpoint(run)
        if checkpoint.weights:
            halo = _step("cover").halo_of(checkpoint) if predict.halo is None else predict.halo
            _step("cover").check_windows(predict.model_copy(update={"halo": halo}))


def show_plans(run: Run, steps: Sequence[str], say: Say) -> int:
    """Print the plan of every step, as far as what it needs is there."""
    _check(run, steps)
    with run.connection:
        for number, step in enumerate(steps):
            try:
                plan = _step(step).plan(run)
            except NotYetError as error:
                if number == 0:
                    raise
                say({"step": step, "waits": str(error)}, [step, f"  not yet: {error}"])
                continue
            say({"step": step, **plan.facts}, plan.lines())
    return 0


def execute(run: Run, steps: Sequence[str], say: Say) -> int:
    """Do the steps in order; stops at the first with failed shards.

    Returns:
        The exit code: 0 done, 1 failed shards.
    """
    with run.held(), run.connection:
        _check(run, steps)
        if "predict" in steps and run.settings.predict.device == "gpu":
            run.connection.client("gpu")  # before hours of ingest and training
        for step in steps:
            outcome: Outcome = _step(step).execute(run)
            say(_counted(step, outcome), _told(step, outcome))
            if outcome.failed:
                return 1
    if "export" in steps:
        small = run.settings.export.area is not None
        catalogue = f"{run.store.uri}/export/{'area' if small else 'collection.json'}"
        say({"export": catalogue}, [f"files     {catalogue}"])
    if "evaluate" in steps:
        page = f"{run.report.uri}/index.html"
        lines = [*_headline(run.report.read_json("metrics.json")), f"report    {page}"]
        say({"report": page}, lines)
    return 0


def _counted(step: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "step": step,
        "done": outcome.done,
        "skipped": outcome.skipped,
        "failed": outcome.failed,
        "seconds": round(outcome.seconds, 2),
    }


def calibrate(run: Run, points: str, say: Say, *, plan: bool) -> int:
    """Correct a finished map by the heights of points, or print what that would do.

    Returns:
        The exit code: 0 done, 1 failed shards.
    """
    step = _step("calibrate")
    if plan:
        found = step.plan(run, points)
        say({"step": "calibrate", **found.facts}, found.lines())
        return 0
    with run.held(), run.connection:
        outcome, result = step.execute(run, points)
    facts = step.summary(result)
    told = Plan("calibrate", facts).lines()[1:]
    lines = [*_told("calibrate", outcome), *told, f"map       {run.store.uri}/{step.TREE}"]
    say(_counted("calibrate", outcome) | result["trial"], lines)
    return int(bool(outcome.failed))


def _headline(metrics: Mapping[str, Any]) -> list[str]:
    """The model and the baselines on the split that the page judges by."""
    split = import_module("aeheight.rows").judged_split(metrics["model"])
    rows = {"model": metrics["model"], **metrics["baselines"]}
    return [
        f"{split if name == 'model' else '':9} {name:6} RMSE {row['rmse']:8.2f} m   "
        f"LE90 {row['le90']:8.2f} m" + ("" if row["r2"] is None else f"   R² {row['r2']:6.3f}")
        for name, table in rows.items()
        if (row := table[split])["n"]
    ]


def _told(step: str, outcome: Outcome) -> list[str]:
    if step == "train":
        return [f"{step:9} {'trained' if outcome.done else 'done before'}"]
    lines = [
        f"{step:9} {outcome.done} shards done in {outcome.seconds:.1f} s, "
        f"{outcome.skipped} done before, {len(outcome.failed)} failed"
    ]
    lines += _grouped(outcome.failed)
    if outcome.failed:
        lines.append("run the same command again to take up just the failed shards")
    return lines


_NAMED = 5
"""Shards of one reason that are named; `--json` names all."""


def _grouped(failed: Mapping[str, str]) -> list[str]:
    """The failed shards, by what went wrong."""
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(failed.items()):
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"  failed  {reason}")
        lines.append(f"          {len(names)} shards: {', '.join(names[:_NAMED])}{more}")
    return lines


_LEDGERS = {"ingest": "cube", "predict": "heights", "calibrate": "calibrated"}
"""The receipts of a step, where they are called otherwise."""


def _ledgers(run: Run) -> list[tuple[str, Tree, Ledger, list[str]]]:
    """Label, tree, receipts and layers of all that shards are written to so far."""
    found = []
    for label, store, names in (
        ("ingest", run.cube, ("embedding", "height", "prior")),
        ("split", run.cube, ("split",)),
        ("predict", run.heights, ("height",)),
        ("calibrate", run.store.child("calibrated.zarr"), ("height",)),
    ):
        if find(store) is None:
            continue
        tree = open_tree(store)
        layers = [layer.name for layer in tree.template.layers if layer.name in names]
        ledger = _LEDGERS.get(label, label)
        found.append((label, tree, run.ledger(ledger), layers))
    return found


def status(run: Run, say: Say) -> int:
    """What is done and what is left of every step, from receipts alone."""
    rows: list[tuple[str, int, int]] = []
    for label, tree, ledger, layers in _ledgers(run):
        if layers:
            rows.append((label, *_progress(tree.template, ledger, layers)))
    cube, heights = (find(store) or {} for store in (run.cube, run.heights))
    trained = _made(run.model.exists(BEST), Ledger(run.model), "cube", cube)
    reported = _made(run.report.exists("metrics.json"), run.ledger("report"), "heights", heights)
    if not _made(True, run.ledger("heights"), "cube", cube):  # a map of an older cube
        reported = 0
        rows = [(label, 0 if label == "predict" else done, total) for label, done, total in rows]
    rows += [("train", trained, 1), ("evaluate", reported, 1)]
    order = [*STEPS]
    order.insert(1, "split")
    if run.settings.height is None:
        order = ["ingest", "predict"]
    known = {label: (done, total) for label, done, total in rows}
    if "calibrate" in known:  # a step that few runs have
        order.append("calibrate")
        if not _made(True, run.ledger("calibrated"), "heights", heights):
            known["calibrate"] = (0, known["calibrate"][1])
    if exported := _exported(run):
        order.append("export")
        known["export"] = exported
    facts = {
        step: {"done": known[step][0], "total": known[step][1]} if step in known else None
        for step in order
    }
    say(
        {"region": run.settings.name, "store": run.store.uri, "steps": facts},
        [f"{run.settings.name} at {run.store.uri}"]
        + [_status_line(s, known.get(s)) for s in order],
    )
    return 0


def _exported(run: Run) -> tuple[int, int] | None:
    """Tiles that are done, and all; None where nothing was exported."""
    if run.ledger("export").settings() is None:
        return None
    found: tuple[int, int] | None = _step("export").progress(run)
    return found


def _made(there: bool, ledger: Ledger, source: str, found: Mapping[str, Any]) -> int:
    """1 for a result that is there and was made from the cube or map that is there now."""
    recorded = (ledger.settings() or {}).get(source)
    return int(there and recorded == found.get("identity"))


def _progress(template: Template, ledger: Ledger, layers: list[str]) -> tuple[int, int]:
    shards = [shard for layer in layers for shard in template.shards(layer)]
    return len(shards) - len(ledger.pending(shards)), len(shards)


def _status_line(step: str, counts: tuple[int, int] | None) -> str:
    if counts is None:
        return f"  {step:9} not begun"
    done, total = counts
    unit = {"train": "model", "evaluate": "report", "export": "tiles"}.get(step, "shards")
    state = "done" if done == total else f"{total - done} left"
    return f"  {step:9} {done} of {total} {unit}, {state}"


def verify(run: Run, say: Say, *, repair: bool) -> int:
    """Compare every finished shard with its receipt; with `repair`, make the damaged ones again.

    Returns:
        The exit code: 0 all sound (or mended), 1 damage.

    Raises:
        InputError: there is nothing to verify.
    """
    ledgers = _ledgers(run)
    if not ledgers:
        raise InputError(f"there is nothing to verify at {run.store.uri}; run aeheight ingest")
    damaged: dict[str, set[str]] = {}
    with run.connection:
        for label, ledger, task in _checks(run, ledgers):
            checked, damages = _inspect(run, label, ledger, task)
            say(
                {"step": label, "checked": checked, "damaged": sorted(damages)},
                [f"{label:9} {checked} shards checked, {len(damages)} damaged"]
                + [f"  damaged {name}: {reason}" for name, reason in sorted(damages.items())],
            )
            if damages:
                damaged[label] = set(damages)
    if not damaged:
        return 0
    if not repair:
        say(
            {"damaged": sum(map(len, damaged.values()))},
            ["run again with --repair to make just these shards again"],
        )
        return 1
    return _repair(run, damaged, [(label, ledger) for label, _, ledger, _ in ledgers], say)


def _repair(
    run: Run, damaged: Mapping[str, set[str]], ledgers: Sequence[tuple[str, Ledger]], say: Say
) -> int:
    """Make damaged shards again, as they were made; each step on what the one before has mended."""
    if "predict" in damaged:  # with the very model and windows that the map was made with
        run = _as_made(run)
    with run.held():
        for label, ledger in ledgers:
            ledger.forget(damaged.get(label, set()))
        for label in damaged.keys() & {"export", "area"}:
            _step("export").forget(run, sorted(damaged[label]), label)
        if "split" in damaged:
            _step("split").record_split(run)
    code = execute(run, [step for step in STEPS if step in damaged], say)
    if not code and "calibrate" in damaged:
        code = _repair_calibrated(run, say)
    if not code and "export" in damaged:
        code = execute(_step("export").as_made(run), ["export"], say)
    if not code and "area" in damaged:
        code = _repair_area(run, damaged["area"], say)
    return code


def _repair_area(run: Run, damaged: set[str], say: Say) -> int:
    """Make the files of an area again, as far as it is the one that the region file names."""
    code = 0 if run.settings.export.area is None else execute(run, ["export"], say)
    if left := sorted(damaged - run.ledger("area").done().keys()):
        lines = [f"area      removed {name}" for name in left]
        say({"removed": left}, [*lines, "run aeheight export with its export.area again"])
        return 1
    return code


def _repair_calibrated(run: Run, say: Say) -> int:
    with run.held(), run.connection:
        outcome = _step("calibrate").repair(run)
    say(_counted("calibrate", outcome), _told("calibrate", outcome))
    return int(bool(outcome.failed))


def _as_made(run: Run) -> Run:
    """The run with the model and the settings that its map was made with."""
    ledger = run.ledger("heights")
    options = replace(run.options, checkpoint=f"{ledger.store.uri}/{_step('predict').MODEL}")
    predict = run.settings.predict.model_validate((ledger.settings() or {})["predict"])
    return replace(
        run, options=options, settings=run.settings.model_copy(update={"predict": predict})
    )


@dataclass(frozen=True, slots=True)
class Inspect:
    """Compares one shard with its receipt; travels to workers as these few words."""

    tree: str
    ledger: str
    key: str

    def __call__(self, shard: Shard) -> Receipt:
        """Read it again."""
        return inspect(open_tree(Store(self.tree)), Ledger(Store(self.ledger), self.key), shard)


def _checks(
    run: Run, ledgers: Sequence[tuple[str, Tree, Ledger, list[str]]]
) -> Iterator[tuple[str, Ledger, Task]]:
    """Label, receipts and the task that reads a shard again, of all that was made."""
    for label, tree, ledger, _ in ledgers:
        current = ledger.current()
        yield label, current, Inspect(tree.store.uri, current.store.uri, current.key)
    yield from _step("export").checks(run)


def _inspect(run: Run, label: str, ledger: Ledger, task: Task) -> tuple[int, dict[str, str]]:
    """How many shards were read again, and the reasons of those that are damaged."""
    shards = ledger.finished()
    if not shards:
        return 0, {}
    progress = Progress(label, len(shards), as_json=run.options.as_json)
    return len(shards), run_shards(run.connection.client(), task, shards, progress).failed
