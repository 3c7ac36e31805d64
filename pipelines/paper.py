"""The study reproduced: its table beside ours, on any region that has heights.

    python -m pipelines.paper pipelines/regions/norcal.yaml [--split halves] [--quick] [--set ...]

"Inferring Height from Earth Embeddings" (arXiv 2602.17250) trains a U-Net and a U-Net++ on absolute
heights, beside a ridge regression. Here the same networks, and the model that the region file asks
for, go through the steps that every run goes through: train, predict, evaluate. The cube is
ingested once, into the region's own store; each model has a store of its own beside it
(`STORE-paper/SPLIT/MODEL`) that shares the cube. What is done is not done again.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aeheight.cluster import QUIET_THREADS, Connection
from aeheight.cube import open_tree, remove_tree
from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.settings import RegionSettings, load_region
from aeheight.steps import pipeline
from aeheight.steps.run import ASKED, Options, Run
from aeheight.store import Store

PAPER: Final = "arXiv 2602.17250"
PUBLISHED: Final[Mapping[str, Mapping[str, Mapping[str, float]]]] = {
    "mean": {},
    "ridge": {"train": {"r2": 0.64}, "test": {"r2": 0.38, "rmse": 32.2}},
    "unet": {"train": {"r2": 0.97}, "test": {"r2": 0.78, "rmse": 19.3, "median": -7.22}},
    "unetplusplus": {"train": {"r2": 0.97}, "test": {"r2": 0.84, "rmse": 16.4, "median": -2.62}},
}
"""What the study gives of each model; metres."""
METRICS: Final = ("r2", "rmse", "median", "nmad")
SPLITS: Final = ("train", "test")
SIDES: Final = ("west", "east", "north", "south")

_SETTING: Final = (
    "model.encoder=resnet18",
    "model.learning_rate=0.001",
    "model.weight_decay=0.0001",
    "predict.novelty=false",
    "predict.spread=false",
)
"""What all networks of the study have in common; the maps tell heights alone, as its own do."""
_QUICK: Final = ("model.epochs=4", "model.patches_per_epoch=64")
_MODELS: Final[Mapping[str, tuple[str, ...]]] = {
    "unet": ("model.architecture=unet", "model.base=none"),
    "unetplusplus": ("model.architecture=unetplusplus", "model.base=none"),
    "default": (),
}
"""What makes each row what it is, whatever `--set` says; the last is the region file's own."""
_NAMES: Final = {
    "mean": "mean height",
    "prior": "prior DEM",
    "ridge": "ridge",
    "unet": "U-Net",
    "unetplusplus": "U-Net++",
}
_HEADS: Final = {"r2": "R²", "rmse": "RMSE", "median": "median", "nmad": "NMAD"}


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that went through all steps."""

    name: str
    """`unet`, `unetplusplus` or `default`."""
    settings: RegionSettings
    metrics: Mapping[str, Any]
    """The whole of its metrics.json."""
    history: Sequence[Mapping[str, float]]
    """One record an epoch; epoch 0 is what the network starts from."""

    @property
    def label(self) -> str:
        """As a reader knows it."""
        model, base = self.settings.model.architecture, self.facts()["corrects"]
        if self.name != "default":
            return _NAMES[model]
        corrects = {
            "none": "",
            "ridge": ", corrects ridge",
            "kernel": ", corrects the kernel regression",
            "prior": ", corrects the prior",
        }[base]
        return f"region's model ({_NAMES[model]}{corrects if model != 'ridge' else ''})"

    @property
    def best_epoch(self) -> int | None:
        """Of the weights that were kept: the first with the lowest validation RMSE."""
        known = [record for record in self.history if "validation_rmse" in record]
        best = min(known, key=lambda record: record["validation_rmse"], default=None)
        return None if best is None else int(best["epoch"])

    def facts(self) -> dict[str, Any]:
        """What the row can be traced by."""
        made = self.metrics["provenance"]
        return {
            "store": self.settings.store,
            "checkpoint": made["model"]["checkpoint"],
            "corrects": made["model"]["corrects"],
            "settings": self.settings.model.model_dump(mode="json"),
            "epochs": max((int(record["epoch"]) for record in self.history), default=0),
            "best_epoch": self.best_epoch,
            "versions": made["versions"],
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    model: str
    source: str
    """`study` or `here`."""
    figures: Mapping[str, Mapping[str, float | None]]
    """Split -> metric -> value (metres, but for R²); what is not known is left out or None."""

    def cells(self) -> list[str]:
        """As text, in the order of the table's columns."""
        values = [self.figures.get(split, {}).get(name) for split in SPLITS for name in METRICS]
        names = [name for _ in SPLITS for name in METRICS]
        texts = [self._text(value, name) for value, name in zip(values, names, strict=True)]
        return [self.model, self.source, *texts]

    def _text(self, value: float | None, name: str) -> str:
        if value is None:
            return "-"
        if self.source == "study":
            return f"{value:g}"
        digits = 3 if name == "r2" else 2
        return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.00


def rows(trained: Sequence[Trained]) -> Iterator[Row]:
    """The table: each model of the study, its published figures above ours; then what it lacks.

    The mean, the ridge and the prior are those that the first model was judged beside: they depend
    on the ground and the split alone.
    """
    baselines = trained[0].metrics["baselines"]
    ours = {model.name: model.metrics["model"] for model in trained}
    for name, published in PUBLISHED.items():
        found = baselines.get(name) or ours.get(name)
        if found:
            yield Row(_NAMES[name], "study", published)
            yield Row(_NAMES[name], "here", found)
    if "prior" in baselines:
        yield Row(_NAMES["prior"], "here", baselines["prior"])
    for model in trained:
        if model.name == "default":
            yield Row(model.label, "here", ours["default"])


def share_cube(source: Run, target: Run) -> None:
    """Give a run the cube of another: links within a file system, else copies.

    Objects are replaced as a whole, never changed, so that what one run writes does not reach the
    other. The split is left out, which each run draws for itself.
    """
    if _made(source) == _made(target):
        return
    receipts = target.ledger("cube").store
    for made in (receipts, target.ledger("split").store):
        made.remove()  # first: a copy that breaks off is begun anew
    remove_tree(target.cube)
    _copy(source.cube, target.cube, lambda key: "/split/c/" not in key)
    _copy(source.ledger("cube").store, receipts, lambda _: True)


def _made(run: Run) -> tuple[set[str], bytes]:
    """The receipts of a cube, whose names say what it was made from, and what was asked for."""
    ledger = run.ledger("cube").store
    return set(ledger.keys()), ledger.read(ASKED) if ledger.exists(ASKED) else b""


def _copy(source: Store, target: Store, wanted: Callable[[str], bool]) -> None:
    for key in filter(wanted, list(source.keys())):
        if source.is_local and target.is_local:
            _link(Path(source.uri) / key, Path(target.uri) / key)
        else:
            target.write(key, source.read(key))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def half(grid: Grid, side: str) -> list[float]:
    """Bounds of the half of a grid on one side, cut between two pixels."""
    west, south, east, north = grid.bounds
    row, col = (size // 2 * grid.resolution for size in grid.shape)
    return {
        "west": [west, south, west + col, north],
        "east": [west + col, south, east, north],
        "north": [west, north - row, east, north],
        "south": [west, south, east, north - row],
    }[side]


def _split(source: Run, side: str) -> list[str]:
    """The overrides by which one side tests; none for the region file's own split.

    Raises:
        InputError: the region has several grids.
    """
    if side == "region":
        return []
    grids = open_tree(source.cube).template.grids
    if len(grids) > 1:
        raise InputError(
            f"--split {side}: the region has {len(grids)} grids "
            f"({', '.join(grid.name for grid in grids)}), and a half is of one; name the test "
            "ground in `split.test` by a GeoJSON file"
        )
    dealt = source.settings.split.folds is not None
    return [f"split.test={half(grids[0], side)}"] + ["split.folds=null", "split.fold=0"] * dealt


@dataclass(frozen=True, slots=True)
class Study:
    """One region under one split."""

    region: Path
    source: Run
    """The region's own, with the cube."""
    split: str
    """`region`, or the side that tests."""
    overrides: tuple[str, ...]
    """Of the command."""
    quick: bool
    overwrite: bool

    @property
    def store(self) -> Store:
        """Beside the region's."""
        folder = f"{self.split}-quick" if self.quick else self.split
        return Store.at(f"{self.source.settings.store.rstrip('/')}-paper").child(folder)

    def run(self, name: str) -> Run:
        """The run of a model."""
        settings = load_region(
            self.region,
            [
                *(_SETTING if name != "default" else ()),
                *(_QUICK if self.quick else ()),
                *self.overrides,
                *_MODELS[name],
                *_split(self.source, self.split),
                f"store={json.dumps(self.store.child(name).uri)}",
            ],
        )
        return Run(settings, Options(overwrite=self.overwrite), self.source.connection)

    def train(self, name: str) -> Trained | None:
        """One model through all steps; None where shards failed."""
        from aeheight.steps.train import load_checkpoint  # noqa: PLC0415 (loads PyTorch)

        run = self.run(name)
        _say({}, [f"-- {run.settings.name}, {self.split} split: {name}"])
        with run.held():
            share_cube(self.source, run)
        if pipeline.execute(run, ["train", "predict", "evaluate"], _say):
            return None
        metrics, checkpoint = run.report.read_json("metrics.json"), load_checkpoint(run)
        return Trained(name, run.settings, metrics, checkpoint.history)

    def publish(self, trained: Sequence[Trained]) -> str:
        """Write paper.md and paper.json beside the models' stores; returns the page."""
        page = self.page(trained)
        self.store.write("paper.md", page.encode())
        self.store.write("paper.json", json.dumps(self.facts(trained), indent=1).encode())
        return page

    def facts(self, trained: Sequence[Trained]) -> dict[str, Any]:
        """The table and what it can be traced by."""
        return {
            "region": self.source.settings.name,
            "study": PAPER,
            "quick": self.quick,
            "split": {"name": self.split, **trained[0].settings.split.model_dump(mode="json")},
            "rows": [
                {
                    "model": row.model,
                    "source": row.source,
                    **{
                        split: {name: row.figures.get(split, {}).get(name) for name in METRICS}
                        for split in SPLITS
                    },
                }
                for row in rows(trained)
            ],
            "models": {model.name: model.facts() for model in trained},
        }

    def page(self, trained: Sequence[Trained]) -> str:
        """Markdown: the table, and what to know when reading it."""
        heads = [f"{split} {_HEADS[name]}" for split in SPLITS for name in METRICS]
        heads = [head if head.endswith("R²") else f"{head} [m]" for head in heads]
        table = [["model", "", *heads], ["---", "---", *["---:"] * len(heads)]]
        table += [row.cells() for row in rows(trained)]
        lines = [f"| {' | '.join(cells)} |" for cells in table]
        return "\n".join([f"## {self.source.settings.name}", "", *lines, "", *self._notes(trained)])

    def _notes(self, trained: Sequence[Trained]) -> list[str]:
        counts = {split: trained[0].metrics["model"][split]["n"] for split in SPLITS}
        split = trained[0].settings.split
        whose = "the region file's" if self.split == "region" else f"the {self.split}ern half tests"
        tests = f"fold {split.fold} of {split.folds}" if split.folds else split.test
        lines = [
            f"- study: {PAPER}, on other ground (Nouvelle-Aquitaine, 10 m): R² and RMSE compare "
            "within one ground only. A dash: not published.",
            f"- split: {whose}; test {tests}, validation {split.validation}, blocks of "
            f"{split.block} px, buffer {split.buffer} px; {counts['train']} training and "
            f"{counts['test']} test pixels.",
            *_hardness(trained[0].metrics.get("shift", {}).get("test", {})),
            *(f"- {model.label}: {_course(model)}." for model in trained),
        ]
        if self.quick:
            lines.append("- A quick training: the figures say that it runs, not how good it is.")
        if note := self.source.settings.note:
            lines.append(f"- {note}")
        return [*lines, ""]


def _hardness(shift: Mapping[str, float | None]) -> Iterator[str]:
    """How unlike the heights of the test ground are to those of the training ground."""
    moved, overlap = shift.get("wasserstein_m"), shift.get("overlap")
    if moved is not None and overlap is not None:
        yield (
            f"- heights of test ground against those of training ground: {moved:.1f} m apart "
            f"(Wasserstein-1), overlap {overlap:.2f}."
        )


def _course(model: Trained) -> str:
    """How a training went, in words."""
    asked, facts = model.settings.model, model.facts()
    if asked.architecture == "ridge":
        return "solved, not trained"
    return (
        f"{asked.encoder}, corrects {facts['corrects']}, patches of {asked.patch} px, "
        f"batches of {asked.batch}, AdamW {asked.learning_rate:g} / {asked.weight_decay:g}, "
        f"seed {asked.seed}, at most {asked.epochs} epochs; best epoch {facts['best_epoch']} of "
        f"{facts['epochs']}"
    )


def _say(_: Mapping[str, Any], lines: Sequence[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


def _source(region: Path, overrides: Sequence[str], connection: Connection) -> Run:
    """The region's own run.

    Raises:
        InputError: a region file that cannot be read, or without heights.
    """
    run = Run(load_region(region, overrides), Options(), connection)
    if run.settings.height is None:
        raise InputError(
            f"{region}: the region has no `height`, and the study needs reference heights to train "
            "on and to judge by"
        )
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("regions", nargs="+", type=Path, metavar="REGION.yaml", help="region files with heights")
    add(
        "--split",
        default="region",
        choices=["region", "halves", *SIDES],
        help="what tests: what the region file says, one side, or east and west in turn (halves)",
    )
    add(
        "--models",
        nargs="+",
        default=list(_MODELS),
        choices=list(_MODELS),
        metavar="MODEL",
        help=f"the models to train: {', '.join(_MODELS)} (default: all)",
    )
    add("--quick", action="store_true", help="a short training, in stores of its own")
    add(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a setting, such as model.epochs=3; a row keeps what makes it what it is",
    )
    add("--overwrite", action="store_true", help="train all models anew")
    add("--workers", type=int, metavar="N", help="worker processes on this machine")
    add("--scheduler", metavar="ADDRESS", help="a Dask scheduler, such as tcp://host:8786")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; the exit code as of `aeheight`: 0 done, 1 unfinished, 2 bad input."""
    arguments = _parser().parse_args(argv)
    os.environ |= {key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()}
    connection = Connection(arguments.scheduler, arguments.workers)
    try:
        sources = [_source(path, arguments.overrides, connection) for path in arguments.regions]
        for path, source in zip(arguments.regions, sources, strict=True):
            if code := _reproduce(path, source, arguments):
                return code
    except InputError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        told = str(error) or "interrupted"
        print(f"paper: {told}; what is done is kept, run again to go on", file=sys.stderr)
        return 1
    return 0


def _reproduce(path: Path, source: Run, arguments: argparse.Namespace) -> int:
    """All models on one region, under each split that is asked for; the exit code."""
    if code := pipeline.execute(source, ["ingest"], _say):
        return code
    for split in ("east", "west") if arguments.split == "halves" else (arguments.split,):
        study = Study(
            path, source, split, tuple(arguments.overrides), arguments.quick, arguments.overwrite
        )
        trained = []
        for name in arguments.models:
            model = study.train(name)
            if model is None:
                return 1
            trained.append(model)
        print(study.publish(trained), flush=True)
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
