"""Every block tests once, or every region: how a model does on ground that it has not seen.

    python -m pipelines.folds REGION.yaml [--folds 5] [--set KEY=VALUE ...]
    python -m pipelines.folds --leave-one-out A.yaml B.yaml C.yaml

The blocks of a region are dealt to folds; for each fold a model is trained on the others, predicts
and is judged. With `--leave-one-out` each region in turn is judged by a model that was trained on
all the others. A cube is ingested once, into the region's own store; each fold has a store of its
own beside it (`STORE-folds/5/0`) that shares the cube. What is done is not done again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from aeheight.cluster import QUIET_THREADS, Connection
from aeheight.errors import InputError
from aeheight.settings import SplitSettings, load_region
from aeheight.shift import Heights, shift
from aeheight.steps import pipeline
from aeheight.steps.also import other_cubes
from aeheight.steps.run import Options, Run
from aeheight.steps.split import record_split
from aeheight.store import Store
from pipelines.paper import share_cube

PREDICTORS: Final = ("model", "ridge", "mean", "prior")
STEPS: Final = ("train", "predict", "evaluate")
NOWHERE: Final = Heights.of(np.empty(0))
"""No pixels."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One fold, or one region left out: a model judged on ground that it has not seen."""

    name: str
    store: str
    test: Mapping[str, Mapping[str, Any]]
    """Predictor -> its metrics on the test ground, as in metrics.json."""
    shift: Mapping[str, Any]
    """The test ground's row of `shift` in metrics.json."""
    correlation: Mapping[str, Any]
    """As in metrics.json."""

    @classmethod
    def of(cls, name: str, run: Run, shifted: Mapping[str, Any] | None = None) -> "Trial":
        """What a finished run says."""
        metrics = run.report.read_json("metrics.json")
        tables = {"model": metrics["model"], **metrics["baselines"]}
        return cls(
            name,
            run.store.uri,
            {key: tables[key]["test"] for key in PREDICTORS if key in tables},
            shifted or metrics["shift"]["test"],
            metrics["correlation"],
        )

    @property
    def n(self) -> int:
        """Test pixels with a reference and a prediction."""
        return int(self.test["model"]["n"])

    def gain(self, rival: str) -> float | None:
        """By which share the model's RMSE is below a rival's; below 0 it is worse."""
        own, other = self.test["model"]["rmse"], self.test[rival]["rmse"]
        return 1 - own / other if own is not None and other else None

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "name": self.name,
            "store": self.store,
            "test": self.test,
            "shift": self.shift,
            "correlation_px": self.correlation["length_px"],
            "buffer_px": self.correlation["buffer_px"],
        }


def page(title: str, trials: Sequence[Trial]) -> str:
    """Markdown: one row a trial, and which is the worst."""
    rivals = [name for name in PREDICTORS if name in trials[0].test]
    heads = ["tested on", "n", "shift [m]", "overlap", "errors go together [px]"]
    heads += [f"{name} {metric}" for name in rivals for metric in ("RMSE [m]", "R²")]
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    rows += [list(_cells(trial, rivals)) for trial in trials]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"## {title}", "", *lines, "", *_worst(trials), ""])


def _cells(trial: Trial, predictors: Sequence[str]) -> Iterator[str]:
    yield trial.name
    yield str(trial.n)
    yield _text(trial.shift["wasserstein_m"], ".1f")
    yield _text(trial.shift["overlap"], ".2f")
    yield _text(trial.correlation["length_px"], ".1f")
    for name in predictors:
        yield _text(trial.test[name]["rmse"], ".2f")
        yield _text(trial.test[name]["r2"], ".3f")


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _worst(trials: Sequence[Trial]) -> Iterator[str]:
    """The trial with the largest RMSE; against ridge and prior, the one with the least gain."""
    judged = [trial for trial in trials if trial.n]
    if not judged:
        yield "- No trial has a test pixel with a reference and a prediction."
        return
    worst = max(judged, key=lambda trial: trial.test["model"]["rmse"])
    yield f"- Worst: {worst.name}, RMSE {worst.test['model']['rmse']:.2f} m."
    for rival in ("ridge", "prior"):
        gains = [
            (g, t.name) for t in judged if rival in t.test and (g := t.gain(rival)) is not None
        ]
        if gains:
            least, name = min(gains)
            better = sum(gain >= 0 for gain, _ in gains)
            mean = sum(gain for gain, _ in gains) / len(gains)
            yield (
                f"- Against {rival}: no worse on {better} of {len(gains)}; RMSE {100 * mean:.1f} % "
                f"lower on average, {100 * least:.1f} % at the least ({name})."
            )


@dataclass(frozen=True, slots=True)
class Region:
    """A region file, with what the command adds."""

    path: Path
    overrides: tuple[str, ...]
    connection: Connection

    @property
    def source(self) -> Run:
        """The region's own run, with the cube."""
        return Run(load_region(self.path, self.overrides), Options(), self.connection)

    @property
    def beside(self) -> Store:
        """Where the stores of its trials lie."""
        return Store.at(f"{self.source.settings.store.rstrip('/')}-folds")

    def trial(self, place: str, also: Sequence[str] = (), **tests: float) -> Run:
        """A run in a store of its own, with the region's cube in it.

        Args:
            place: of the store.
            also: stores of other runs to train on too.
            **tests: what tests, in place of what the region file says: `test`, or folds and fold.
        """
        asked = self.source.settings
        kept = asked.split.model_dump(exclude={"test", "folds", "fold"})
        changed = {
            "split": SplitSettings.model_validate(kept | tests),
            "store": self.beside.child(place).uri,
            "also": tuple(also),
        }
        run = Run(asked.model_copy(update=changed), Options(), self.connection)
        with run.held():
            share_cube(self.source, run)
        return run

    def ingest(self) -> bool:
        """Whether the cube is whole; made where it is not there yet.

        Raises:
            InputError: a region file that cannot be read, or without heights.
        """
        if self.source.settings.height is None:
            raise InputError(f"{self.path}: the region has no `height` to train on and judge by")
        return pipeline.execute(self.source, ["ingest"], _say) == 0


def folds(region: Region, number: int) -> list[Trial] | None:
    """One trial a fold; None where shards failed."""
    trials = []
    for fold in range(number):
        run = region.trial(f"{number}/{fold}", folds=number, fold=fold)
        _say({}, [f"-- {run.settings.name}: fold {fold} of {number} tests"])
        if pipeline.execute(run, STEPS, _say):
            return None
        trials.append(Trial.of(f"fold {fold}", run))
    return trials


def leave_one_out(regions: Sequence[Region]) -> list[Trial] | None:
    """One trial a region: judged there, trained on all others; None where shards failed.

    Raises:
        InputError: two of them share ground, or cannot be trained on together; before any is.
    """
    grounds = [region.trial("left-out/ground", test=0.0) for region in regions]
    for ground in grounds:
        with ground.held():
            record_split(ground)
    runs = []
    for k, region in enumerate(regions):
        also = [ground.store.uri for n, ground in enumerate(grounds) if n != k]
        runs.append(region.trial("left-out/tested", also, test=1.0))
        other_cubes(runs[k].settings, runs[k].open_cube())
    heights = [_heights(ground) for ground in grounds]
    trials = []
    for k, (region, run) in enumerate(zip(regions, runs, strict=True)):
        _say({}, [f"-- {region.path.stem} is left out"])
        if pipeline.execute(run, STEPS, _say):
            return None
        trained = sum(heights[:k] + heights[k + 1 :], start=NOWHERE)
        trials.append(Trial.of(region.path.stem, run, _from(trained, heights[k])))
    return trials


def _heights(run: Run) -> Heights:
    """The reference heights of a whole region."""
    tree = run.open_cube()
    shards = tree.template.shards("height")
    parts = (Heights.of(tree.read(s.group, "height", None, s.region)) for s in shards)
    return sum(parts, start=NOWHERE)


def _from(trained: Heights, tested: Heights) -> Mapping[str, Any]:
    return shift({"test": tested}, trained)["test"]


def _say(_: Mapping[str, Any], lines: Sequence[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.folds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("regions", nargs="+", type=Path, metavar="REGION.yaml", help="region files with heights")
    add("--folds", type=_several, default=5, metavar="K", help="parts that the blocks are dealt to")
    add("--leave-one-out", action="store_true", help="leave out a whole region at a time")
    add(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a setting of every region, such as model.epochs=3",
    )
    add("--workers", type=int, metavar="N", help="worker processes on this machine")
    add("--scheduler", metavar="ADDRESS", help="a Dask scheduler, such as tcp://host:8786")
    return parser


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all trials and print the table; the exit code as of `aeheight`."""
    arguments = _parser().parse_args(argv)
    os.environ |= {key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()}
    connection = Connection(arguments.scheduler, arguments.workers)
    try:
        regions = [
            Region(path, tuple(arguments.overrides), connection) for path in arguments.regions
        ]
        return _carry_out(regions, arguments)
    except InputError as error:
        print(f"folds: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        told = str(error) or "interrupted"
        print(f"folds: {told}; what is done is kept, run again to go on", file=sys.stderr)
        return 1


def _carry_out(regions: Sequence[Region], arguments: argparse.Namespace) -> int:
    if arguments.leave_one_out:
        _need_stores(regions)
    if not all(region.ingest() for region in regions):
        return 1
    if arguments.leave_one_out:
        return _publish(regions[0].beside.child("left-out"), "One region left out",
                        leave_one_out(regions))  # fmt: skip
    for region in regions:
        title = f"{region.source.settings.name}: {arguments.folds} folds"
        store = region.beside.child(str(arguments.folds))
        if code := _publish(store, title, folds(region, arguments.folds)):
            return code
    return 0


def _need_stores(regions: Sequence[Region]) -> None:
    if len({region.source.store.uri for region in regions}) < max(len(regions), 2):
        raise InputError(
            "--leave-one-out needs two regions or more, each with a store of its own; "
            f"given: {', '.join(str(region.path) for region in regions)}"
        )


def _publish(store: Store, title: str, trials: Sequence[Trial] | None) -> int:
    """Print the table, and leave it as folds.md and folds.json; the exit code."""
    if trials is None:
        return 1
    text = page(title, trials)
    store.write("folds.md", text.encode())
    facts = {"title": title, "trials": [trial.facts() for trial in trials]}
    store.write("folds.json", json.dumps(facts, indent=1).encode())
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
