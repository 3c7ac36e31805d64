"""View: a finished export as a map in the browser."""

import asyncio
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aeheight.errors import InputError
from aeheight.steps.run import Plan, Run
from aeheight.steps.tiles import FOLDER

Say = Callable[[dict[str, Any], list[str]], None]
"""Takes the facts for machines and the lines for people."""

_NEEDED = {"rio_tiler": "rio-tiler", "xstatic.pkg.leaflet": "XStatic-Leaflet", "tornado": "tornado"}
"""Modules of the extra `view`, and their packages."""


def view(run: Run, say: Say, host: str, port: int, *, plan: bool) -> int:
    """Serve the map until it is interrupted, or print what would be served.

    Args:
        run: whose export it is.
        say: prints.
        host: to listen at.
        port: 0 takes any that is free.
        plan: print the layers, files, colours' limits and address, and stop.

    Returns:
        The exit code: 0.

    Raises:
        NotYetError: there is no finished export.
        InputError: a package is not installed, the export is damaged, or the port is taken.
    """
    need_packages()
    from aeheight import viewer  # noqa: PLC0415

    place = run.store.child(FOLDER)
    shown = viewer.Shown.of(place)
    if plan:
        say(*_planned(shown, viewer.address(host, port) if port else f"a free port of {host}"))
        return 0

    def ready(address: str) -> None:
        say({"address": address}, [f"map       {address}   (Ctrl-C ends it)"])

    with suppress(KeyboardInterrupt):
        asyncio.run(viewer.serve(place, shown, host, port, ready))
    return 0


def need_packages() -> None:
    """Refuse early where the extra is not installed.

    Raises:
        InputError: says which command installs it.
    """
    lacking = [package for module, package in _NEEDED.items() if not _installed(module)]
    if lacking:
        raise InputError(
            f"view needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not "
            "installed: python -m pip install 'aeheight[view]', or in its folder "
            "python -m pip install -c constraints.txt '.[view]'"
        )


def _installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # of a parent
        return importlib.util.find_spec(module) is not None
    return False


def _planned(shown: Any, address: str) -> tuple[dict[str, Any], list[str]]:
    """What `--plan` prints: facts for machines, lines for people."""
    export = shown.export
    layers = {
        layer.name: {
            "files": len(layer.files),
            "unit": layer.unit,
            "limits": list(shown.limits[layer.name]),
        }
        for layer in export.layers
    }
    facts = {"step": "view", "years": list(export.years), "layers": layers, "address": address}
    told = {
        name: f"{about['files']} files, colours {about['limits'][0]:.4g} to "
        f"{about['limits'][1]:.4g} {about['unit']}".rstrip()
        for name, about in layers.items()
    }
    people = {"years": " ".join(map(str, export.years)), **told, "address": address}
    return facts, Plan("view", people).lines()
