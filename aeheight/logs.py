"""Logs as JSON, one object a line, for Dask's scheduler and workers in a cluster.

A Dask settings file names them (deploy/base/logging.yaml). A process that cannot begin says so in
plain lines still: those are what a pod's termination message shows.
"""

import json
import logging
from datetime import UTC, datetime
from typing import TextIO


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-11-23T09:30:00.123+00:00", "level": "INFO", "logger": ..., "message": ...}`.

    `exception` holds a traceback, and `stack` what `stack_info` asks for, where there is one. Line
    breaks are escaped: a record is one line whatever it says.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One record as a line."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = self.formatStack(record.stack_info)
        return json.dumps(told)


def stderr() -> "logging.StreamHandler[TextIO]":
    """The handler: stderr, where Python's own warnings go too, as records of `py.warnings`."""
    logging.captureWarnings(True)
    return logging.StreamHandler()
