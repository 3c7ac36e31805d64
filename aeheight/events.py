"""Records as TensorBoard's event files and as CSV: bytes, made anew from all records each time.

A file that is a function of the records can be put in place as a whole, on a local disk or in an
object store, and a training that is taken up again leaves no record twice.

Source of the format: `tensorflow/core/util/event.proto` and `core/lib/io/record_writer.cc`.
"""

import csv
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import google_crc32c

EVENTS: Final = "events.out.tfevents.aeheight"
"""A name that TensorBoard looks for."""

_MASK: Final = 0xA282EAD8
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5


def tensorboard(records: Iterable[Mapping[str, float]], start: float) -> bytes:
    """An event file with one scalar a value of each record.

    Args:
        records: with `epoch`, the step, and `seconds` since the start where they are known.
        start: seconds since 1970.
    """
    events = [_wall_time(start) + _field(3, b"brain.Event:2")]
    for record in records:
        scalars = b"".join(
            _field(1, _field(1, name.encode()) + _key(2, _FLOAT) + struct.pack("<f", value))
            for name, value in sorted(record.items())
            if name not in ("epoch", "seconds")
        )
        step = _key(2, _VARINT) + _varint(int(record["epoch"]))
        events.append(_wall_time(start + record.get("seconds", 0.0)) + step + _field(5, scalars))
    return b"".join(map(_framed, events))


def _wall_time(seconds: float) -> bytes:
    return _key(1, _DOUBLE) + struct.pack("<d", seconds)


def _field(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(content)) + content


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _framed(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    return length + _checked(length) + event + _checked(event)


def _checked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def to_csv(records: Sequence[Mapping[str, float]]) -> bytes:
    """One row a record; `epoch` comes first, and what a record lacks is empty."""
    text = io.StringIO()
    columns = sorted({key for record in records for key in record}, key=lambda k: (k != "epoch", k))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()
