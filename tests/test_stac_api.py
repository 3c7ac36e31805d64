"""A STAC API on loopback: searched by the grids' ground, page by page."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from pyproj import Transformer

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.sources.heights import read_heights
from aeheight.windows import whole
from tests.test_stac import item_of
from tests.tifs import GRID, LEFT, TOP, read, source_of, terrain, write_heights

PAGE = 2
CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/collections",
    "https://api.stacspec.org/v1.0.0/ogcapi-features",
]


class Api(ThreadingHTTPServer):
    """A small one: landing page, collections, search by bounds and collection, paging."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = f"http://127.0.0.1:{self.server_port}"
        self.items: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.broken = False

    def landing(self) -> dict[str, Any]:
        links = [
            {"rel": "root", "href": self.root},
            {"rel": "self", "href": self.root},
            {"rel": "data", "href": f"{self.root}/collections"},
            {"rel": "search", "href": f"{self.root}/search", "method": "POST",
             "type": "application/geo+json"},
        ]  # fmt: skip
        return {
            "type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "of a test",
            "conformsTo": CONFORMS, "links": links,
        }  # fmt: skip

    def collection(self, name: str) -> dict[str, Any]:
        extent = {
            "spatial": {"bbox": [[-180, -90, 180, 90]]},
            "temporal": {"interval": [[None, None]]},
        }
        links = [
            {"rel": "root", "href": self.root},
            {"rel": "items", "href": f"{self.root}/collections/{name}/items"},
        ]
        return {
            "type": "Collection", "id": name, "stac_version": "1.0.0", "description": name,
            "license": "none", "extent": extent, "links": links,
        }  # fmt: skip

    def search(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.searches.append(asked)
        w, s, e, n = asked["bbox"]
        found = [
            item
            for item in self.items
            if item["collection"] in asked["collections"]
            and item["bbox"][0] < e and w < item["bbox"][2]
            and item["bbox"][1] < n and s < item["bbox"][3]
        ]  # fmt: skip
        start = int(asked.get("token", 0))
        links: list[dict[str, Any]] = [{"rel": "root", "href": self.root}]
        if start + PAGE < len(found):
            body = asked | {"token": start + PAGE}
            links.append(
                {"rel": "next", "href": f"{self.root}/search", "method": "POST", "body": body}
            )
        page = found[start : start + PAGE]
        return {"type": "FeatureCollection", "features": page, "links": links}


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        parse_qs(urlsplit(self.path).query)
        if not path:
            self._answer(self.server.landing())
        elif path == "/collections":
            names = sorted({item["collection"] for item in self.server.items})
            every = [self.server.collection(name) for name in names]
            self._answer({"collections": every, "links": []})
        elif path.startswith("/collections/"):
            self._answer(self.server.collection(path.split("/")[2]))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.broken:
            self.send_error(400, "no such thing")
        else:
            self._answer(self.server.search(asked))

    def _answer(self, described: dict[str, Any]) -> None:
        body = json.dumps(described).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def serve(api: Api, path: Path, collection: str = "dsm", age: int = 0) -> None:
    item = item_of(path)
    item.datetime = datetime(2020, 1, 1, tzinfo=UTC) - timedelta(days=age)
    described = item.to_dict() | {"collection": collection, "links": []}
    api.items.append(described)


def test_a_collection_is_searched_page_by_page(tmp_path: Path, api: Api) -> None:
    paths = []
    for n in range(5):
        path = tmp_path / f"{n}.tif"
        paths.append(write_heights(path, terrain(60, 16), LEFT + 80 * n, step=5.0))
        serve(api, path)
    serve(api, write_heights(tmp_path / "far.tif", terrain(60, 16), LEFT + 90_000, step=5.0))
    serve(api, write_heights(tmp_path / "other.tif", terrain(60, 72), step=5.0), "dtm")
    wanted = read(paths)
    for href in (api.root, f"{api.root}/", f"{api.root}/collections/dsm"):
        source = source_of(href, source="stac", collection="dsm")
        assert [Path(raster.href).stem for raster in source.rasters] == list("01234")
        np.testing.assert_array_equal(read_heights(source, GRID, whole(GRID.shape)), wanted)
    assert len(api.searches) == 9
    assert len(source_of(f"{api.root}/collections/dtm", source="stac").rasters) == 1


def test_the_newest_comes_first_in_whatever_order_an_api_answers(tmp_path: Path, api: Api) -> None:
    paths = [write_heights(tmp_path / f"{n}.tif", terrain(30, 36, 0.5)) for n in range(4)]
    for path, age in zip(paths, (30, 10, 20, 10), strict=True):
        serve(api, path, age=age)
    wanted = ["1", "3", "2", "0"]
    for _ in range(2):
        source = source_of(api.root, source="stac", collection="dsm")
        names = [Path(raster.href).stem for raster in source.rasters]
        assert sorted(names[:2]) == wanted[:2]
        assert names[2:] == wanted[2:]
        first, api.items = names, api.items[::-1]
        assert first == names


def test_a_region_across_the_180th_meridian_is_searched_in_two_boxes(
    tmp_path: Path, api: Api
) -> None:
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32701", always_xy=True).transform(180, -16.0)
    grid = Grid("EPSG:32701", 10.0, round(x) - 1000.0, round(y) - 1000.0, (200, 200))
    heights = terrain(120, 100)
    for name, part, left in (("w", heights[:, :50], 180 - 0.025), ("e", heights[:, 50:], -180.0)):
        path = write_heights(tmp_path / f"{name}.tif", part, left, -16.0, 5e-4, crs="EPSG:4326")
        serve(api, path)
    source = source_of(api.root, grid, source="stac", collection="dsm")
    assert len(source.rasters) == 2
    boxes = [search["bbox"] for search in api.searches]
    assert [box[2] - box[0] < 0.1 for box in boxes] == [True, True]
    found = read_heights(source, grid, whole(grid.shape))
    np.testing.assert_array_equal(found, read([tmp_path / "w.tif", tmp_path / "e.tif"], grid))


def test_what_an_api_cannot_answer(tmp_path: Path, api: Api) -> None:
    serve(api, write_heights(tmp_path / "a.tif", terrain(30, 36)))
    with pytest.raises(InputError, match=r"height\.collection, such as \['dsm'\]"):
        source_of(api.root, source="stac")
    with pytest.raises(InputError, match="no STAC item of collection 'dtm'"):
        source_of(api.root, source="stac", collection="dtm")
    far = Grid("EPSG:32610", 10.0, LEFT + 90_000, TOP, (9, 9))
    with pytest.raises(InputError, match="none on the region's ground"):
        source_of(api.root, far, source="stac", collection="dsm")
    api.broken = True
    with pytest.raises(InputError, match=rf"{api.root} cannot be read as STAC"):
        source_of(api.root, source="stac", collection="dsm")
