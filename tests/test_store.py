"""Objects in a folder: whole or absent, put if absent, errors in one line that name the object."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.errors import InputError
from aeheight.settings import AccessSettings
from aeheight.sources.files import gdal_options
from aeheight.store import Store
from tests.trees import full_disk

PART = st.text("abcdefgh0123456789._-", min_size=1, max_size=8).filter(
    lambda part: part.strip(".") and not part.startswith("-")
)
KEY = st.lists(PART, min_size=2, max_size=3).map("/".join)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "a" / "b")


def one_line(error: BaseException, *names: str) -> None:
    text = str(error)
    assert "\n" not in text
    for name in names:
        assert name in text


def test_writes_and_reads_back(store: Store) -> None:
    store.write("x/y.json", b"one")
    assert store.read("x/y.json") == b"one"
    store.write("x/y.json", b"two")
    assert store.read("x/y.json") == b"two"
    assert (Path(store.uri) / "x" / "y.json").read_bytes() == b"two"


def test_empty_object(store: Store) -> None:
    store.write("nothing", b"")
    assert store.exists("nothing")
    assert store.read("nothing") == b""


def test_create_is_put_if_absent(store: Store) -> None:
    assert store.create("lease", b"mine")
    assert not store.create("lease", b"theirs")
    assert store.read("lease") == b"mine"


def test_create_knows_its_own_object_after_a_lost_answer(store: Store) -> None:
    assert store.create("lease", b"mine")
    assert store.create("lease", b"mine")


def test_of_many_creators_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("lease", str(n).encode()), range(32)))
    assert sum(won) == 1
    assert store.read("lease") == str(won.index(True)).encode()


def test_exists(store: Store) -> None:
    assert not store.exists("x/y")
    store.write("x/y", b"1")
    assert store.exists("x/y")
    assert not store.exists("x")


def test_keys_below_a_folder_not_below_a_prefix_of_its_name(store: Store) -> None:
    for key in ("run/a", "run/b/c", "run2/a", "top"):
        store.write(key, b"1")
    assert sorted(store.keys()) == ["run/a", "run/b/c", "run2/a", "top"]
    assert sorted(store.keys("run")) == ["run/a", "run/b/c"]
    assert sorted(store.child("run").keys()) == ["a", "b/c"]
    assert list(store.keys("none")) == []


def test_keys_over_many_pages(store: Store) -> None:
    wanted = [f"n/{number:04d}" for number in range(230)]
    for key in wanted:
        store.write(key, b"1")
    assert sorted(store.keys("n")) == wanted


def test_remove_object_folder_and_all(store: Store) -> None:
    for key in ("run/a", "run/b/c", "run2/a", "top"):
        store.write(key, b"1")
    store.remove("top")
    store.remove("run")
    assert sorted(store.keys()) == ["run2/a"]
    store.remove()
    assert list(store.keys()) == []
    store.write("again", b"1")
    assert list(store.keys()) == ["again"]


def test_removing_nothing_is_no_error(store: Store) -> None:
    store.remove("none")
    store.remove()


def test_looking_makes_no_folder(store: Store) -> None:
    assert not store.exists("x")
    assert list(store.keys()) == []
    with pytest.raises(FileNotFoundError):
        store.read("x")
    store.remove()
    assert not Path(store.uri).exists()


def test_a_missing_object_is_named_in_one_line(store: Store) -> None:
    store.write("there", b"1")
    with pytest.raises(FileNotFoundError) as caught:
        store.read("x/gone.json")
    one_line(caught.value, store.uri, "x/gone.json")


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store.at(tmp_path / "file" / below)
    for write in (store.write, store.create):
        with pytest.raises(OSError, match="cannot write") as caught:
            write("k.json", b"1")
        one_line(caught.value, store.uri, "k.json")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_the_old_object_whole(store: Store) -> None:
    store.write("k", b"old")
    with full_disk(1000):
        for write in (store.write, store.create):
            with pytest.raises(OSError, match="cannot write") as caught:
                write("new", b"x" * 5000)
            one_line(caught.value, store.uri, "new", "File too large")
        with pytest.raises(OSError, match="cannot write"):
            store.write("k", b"x" * 5000)
    assert store.read("k") == b"old"
    assert list(store.keys()) == ["k"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="no right"):
            Store.at(tmp_path / "store").write("k", b"1")
    finally:
        tmp_path.chmod(0o700)


def test_a_scheme_that_nothing_knows() -> None:
    with pytest.raises(InputError, match="no such kind of store") as caught:
        Store.at("nowhere://bucket/prefix").read("k")
    one_line(caught.value, "nowhere://bucket/prefix")


def test_a_bucket_without_a_network() -> None:
    """A URI goes through the same door; the memory store stands in for a bucket."""
    store = Store.at("memory:///prefix")
    assert not store.is_local
    assert store.create("k", b"1")
    assert not store.create("k", b"2")
    assert store.read("k") == b"1"
    with pytest.raises(FileNotFoundError) as caught:
        store.read("gone")
    one_line(caught.value, "memory:///prefix", "gone")
    store.remove()
    assert not store.exists("k")


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.at("runs/demo/")
    assert store.uri == str(tmp_path / "runs" / "demo")
    monkeypatch.chdir("/")
    store.write("k", b"1")
    assert (tmp_path / "runs" / "demo" / "k").exists()


@pytest.mark.parametrize(
    ("given_uri", "uri"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("file:///data/run", "/data/run"),
        (Path("/data/run"), "/data/run"),
    ],
)
def test_uris(given_uri: str | Path, uri: str) -> None:
    assert Store.at(given_uri).uri == uri


def test_child() -> None:
    assert Store.at("s3://bucket/run").child("cube.zarr").uri == "s3://bucket/run/cube.zarr"


def test_travels_as_its_uri(store: Store) -> None:
    store.write("k", b"1")
    data = pickle.dumps(store)
    assert len(data) < 300
    again = pickle.loads(data)
    assert again == store
    assert again.read("k") == b"1"


def test_zarr_reads_what_zarr_wrote(store: Store) -> None:
    zarr.create_group(store.zarr()).create_array("a", shape=(4,), dtype="int8")[:] = 7
    group = zarr.open_group(store.zarr(read_only=True), mode="r")
    assert group["a"][:].tolist() == [7] * 4
    with pytest.raises(ValueError, match="read-only"):
        group["a"][:] = 1


@given(objects=st.dictionaries(KEY, st.binary(max_size=50), max_size=6))
@settings(max_examples=30, deadline=None)
def test_keys_are_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, objects: dict[str, bytes]
) -> None:
    # An object store may hold both `a` and `a/b`; a folder cannot.
    keys = {k for k in objects if not any(o.startswith(f"{k}/") for o in objects)}
    store = Store.at(tmp_path_factory.mktemp("store"))
    for key in keys:
        store.write(key, objects[key])
    assert set(store.keys()) == keys
    assert {key: store.read(key) for key in keys} == {key: objects[key] for key in keys}
    store.remove()
    assert not any(map(store.exists, keys))


def test_copy_is_whole_and_of_its_own(store: Store) -> None:
    store.write("a/x", b"one")
    store.copy("a/x", "b/y")
    store.write("a/x", b"two")
    assert store.read("b/y") == b"one"
    store.copy("a/x", "b/y")
    assert store.read("b/y") == b"two"
    with pytest.raises(FileNotFoundError) as caught:
        store.copy("a/none", "b/z")
    one_line(caught.value, store.uri, "a/none")
    assert sorted(store.keys()) == ["a/x", "b/y"]


def test_removes_just_these(store: Store) -> None:
    store.remove_many(["never"])
    assert not Path(store.uri).exists()
    keys = [f"n/{number}" for number in range(12)]
    for key in [*keys, "left"]:
        store.write(key, b"1")
    store.remove_many([*keys[:6], "absent", *keys[6:]])
    assert list(store.keys()) == ["left"]
    store.remove_many([])


def test_what_vanishes_while_it_is_created(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's object was there, and is gone before it can be compared: it was not ours."""
    store.write("lease", b"theirs")
    read = Store.read

    def vanish(self: Store, key: str) -> bytes:
        self.remove(key)
        return read(self, key)

    monkeypatch.setattr(Store, "read", vanish)
    assert not store.create("lease", b"mine")


def test_access_is_part_of_the_store() -> None:
    public = AccessSettings(anonymous=True)
    store = Store.at("s3://bucket/run", public)
    assert store != Store.at("s3://bucket/run")
    assert store.child("cube.zarr").access == public
    assert pickle.loads(pickle.dumps(store)) == store
    assert hash(store) == hash(Store.at("s3://bucket/run/", public))
    assert Store.at("s3://bucket/run", AccessSettings()) == Store.at("s3://bucket/run")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("access", [None, AccessSettings(anonymous=True)])
def test_the_web_needs_no_credentials(tmp_path: Path, access: AccessSettings | None) -> None:
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "index.csv").write_bytes(b"a,b")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        store = Store.at(f"http://127.0.0.1:{server.server_port}/tiles", access)
        assert store.read("index.csv") == b"a,b"
        with pytest.raises(FileNotFoundError):
            store.read("other.csv")
        server.shutdown()


def test_who_pays_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    with pytest.raises(InputError, match="GOOGLE_CLOUD_PROJECT"):
        Store.at("gs://bucket", AccessSettings(requester_pays=True)).read("k")


@pytest.mark.parametrize(
    ("variables", "access", "wanted"),
    [
        ({}, AccessSettings(), {"AWS_S3_ENDPOINT": None, "AWS_NO_SIGN_REQUEST": None}),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:7480/"},
            AccessSettings(),
            {"AWS_S3_ENDPOINT": "127.0.0.1:7480", "AWS_HTTPS": "NO"},
        ),
        (
            {"AWS_ENDPOINT_URL": "http://other", "AWS_ENDPOINT_URL_S3": "https://s3.example.org"},
            AccessSettings(region="eu-west-3", requester_pays=True),
            {
                "AWS_S3_ENDPOINT": "s3.example.org",
                "AWS_HTTPS": "YES",
                "AWS_VIRTUAL_HOSTING": "FALSE",
                "AWS_REGION": "eu-west-3",
                "AWS_REQUEST_PAYER": "requester",
            },
        ),
        (
            {"AWS_ENDPOINT_URL": "http://one", "AWS_S3_ENDPOINT": "two", "GDAL_NUM_THREADS": "4"},
            AccessSettings(anonymous=True),
            # The user's own word; but threads would make zeros of what fails.
            {"AWS_S3_ENDPOINT": None, "AWS_NO_SIGN_REQUEST": "YES", "GDAL_NUM_THREADS": "1"},
        ),
    ],
)
def test_gdal_is_told_the_same(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    access: AccessSettings,
    wanted: dict[str, str | None],
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = gdal_options("s3://bucket/tile.tiff", access)
    assert {name: told.get(name) for name in wanted} == wanted
    assert gdal_options("/data/tile.tiff", access) == {}
