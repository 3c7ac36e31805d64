"""What an export shows: the layers of a map and, beside them, its reference and the difference."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeheight.cube import Tree, find, open_tree
from aeheight.errors import InputError, NotYetError
from aeheight.settings import ExportSettings
from aeheight.steps.run import Run
from aeheight.store import Store
from aeheight.template import Layer
from aeheight.windows import Region

REFERENCE, DIFFERENCE = "reference", "difference"
"""Layers that are not the map's own."""
_WITHOUT = "or export without it: --set export.reference=false"


@dataclass(frozen=True, slots=True)
class Opening:
    """A tree, as it travels to workers."""

    uri: str
    version: str
    """Identity and template: a tree made anew is opened anew."""

    @classmethod
    def of(cls, tree: Tree) -> "Opening":
        """Of an open tree."""
        return cls(tree.store.uri, f"{tree.identity} {tree.version}")

    def tree(self) -> Tree:
        """The tree, opened once a process."""
        return _opened(self.uri, self.version)


@lru_cache(maxsize=4)
def _opened(uri: str, _version: str) -> Tree:
    return open_tree(Store(uri))


@dataclass(frozen=True, slots=True)
class Shown:
    """The layers of an export; travels to workers as these few words."""

    map: Opening
    cube: Opening | None
    """Holds the reference; None: there is none, or it is not wanted."""

    def of_map(self) -> list[Layer]:
        """The map's own layers: `height` first."""
        return [layer for layer in self.map.tree().template.layers if layer.timed]

    def layers(self) -> list[Layer]:
        """All layers of a zone's files."""
        if self.cube is None:
            return self.of_map()
        return [*self.of_map(), *_beside(self.map.tree(), self.cube.tree())]

    def read(self, group: str, layer: str, year: int | None, region: Region) -> NDArray[np.float32]:
        """The pixels of a region of a zone, which may reach past its grid.

        Returns:
            (rows, columns), NaN where there is none; of `difference`, where either is missing.

        Raises:
            OSError: a chunk is damaged or cannot be read.
        """
        if layer not in (REFERENCE, DIFFERENCE):
            return self._mapped(group, layer, year, region)
        assert self.cube is not None
        reference: NDArray[np.float32] = self.cube.tree().read(group, "height", None, region)
        if layer == REFERENCE:
            return reference
        return self._mapped(group, "height", year, region) - reference

    def _mapped(
        self, group: str, layer: str, year: int | None, region: Region
    ) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.map.tree().read(group, layer, year, region)
        return values


def _beside(heights: Tree, cube: Tree) -> tuple[Layer, Layer]:
    """The reference as the cube describes it, and the difference from it."""
    mapped, known = (tree.template.layer("height").attributes for tree in (heights, cube))
    reference = Layer(REFERENCE, "float32", np.nan, attributes=known)
    about: dict[str, Any] = {
        "long_name": "predicted minus reference height",
        "units": "m",
        **{key: mapped[key] for key in ("surface", "vertical_datum") if key in mapped},
        **{f"reference_{key}": known[key] for key in ("surface", "vertical_datum") if key in known},
        **{key: known[key] for key in ("attribution", "license") if key in known},
    }
    return reference, Layer(DIFFERENCE, "float32", np.nan, timed=True, attributes=about)


def reference_of(run: Run, settings: ExportSettings, heights: Tree) -> Tree | None:
    """The cube that holds a map's reference; None where there is none, or it is not wanted.

    Args:
        run: whose map it is.
        settings: of the export.
        heights: the map.

    Raises:
        NotYetError: shards of the reference are missing.
        InputError: the cube was made anew since the map.
    """
    if not settings.reference or find(run.cube) is None:
        return None
    cube = run.open_cube()
    if all(layer.name != "height" for layer in cube.template.layers):
        return None
    made_from = (run.ledger("heights").settings() or {}).get("cube")
    if made_from != cube.identity or cube.template.grids != heights.template.grids:
        raise InputError(
            f"the reference in {run.cube.uri} is beside an older map: the cube was made anew "
            f"since; run aeheight predict --overwrite, {_WITHOUT}"
        )
    if left := run.ledger("cube").pending(cube.template.shards("height")):
        raise NotYetError(
            f"{len(left)} shards of the reference are missing; run aeheight ingest, {_WITHOUT}"
        )
    return cube
