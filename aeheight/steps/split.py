"""The split, recorded in the cube: for training, and for testing a model trained elsewhere."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree
from aeheight.embeddings import valid
from aeheight.errors import InputError
from aeheight.grid import Grid, owned
from aeheight.receipts import receipt_for
from aeheight.settings import Bounds, RegionSettings, SplitSettings, fingerprint
from aeheight.sources.areas import area_touches, read_area, read_shapes
from aeheight.splits import UNUSED, USES, count_blocks, draw_split
from aeheight.steps.run import Run
from aeheight.template import Shard, Template


def split_fingerprint(settings: RegionSettings) -> str:
    """What a checkpoint remembers of the split that it was trained on."""
    return fingerprint(split_settings(settings))


def split_settings(settings: RegionSettings) -> dict[str, Any]:
    """All that a split depends on besides the grid, with the content of files that it names.

    Raises:
        InputError: such a file is missing or is no GeoJSON.
    """
    wanted = settings.split
    # What says nothing is left out: splits from before there were folds are still known.
    aside = {"folds", "fold"} if wanted.folds is None else {"test"}
    areas = {"test": wanted.test, "validation": wanted.validation}
    return wanted.model_dump(mode="json", exclude=aside) | {
        f"{name}_area": fingerprint(read_shapes(settings, area, "split"))
        for name, area in areas.items()
        if isinstance(area, str)
    }


def record_split(run: Run) -> str:
    """Write the use of every pixel into the cube, where it is not there yet.

    It is a pure function of settings and grid and costs little, so the driver does it itself.

    Returns:
        `split_fingerprint`.

    Raises:
        InputError: the region has no reference heights, or the split there is another one.
    """
    if run.settings.height is None:
        raise InputError(
            "the region has no `height`, so only ingest and predict are possible; name a "
            "reference height model to train or to evaluate"
        )
    tree = run.open_cube()
    check_split(run.settings, tree.template.grids)
    settings = {"split": split_settings(run.settings), "cube": tree.identity}
    ledger = run.ledger("split").begin(settings)
    for shard in ledger.pending(tree.template.shards("split")):
        started = time.monotonic()
        use = draw(run.settings, tree.template, shard)
        digest = tree.write(shard, use)
        ledger.leave(receipt_for(shard, use, digest, use != UNUSED, ledger.key, started))
    return fingerprint(settings["split"])


def draw(settings: RegionSettings, template: Template, shard: Shard) -> NDArray[np.uint8]:
    """The use of every pixel of a shard: (rows, columns), a pure function of settings and grids."""
    split, grid = settings.split, template.grid(shard.group)
    around = shard.region.expand(split.buffer)
    seen = grid.part(around)
    test, validation = (
        read_area(settings, wanted, seen) for wanted in (split.test, split.validation)
    )
    foreign = ~owned(template.grids, grid, around)
    return draw_split(split, grid.shape, shard.region, test, validation, foreign)


def check_split(settings: RegionSettings, grids: Sequence[Grid], *, trains: bool = False) -> None:
    """Refuse a split that leaves some use without a block or an area, from metadata alone.

    Args:
        settings: of the run.
        grids: of its cube.
        trains: whether a model is to be trained on this ground: then some must be left for it.

    Raises:
        InputError: says which use goes without ground, with the numbers and the remedy.
    """
    split = settings.split
    blocks = [count_blocks(split, grid.shape) for grid in grids]
    most = max(one.number for one in blocks)
    if split.folds is not None:
        if most < split.folds:
            raise InputError(
                f"split.folds: {most} blocks cannot be dealt to {split.folds} folds; give fewer "
                f"folds, or make split.block ({split.block} px) smaller"
            )
    elif isinstance(split.test, float):
        _refuse_none("test", split.test, f"{most} blocks", [one.test for one in blocks], split)
    else:
        _refuse_far("test", split.test, settings, grids)
    if isinstance(split.validation, float):
        rest = max(one.number - (one.test or 0) for one in blocks)
        validates = [one.validation for one in blocks]
        if rest:
            by_block = any(one.test for one in blocks)
            words = f"the {rest} blocks that do not test" if by_block else f"{rest} blocks"
            _refuse_none("validation", split.validation, words, validates, split)
    else:
        _refuse_far("validation", split.validation, settings, grids)
    if trains and all(one.training == 0 for one in blocks):
        one = max(blocks, key=lambda one: one.number)
        raise InputError(
            f"split: of {one.number} blocks {one.test} test and {one.validation} validate, which "
            f"leaves none to train on; lower the shares, or make split.block ({split.block} px) "
            "smaller (or give a region that only tests another's model, by --checkpoint)"
        )


def _refuse_none(
    name: str, share: float, of: str, counts: Sequence[int | None], split: SplitSettings
) -> None:
    if share and not any(counts):
        raise InputError(
            f"split.{name}: {share:g} of {of} rounds to none; make split.block ({split.block} px) "
            f"smaller, or split.{name} larger"
        )


def _refuse_far(
    name: str, wanted: Bounds | str, settings: RegionSettings, grids: Sequence[Grid]
) -> None:
    if len(grids) > 1 and not isinstance(wanted, str):
        raise InputError(
            f"split.{name}: bounds are in the CRS of one grid, and the region has "
            f"{[grid.name for grid in grids]}; give a GeoJSON file in degrees"
        )
    if not any(area_touches(settings, wanted, grid) for grid in grids):
        grid = grids[0]
        raise InputError(
            f"split.{name}: {wanted!r} holds no ground of the grid {list(grid.bounds)}; bounds "
            f"are in its CRS ({grid.crs}), GeoJSON in degrees"
        )


def need_ground(run: Run) -> None:
    """Refuse to train where a recorded split has a use without one pixel to work with.

    Shards are read in order until each use has shown a pixel with an embedding and a reference,
    which the first few do as a rule.

    Raises:
        InputError: says which use goes without, what it lacks, and the remedy.
    """
    tree, split = run.open_cube(), run.settings.split
    check_split(run.settings, tree.template.grids, trains=not run.settings.also)
    uses = [] if run.settings.also else ["train"]
    if split.validation and not run.settings.also:
        uses.append("validation")
    if split.test or split.folds:
        uses.append("test")
    lacking = {name: _Seen() for name in uses}
    for shard in tree.template.shards("split"):
        if not lacking:
            return
        for name in _shown(tree, shard, lacking):
            del lacking[name]
    for name, seen in lacking.items():
        seen.refuse(name, split)


@dataclass(slots=True)
class _Seen:
    """What a search has met of a use that has shown no usable pixel yet."""

    pixels: int = 0
    referenced: int = 0

    def refuse(self, name: str, split: SplitSettings) -> NoReturn:
        """End with what the use lacks."""
        if not self.pixels:
            raise InputError(
                f"split: no pixel is left for {name} ground: the buffer of {split.buffer} px takes "
                f"it from blocks of {split.block} px; make split.buffer or the other uses smaller"
            )
        lack = "an embedding and a reference height" if self.referenced else "a reference height"
        raise InputError(
            f"split: none of the {self.pixels} pixels of {name} ground has {lack}; choose other "
            "ground by split.seed, split.block or the shares, or check that `height` and "
            "`embeddings` cover it"
        )


def _shown(tree: Tree, shard: Shard, lacking: Mapping[str, _Seen]) -> list[str]:
    """Which of the uses have a usable pixel in a shard; counts what there is of all."""
    use = tree.read(shard.group, "split", None, shard.region)
    there = {name: use == USES[name] for name in lacking}
    if not any(mask.any() for mask in there.values()):
        return []
    height = tree.read(shard.group, "height", None, shard.region)
    referenced = {name: mask & ~np.isnan(height) for name, mask in there.items()}
    for name, seen in lacking.items():
        seen.pixels += int(there[name].sum())
        seen.referenced += int(referenced[name].sum())
    if not any(mask.any() for mask in referenced.values()):
        return []
    embedded = _embedded(tree, shard)
    return [name for name, mask in referenced.items() if (mask & embedded).any()]


def _embedded(tree: Tree, shard: Shard) -> NDArray[np.bool_]:
    """(rows, columns) where there is an embedding in some year."""
    found = np.zeros(shard.region.shape, dtype=bool)
    for year in tree.template.years:
        found |= valid(tree.read(shard.group, "embedding", year, shard.region))
    return found
