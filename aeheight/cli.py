"""The command `aeheight`: one verb a step, and run, status, verify.

Exit codes: 0 done; 1 finished with failed shards (listed), or interrupted in a state that a rerun
takes up; 2 bad input.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aeheight import __version__
from aeheight.cluster import PATIENCE, QUIET_THREADS, Connection
from aeheight.errors import InputError
from aeheight.progress import describe_run, served
from aeheight.settings import RegionSettings, load_region

DONE, UNFINISHED, BAD_INPUT = 0, 1, 2

_VERBS = {
    "ingest": "tiles and rasters to the cube",
    "train": "the cube to a model",
    "predict": "the cube and a model to a map of heights",
    "evaluate": "the map against its reference: metrics and a report",
    "calibrate": "a finished map corrected by sparse reference heights, where they prove a gain",
    "export": "a finished map to files that every GIS opens: COGs, STAC, pictures",
    "view": "a finished export as a map in the browser, served to this machine",
    "run": "all steps in order; what is done is skipped",
    "status": "what is done and what is left; of a store alone, too, from anywhere",
    "verify": "read every finished shard again and compare its checksum",
}
_COMPARE = "the reports of two runs side by side"

_EPILOG = """\
examples:
  aeheight run region.yaml --plan                     what it would do, and what it costs
  aeheight run region.yaml                            all steps; again, after an interruption
  aeheight predict other.yaml --checkpoint runs/demo  a model trained elsewhere
  aeheight calibrate region.yaml --points gnss.csv    a finished map, corrected
  aeheight export region.yaml                         a finished map as GeoTIFFs
  aeheight view region.yaml                           those, as a map in the browser
  aeheight compare region.yaml runs/other             two reports side by side
  aeheight status s3://bucket/run                     how far a run is, from anywhere

exit codes: 0 done; 1 shards failed, or interrupted: run again to go on; 2 bad input
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's grammar."""
    parser = argparse.ArgumentParser(
        prog="aeheight",
        description="Height maps of whole regions from Earth embeddings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"aeheight {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in _VERBS.items():
        command = verbs.add_parser(verb, help=summary, description=summary.capitalize() + ".")
        if verb == "status":
            command.add_argument(
                "region", metavar="PLACE", help="a region file, or a run's store: a folder or URI"
            )
        else:
            command.add_argument("region", metavar="REGION.yaml", help="the region file")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="override a setting, such as model.epochs=3; may be given again",
        )
        command.add_argument(
            "--json", action="store_true", dest="as_json", help="results and progress as JSON"
        )
        if verb == "view":
            _add_view(command)
        elif verb not in ("status", "verify"):
            _add_work(command)
        if verb in ("predict", "run"):
            command.add_argument(
                "--checkpoint",
                metavar="PATH",
                help="a model trained elsewhere: a .ckpt, or another run's store",
            )
        if verb == "calibrate":
            command.add_argument(
                "--points",
                required=True,
                metavar="FILE",
                help="GeoParquet or CSV: lon, lat (or points), height, datum, and sigma if known",
            )
        if verb == "verify":
            command.add_argument(
                "--repair", action="store_true", help="make the damaged shards again"
            )
            _add_workers(command)
    _add_compare(
        verbs.add_parser("compare", help=_COMPARE, description=f"{_COMPARE.capitalize()}.")
    )
    return parser


def _add_compare(command: argparse.ArgumentParser) -> None:
    for name in "AB":
        command.add_argument(
            name.lower(), metavar=name, help="a region file, a run's store, or a metrics.json"
        )
    command.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        default="test",
        help="whose figures (default: test)",
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="the same as JSON")


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", action="store_true", help="print what would be served, and stop")
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="where to listen (default: 127.0.0.1, for this machine alone)",
    )
    command.add_argument(
        "--port",
        type=_any_port,
        default=8000,
        metavar="N",
        help="of the page (default: 8000); 0 takes any that is free",
    )


def _add_work(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plan", action="store_true", help="print what would be done, and stop")
    command.add_argument(
        "--overwrite", action="store_true", help="discard the step's receipts and outputs first"
    )
    _add_workers(command)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="worker processes on this machine (default: one for two cores)",
    )
    command.add_argument(
        "--gpus",
        type=_count,
        metavar="N",
        help="further processes here, one for each GPU (default: all that are visible)",
    )
    command.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask scheduler, tcp://host:8786 or tls://host:8786",
    )
    command.add_argument(
        "--patience",
        type=_positive,
        metavar="SECONDS",
        help="how long to wait for the first worker of --scheduler, and for the first with a GPU "
        "(default: 600)",
    )
    command.add_argument(
        "--metrics-port",
        type=_port,
        metavar="N",
        help="serve this command's metrics to Prometheus at http://HOST:N/metrics",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a whole number from 1 to 65535")
    return int(text)


def _any_port(text: str) -> int:
    return 0 if text == "0" else _port(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # a cluster's way to say stop
    try:
        return _dispatch(arguments)
    except InputError as error:
        _complain(arguments, str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        _complain(arguments, "interrupted; finished shards are kept, run again to go on")
        return UNFINISHED
    except OSError as error:
        _complain(arguments, f"{error}; finished shards are kept, run again to go on")
        return UNFINISHED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _complain(arguments: argparse.Namespace, message: str) -> None:
    text = json.dumps({"error": message}) if arguments.as_json else f"aeheight: {message}"
    print(text, file=sys.stderr)  # noqa: T201


def _compare(arguments: argparse.Namespace) -> int:
    from aeheight.steps.compare import Judged, compare, describe  # noqa: PLC0415

    found = compare(Judged.at(arguments.a), Judged.at(arguments.b), arguments.split)
    told = json.dumps(found.to_dict()) if arguments.as_json else "\n".join(describe(found))
    print(told, flush=True)  # noqa: T201
    return DONE


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.verb == "compare":
        return _compare(arguments)
    settings = _settings(arguments)
    # Heavy libraries load only once the region file is known to be good.
    os.environ |= {key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()}
    from aeheight.steps import pipeline  # noqa: PLC0415
    from aeheight.steps.run import Options, Run  # noqa: PLC0415

    options = Options(
        overwrite=getattr(arguments, "overwrite", False),
        checkpoint=getattr(arguments, "checkpoint", None),
        as_json=arguments.as_json,
    )
    run = Run(settings, options, _connection(arguments))
    say: Callable[[dict[str, Any], list[str]], None] = (
        (lambda facts, _: print(json.dumps(facts), flush=True))  # noqa: T201
        if arguments.as_json
        else (lambda _, lines: print("\n".join(lines), flush=True))  # noqa: T201
    )
    if arguments.verb == "status":
        return pipeline.status(run, say)
    if arguments.verb == "view":
        from aeheight.steps.view import view  # noqa: PLC0415

        return view(run, say, arguments.host, arguments.port, plan=arguments.plan)
    verb, planning = arguments.verb, getattr(arguments, "plan", False)
    steps = [] if verb in ("verify", "calibrate") else pipeline.steps_of(run, verb)
    if steps and planning:
        return pipeline.show_plans(run, steps, say)
    describe_run(settings.name, __version__)
    with served(arguments.metrics_port):
        if verb == "verify":
            return pipeline.verify(run, say, repair=arguments.repair)
        if verb == "calibrate":
            return pipeline.calibrate(run, arguments.points, say, plan=planning)
        return pipeline.execute(run, steps, say)


def _settings(arguments: argparse.Namespace) -> RegionSettings:
    """Of the region file; `status` takes them from a store, too."""
    place = arguments.region
    if arguments.verb != "status" or place.endswith((".yaml", ".yml")) or Path(place).is_file():
        return load_region(place, arguments.overrides)
    if arguments.overrides:
        raise InputError(f"--set changes settings of a region file, and {place} is a store")
    from aeheight.steps.stored import stored_settings  # noqa: PLC0415

    return stored_settings(place)


def _connection(arguments: argparse.Namespace) -> Connection:
    def tell(facts: dict[str, str], line: str) -> None:
        told = json.dumps(facts) if arguments.as_json else line
        print(told, file=sys.stderr, flush=True)  # noqa: T201

    def announce(address: str, hint: str) -> None:
        facts = {"dashboard": address} | ({"hint": hint} if hint else {})
        tell(facts, f"dashboard {address}" + f" ({hint})" * bool(hint))

    return Connection(
        getattr(arguments, "scheduler", None),
        getattr(arguments, "workers", None),
        getattr(arguments, "patience", None) or PATIENCE,
        gpus=getattr(arguments, "gpus", None),
        announce=announce,
        waiting=lambda what: tell({"waiting": what}, what),
    )


if __name__ == "__main__":
    sys.exit(main())
