"""Headless Chromium for the tests, by the DevTools protocol: what a page does, measured."""

import asyncio
import base64
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (found := shutil.which(name))
    ),
    None,
)
"""Path of a browser, or None."""


@dataclass(frozen=True)
class Seen:
    """What one visit to a page showed."""

    errors: list[str]
    """Of the console, the log and of scripts."""
    requests: list[str]
    """Addresses asked for, the page's own first; data URIs left out."""
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
    address = page if isinstance(page, str) else page.absolute().as_uri()
    process = subprocess.Popen(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port = _port(folder / "DevToolsActivePort", process)
        return asyncio.run(_visit(port, address, width, dark, ask))
    finally:
        process.kill()
        process.wait()


def _port(told: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if told.exists() and "\n" in (text := told.read_text()):
            return int(text.split()[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not come up")


async def _visit(port: int, address: str, width: int, dark: bool, ask: dict[str, str]) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json()
        target = next(found for found in targets if found["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            return await _look(_Tab(socket), address, width, dark, ask)


class _Tab:
    """One tab: commands and their answers; what else arrives is kept in `events`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.last, self.events = socket, 0, list[dict[str, Any]]()

    async def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.last += 1
        await self.socket.send_json({"id": self.last, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json(timeout=60)
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    async def until(self, method: str) -> None:
        while all(event["method"] != method for event in self.events):
            self.events.append(await self.socket.receive_json(timeout=60))

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]


async def _look(tab: _Tab, address: str, width: int, dark: bool, ask: dict[str, str]) -> Seen:
    for domain in ("Page", "Runtime", "Log", "Network"):
        await tab(f"{domain}.enable")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    await tab("Emulation.setDeviceMetricsOverride", **screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await tab("Emulation.setEmulatedMedia", features=[scheme])
    await tab("Page.navigate", url=address)
    await tab.until("Page.loadEventFired")
    told = {}
    for name, expression in ask.items():
        answer = await tab("Runtime.evaluate", expression=expression, returnByValue=True)
        told[name] = answer["result"].get("value")
    shot = await tab("Page.captureScreenshot", captureBeyondViewport=True)
    pdf = await tab("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
    complaints = [str(event["exceptionDetails"]) for event in tab.of("Runtime.exceptionThrown")]
    complaints += [str(event["entry"]["text"]) for event in tab.of("Log.entryAdded")]
    complaints += [str(event["args"]) for event in tab.of("Runtime.consoleAPICalled")]
    asked = [event["request"]["url"] for event in tab.of("Network.requestWillBeSent")]
    return Seen(
        complaints,
        [url for url in asked if not url.startswith("data:")],
        told,
        base64.b64decode(shot["data"]),
        base64.b64decode(pdf["data"]),
    )
