"""What every step shares: the run's places, the options of a command, and the one sentence.

For every pending shard: read what it needs, compute, write the whole shard, leave a receipt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aeheight.cluster import Connection, Outcome, Progress, Task, clock, run_shards
from aeheight.cube import Tree, find, open_tree
from aeheight.errors import InputError, NotYetError
from aeheight.receipts import Ledger, lease
from aeheight.settings import Device, RegionSettings, differences
from aeheight.store import Store
from aeheight.template import Shard, Template
from aeheight.windows import Region, whole

BEST = "best.ckpt"
"""The trained checkpoint, under `model`."""

ASKED = "asked.json"
"""Which sources the region file named when the cube was made, beside the cube's receipts."""


_MAKERS = {"heights": "predict", "calibrated": "calibrate"}
"""The verb that makes each map."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to a region file; none of it changes a result."""

    overwrite: bool = False
    """Discard the step's receipts and outputs first."""
    checkpoint: str | None = None
    """A model trained elsewhere: a file, or another run's store."""
    as_json: bool = False
    """Progress as JSON lines."""


@dataclass(frozen=True, slots=True)
class Run:
    """One region file and where its results lie."""

    settings: RegionSettings
    options: Options = field(default_factory=Options)
    connection: Connection = field(default_factory=Connection)
    """Where tasks run; shared by all steps."""

    @property
    def store(self) -> Store:
        """Where everything of the run lies."""
        return Store.at(self.settings.store)

    @property
    def cube(self) -> Store:
        """Embeddings, heights, prior and split."""
        return self.store.child("cube.zarr")

    @property
    def heights(self) -> Store:
        """Predicted heights."""
        return self.store.child("heights.zarr")

    @property
    def model(self) -> Store:
        """The trained checkpoint and its history."""
        return self.store.child("model")

    @property
    def report(self) -> Store:
        """Metrics and the page."""
        return self.store.child("report")

    def ledger(self, name: str) -> Ledger:
        """The receipts of `cube`, `split`, `heights` or `report`."""
        return Ledger(self.store.child(f"{name}.receipts"))

    def left(self, name: str, shards: Sequence[Shard]) -> int:
        """How many shards a plan has before it: all of them where they are to be overwritten."""
        return len(shards if self.options.overwrite else self.ledger(name).pending(shards))

    def open_cube(self) -> Tree:
        """The ingested cube, whole or not.

        Raises:
            NotYetError: there is none yet.
        """
        if find(self.cube) is None:
            raise NotYetError(f"there is no cube at {self.cube.uri} yet; run aeheight ingest")
        return open_tree(self.cube)

    def whole_cube(self) -> Tree:
        """The ingested cube, with every shard in it.

        Raises:
            NotYetError: there is none yet, or shards of it are missing.
            InputError: the region file has changed since.
        """
        tree, ledger = self.open_cube(), self.ledger("cube")
        ledger.check(cube_settings(self.settings), "ingest", made=True)
        refuse_other_meaning(ledger, self.settings)
        asked = ledger.store.read_json(ASKED) if ledger.store.exists(ASKED) else {}
        wanted = sources_asked(self.settings)
        if changed := differences(asked, wanted):
            fewer = set(asked.get("years", [])) - set(wanted["years"])
            raise NotYetError(
                "the region file asks for other sources than the cube was made from:\n  "
                + "\n  ".join(changed)
                + "\nset them back"
                + ("" if fewer else ", or run aeheight ingest, which makes what they touch")
            )
        if left := ledger.pending(cube_shards(tree.template)):
            raise NotYetError(f"{len(left)} shards of the cube are missing; run aeheight ingest")
        return tree

    def whole_map(self, name: str = "heights") -> Tree:
        """A map, with every shard in it.

        Args:
            name: `heights` or `calibrated`.

        Raises:
            NotYetError: there is none yet, or shards of it are missing.
            InputError: the map that was corrected is no longer there.
        """
        place, ledger, verb = self.store.child(f"{name}.zarr"), self.ledger(name), _MAKERS[name]
        if find(place) is None:
            raise NotYetError(f"there is no map at {place.uri} yet; run aeheight {verb}")
        tree = open_tree(place)
        if left := ledger.pending(tree.template.shards("height")):
            raise NotYetError(f"{len(left)} shards of the map are missing; run aeheight {verb}")
        corrected = (ledger.settings() or {}).get("heights")
        if name == "calibrated" and corrected != (find(self.heights) or {}).get("identity"):
            raise InputError(
                f"{place.uri} corrects an older map than {self.heights.uri}; run aeheight "
                "calibrate --overwrite"
            )
        return tree

    def discard(self, *places: Store) -> None:
        """Remove what `--overwrite` replaces, once it is known that the work can begin."""
        self.connection.client()
        for place in places:
            place.remove()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The run's lease; one driver at a time.

        Raises:
            InputError: another driver holds it, or the store is no folder.
        """
        if self.store.is_local and Path(self.store.uri).is_file():
            raise InputError(f"store: {self.store.uri} is a file; name a folder instead")
        with lease(self.store):
            yield


def cube_settings(settings: RegionSettings) -> dict[str, Any]:
    """The settings that a whole cube depends on, besides its grid.

    Files, years and what heights mean do not belong to them: what a shard was made from, and how,
    stands in its receipt.
    """
    kind = settings.model_dump(mode="json", include={"embeddings": {"source"}})
    return kind | {"cube": settings.cube.model_dump(mode="json")}


def height_settings(settings: RegionSettings, layer: str) -> dict[str, Any]:
    """What the shards of `height` or `prior` depend on besides their files; empty for others."""
    wanted = {"height": settings.height, "prior": settings.prior}.get(layer)
    return wanted.model_dump(mode="json", exclude={"href", "access"}) if wanted else {}


def sources_asked(settings: RegionSettings) -> dict[str, Any]:
    """What the region file asks for, for comparison with what a cube was made of."""
    asked = settings.model_dump(
        mode="json", include={"embeddings": {"href"}, "height": True, "prior": True, "aoi": True}
    )
    for key in ("height", "prior"):
        if asked[key]:
            asked[key].pop("access")
    return asked | {"years": list(settings.embeddings.years)}


_MENDABLE = {"nodata"}
"""What may be named better later: the shards of that layer are made again."""


def refuse_other_meaning(ledger: Ledger, settings: RegionSettings) -> None:
    """Heights that were made of one surface or datum do not become another's by a word.

    Raises:
        InputError: shows what differs.
    """
    if not ledger.store.exists(ASKED):
        return
    asked = ledger.store.read_json(ASKED)
    for layer in ("height", "prior"):
        before, now = asked.get(layer), sources_asked(settings)[layer]
        if not before or not now:
            continue
        aside = {"href"} | _MENDABLE
        old, new = ({k: v for k, v in each.items() if k not in aside} for each in (before, now))
        changed = differences(old, new, f"{layer}.")
        if changed and layer in {Shard.parse(name).layer for name in ledger.done()}:
            ledger.refuse(changed, "run aeheight ingest --overwrite")


class Made:
    """What the shards of a tree were made from, for the steps that build on them."""

    def __init__(self, template: Template, done: Mapping[str, str]) -> None:
        """Remember the receipts of a tree.

        Args:
            template: of the tree.
            done: `Ledger.done`.
        """
        self._template, self._done = template, done

    def inputs(self, group: str, layers: Mapping[str, int | None], region: Region) -> list[str]:
        """The inputs of every shard under a region, in a fixed order.

        Args:
            group: of the tree.
            layers: the layers that are read, and the year of each.
            region: pixels of the group's grid; it may reach past it.
        """
        edge, shape = self._template.cut.shard, self._template.grid(group).shape
        inside = region.intersect(whole(shape))
        if inside is None:
            return []
        return [
            self._done.get(Shard(group, layer, year, square).name, "")
            for layer, year in layers.items()
            for row in range(inside.row // edge * edge, inside.bottom, edge)
            for col in range(inside.col // edge * edge, inside.right, edge)
            for square in [Region(row, col, edge, edge).intersect(whole(shape))]
            if square
        ]


def cube_shards(template: Template) -> list[Shard]:
    """The shards that ingest writes: all but the split's."""
    layers = [layer.name for layer in template.layers if layer.name != "split"]
    return [shard for layer in layers for shard in template.shards(layer)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step would do, from headers and settings alone."""

    step: str
    facts: Mapping[str, Any]
    """In the order of printing; sizes in bytes, areas in pixels."""

    def lines(self) -> list[str]:
        """For people."""
        facts = [row for key, value in self.facts.items() for row in _rows(key, value)]
        width = max(len(label) for label, _ in facts)
        return [self.step] + [f"  {label:{width}}  {text}" for label, text in facts]


def _rows(key: str, value: Any) -> list[tuple[str, str]]:
    """Label and text of one fact; of groups, two lines each."""
    label = key.replace("_", " ")
    if key == "groups":
        return [row for group in value for row in _group_rows(group)]
    if isinstance(value, dict):
        return [(label, ", ".join(f"{k}: {100 * v:.1f} %" for k, v in value.items()))]
    return [(label, _shown(key, value))]


def _group_rows(group: Mapping[str, Any]) -> list[tuple[str, str]]:
    unit = "m" if "utm" in group["name"] else "units of the CRS"
    rows, columns = group["shape"]
    sides = zip(("west", "south", "east", "north"), group["bounds"], strict=True)
    return [
        (f"group {group['name']}",
         f"{group['crs']}, {rows} rows x {columns} columns of {group['resolution']:g} {unit}"),
        ("", ", ".join(f"{side} {value:.10g}" for side, value in sides)),
    ]  # fmt: skip


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in key and isinstance(value, int):
        return human_bytes(value)
    if key.endswith("seconds"):
        return clock(value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def human_bytes(count: int) -> str:
    """`1.54 GB`, in powers of 1000.

    >>> human_bytes(1_536_000_000)
    '1.54 GB'
    >>> human_bytes(999_600)
    '1 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:  # what `.3g` would not write as 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def carry_out(
    run: Run,
    step: str,
    ledger: Ledger,
    shards: Sequence[Shard],
    task: Task,
    device: Device = "cpu",
) -> Outcome:
    """Run a task over the shards that have no receipt yet.

    Args:
        run: gives the connection.
        step: the label of the progress.
        ledger: knows what is done.
        shards: all of the step's shards.
        task: makes one shard.
        device: where its tasks may run.
    """
    pending = ledger.take_up(shards)
    skipped = len(shards) - len(pending)
    if not pending:
        return Outcome(0, skipped, {}, 0.0, 0)
    progress = Progress(step, len(pending), as_json=run.options.as_json)
    progress.begin()
    outcome = run_shards(run.connection.client(device), task, pending, progress, device)
    return replace(outcome, skipped=skipped)
