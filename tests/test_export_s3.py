"""An export into an object store by two workers, killed and taken up: the bytes as on a disk."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aeheight import store as stores
from aeheight.store import Store
from tests import s3
from tests.runs import Region, run_here
from tests.s3 import BUCKET
from tests.test_calibrate import EAST, WEST, Map, make_map
from tests.test_export_area import area

pytestmark = pytest.mark.slow
ALL = (
    *("--set", "export.tile=60", "--set", "export.block=128"),
    *("--set", "export.crs=EPSG:3310", "--set", "export.pyramids=true"),
)
SMALL = area([-120.2, 38.57, -119.8, 38.6])


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which an S3 store can be used."""
    with s3.server(tmp_path_factory.mktemp("s3")) as server:
        known = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        yield known | server.variables() | {
            "AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip


@pytest.fixture
def remote(variables, monkeypatch) -> Iterator[Store]:
    """A place in the bucket, which this process can open too."""
    for name, value in variables.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    stores._open.cache_clear()
    stores._meet.cache_clear()
    yield Store.at(f"s3://{BUCKET}/run")
    stores._open.cache_clear()
    stores._meet.cache_clear()


@pytest.fixture(scope="module")
def done(tmp_path_factory, scheduler) -> Map:
    """The export on a disk."""
    made = make_map(tmp_path_factory.mktemp("disk"), grids=(WEST, EAST), reference=True)
    for asked in (ALL, SMALL):
        result = run_here("export", made.region.path, *asked, "--scheduler", scheduler)
        assert result.code == 0, result.err
    return made


def moved(made: Map, folder: Path, remote: Store) -> Region:
    """The same map in the store, not exported."""
    for name in ("heights.zarr", "heights.receipts", "cube.zarr", "cube.receipts"):
        for path in (made.region.store / name).rglob("*"):
            if path.is_file():
                remote.write(str(path.relative_to(made.region.store)), path)
    region = Region(folder / "remote.yaml", made.region.settings | {"store": remote.uri})
    region.path.write_text(yaml.safe_dump(region.settings))
    return region


def receipts(remote: Store) -> int:
    """How many pieces are done: `~` stands before what each was made from."""
    return sum("~" in key for key in remote.keys("export.receipts") if key.endswith(".json"))


def test_the_same_bytes_as_on_a_disk(done, tmp_path, remote, variables, command):
    region = moved(done, tmp_path, remote)
    verb = [*command, "export", str(region.path), "--workers", "2"]
    process = subprocess.Popen([*verb, *ALL], env=variables, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while receipts(remote) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = receipts(remote)
    assert finished >= 5
    assert not remote.exists("export/collection.json")
    for asked in (ALL, SMALL):
        again = subprocess.run(
            [*verb, *asked], env=variables, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stderr
        if asked == ALL:
            assert int(again.stdout.split(" done before")[0].split()[-1]) >= finished
    root = done.region.store / "export"
    wanted = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    place = remote.child("export")
    found = {key: bytes(place.read(key)) for key in place.keys()}  # noqa: SIM118
    assert found.keys() == wanted.keys()
    assert [key for key, data in found.items() if data != wanted[key]] == []
    checked = subprocess.run(
        [*command, "verify", str(region.path), "--workers", "2"],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "area " in checked.stdout
