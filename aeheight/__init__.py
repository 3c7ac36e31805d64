"""aeheight: height maps of whole regions from Earth embeddings.

The few names that a notebook needs; everything else lives in its module.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "decode", "encode", "load_region", "open_cube"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Load a name's module when it is first used: `import aeheight` stays quick."""
    from importlib import import_module  # noqa: PLC0415

    homes = {
        "decode": "aeheight.embeddings",
        "encode": "aeheight.embeddings",
        "load_region": "aeheight.settings",
        "open_cube": "aeheight.cube",
    }
    if name not in homes:
        raise AttributeError(f"module 'aeheight' has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
