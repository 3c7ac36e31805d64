"""A headless Chromium for tests of pages: its DevTools protocol over tornado's websocket client."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""Where the browser is; None: there is none."""
_PATIENCE = 30
"""Seconds that the browser is waited for."""


class Page:
    """One tab."""

    def __init__(self, runner: asyncio.Runner, socket: WebSocketClientConnection) -> None:
        self._runner, self._socket, self._number = runner, socket, 0
        self.complaints: list[str] = []
        """Errors and warnings that the console showed, and requests that failed."""
        self.requests: list[str] = []
        """Addresses asked for; data URIs are left out."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser something; events that come before the answer are looked through."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        return self._runner.run(self._ask(json.dumps(message), self._number))

    async def _ask(self, message: str, number: int) -> dict[str, Any]:
        await self._socket.write_message(message)
        while True:
            told = await asyncio.wait_for(self._socket.read_message(), _PATIENCE)
            assert isinstance(told, str), "the browser has gone"
            found = json.loads(told)
            if found.get("id") == number:
                assert "error" not in found, found["error"]
                return found["result"]
            self._listen(found.get("method", ""), found.get("params", {}))

    def _listen(self, method: str, told: dict[str, Any]) -> None:
        loud = told.get("type") in ("error", "warning", "assert")
        if method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and loud):
            self.complaints.append(json.dumps(told))
        if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"] + " " + told["entry"].get("url", ""))
        if method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.requests.append(told["request"]["url"])
        if method == "Network.loadingFailed" and not told.get("canceled"):
            self.complaints.append(told["errorText"])

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.03)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the window."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=phone)  # fmt: skip
        self("Emulation.setTouchEmulationEnabled", enabled=phone)

    def open(self, address: str) -> None:
        """Go to a page; it need not be ready."""
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=address)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`mouseMoved`, `mousePressed` or `mouseReleased`, at a place of the window."""
        held = {"button": "left", "buttons": 1, "clickCount": 1}
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def tap(self, x: float, y: float) -> None:
        """A finger."""
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self) -> np.ndarray:
        """What is seen: (rows, columns, 3)."""
        data = base64.b64decode(self("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@dataclass(frozen=True)
class Seen:
    """What one visit to a page showed."""

    errors: list[str]
    """As `Page.complaints`."""
    requests: list[str]
    """As `Page.requests`; the page's own is the first."""
    told: dict[str, Any]
    """What each expression gave."""
    shot: bytes
    """PNG of the whole page."""
    pdf: bytes
    """As printed."""


def visit(
    page: Path | str, folder: Path, *, width: int = 1280, dark: bool = False, ask: dict[str, str]
) -> Seen:
    """Open a page and look.

    Args:
        page: file or address.
        folder: for the browser's profile.
        width: of the window, CSS pixels.
        dark: whether the reader prefers dark pages.
        ask: JavaScript expressions by name.
    """
    with browser(folder) as tab:
        tab.resize(width, 900, phone=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab("Emulation.setEmulatedMedia", features=[scheme])
        address = page if isinstance(page, str) else page.absolute().as_uri()
        tab("Page.navigate", url=address)
        tab.until(f"location.href == {json.dumps(address)} && document.readyState == 'complete'")
        told = {name: tab.evaluate(expression) for name, expression in ask.items()}
        shot = tab("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        pdf = tab("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"]
        return Seen(
            tab.complaints, tab.requests, told, base64.b64decode(shot), base64.b64decode(pdf)
        )


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a browser that knows no network beyond this machine; its profile in a folder."""
    assert CHROMIUM
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio")
    apart = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    process = subprocess.Popen(
        [CHROMIUM, *options, apart, "--remote-debugging-port=0", f"--user-data-dir={folder}",
         "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with asyncio.Runner() as runner:
            address = _first_tab(folder / "DevToolsActivePort")
            socket = runner.run(_connect(address))
            try:
                yield Page(runner, socket)
            finally:
                runner.run(_leave(socket))
    finally:
        process.terminate()
        process.wait(_PATIENCE)


async def _connect(address: str) -> WebSocketClientConnection:
    return await websocket_connect(address, max_message_size=1 << 26)


async def _leave(socket: WebSocketClientConnection) -> None:
    """Close, and hear out what was still on its way: a socket left open is an error elsewhere."""
    socket.close()
    with suppress(TimeoutError):
        while await asyncio.wait_for(socket.read_message(), _PATIENCE) is not None:
            pass


def _first_tab(contact: Path) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        with suppress(OSError, IndexError, StopIteration):
            port = contact.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = json.load(answer)
            return next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
        time.sleep(0.05)
    raise TimeoutError("the browser did not come up")
