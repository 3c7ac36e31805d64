"""A run known by its store alone: what `aeheight status s3://bucket/run` needs of its settings."""

from aeheight.cube import find
from aeheight.errors import InputError, NotYetError
from aeheight.receipts import Ledger
from aeheight.settings import RegionSettings
from aeheight.steps.run import ASKED
from aeheight.store import Store

TITLE = "aeheight cube of "
"""What the title of a cube says before the region's name."""


def stored_settings(place: str) -> RegionSettings:
    """The settings of the run that lies in a store, as far as its cube records them.

    Sources, years, cube and name are the run's; what no cube depends on (`split`, `model`,
    `predict`, `export`) has its default.

    Args:
        place: a folder or a URI, as a region file names it under `store`.

    Raises:
        NotYetError: there is no run.
        InputError: wrong credentials, or records that this version cannot read.
        OSError: the store cannot be reached.
    """
    store = Store.at(place)
    cube, ledger = find(store.child("cube.zarr")), Ledger(store.child("cube.receipts"))
    settings = ledger.settings()
    if cube is None or settings is None or not ledger.store.exists(ASKED):
        raise NotYetError(
            f"there is no run at {store.uri} (no cube that was begun); name the folder or URI that "
            "its region file has under `store`, or the region file"
        )
    asked = ledger.store.read_json(ASKED)
    try:
        years = asked.pop("years")
        embeddings = settings["embeddings"] | asked.pop("embeddings") | {"year": years}
        known = {"store": place, "cube": settings["cube"], "embeddings": embeddings}
        name = cube["template"]["title"].removeprefix(TITLE)
        return RegionSettings.model_validate({"name": name, **known, **asked})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{ledger.store.uri} is not of this version of aeheight ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); name the region file instead"
        ) from error
