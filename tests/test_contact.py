"""Reaching a scheduler over TLS: what is wrong with a certificate or an address, in one message."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dask import config
from distributed import LocalCluster
from distributed.security import Security

from aeheight.contact import reach
from aeheight.errors import InputError
from tests.hosts.network import certificates

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
PREFIX = "DASK_DISTRIBUTED__COMM__"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates(tmp_path_factory.mktemp("ours") / "tls")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another authority."""
    return certificates(tmp_path_factory.mktemp("foreign") / "tls")


def settings(folder: Path, **changes: str | None) -> dict[str, str | None]:
    """Dask's settings of a driver."""
    named = {"ca-file": "ca.crt", "client.cert": "tls.crt", "client.key": "tls.key"}
    paths = {part: str(folder / name) for part, name in named.items()} | changes
    return {f"distributed.comm.tls.{part}": path for part, path in paths.items()}


@pytest.fixture(scope="module")
def address(ours: Path) -> Iterator[str]:
    """A scheduler that speaks TLS."""
    files = dict.fromkeys(("client", "scheduler", "worker"), ("tls.crt", "tls.key"))
    security = Security(
        require_encryption=True,
        tls_ca_file=str(ours / "ca.crt"),
        **{f"tls_{who}_cert": str(ours / cert) for who, (cert, _) in files.items()},
        **{f"tls_{who}_key": str(ours / key) for who, (_, key) in files.items()},
    )
    with LocalCluster(
        0, protocol="tls://", security=security, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def refused(address: str, wanted: dict[str, str | None]) -> str:
    with config.set(wanted), pytest.raises(InputError) as caught:
        reach(address, 5, "start one")
    return str(caught.value)


def test_both_trust_each_other(address: str, ours: Path) -> None:
    with config.set(settings(ours)), reach(address, 20, "") as client:
        assert client.run_on_scheduler(lambda: 1) == 1


def test_no_certificate_is_named(address: str, ours: Path) -> None:
    told = refused(address, {})
    assert f"{address} speaks TLS and asks for a certificate" in told
    assert all(f"{PREFIX}TLS__{part}" in told for part in ("CA_FILE", "CLIENT__CERT"))
    told = refused(address, settings(ours, **{"client.key": None}))
    assert told.endswith(f"; set {PREFIX}TLS__CLIENT__KEY to its file")


def test_a_certificate_is_not_there(address: str, ours: Path) -> None:
    told = refused(address, settings(ours, **{"client.cert": "/nowhere/tls.crt"}))
    assert told == f"{PREFIX}TLS__CLIENT__CERT names /nowhere/tls.crt, which is no file here"


def test_a_key_of_another_certificate(address: str, ours: Path, foreign: Path) -> None:
    told = refused(address, settings(ours, **{"client.key": str(foreign / "tls.key")}))
    assert "cannot be used" in told
    assert f"{PREFIX}TLS__CLIENT__KEY={foreign}/tls.key" in told


def test_an_authority_that_did_not_sign(address: str, ours: Path, foreign: Path) -> None:
    told = refused(address, settings(foreign))
    assert f"{PREFIX}TLS__CA_FILE must name the CA that signed the scheduler's" in told
    told = refused(address, settings(foreign, **{"ca-file": str(ours / "ca.crt")}))
    assert "it hung up, as on a certificate of another CA than its own" in told


def test_a_plain_address_of_one_that_speaks_tls(address: str, ours: Path) -> None:
    plain = address.replace("tls://", "tcp://")
    assert f"try {address}" in refused(plain, settings(ours))
    encrypted = {"distributed.comm.require-encryption": True}
    told = refused(plain, settings(ours) | encrypted)
    assert f"{plain} is not encrypted" in told
    assert f"give --scheduler {address}" in told


def test_an_encrypted_address_of_one_that_does_not(ours: Path) -> None:
    with LocalCluster(0, protocol="tcp://", dashboard_address=":0") as cluster:
        plain = cluster.scheduler_address
        told = refused(plain.replace("tcp://", "tls://"), settings(ours))
    assert f"it does not speak TLS: try {plain}" in told
