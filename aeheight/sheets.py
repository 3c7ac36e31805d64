"""The report's tables as CSV: the figures of metrics.json, none rounded, none added.

Metres but for n, counts and pairs (pixels), coverage, r2, pearson, skill, slopes, ratios, overlap
and outside (of 1), and what its name says (`_px`, `_m`, `_m2`). An undefined figure is empty.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, Final

from aeheight.rows import CLASSES

Row = dict[str, Any]

SHEETS: Final = {
    "metrics.csv": "every metric of the model and its baselines on each split, with 95 % intervals",
    "classes.csv": "every metric of the model by class of slope, height, aspect and so on",
    "spread.csv": "what height ± spread holds, on each split and by class",
    "checks.csv": "skill, regression, co-registration, seams, zones, heights, reach of the errors",
    "variogram.csv": "semivariance of the errors over distance",
}
"""Names of the files, and what they hold."""


def sheets(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Name and content of each CSV.

    Args:
        metrics: the whole of metrics.json.
    """
    made = {
        "metrics.csv": _metrics(metrics),
        "classes.csv": _classes(metrics.get("by", {})),
        "spread.csv": _spread(metrics.get("intervals", {})),
        "checks.csv": _checks(metrics),
        "variogram.csv": _variogram(metrics.get("correlation", {})),
    }
    return {name: _csv(list(rows)) for name, rows in made.items()}


def _csv(rows: list[Row]) -> bytes:
    """With a header of all keys in order of appearance; empty where there is no row."""
    text = io.StringIO()
    header = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(header))
    if rows:
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def _metrics(metrics: Mapping[str, Any]) -> Iterator[Row]:
    """`metric_lo` and `metric_hi` are the 95 % interval, where a bootstrap has one."""
    sure = metrics.get("confidence") or {}
    for name, table in {"model": metrics["model"], **metrics.get("baselines", {})}.items():
        for split, row in table.items():
            known = name == "model" and split == sure.get("split")
            ends = sure["metrics"] if known else {}
            yield {
                "predictor": name,
                "split": split,
                **row,
                **{
                    f"{metric}_{end}": interval[end]
                    for metric, interval in ends.items()
                    for end in ("lo", "hi")
                },
            }


def _classes(by: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[Row]:
    """`unit` is that of the edges `lo` and `hi`; `class` the name of one without edges."""
    for criterion, found in by.items():
        for row in found:
            place = {key: row.get(key) for key in ("split", "lo", "hi")}
            _, unit = CLASSES.get(criterion, ("", ""))
            named = {"unit": unit, "class": row.get("class")}
            yield {"criterion": criterion, **place, **named, **row}


def _spread(intervals: Mapping[str, Any]) -> Iterator[Row]:
    """`criterion` is `split` where a row is of all of a split."""
    whole = [{"split": split, **row} for split, row in intervals.get("model", {}).items()]
    return _classes({"split": whole, **intervals.get("by", {})})


def _checks(metrics: Mapping[str, Any]) -> Iterator[Row]:
    """One figure a row: of a table of metrics.json, its item, and the figure's name."""
    for table in ("skill", "regression", "shift", "seams"):
        for item, row in (metrics.get(table) or {}).items():
            yield from _figures(table, item, row)
    shifted = metrics.get("coregistration") or {}
    whole = {key: value for key, value in shifted.items() if not isinstance(value, Mapping)}
    yield from _figures("coregistration", "shift", whole)
    for item in ("raw", "coregistered"):
        yield from _figures("coregistration", item, shifted.get(item) or {})
    for row in metrics.get("zones", ()):
        yield from _figures("zones", " and ".join(row["between"]), row)
    reach = metrics.get("correlation") or {}
    yield from _figures("correlation", reach.get("ground", ""), reach)


def _figures(table: str, item: str, row: Mapping[str, Any]) -> Iterator[Row]:
    for figure, value in row.items():
        if value is None or isinstance(value, int | float | str):
            yield {"table": table, "item": item, "figure": figure, "value": value}


def _variogram(correlation: Mapping[str, Any]) -> Iterator[Row]:
    names = ("lags_px", "pairs", "semivariance_m2")
    for lag, pairs, value in zip_longest(*(correlation.get(name, ()) for name in names)):
        yield {"lag_px": lag, "pairs": pairs, "semivariance_m2": value}
