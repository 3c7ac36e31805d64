"""A real S3 server on the loopback (Ceph, or moto's where Ceph is missing) and a faulty way to it.

Ceph's programs (`apt install radosgw ceph-mon ceph-osd ceph-common`) check signatures, rights and
conditional puts as Amazon does; moto checks no signature.
"""

import asyncio
import contextlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import obstore
import pytest
from aiohttp import ClientSession, DummyCookieJar, web
from obstore.store import S3Store
from yarl import URL

KEY, SECRET, BUCKET = "AKHEIGHT", "SKHEIGHT12345678", "heights"
_HOP = {"connection", "content-encoding", "content-length", "transfer-encoding"}
_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw")
Fault = Literal["none", "slow", "500", "503", "reset", "cut", "lost"]
FAULTS: tuple[Fault, ...] = ("slow", "500", "503", "reset", "cut", "lost")
"""A late answer, two server errors, no answer, half an answer, and done but not answered."""


@dataclass(frozen=True)
class Server:
    """A running S3 server with one bucket."""

    url: str
    checks_signatures: bool

    def variables(self, url: str | None = None) -> dict[str, str]:
        """What a user sets to use it (through another address, if given)."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url or self.url,
        }


@contextlib.contextmanager
def server(folder: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    """Start one at an address of this machine, or skip the test that asks for it."""
    if all(shutil.which(program) for program in (*_PROGRAMS, "radosgw-admin")):
        with _ceph(folder, host) as url:
            yield Server(url, checks_signatures=True)
    elif importlib.util.find_spec("moto") and importlib.util.find_spec("flask"):
        with _moto(host) as url:
            yield Server(url, checks_signatures=False)
    else:
        pytest.skip("needs an S3 server: apt install radosgw ceph-mon ceph-osd ceph-common")


@contextlib.contextmanager
def _moto(host: str = "127.0.0.1") -> Iterator[str]:
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (an option)

    moto = ThreadedMotoServer(host, 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    try:
        _make_bucket(f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    finally:
        moto.stop()


@contextlib.contextmanager
def _ceph(folder: Path, host: str) -> Iterator[str]:
    """One monitor, one store in memory and one gateway; they end with the block."""
    for name in ("mon", "osd", "rgw", "run"):
        (folder / name).mkdir(parents=True)
    port, ceph = _free_port(), _Ceph(folder)
    url = f"http://{host}:{port}"
    ceph.configure(f"{host}:{port}")
    with contextlib.ExitStack() as started:
        started.callback(ceph.stop)
        ceph.monitor()
        ceph.disk()
        ceph("radosgw", "-n", "client.rgw.x")
        _wait(url, 60)
        user = ("user", "create", "--uid=t", "--display-name=t")
        keys = (f"--access-key={KEY}", f"--secret={SECRET}")
        ceph("radosgw-admin", "-n", "client.rgw.x", *user, *keys)
        _make_bucket(url)
        yield url


class _Ceph:
    """A cluster's folder, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fsid, self.port = folder, str(uuid.uuid4()), _free_port()

    def __call__(self, *command: str) -> str:
        configured = [command[0], "-c", str(self.folder / "ceph.conf"), *command[1:]]
        return self.tool(*configured)

    def tool(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def configure(self, gateway: str) -> None:
        at = self.folder
        (at / "ceph.conf").write_text(f"""
[global]
fsid = {self.fsid}
mon host = v2:127.0.0.1:{self.port}/0
mon initial members = a
keyring = {at}/keyring
run dir = {at}/run
log file = {at}/$name.log
admin socket = {at}/run/$name.asok
pid file = {at}/run/$name.pid
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind msgr1 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon data avail crit = 1
mon data avail warn = 1
[mon.a]
mon data = {at}/mon
public addr = 127.0.0.1
[osd.0]
osd data = {at}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw.x]
rgw data = {at}/rgw
rgw frontends = beast endpoint={gateway} tcp_nodelay=1
rgw thread pool size = 32
""")

    def monitor(self) -> None:
        at, everything = self.folder, ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        ring, monmap = str(at / "keyring"), str(at / "monmap")
        self.tool("ceph-authtool", "--create-keyring", ring)
        for name in ("mon.", "client.admin", "client.rgw.x", "osd.0"):
            self.tool("ceph-authtool", ring, "--gen-key", "-n", name, *everything)
        mon = ("--addv", "a", f"[v2:127.0.0.1:{self.port}]")
        self.tool("monmaptool", "--create", "--clobber", "--fsid", self.fsid, *mon, monmap)
        self("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", ring)
        self("ceph-mon", "-i", "a")

    def disk(self) -> None:
        name = str(uuid.uuid4())
        self("ceph", "osd", "new", name)
        self("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)
        self("ceph-osd", "-i", "0")

    def stop(self) -> None:
        for file in (self.folder / "run").glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 9)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing answers at {url}")


def _make_bucket(url: str) -> None:
    """Obstore makes no buckets; but the name of one, as a key of the whole server, is one."""
    whole = S3Store(
        "any", endpoint=url, region="us-east-1", virtual_hosted_style_request=True,
        access_key_id=KEY, secret_access_key=SECRET, client_options={"allow_http": True},
    )  # fmt: skip
    address = obstore.sign(whole, "PUT", BUCKET, timedelta(minutes=5))
    urllib.request.urlopen(urllib.request.Request(address, method="PUT"), timeout=30).close()


@dataclass
class Chaos:
    """A proxy before the server: requests meet `fault` with `share`, by a seeded draw."""

    upstream: str
    fault: Fault = "none"
    share: float = 0.2
    late: float = 2.0
    """Seconds of a slow answer."""
    method: str = ""
    """Only requests with it meet the fault; empty: all."""
    requests: int = 0
    hits: int = 0
    url: str = ""

    def begin(self, fault: Fault, seed: int = 1) -> None:
        """From now on requests meet this fault; the counts start anew."""
        self.fault, self.requests, self.hits = fault, 0, 0
        self._random = random.Random(seed)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on, or not."""
        body = await request.read()
        self.requests += 1
        meant = self.fault != "none" and self.method in ("", request.method)
        hit = meant and self._random.random() < self.share
        self.hits += hit
        if hit and self.fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[self.fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
            return web.Response(status=int(self.fault), text=text, content_type="application/xml")
        if hit and self.fault == "reset":
            return _hang_up(request)
        if hit and self.fault == "slow":
            await asyncio.sleep(self.late)
            if request.transport is None or request.transport.is_closing():
                return _hang_up(request)  # nobody waits any more: it must not overtake a later put
        status, headers, answer = await self._pass_on(request, body)
        if hit and self.fault == "lost":
            return _hang_up(request)
        if hit and self.fault == "cut" and len(answer) > 1:
            return await _cut(request, status, headers, answer)
        if request.method == "HEAD":
            return web.Response(status=status, headers=headers)
        headers.pop("Content-Length", None)
        return web.Response(status=status, headers=headers, body=answer)

    async def _pass_on(self, request: web.Request, body: bytes) -> tuple[int, Any, bytes]:
        # With the host that the client has signed.
        kept = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        kept |= {"Content-Length": str(len(body))} if request.body_exists else {}
        address = URL(self.upstream + request.raw_path, encoded=True)
        async with self._client.request(
            request.method, address, headers=kept, data=BytesIO(body), allow_redirects=False,
            skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
        ) as answer:  # fmt: skip
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in {*_HOP, "date"}}
            headers |= {k: v for k, v in answer.headers.items() if k == "Content-Length"}
            return answer.status, headers, await answer.read()

    @contextlib.contextmanager
    def running(self) -> Iterator["Chaos"]:
        """Serve from a thread of its own."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="chaos")
        thread.start()
        self.begin("none")
        try:
            runner = asyncio.run_coroutine_threadsafe(self._start(), loop).result(30)
            yield self
            asyncio.run_coroutine_threadsafe(self._stop(runner), loop).result(30)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _start(self) -> web.AppRunner:
        self._client = ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar())
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{key:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _stop(self, runner: web.AppRunner) -> None:
        await runner.cleanup()
        await self._client.close()


def _hang_up(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _cut(
    request: web.Request, status: int, headers: dict[str, str], answer: bytes
) -> web.StreamResponse:
    response = web.StreamResponse(
        status=status, headers=headers | {"Content-Length": str(len(answer))}
    )
    await response.prepare(request)
    await response.write(answer[: len(answer) // 2])
    await asyncio.sleep(0.02)  # so that this half is on its way
    _hang_up(request)
    return response
