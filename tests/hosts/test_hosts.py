"""A map made on several hosts over mutual TLS, and what may happen to each of them.

Whatever happens, the bytes of the map are those of an undisturbed run.
"""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aeheight import __version__
from pipelines.fault_runs import differing
from tests.hosts.network import certificates, lacking, tls
from tests.hosts.site import ROOT, TTL, WORKERS, Command, Site, site, wait_for
from tests.runs import Region, Regions, copied

_LACKING = lacking()
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(_LACKING is not None, reason=str(_LACKING)),
]
SHARDS = 16
DWELL = 0.5


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("hosts")) as there:
        yield there


@pytest.fixture
def unmapped(regions: Regions, small_run: Region) -> Region:
    """The small run without its map."""
    region = copied(small_run, regions)
    for made in (region.heights, region.store / "heights.receipts"):
        shutil.rmtree(made)
    return region


def begun(hosts: Site, region: Region) -> Command:
    """A driver, once every worker computes and some shards are done."""
    driver = hosts.drive("predict", region.path)

    def amid() -> bool:
        assert driver.alive(), driver.said()
        return len(region.receipts("heights")) >= 2 and all(
            hosts.noted("begin", name) for name in WORKERS
        )

    wait_for(amid, "every worker to begin")
    return driver


def same_map(region: Region, sound: Region) -> None:
    assert not differing(sound.heights, region.heights)
    assert len(region.receipts("heights")) == SHARDS


def finished(driver: Command, region: Region, sound: Region, done: int = SHARDS) -> str:
    code, said = driver.end()
    assert code == 0, said
    assert f"{done} shards done" in said
    assert "Traceback" not in said
    same_map(region, sound)
    return said


def tell(what: str, since: float) -> None:
    print(f"\n{what}: {time.monotonic() - since:.1f} s", flush=True)


def refused(command: Command, *words: str, code: int = 2) -> str:
    """One clear message, and no traceback."""
    found, said = command.end()
    assert found == code, said
    assert "Traceback" not in said
    assert said.count("aeheight: ") == 1, said
    for word in words:
        assert word in said
    return said


# --- nothing happens ----------------------------------------------------------------------------


def test_undisturbed(hosts: Site, unmapped: Region, small_run: Region) -> None:
    """The bytes that workers of this machine make."""
    began = time.monotonic()
    hosts.whole()
    tell("scheduler and three workers up", began)
    hosts.dwell(0)
    driver = hosts.drive("predict", unmapped.path)
    finished(driver, unmapped, small_run)
    tell("undisturbed map", driver.began)
    assert set(hosts.noted("begin").values()) == {1}


# --- workers ------------------------------------------------------------------------------------


def test_a_worker_is_killed(hosts: Site, unmapped: Region, small_run: Region) -> None:
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["one"].kill()
    struck = time.monotonic()
    finished(driver, unmapped, small_run)
    tell("a worker killed -9, to the end of the map", struck)
    assert set(hosts.noted("end")) == set(hosts.noted("begin"))


def test_a_worker_is_told_to_stop(hosts: Site, unmapped: Region, small_run: Region) -> None:
    """SIGTERM alone: what it was computing is computed elsewhere."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["two"].process.send_signal(signal.SIGTERM)
    struck = time.monotonic()
    hosts.running["two"].end()
    tell("a worker ended by SIGTERM", struck)
    finished(driver, unmapped, small_run)
    tell("a worker ended by SIGTERM, to the end of the map", struck)


def test_a_worker_retires_first(hosts: Site, unmapped: Region, small_run: Region) -> None:
    """Then no shard is computed twice."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    struck = time.monotonic()
    told = hosts.start(
        "three", "aeheight.retire", "--scheduler", hosts.address, "--name", "three"
    ).end()
    assert told == (0, "three is retired\n")
    tell("retired", struck)
    before = hosts.noted("begin", "three")
    assert hosts.noted("end", "three") == before
    hosts.running["three"].process.send_signal(signal.SIGTERM)
    hosts.running["three"].end()
    finished(driver, unmapped, small_run)
    assert hosts.noted("begin", "three") == before
    assert set(hosts.noted("begin").values()) == {1}


@pytest.mark.parametrize("how", ["cut off", "frozen"])
def test_a_silent_worker(hosts: Site, unmapped: Region, small_run: Region, how: str) -> None:
    """Its shards go elsewhere once it has been silent for the time it may; and it comes back."""
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    worker = hosts.running["one"]
    if how == "frozen":
        worker.process.send_signal(signal.SIGSTOP)
    else:
        hosts.hosts["one"].cut()
    struck = time.monotonic()
    try:
        finished(driver, unmapped, small_run)
        tell(f"a worker {how} (TTL {TTL} s), to the end of the map", struck)
        assert time.monotonic() - struck < 4 * TTL
    finally:
        worker.process.send_signal(signal.SIGCONT)
        hosts.hosts["one"].plug()
    struck = time.monotonic()
    wait_for(lambda: worker.said().count("Registered to:") > 1 or not worker.alive(), "its return")
    tell(f"it {'came back' if worker.alive() else 'ended'} after", struck)
    time.sleep(1)  # what it still holds does no harm
    same_map(unmapped, small_run)


# --- scheduler and driver -----------------------------------------------------------------------


def test_the_scheduler_is_lost(hosts: Site, unmapped: Region, small_run: Region) -> None:
    hosts.whole().dwell(DWELL)
    driver = begun(hosts, unmapped)
    hosts.running["scheduler"].kill()
    struck = time.monotonic()
    refused(driver, "the scheduler went away", "run again", code=1)
    tell("a scheduler killed, the driver ended after", struck)
    wait_for(lambda: not any(hosts.running[name].alive() for name in WORKERS), "the workers' end")
    done = len(unmapped.receipts("heights"))
    hosts.whole().dwell(0)
    tell("scheduler and workers are there again", struck)
    finished(hosts.drive("predict", unmapped.path), unmapped, small_run, SHARDS - done)
    tell("the same command went on to the end of the map", struck)


def test_the_driver_is_killed(hosts: Site, unmapped: Region, small_run: Region) -> None:
    hosts.whole().dwell(DWELL)
    begun(hosts, unmapped).kill()
    struck = time.monotonic()
    driver = hosts.drive("predict", unmapped.path)
    code, said = driver.end()
    assert code == 0, said
    same_map(unmapped, small_run)
    tell("a driver killed -9 and run again, to the end of the map", struck)


# --- who is refused -----------------------------------------------------------------------------


def test_without_a_certificate(hosts: Site, unmapped: Region) -> None:
    hosts.whole()
    bare = dict.fromkeys(tls(Path()))
    refused(hosts.drive("predict", unmapped.path, env=bare), "TLS", "CERT", hosts.address)


def test_with_a_certificate_that_is_not_there(hosts: Site, unmapped: Region) -> None:
    refused(hosts.drive("predict", unmapped.path, env=tls(Path("/nowhere"))), "/nowhere/ca.crt")


def test_without_encryption(hosts: Site, unmapped: Region) -> None:
    """Whether the driver's settings ask for it or not."""
    plain = hosts.whole().address.replace("tls", "tcp")
    words = ("predict", unmapped.path, "--scheduler", plain)
    refused(hosts.drive(*words), "is not encrypted", hosts.address)
    bare = dict.fromkeys(tls(Path()))
    refused(hosts.drive(*words, env=bare), "no Dask scheduler answers", f"try {hosts.address}")


def test_with_a_certificate_of_another_authority(
    hosts: Site, unmapped: Region, tmp_path: Path
) -> None:
    foreign = certificates(tmp_path / "tls")
    env = tls(foreign) | {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(hosts.secrets / "ca.crt")}
    refused(hosts.whole().drive("predict", unmapped.path, env=env), "of another CA")


def test_a_worker_of_another_version(hosts: Site, unmapped: Region, tmp_path: Path) -> None:
    code = "import aeheight\naeheight.__version__ = '0.0.9'"
    (tmp_path / "sitecustomize.py").write_text(code)
    hosts.whole().running["one"].kill()
    hosts.start_worker("one", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    wait_for(lambda: hosts.joined("one"), "the worker of another version")
    driver = hosts.drive("predict", unmapped.path)
    try:
        refused(driver, "has aeheight 0.0.9, ", f"the driver has aeheight {__version__}, ")
    finally:
        hosts.running["one"].kill()
    assert not unmapped.receipts("heights")
