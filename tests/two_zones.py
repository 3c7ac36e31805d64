"""An export of two zones that meet, with known values, and the viewer's server beside it."""

import asyncio
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aeheight import viewer
from aeheight.grid import Grid
from aeheight.store import Store

WEST = Grid("EPSG:32610", 100.0, 750000.0, 4290000.0, (300, 250))
EAST = Grid("EPSG:32611", 100.0, 230000.0, 4290000.0, (300, 250))
"""Two zones that meet, and overlap, at 120° west."""


def slope(lon, lat):
    """Heights of the two zones: 0 to about 300 m from west to east; a lake has none."""
    values = (lon + 120.35) * 400 + 0 * lat
    lake = np.hypot((lon + 120.2) * 0.78, lat - 38.65) < 0.01
    return np.where(lake, np.nan, values)


LAYERS = {
    "height": lambda lon, lat: slope(lon, lat) + 5,
    "novelty": lambda lon, lat: 0 * lon + 0.5,
    "reference": slope,
    "ripples": lambda lon, lat: np.sin(lon * 500),
    "difference": lambda lon, lat: 0 * slope(lon, lat) + 5 + 0 * lat,
    "spread": lambda lon, lat: 0 * lon + 3,
}


@dataclass(frozen=True)
class Served:
    """A server in a thread."""

    address: str

    def get(self, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        asked = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(asked) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), dict(error.headers)

    def json(self, path: str) -> Any:
        code, data, _ = self.get(path)
        assert code == 200, data
        return json.loads(data)

    def tile(self, path: str) -> np.ndarray:
        """(rows, columns, 4) red, green, blue, alpha."""
        code, data, _ = self.get(f"tiles/{path}.png")
        assert code == 200, data
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """What `aeheight view` serves, on a free port."""
    place, told, ready = Store.at(folder), [], threading.Event()
    loop = asyncio.new_event_loop()

    def come(address: str) -> None:
        told.append(address)
        ready.set()

    async def work() -> None:
        await viewer.serve(place, viewer.Shown.of(place), "127.0.0.1", 0, come)

    task = loop.create_task(work())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    try:
        assert ready.wait(30)
        yield Served(told[0])
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
