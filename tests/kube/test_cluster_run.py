"""A whole run on a real cluster and a real S3 server, while pods are lost; and what fails fast.

Asked for by `make test-kube`: `KUBECONFIG` names a cluster whose nodes have the image
`localhost/aeheight:0.1.0`, and `AEHEIGHT_TEST_HOST` an address of this machine that its pods reach.
The S3 server is started here.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aeheight.models import Checkpoint
from aeheight.store import Store
from aeheight.trust import Trust
from pipelines.world import make_world
from tests import s3
from tests.kube.cluster import JOB, Space, space, until, upload
from tests.runs import small_settings
from tests.s3 import BUCKET, Server

pytestmark = [
    pytest.mark.kube,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (os.environ.get("KUBECONFIG") and os.environ.get("AEHEIGHT_TEST_HOST")),
        reason="needs a cluster: KUBECONFIG and AEHEIGHT_TEST_HOST; see make test-kube",
    ),
]
NEW = f"s3://{BUCKET}/new"
"""A store that nothing is in."""
SHARDS = 64
"""Of 64 px in a world of 512 px."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    at = os.environ["AEHEIGHT_TEST_HOST"]
    with s3.server(tmp_path_factory.mktemp("s3"), at) as running, pytest.MonkeyPatch.context() as p:
        for name, value in running.variables().items():
            p.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def region(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a small world that lies in the bucket."""
    world = make_world(tmp_path_factory.mktemp("world") / "world", size=512)
    uri = upload(world.folder, "world")
    settings = small_settings(world)
    for name, path in (
        ("embeddings", world.embeddings),
        ("height", world.height.parent),  # its GeoTIFFs
        ("prior", world.prior),
    ):
        settings[name]["href"] = f"{uri}/{path.relative_to(world.folder).as_posix()}"
    settings["height"] = settings["height"] | {"source": "raster"}
    return settings | {"name": "kube"}


@contextmanager
def opened(server: Server, folder: Path) -> Iterator[Space]:
    """A namespace with both Secrets."""
    with space(f"aeheight-{uuid.uuid4().hex[:6]}", folder, server) as found:
        found.credentials()
        found.certificates()
        yield found


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Iterator[Space]:
    with opened(server, tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, region: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, dict[str, float]]:
    """A finished run, and the seconds that each step took."""
    store = Store.at(f"s3://{BUCKET}/quiet")
    with opened(server, tmp_path_factory.mktemp("quiet")) as found:
        return store, run(found, region, store, {})


def patch(kind: str, name: str, *operations: tuple[str, str, Any]) -> dict[str, Any]:
    """As kustomize takes it, from (operation, path within the first pod's container, value)."""
    at = "/spec/template/spec/containers/0"
    told = [
        {"op": op, "path": path if path.startswith("/spec") else f"{at}/{path}", "value": value}
        for op, path, value in operations
    ]
    return {"target": {"kind": kind, "name": name}, "patch": json.dumps(told)}


def arguments(verb: str, *more: str) -> dict[str, Any]:
    """What the driver is told."""
    at = ["/etc/aeheight/region.yaml", "--scheduler", "tls://aeheight-scheduler:8786"]
    return patch("Job", JOB, ("replace", "args", [verb, *at, "--json", *more]))


ONCE = patch("Job", JOB, ("replace", "/spec/backoffLimit", 0))


def receipts(store: Store, name: str) -> int:
    """Shards done of `cube`, `heights` or `report`."""
    return sum("/r" in key and key.endswith(".json") for key in store.keys(f"{name}.receipts"))


def believe(store: Store) -> None:
    """Let the network count: what little training a test can give earns no trust."""
    found = Checkpoint.from_bytes(store.read("model/best.ckpt"))
    store.write("model/best.ckpt", replace(found, trust=Trust(0.75, 0.5)).to_bytes())


def values(store: Store) -> dict[str, bytes]:
    """Every shard of the cube and of the map, by its name."""
    wanted = ("cube.zarr/", "heights.zarr/")
    return {
        name: store.read(name)
        for name in store.keys("")
        if name.startswith(wanted) and "/c/" in name
    }


def run(
    place: Space,
    region: dict[str, Any],
    store: Store,
    losses: dict[str, Callable[[], None]],
    seconds: float = 600,
) -> dict[str, float]:
    """Ingest, train and the rest, a Job each; what to lose in each. Seconds that each took."""
    took = {}
    for step in ("ingest", "train", "run"):
        began = time.monotonic()
        place.apply(region | {"store": store.uri}, arguments(step))
        losses.get(step, lambda: None)()
        assert place.finished(seconds) == "Complete", place.said()
        took[step] = time.monotonic() - began
        if step == "train":
            believe(store)
    return took


def test_pods_that_are_lost_change_no_byte(
    place: Space,
    region: dict[str, Any],
    undisturbed: tuple[Store, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiet, known = undisturbed
    lost = []
    store = Store.at(f"s3://{BUCKET}/lossy")

    def lose(component: str) -> None:
        place.lose(component)
        lost.append(component)

    def after(name: str, count: int, *components: str) -> None:
        until(
            lambda: receipts(store, name) >= count or None, 300,
            f"no {count} shards of {name}",
        )  # fmt: skip
        for component in components:
            lose(component)

    def in_ingest() -> None:
        after("cube", 5, "worker")
        after("cube", 30, "driver")

    def in_training() -> None:
        until(lambda: store.exists("model/last.ckpt") or None, 300, "training has not begun")
        lose("driver")

    def in_the_rest() -> None:
        after("heights", 3, "worker")
        after("heights", 20, "scheduler")
        after("heights", 40, "driver", "worker")
        after("report", 10, "worker", "worker")

    losses = {"ingest": in_ingest, "train": in_training, "run": in_the_rest}
    disturbed = run(place, region, store, losses)
    with capsys.disabled():
        print(f"\nlost {', '.join(lost)}")
        for step, seconds in disturbed.items():
            print(f"{step:8} undisturbed {known[step]:5.0f} s, disturbed {seconds:5.0f} s")
    wanted, found = values(quiet), values(store)
    assert len(wanted) > 2 * SHARDS
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    one, other = (s.read_json("report/metrics.json") for s in (quiet, store))
    assert one["model"] == other["model"]
    assert one["by"] == other["by"]


def no_secret(place: Space, name: str) -> None:
    place("delete", "secret", name, "--ignore-not-found")


def other_version(place: Space) -> dict[str, Any]:
    """A patch: the workers believe that they are another release."""
    place("create", "configmap", "other", "--from-literal=sitecustomize.py="
          "import aeheight; aeheight.__version__ = '0.0.9'")  # fmt: skip
    return patch(
        "Deployment",
        "aeheight-worker",
        ("add", "/spec/template/spec/volumes/-", {"name": "other", "configMap": {"name": "other"}}),
        ("add", "volumeMounts/-", {"name": "other", "mountPath": "/etc/other"}),
        ("add", "env/-", {"name": "PYTHONPATH", "value": "/etc/other"}),
    )


BAD: dict[str, tuple[Callable[[Space, dict[str, Any]], Any], tuple[str, ...]]] = {
    "no credentials": (
        lambda place, _: no_secret(place, "aeheight-store"), ("AWS_ACCESS_KEY_ID",)
    ),
    "no certificates": (
        lambda place, region: region.update(store=NEW) or no_secret(place, "aeheight-tls"),
        ("ca.crt",),
    ),
    "wrong key": (
        lambda place, _: place.credentials(AWS_SECRET_ACCESS_KEY="wrong"), ("AWS_SECRET",)
    ),
    "no such store": (
        lambda place, _: place.credentials(AWS_ENDPOINT_URL="http://10.99.0.1:9"),
        ("10.99.0.1:9", "is the store up"),
    ),
    "no such bucket": (
        lambda _, region: region.update(store="s3://nowhere/run"), ("nowhere", "create the bucket")
    ),
    "no GPU": (
        lambda _, region: region["predict"].update(device="gpu") or region.update(store=NEW),
        ("no worker declares a GPU",),
    ),
    "another version": (
        lambda place, region: region.update(store=NEW) or other_version(place),
        ("aeheight 0.0.9", "0.1.0"),
    ),
    "another cube": (
        lambda _, region: region["cube"].update(shard=128), ("--overwrite", "cube.shard")
    ),
}  # fmt: skip


MAY_PASS = {"no such store"}
"""Worth another attempt, which the base's Job makes six times."""


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_ends_the_job_with_the_reason(
    place: Space, region: dict[str, Any], undisturbed: tuple[Store, dict[str, float]], what: str
) -> None:
    change, words = BAD[what]
    mine = deepcopy(region) | {"store": undisturbed[0].uri}
    more = change(place, mine)
    began = time.monotonic()
    place.apply(mine, ONCE, arguments("run", "--patience", "60"), *([more] if more else []))
    assert place.finished(300) == "Failed"
    code, message = place.last_words()
    assert code == (1 if what in MAY_PASS else 2), message
    for word in words:
        assert word in message, f"{time.monotonic() - began:.0f} s: {message}"
