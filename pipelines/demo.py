"""The demo: a made-up world, then every step of `aeheight run` on it."""

import sys
import time
from pathlib import Path

from aeheight.cli import main as aeheight
from aeheight.errors import InputError
from pipelines.world import make_world

WORLD = Path("runs/demo-world")
REGION = Path(__file__).parent / "regions" / "demo.yaml"


def main() -> int:
    """Make the world where it is not there yet, and run the demo region; the exit code."""
    started = time.monotonic()
    print(f"world     a made-up landscape in the real formats, in {WORLD}", flush=True)
    try:
        make_world(WORLD)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"world     ready after {time.monotonic() - started:.0f} s", flush=True)
    code = aeheight(["run", str(REGION)])
    print(f"demo      ended after {time.monotonic() - started:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
