"""Object stores that fail: a real S3 server behind a faulty proxy, and answers that stay right."""

import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store
from rasterio.vrt import WarpedVRT

from aeheight import store as stores
from aeheight.cube import open_tree
from aeheight.errors import InputError
from aeheight.receipts import Ledger, lease
from aeheight.settings import AccessSettings
from aeheight.sources import files
from aeheight.sources.files import find_files, opened, read_raster
from aeheight.store import Store
from tests import s3
from tests.s3 import BUCKET, FAULTS, Chaos, Fault, Server
from tests.tifs import random_codes, region, write_tile
from tests.trees import TEMPLATE, bytes_of, full_tree

pytestmark = pytest.mark.slow
ANYONE = AccessSettings(anonymous=True)
CODES = random_codes(np.random.default_rng(3), 48, 48)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3.server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="session")
def proxy(server: Server) -> Iterator[Chaos]:
    with Chaos(server.url, late=0.3).running() as running:
        yield running


@pytest.fixture
def chaos(proxy: Chaos, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chaos]:
    """The proxy, with the environment set for it, and short pauses."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GDAL_HTTP"))]:
        monkeypatch.delenv(name)
    for name, value in server.variables(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    short = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(seconds=0.2)}
    monkeypatch.setattr(stores, "_BACKOFF", {**short, "base": 2})
    monkeypatch.setattr(stores, "_FIRST_PATIENCE", timedelta(seconds=3))
    monkeypatch.setitem(stores._TIMEOUTS, "read_timeout", "100ms")
    monkeypatch.setitem(files._REMOTE, "GDAL_HTTP_RETRY_DELAY", "0.02")
    monkeypatch.setitem(files._REMOTE, "GDAL_HTTP_TIMEOUT", "1")
    monkeypatch.setattr(files, "_PAUSES", (0.01,) * 12)
    monkeypatch.setattr(files, "_MEND", 12)
    forget()
    proxy.begin("none")
    yield proxy
    proxy.begin("none")
    forget()


def forget() -> None:
    """Open every store anew."""
    stores._open.cache_clear()
    stores._meet.cache_clear()
    files._answered.clear()


@pytest.fixture
def store(chaos: Chaos, request: pytest.FixtureRequest) -> Store:
    """A folder of the bucket of the test's own."""
    name = request.node.name.translate(str.maketrans("[]-", "___"))
    return Store.at(f"s3://{BUCKET}/{name}")


@pytest.fixture
def public(server: Server, chaos: Chaos) -> S3Store:
    """The bucket of a writer who lets all read."""
    everyone: Any = {"allow_http": True, "default_headers": {"x-amz-acl": "public-read"}}
    return S3Store(
        BUCKET, endpoint=server.url, region="us-east-1", access_key_id=s3.KEY,
        secret_access_key=s3.SECRET, client_options=everyone,
    )  # fmt: skip


def bucket_of(server: Server) -> S3Store:
    return S3Store(
        BUCKET, endpoint=server.url, region="us-east-1", access_key_id=s3.KEY,
        secret_access_key=s3.SECRET, client_options={"allow_http": True},
    )  # fmt: skip


def one_line(error: BaseException, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("fault", FAULTS)
def test_objects_survive(chaos: Chaos, store: Store, fault: Fault) -> None:
    rng = np.random.default_rng(0)
    objects = {f"a/{n}": rng.bytes(10 ** (n % 6)) for n in range(12)}
    chaos.begin(fault)
    for key, data in objects.items():
        store.write(key, b"before")
        store.write(key, data)
        assert store.read(key) == data
    assert all(store.create(f"b/{n}", f"mine {n}".encode()) for n in range(6))
    assert not any(store.create(f"b/{n}", b"another's") for n in range(6))
    store.copy("a/5", "c/5")
    assert store.read("c/5") == objects["a/5"]
    assert sorted(store.keys("a")) == sorted(objects)
    store.remove_many(["a/0", "a/1", "never"])
    store.remove("b")
    assert sorted(store.keys()) == sorted({*objects, "c/5"} - {"a/0", "a/1"})
    assert not store.exists("a/0")
    assert store.exists("a/2")
    with pytest.raises(FileNotFoundError):
        store.read("a/0")
    assert chaos.hits > 10


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every object of a tree written to a disk; its values are the first of the generator's."""
    return bytes_of(made_again(Store.at(tmp_path_factory.mktemp("quiet") / "cube.zarr")))


def made_again(store: Store) -> Any:
    """A tree whose values and identity are always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.trees.RNG", np.random.default_rng(11))
        patch.setattr("uuid.uuid4", type("Token", (), {"hex": "0" * 32}))
        return full_tree(store)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tree_survives(chaos: Chaos, store: Store, fault: Fault, quiet: dict[str, bytes]) -> None:
    chaos.begin(fault)
    made_again(store)
    assert bytes_of(open_tree(store)) == quiet
    assert chaos.hits > 10
    tree = open_tree(store)
    for layer in TEMPLATE.layers:
        for shard in TEMPLATE.shards(layer.name):
            tree.read(shard.group, shard.layer, shard.year, shard.region)


def test_what_zarr_lists_and_deletes(chaos: Chaos, store: Store) -> None:
    chaos.begin("cut")
    root = zarr.create_group(store.zarr())
    for name in ("a", "b", "c"):
        root.create_group(f"{name}/deep").create_array("x", shape=(9,), chunks=(1,), dtype="int8")[
            :
        ] = 7
    assert sorted(root.group_keys()) == ["a", "b", "c"]
    del root["b"]
    assert sorted(zarr.open_group(store.zarr()).group_keys()) == ["a", "c"]
    zarr.create_group(store.zarr(), overwrite=True)
    assert list(store.keys()) == ["zarr.json"]


def test_a_body_that_stalls_is_read_again(chaos: Chaos, store: Store) -> None:
    data = np.random.default_rng(0).bytes(12_000_000)
    chaos.begin("cut")
    store.write("large", data)
    for _ in range(4):
        assert store.read("large") == data
    assert chaos.hits


def test_an_upload_whose_last_answer_is_cut_off_is_sent_again(
    chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).bytes(12_000_000)  # in parts, begun and ended by a POST
    monkeypatch.setattr(chaos, "method", "POST")
    monkeypatch.setattr(chaos, "share", 0.5)
    chaos.begin("cut")
    for number in range(4):
        store.write("large", data[number:])
        assert store.read("large") == data[number:]
    assert chaos.hits


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_survives(chaos: Chaos, store: Store, tmp_path: Path, fault: Fault) -> None:
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(12_000_000))
    chaos.begin(fault)
    store.write("large", path)
    found = list(store.pieces("large", 5_000_000))
    assert [len(piece) for piece in found] == [5_000_000, 5_000_000, 2_000_000]
    assert b"".join(found) == path.read_bytes()
    with pytest.raises(FileNotFoundError):
        next(store.pieces("none"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_raster_survives(
    chaos: Chaos, store: Store, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = write_tile(tmp_path / "tile.tiff", CODES)
    with opened(str(tile)) as dataset:
        local = dataset.read()
    store.write("2021/10N/tile.tiff", tile.read_bytes())
    # GDAL's own threads would make zeros of blocks that fail.
    monkeypatch.setenv("GDAL_NUM_THREADS", "4")
    monkeypatch.setattr(chaos, "late", 1.2)
    chaos.begin(fault)
    for _ in range(4):
        href = f"{store.uri}/2021/10N/tile.tiff"
        assert np.array_equal(read_raster(href, lambda dataset: dataset.read()), local)
    assert chaos.hits


def test_a_warped_raster_survives(chaos: Chaos, store: Store, tmp_path: Path) -> None:
    tile = write_tile(tmp_path / "tile.tiff", CODES)

    def warped(dataset: Any) -> Any:
        with WarpedVRT(dataset, crs="EPSG:4326") as vrt:
            return vrt.read(1)

    store.write("tile.tiff", tile.read_bytes())
    chaos.begin("cut")
    assert np.array_equal(
        read_raster(f"{store.uri}/tile.tiff", warped), read_raster(str(tile), warped)
    )


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
    "key": ({"AWS_ACCESS_KEY_ID": "wrong"}, "InvalidAccessKeyId"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_credentials_fail_at_once(
    server: Server, chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if not server.checks_signatures:
        pytest.skip("this server checks no signature")
    variables, said = WRONG[wrong]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    doings = [
        lambda: store.read("k"),
        lambda: store.write("k", b"1"),
        lambda: store.create("k", b"1"),
        lambda: store.exists("k"),
        lambda: list(store.keys()),
        lambda: store.remove_many(["k"]),
        store.zarr,
        lambda: read_raster(f"{store.uri}/tile.tiff", lambda dataset: dataset.read()),
        lambda: find_files(region("x"), f"{store.uri}/", "embeddings"),
    ]
    for doing in doings:
        chaos.begin("none")
        with pytest.raises(InputError) as caught:
            doing()
        one_line(caught.value, f"s3://{BUCKET}", said, "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL")
        assert chaos.requests <= 4


def test_credentials_that_are_revoked_in_the_midst(
    server: Server, chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not server.checks_signatures:
        pytest.skip("this server checks no signature")
    store.write("k", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    stores._open.cache_clear()
    for doing in (store.read, store.exists, store.remove, lambda key: store.copy(key, "l")):
        chaos.begin("none")
        with pytest.raises(InputError) as caught:
            doing("k")
        one_line(caught.value, store.uri, "403 Forbidden", "AWS_SECRET_ACCESS_KEY")
        assert chaos.requests == 1


def test_no_credentials(chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="there are no credentials") as caught:
        store.read("k")
    one_line(caught.value, f"s3://{BUCKET}", "AWS_ACCESS_KEY_ID", "anonymous: true")
    assert chaos.requests == 0


def test_no_such_bucket(chaos: Chaos) -> None:
    for doing in (
        lambda store: store.read("k"),
        lambda store: store.write("k", b"1"),
        lambda store: store.exists("k"),
        lambda store: list(store.keys()),
        lambda store: store.zarr(read_only=True),
        lambda store: read_raster(f"{store.uri}/tile.tiff", lambda dataset: dataset.read()),
    ):
        with pytest.raises(InputError) as caught:
            doing(Store.at("s3://missing/run"))
        one_line(caught.value, "s3://missing", "NoSuchBucket", "create the bucket")


def test_nothing_answers(chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(stores, "_FIRST_PATIENCE", timedelta(seconds=0.5))
    monkeypatch.setitem(files._REMOTE, "GDAL_HTTP_MAX_RETRY", "2")
    monkeypatch.setattr(files, "_PAUSES", (0.01,))
    with pytest.raises(OSError, match="cannot open") as caught:
        store.read("k")
    one_line(caught.value, f"s3://{BUCKET}", "127.0.0.1:9", "is the store up")
    with pytest.raises(OSError, match="cannot be read") as caught:
        read_raster(f"{store.uri}/tile.tiff", lambda dataset: dataset.read())
    one_line(caught.value, f"{store.uri}/tile.tiff", "127.0.0.1:9", "is the store up")


def test_a_public_object_is_read_without_credentials(
    server: Server, chaos: Chaos, public: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tile = write_tile(tmp_path / "tile.tiff", CODES)
    obstore.put(public, "open/tile.tiff", tile.read_bytes())
    obstore.put(bucket_of(server), "closed/tile.tiff", tile.read_bytes())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert Store.at(f"s3://{BUCKET}/open", ANYONE).read("tile.tiff") == tile.read_bytes()
    with opened(f"s3://{BUCKET}/open/tile.tiff", ANYONE) as dataset, opened(str(tile)) as local:
        assert np.array_equal(dataset.read(), local.read())
    if server.checks_signatures:
        with pytest.raises(InputError, match="403 Forbidden AccessDenied"):
            Store.at(f"s3://{BUCKET}/closed", ANYONE).read("tile.tiff")
        with pytest.raises(InputError, match="403 Forbidden") as caught:
            read_raster(f"s3://{BUCKET}/closed/tile.tiff", lambda d: d.read(), ANYONE)
        one_line(caught.value, f"s3://{BUCKET}/closed/tile.tiff", "AWS_ACCESS_KEY_ID")


def test_what_cannot_be_opened(chaos: Chaos, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MEND", 1)
    store.write("text.tiff", b"no raster")
    with pytest.raises(InputError, match="there is no such file"), opened(f"{store.uri}/none.tiff"):
        pass
    with pytest.raises(InputError, match="opened as a raster"), opened(f"{store.uri}/text.tiff"):
        pass


def test_a_raster_that_appears_later(chaos: Chaos, store: Store, tmp_path: Path) -> None:
    href = f"{store.uri}/tile.tiff"
    with pytest.raises(InputError, match="there is no such file"), opened(href):
        pass
    store.write("tile.tiff", write_tile(tmp_path / "tile.tiff", CODES).read_bytes())
    with opened(href) as dataset:
        assert dataset.count == len(CODES)


def test_folders_and_globs(chaos: Chaos, store: Store) -> None:
    names = ["2021/10N/a.tiff", "2021/10N/a.vrt", "2021/10N/b.vrt", "2021/11N/c.TIF", "index.csv"]
    for name in [*names, "2022/10N/a.tiff"]:
        store.write(name, b"1")

    def found(href: str) -> list[str]:
        hrefs = find_files(region("x"), f"{store.uri}/{href}", "embeddings")
        return [found.removeprefix(f"{store.uri}/") for found in hrefs]

    year = ["2021/10N/a.tiff", "2021/10N/b.vrt", "2021/11N/c.TIF"]
    assert found("2021/") == found("2021") == year
    assert found("2021/10N/*") == year[:2]
    assert found("2021/*/*.TIF") == found("202?/11[NS]/*") == year[2:]
    assert found("**/a.tiff") == found("*/10N/*.tiff") == ["2021/10N/a.tiff", "2022/10N/a.tiff"]
    assert found("**/*.vrt") == ["2021/10N/a.vrt", "2021/10N/b.vrt"]
    assert found("2021/10N/a.vrt") == ["2021/10N/a.vrt"]
    with pytest.raises(InputError, match="names no raster"):
        found("2023/*.tiff")


def test_access_travels(chaos: Chaos) -> None:
    store = Store.at(f"s3://{BUCKET}/x/", ANYONE)
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert hash(again) == hash(store)
    assert again.child("y").access == ANYONE
    assert Store.at(f"s3://{BUCKET}/x", AccessSettings()) == Store.at(f"s3://{BUCKET}/x")
    assert len(pickle.dumps(store)) < 700
    assert b"AKHEIGHT" not in pickle.dumps(Store.at(f"s3://{BUCKET}/x").zarr())


def test_of_many_creators_one_wins(chaos: Chaos, store: Store) -> None:
    chaos.begin("lost")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("lease", str(n).encode()), range(24)))
    assert sum(won) == 1
    assert store.read("lease") == str(won.index(True)).encode()


@pytest.mark.parametrize("fault", ["lost", "cut", "503"])
def test_a_run_is_held_and_its_receipts_kept(chaos: Chaos, store: Store, fault: Fault) -> None:
    chaos.begin(fault)
    with lease(store):
        with pytest.raises(InputError, match="held by another driver"), lease(store):
            pass
        ledger = Ledger(store.child("cube.receipts")).begin({"a": 1})
        assert not ledger.done()
    assert not store.exists("lease.json")
    assert threading.active_count() < 50
