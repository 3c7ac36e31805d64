"""Other runs whose ground is trained on too: opened, and refused where it means something else."""

from dataclasses import dataclass
from typing import Any

from aeheight.cube import Tree, find, open_tree
from aeheight.errors import InputError
from aeheight.models import Further
from aeheight.receipts import Ledger
from aeheight.settings import RegionSettings, fingerprint
from aeheight.steps.leaks import leaks
from aeheight.steps.run import ASKED, cube_shards
from aeheight.store import Store


@dataclass(frozen=True, slots=True)
class Other:
    """A cube of another run with its split."""

    tree: Tree
    split: str
    """Its fingerprint."""
    content: str
    """Fingerprint of what its shards were made from."""

    @property
    def further(self) -> Further:
        """What a checkpoint remembers of it."""
        return Further(self.tree.identity, self.split, self.tree.template.years)


def other_cubes(settings: RegionSettings, own: Tree) -> list[Other]:
    """The cubes of `also`.

    Args:
        settings: names their runs.
        own: the cube that they must agree with.

    Raises:
        InputError: one is missing, not finished, without a split, or of another resolution, kind
            of grid, surface or vertical datum, or teaches ground that this run tests or validates
            on; says which.
    """
    trees = [_opened(store) for store in settings.also]
    seen = {own.identity: "this run itself"}
    for store, tree in zip(settings.also, trees, strict=True):
        if tree.identity in seen:
            raise InputError(
                f"also: {store} is the same cube as {seen[tree.identity]}; name it once"
            )
        seen[tree.identity] = store
        _refuse_other(store, tree, settings, own)
    others = [_whole(store, tree) for store, tree in zip(settings.also, trees, strict=True)]
    for store, other in zip(settings.also, others, strict=True):
        _refuse_leak(store, other.tree, settings, own)
    return others


def _opened(uri: str) -> Tree:
    cube = Store.at(uri).child("cube.zarr")
    if find(cube) is None:
        raise InputError(f"also: there is no cube at {cube.uri}; run aeheight ingest for that run")
    return open_tree(cube)


def _whole(uri: str, tree: Tree) -> Other:
    cubes, splits = (Ledger(Store.at(uri).child(f"{name}.receipts")) for name in ("cube", "split"))
    if left := cubes.pending(cube_shards(tree.template)):
        raise InputError(
            f"also: {len(left)} shards of the cube of {uri} are missing; run aeheight ingest for it"
        )
    split = splits.settings() or {}
    stale = split.get("cube") != tree.identity
    if stale or splits.pending(tree.template.shards("split")):
        raise InputError(
            f"also: the cube of {uri} has no whole split that says what trains; run aeheight train "
            "or evaluate for it"
        )
    return Other(tree, fingerprint(split["split"]), cube_content(cubes))


def cube_content(ledger: Ledger) -> str:
    """Fingerprint of what all shards of a cube were made from."""
    return fingerprint(sorted(ledger.done().items()))


def _refuse_other(uri: str, tree: Tree, settings: RegionSettings, own: Tree) -> None:
    asked: dict[str, Any] = Store.at(uri).child("cube.receipts").read_json(ASKED)
    theirs, ours = asked.get("height") or {}, settings.height
    if not theirs:
        raise InputError(f"also: the run {uri} has no `height` to train on")
    assert ours is not None
    pairs: list[tuple[str, object, object]] = [
        ("height.surface", theirs.get("surface"), ours.surface),
        ("height.vertical_datum", theirs.get("vertical_datum"), ours.vertical_datum),
        ("the grid's resolution", _resolution(tree), _resolution(own)),
        ("embeddings from", _kind(_recorded(uri)), _kind(settings.embeddings.source)),
    ]
    if settings.base == "prior":
        pairs.append(("a prior", _has_prior(tree), _has_prior(own)))
    different = [f"{what}: {there}, here {here}" for what, there, here in pairs if there != here]
    if different:
        raise InputError(
            f"also: the cube of {uri} cannot be trained on together with this run's:\n  "
            + "\n  ".join(different)
            + "\ntake it out of `also`, or ingest it alike"
        )


def _refuse_leak(uri: str, tree: Tree, settings: RegionSettings, own: Tree) -> None:
    if count := leaks(settings, own, tree):
        raise InputError(
            f"also: {uri} trains or validates on {count} pixels of ground that this run tests or "
            "validates on, so its test would be flattered; give the two grids or splits that do "
            "not overlap (`split.test` may be bounds or a GeoJSON file), or take it out of `also`"
        )


def _has_prior(tree: Tree) -> bool:
    return any(layer.name == "prior" for layer in tree.template.layers)


def _resolution(tree: Tree) -> str:
    """Such as `10 m`, or `8.983e-05 degrees`."""
    grid = tree.template.grids[0]
    return f"{grid.resolution:g} {'degrees' if grid.is_geographic else 'm'}"


def _recorded(uri: str) -> str:
    settings = Ledger(Store.at(uri).child("cube.receipts")).settings() or {}
    return str(settings.get("embeddings", {}).get("source"))


def _kind(source: str) -> str:
    """Tiles and exports hold the same embeddings, the mosaic resampled ones."""
    return "the mosaic" if source == "mosaic" else "tiles"
