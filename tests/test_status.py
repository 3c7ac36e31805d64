"""`aeheight status` of a store alone: of a folder or an object store, by what the run recorded."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aeheight import store as stores
from aeheight.settings import load_region
from aeheight.steps.run import sources_asked
from aeheight.steps.stored import stored_settings
from aeheight.store import Store
from tests import s3
from tests.runs import copied, one_message, run_here, snapshot
from tests.s3 import BUCKET, Server


def told(*arguments: str | Path) -> dict:
    result = run_here("status", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_folder_tells_what_its_region_file_tells(small_run):
    before = snapshot(small_run.store)
    assert told(small_run.store) == told(small_run.path)
    for flags in ([], ["--json"]):
        one, other = (run_here("status", p, *flags) for p in (small_run.store, small_run.path))
        assert one == other
    assert snapshot(small_run.store) == before


def test_all_that_a_cube_depends_on_is_known_again(small_run):
    found, wanted = stored_settings(str(small_run.store)), load_region(small_run.path)
    assert (found.name, found.store, found.cube) == (wanted.name, wanted.store, wanted.cube)
    assert sources_asked(found) == sources_asked(wanted)
    assert found.embeddings.source == wanted.embeddings.source


@pytest.mark.parametrize("name", ["cube", "heights", "report"])
def test_what_lacks_a_receipt_is_left(small_run, regions, name):
    twin = copied(small_run, regions)
    for receipt in twin.receipts(name)[:3]:
        receipt.unlink()
    assert told(twin.store) == told(twin.path)
    step = {"cube": "ingest", "heights": "predict"}.get(name)
    if step:
        counts = told(twin.store)["steps"][step]
        assert counts["total"] - counts["done"] == 3


def test_a_run_without_heights(aeheight, regions):
    region = regions.write("bare", height=None, prior=None)
    assert aeheight("ingest", region.path, "--workers", "1").code == 0
    assert list(told(region.store)["steps"]) == ["ingest", "predict"]
    assert told(region.store) == told(region.path)


def test_no_run_there(tmp_path, small_run, regions):
    empty = tmp_path / "empty"
    empty.mkdir()
    for place in (tmp_path / "nothing", empty, "memory:///runs/none"):
        result = run_here("status", place)
        assert result.code == 2
        one_message(result.err, "there is no run at", "region file")
    assert not (tmp_path / "nothing").exists()
    half = copied(small_run, regions, "half").store
    (half / "cube.receipts" / "asked.json").unlink()
    one_message(run_here("status", half).err, "there is no run at")


def test_what_is_no_run_of_this_version(small_run, regions):
    twin = copied(small_run, regions)
    asked = twin.store / "cube.receipts" / "asked.json"
    asked.write_text(json.dumps(json.loads(asked.read_text()) | {"colour": "red"}))
    result = run_here("status", twin.store)
    assert result.code == 2
    one_message(result.err, "not of this version", "colour", "region file")


def test_other_bad_input(small_run):
    for arguments, words in (
        ((small_run.store, "--set", "model.epochs=3"), ("--set", "is a store")),
        (("foo://bucket/run",), ("foo://bucket/run", "no such kind of store")),
        (("none.yaml",), ("cannot read the region file none.yaml",)),
    ):
        result = run_here("status", *arguments)
        assert result.code == 2
        one_message(result.err, *words)


# --- an object store ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with s3.server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def environment(server, monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """With the store's address and credentials, and no connection of before."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    stores._open.cache_clear()
    stores._meet.cache_clear()


@pytest.mark.slow
def test_a_bucket_tells_the_same(environment, small_run, regions):
    uri = f"s3://{BUCKET}/status/run"
    remote, twin = Store.at(uri), copied(small_run, regions)
    for receipt in twin.receipts("heights")[:5]:
        receipt.unlink()
    for path in twin.store.rglob("*"):
        if path.is_file():
            remote.write(str(path.relative_to(twin.store)), path)
    region = regions.write("remote", store=uri)
    shutil.rmtree(twin.store)
    assert told(uri) == told(uri + "/") == told(region.path)
    assert told(uri)["store"] == uri
    counts = told(uri)["steps"]["predict"]
    assert counts["total"] - counts["done"] == 5


@pytest.mark.slow
def test_no_run_in_a_bucket_and_no_bucket(environment):
    one_message(run_here("status", f"s3://{BUCKET}/none").err, "there is no run at")
    result = run_here("status", "s3://not-there/run")
    assert result.code == 2
    one_message(result.err, "NoSuchBucket", "s3://not-there")


@pytest.mark.slow
def test_wrong_credentials_are_told_soon(environment, server):
    if not server.checks_signatures:
        pytest.skip("this server takes any credentials")
    started = time.monotonic()
    environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = run_here("status", f"s3://{BUCKET}/run")
    assert result.code == 2
    one_message(result.err, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.delenv(name)
    forget()
    result = run_here("status", f"s3://{BUCKET}/run")
    assert result.code == 2
    one_message(result.err, "no credentials", "AWS_ACCESS_KEY_ID")
    assert time.monotonic() - started < stores._FIRST_PATIENCE.total_seconds()
