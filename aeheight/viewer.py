"""A map in the browser: a page, its tiles and values, served to this machine by tornado.

The page is static (`pages/`), Leaflet comes from its own package, and all that the page knows of
the map is `layers.json`. Nothing is fetched from the network. Files are opened for each tile, and
the catalogue is read again when the export was made anew, so that nothing old is shown.
"""

import asyncio
import importlib.util
import ipaddress
import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler

from aeheight import tiling
from aeheight.errors import InputError
from aeheight.exported import Exported, Layer, read_export, stamp
from aeheight.limits import error_limits, novelty_limits, value_limits
from aeheight.store import Store

T = TypeVar("T")
Limits = tuple[float, float]

_PAGES: Final = Path(__file__).parent / "pages"
_THREADS: Final = min(4, os.cpu_count() or 1)
_SAMPLES: Final = 48
"""Files of a layer from which its limits are taken, at most."""
_TILE: Final = 512
"""Edge of a tile in pixels; shown at half of it, so that it is sharp on every screen."""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a layer is drawn: as in the report."""

    title: str
    """In a word or two."""
    colours: str
    """Name of a colour map that the colour-blind can read."""
    scale: str
    """Layers of one scale share their limits."""


_STYLES: Final = {
    "reference": Style("Reference", "viridis", "height"),
    "height": Style("Prediction", "viridis", "height"),
    "difference": Style("Difference", "rdbu_r", "difference"),
    "spread": Style("Spread", "magma_r", "spread"),
    "novelty": Style("Novelty", "ylorbr", "novelty"),
}
_SCALES: Final[Mapping[str, Callable[[list[NDArray[np.float32]]], Limits]]] = {
    "height": value_limits,
    "difference": error_limits,
    "novelty": novelty_limits,
}


def style_of(layer: Layer) -> Style:
    """How a layer is drawn; one that is not known by its name in colours of its own scale."""
    return _STYLES.get(layer.name, Style(layer.name.capitalize(), "cividis", layer.name))


@dataclass(frozen=True, slots=True)
class Shown:
    """An export and the limits of its colours."""

    export: Exported
    stamp: tuple[int, int] | None
    limits: Mapping[str, Limits]
    """By layer."""
    zoom: int
    """The level whose pixels are as fine as the files'."""

    @classmethod
    def of(cls, place: Store) -> "Shown":
        """Read the catalogue, and small pictures of some files of each layer.

        Raises:
            InputError: as from `read_export`, or a file is missing or damaged.
        """
        made, export = stamp(place), read_export(place)
        with ThreadPoolExecutor(_THREADS) as pool:
            scales: dict[str, list[NDArray[np.float32]]] = {}
            try:
                for layer in export.layers:
                    pictures = pool.map(tiling.sample, _some(layer.files))
                    scales.setdefault(style_of(layer).scale, []).extend(pictures)
            except OSError as error:
                raise InputError(f"{error}; run aeheight verify --repair") from error
        found = {name: _SCALES.get(name, value_limits)(given) for name, given in scales.items()}
        limits = {layer.name: found[style_of(layer).scale] for layer in export.layers}
        latitude = (export.bounds[1] + export.bounds[3]) / 2
        return cls(export, made, limits, tiling.native_zoom(export.pixel, latitude))

    def layer(self, name: str) -> Layer | None:
        """By its name."""
        return next((layer for layer in self.export.layers if layer.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """What the page knows."""
        export = self.export
        west, south, east, north = export.bounds
        return {
            "name": export.name,
            "description": export.description,
            "attribution": export.attribution,
            "surface": export.surface,
            "vertical_datum": export.vertical_datum,
            "years": export.years,
            "bounds": [[south, west], [north, east]],
            "zoom": self.zoom,
            "finest": tiling.FINEST,
            "stamp": "-".join(map(str, self.stamp or ())),
            "layers": [self._described(layer) for layer in export.layers],
        }

    def _described(self, layer: Layer) -> dict[str, Any]:
        style, limits = style_of(layer), self.limits[layer.name]
        return {
            "name": layer.name,
            "title": style.title,
            "about": layer.title,
            "unit": layer.unit,
            "years": list(layer.tiles),
            "limits": limits,
            "colours": tiling.ramp(style.colours),
        }


def _some(files: list[Path]) -> list[Path]:
    """Not too many, spread evenly."""
    count = min(len(files), _SAMPLES)
    return [files[number * len(files) // count] for number in range(count)]


class Viewer:
    """The export that is shown, and the threads that draw it."""

    def __init__(self, place: Store, shown: Shown) -> None:
        """Begin with what is there.

        Args:
            place: the export's folder.
            shown: read from it.
        """
        self._place, self.shown = place, shown
        self._pool = ThreadPoolExecutor(_THREADS, "tile")
        self._reading = asyncio.Lock()

    async def work(self, call: Callable[[], T]) -> T:
        """Run what reads files in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def latest(self) -> Shown:
        """What is shown; an export that has come since takes its place once it is whole."""
        async with self._reading:
            if stamp(self._place) not in (None, self.shown.stamp):
                self.shown = await self.work(lambda: Shown.of(self._place))
        return self.shown

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(cancel_futures=True)


class _Handler(RequestHandler):
    """Answers that must never be old, or be more than a page of this server can use."""

    def initialize(self, viewer: Viewer) -> None:
        self.viewer = viewer

    def set_default_headers(self) -> None:
        _headers(self)

    def known(self, year: str) -> int:
        """A year of the map."""
        if not year.isdecimal() or int(year) not in self.viewer.shown.export.years:
            raise HTTPError(404, reason="No such year")
        return int(year)

    async def answer(self, call: Callable[[], T]) -> T:
        """What a thread reads from files; not found while the export is made anew."""
        try:
            return await self.viewer.work(call)
        except OSError as error:
            raise HTTPError(404, reason="A file of the export is missing or damaged") from error


class _Pages(StaticFileHandler):
    def set_default_headers(self) -> None:
        _headers(self)


def _headers(handler: RequestHandler) -> None:
    handler.set_header("Cache-Control", "no-cache")
    handler.set_header("Content-Security-Policy", _POLICY)
    handler.set_header("X-Content-Type-Options", "nosniff")


class _Layers(_Handler):
    async def get(self) -> None:
        try:
            self.finish((await self.viewer.latest()).to_dict())
        except (InputError, OSError) as error:
            raise HTTPError(503, reason="The export cannot be read") from error


class _Tile(_Handler):
    async def get(self, name: str, year: str, *place: str) -> None:
        zoom, x, y = map(int, place)
        layer, shown = self.viewer.shown.layer(name), self.viewer.shown
        if layer is None or not tiling.exists(x, y, zoom):
            raise HTTPError(404, reason="No such tile")
        area = tiling.tile_bounds(x, y, zoom)
        paths = [t.path for t in layer.tiles.get(self.known(year), ()) if t.touches(area)]
        colours, limits = style_of(layer).colours, shown.limits[name]
        png = await self.answer(lambda: tiling.tile_png(paths, x, y, zoom, _TILE, colours, limits))
        self.set_header("Content-Type", "image/png")
        self.finish(png)


class _Point(_Handler):
    async def get(self, year: str) -> None:
        lon, lat, chosen = self._degrees("lon", 180), self._degrees("lat", 90), self.known(year)
        here = (lon, lat, lon, lat)

        def values() -> dict[str, float | None]:
            return {
                layer.name: tiling.value_at(
                    [t.path for t in layer.tiles.get(chosen, ()) if t.touches(here)], lon, lat
                )
                for layer in self.viewer.shown.export.layers
            }

        self.finish({"values": await self.answer(values)})

    def _degrees(self, name: str, most: float) -> float:
        try:
            found = float(self.get_query_argument(name))
        except ValueError:
            found = math.nan
        if not abs(found) <= most:
            raise HTTPError(400, reason=f"{name} must be degrees within {most:g}")
        return found


def leaflet() -> Path:
    """The folder of Leaflet's files, in its package."""
    found = importlib.util.find_spec("xstatic.pkg.leaflet")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "data"


def application(viewer: Viewer, names: str = ".*") -> Application:
    """What is answered to which address.

    Args:
        viewer: the export that is shown.
        names: pattern of the host that a request must name; others find nothing.
    """
    given = {"viewer": viewer}
    found = Application(log_function=lambda _: None)
    found.add_handlers(
        names,
        [
            (r"/layers\.json", _Layers, given),
            (r"/tiles/(\w+)/(\d{1,4})/(\d{1,2})/(\d{1,8})/(\d{1,8})\.png", _Tile, given),
            (r"/values/(\d{1,4})", _Point, given),
            (r"/leaflet/([\w./-]*)", _Pages, {"path": leaflet()}),
            (r"/([\w.-]*)", _Pages, {"path": _PAGES, "default_filename": "view.html"}),
        ],
    )
    return found


def _names(host: str, listener: socket.socket) -> str:
    """Pattern of the names by which a browser may call this server.

    A page from elsewhere can have its own name lead to this machine (DNS rebinding), and would then
    read the map: at an address that only this machine reaches, only its own names are answered.
    """
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        return ".*"
    asked = f"[{host}]" if ":" in host else host
    known = map(re.escape, ("localhost", "127.0.0.1", "[::1]", asked.lower()))
    return f"(?:{'|'.join(known)})$"


async def serve(
    place: Store, shown: Shown, host: str, port: int, ready: Callable[[str], None]
) -> None:
    """Serve until cancelled.

    Args:
        place: the export's folder.
        shown: read from it.
        host: name or address to listen at.
        port: 0 takes any that is free.
        ready: is told the address once it answers.

    Raises:
        InputError: the port is taken, or the host is not this machine's.
    """
    listener = _listen(host, port)
    viewer = Viewer(place, shown)
    server = HTTPServer(application(viewer, _names(host, listener)))
    try:
        server.add_socket(listener)
        ready(address(host, listener.getsockname()[1]))
        await asyncio.Event().wait()
    finally:
        server.stop()
        viewer.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise InputError(
            f"cannot listen at {host}, port {port}: {reason}; take another with --port, or any "
            "that is free with --port 0"
        ) from error
    found.setblocking(False)
    return found


def address(host: str, port: int) -> str:
    """What to open in a browser.

    >>> address("::1", 8000)
    'http://[::1]:8000/'
    """
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
