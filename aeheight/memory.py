"""How much memory a process has held."""

from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this process has held; 0 where the system does not tell (not Linux)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
