"""Two reports side by side: what `aeheight compare A B` tells, from metrics.json alone.

What makes figures unlike comes first: heights over another datum, of another surface, year, ground,
reference or split cannot be held against each other, whatever the figures say. All differences are
B - A. No pixel is read.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from aeheight import intervals
from aeheight.errors import InputError, NotYetError
from aeheight.rows import FEW, label
from aeheight.settings import load_region
from aeheight.steps.unlike import Difference, part, reasons, unlike
from aeheight.store import Store

HEADLINE: Final = ("n", "coverage", "mean", "median", "nmad", "mae", "rmse", "le68", "le90", "r2")
"""Metrics told of each model, by the names of `metrics.GLOSSARY`."""

_METRICS = "metrics.json"
_OF_A_CLASS = ("mean", "nmad", "le90")
"""Metrics that the printed tables have room for; all of HEADLINE are in JSON."""
_UNLIKE = 0.01
"""Share of the judged pixels by which two maps may differ before it is told."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One run's metrics.json."""

    place: str
    """Where it lies."""
    metrics: Mapping[str, Any]
    """All that it holds."""

    @classmethod
    def at(cls, place: str) -> "Judged":
        """The report of a run.

        Args:
            place: a region file (`.yaml`), a metrics.json (`.json`), or a run's store; the last two
                as paths or URIs.

        Raises:
            NotYetError: there is no report yet.
            InputError: the region file is wrong, or what lies there is no metrics.json.
            OSError: the store cannot be reached.
        """
        store, name = _where(place)
        try:
            data = store.read(name)
        except FileNotFoundError as error:
            raise NotYetError(
                f"{place}: there is no report at {store.uri}/{name} yet; run aeheight evaluate"
            ) from error
        return cls(f"{store.uri}/{name}", _parsed(data, f"{store.uri}/{name}"))

    @property
    def region(self) -> str:
        """The region's name."""
        return str(part(self.metrics, "provenance").get("region", "unknown"))


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of both; None where it is undefined."""

    a: float | None
    b: float | None
    difference: float | None
    """b - a."""
    interval_a: tuple[float, float] | None = None
    """Ends of the confidence interval."""
    interval_b: tuple[float, float] | None = None
    overlap: bool | None = None
    """Whether the two intervals share a value; None where one of them is missing."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that both have: predictors, or the classes of a criterion."""

    rows: Mapping[str, Mapping[str, Figure]]
    """By label, then metric."""
    only_a: tuple[str, ...]
    """Labels of rows that B lacks."""
    only_b: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two reports side by side."""

    a: str
    """Where the metrics.json of A lies."""
    b: str
    regions: tuple[str, str]
    """Names of both."""
    split: str
    """Whose figures are told."""
    warnings: tuple[str, ...]
    """Why the figures cannot be compared; the vertical datum and the surface first."""
    differences: tuple[Difference, ...]
    model: Mapping[str, Figure]
    """By the names of HEADLINE."""
    intervals: Mapping[str, Figure]
    """By the names of `intervals.GLOSSARY`; empty where one map does not tell its spread."""
    baselines: Table
    by: Mapping[str, Table]
    """Of the criteria that both have."""
    left_out: tuple[str, ...]
    """What could not be told, and why."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def compare(a: Judged, b: Judged, split: str = "test") -> Comparison:
    """Hold two reports against each other.

    Args:
        a: what differences start from.
        b: what they lead to.
        split: whose figures: `train`, `validation`, `test` or `all`.
    """
    differences, left_out = unlike(part(a.metrics, "provenance"), part(b.metrics, "provenance"))
    model = _model(a.metrics, b.metrics, split, left_out)
    return Comparison(
        a=a.place,
        b=b.place,
        regions=(a.region, b.region),
        split=split,
        warnings=tuple(_warnings(reasons(differences), model, split)),
        differences=differences,
        model=model,
        intervals=_intervals(a.metrics, b.metrics, split, left_out),
        baselines=_baselines(a.metrics, b.metrics, split, left_out),
        by=_by(a.metrics, b.metrics, split, left_out),
        left_out=tuple(left_out),
    )


def describe(found: Comparison) -> list[str]:
    """What people read, a line each; `Comparison.to_dict` has more metrics of each class."""
    lines = [f"{name}  {place} ({region})" for name, place, region in _heads(found)]
    lines += [f"WARNING: {text}" for text in found.warnings]
    lines += ["", "what differs:" if found.differences else "nothing differs in provenance"]
    lines += [
        f"  {f'{one.topic} {one.key}'.strip()}: {' -> '.join(one.values)}"
        for one in found.differences
    ]
    lines += ["", f"model on {found.split} ground (metres; differences are B - A)"]
    lines += _figure_lines(found.model)
    if found.intervals:
        lines += ["", "intervals of height ± spread (90 % should hold the reference)"]
        lines += _figure_lines(found.intervals)
    for title, table in {"baselines": found.baselines, **found.by}.items():
        lines += ["", title if title == "baselines" else f"by {title}", *_table_lines(table)]
    return lines + [""] * bool(found.left_out) + [f"left out: {text}" for text in found.left_out]


def _where(place: str) -> tuple[Store, str]:
    """Store and name of the metrics.json that a place means."""
    if place.endswith((".yaml", ".yml")):
        place = load_region(place).store
    elif place.endswith(".json"):
        folder, _, name = Store.at(place).uri.rpartition("/")
        return Store.at(folder), name
    return Store.at(place).child("report"), _METRICS


def _parsed(data: bytes, place: str) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise InputError(f"{place} is no metrics.json: {error}; run aeheight evaluate") from error
    lacking = [key for key in ("model", "provenance") if not part(found, key)]
    if lacking:
        raise InputError(
            f"{place} is no metrics.json of aeheight: it has no {' and no '.join(lacking)}; name "
            "a region file, a run's store or its report/metrics.json"
        )
    return part(found)


def _warnings(
    unlike_topics: Mapping[str, str], model: Mapping[str, Figure], split: str
) -> Iterator[str]:
    yield from (f"not comparable: {reason}" for reason in unlike_topics.values())
    for name, n in (("A", model["n"].a), ("B", model["n"].b)):
        if not n:
            yield f"{name} judges no {split} ground; another --split may have pixels in both"
    if not unlike_topics.keys() & {"reference", "ground", "split"}:
        yield from _unlike_pixels(model, split)


def _unlike_pixels(model: Mapping[str, Figure], split: str) -> Iterator[str]:
    """What the numbers of pixels say of ground that the provenance calls the same."""
    n, coverage = model["n"], model["coverage"]
    if not (n.a and n.b and coverage.a and coverage.b):
        return
    references = round(n.a / coverage.a), round(n.b / coverage.b)
    if references[0] != references[1]:
        yield (
            f"not comparable: unlike reference ({references[0]} pixels of {split} ground have one "
            f"in A, {references[1]} in B)"
        )
    elif abs(n.b - n.a) > _UNLIKE * n.a:
        yield (
            f"the figures are of unlike pixels: A has heights for {coverage.a:.1%} of the "
            f"reference, B for {coverage.b:.1%}"
        )


def _model(
    a: Mapping[str, Any], b: Mapping[str, Any], split: str, left_out: list[str]
) -> dict[str, Figure]:
    ends_a, ends_b = _ends(a, "A", split, left_out), _ends(b, "B", split, left_out)
    levels = [part(metrics, "confidence").get("level") for metrics in (a, b)]
    if ends_a and ends_b and levels[0] != levels[1]:
        left_out.append(f"confidence intervals: of {levels[0]} in A, of {levels[1]} in B")
        ends_a = ends_b = {}
    figures = _figures(part(a, "model", split), part(b, "model", split), HEADLINE)
    return {
        name: _with_intervals(figure, ends_a.get(name), ends_b.get(name))
        for name, figure in figures.items()
    }


def _ends(
    metrics: Mapping[str, Any], name: str, split: str, left_out: list[str]
) -> dict[str, tuple[float, float]]:
    """The confidence intervals of one report's model, where they are of this split."""
    found = part(metrics, "confidence")
    if found.get("split") != split:
        what = f"those of {found['split']} ground" if "split" in found else "none"
        left_out.append(f"confidence intervals: {name} has {what}")
        return {}
    ends = {
        key: (_number(row.get("lo")), _number(row.get("hi")))
        for key, row in part(found, "metrics").items()
        if isinstance(row, Mapping)
    }
    return {key: (lo, hi) for key, (lo, hi) in ends.items() if lo is not None and hi is not None}


def _with_intervals(
    figure: Figure, a: tuple[float, float] | None, b: tuple[float, float] | None
) -> Figure:
    overlap = None if a is None or b is None else a[0] <= b[1] and b[0] <= a[1]
    return Figure(figure.a, figure.b, figure.difference, a, b, overlap)


def _figures(a: Mapping[str, Any], b: Mapping[str, Any], names: Iterable[str]) -> dict[str, Figure]:
    found = {}
    for name in names:
        one, other = _number(a.get(name)), _number(b.get(name))
        difference = None if one is None or other is None else other - one
        found[name] = Figure(one, other, difference)
    return found


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _intervals(
    a: Mapping[str, Any], b: Mapping[str, Any], split: str, left_out: list[str]
) -> dict[str, Figure]:
    first, second = (part(metrics, "intervals", "model", split) for metrics in (a, b))
    lacking = [name for name, row in (("A", first), ("B", second)) if not row]
    left_out += [f"intervals of the spread: {name} has none" for name in lacking]
    return {} if lacking else _figures(first, second, intervals.GLOSSARY)


def _baselines(
    a: Mapping[str, Any], b: Mapping[str, Any], split: str, left_out: list[str]
) -> Table:
    left_out += [
        f"baselines: {name} has none"
        for name, metrics in (("A", a), ("B", b))
        if not part(metrics, "baselines")
    ]
    first, second = (
        {name: part(metrics, "baselines", name, split) for name in part(metrics, "baselines")}
        for metrics in (a, b)
    )
    return _table(first, second)


def _by(
    a: Mapping[str, Any], b: Mapping[str, Any], split: str, left_out: list[str]
) -> dict[str, Table]:
    first, second = part(a, "by"), part(b, "by")
    for name, some, others in (("A", first, second), ("B", second, first)):
        left_out += [f"table by {key}: only {name} has it" for key in some if key not in others]
    return {
        key: _table(_classes(first[key], split), _classes(second[key], split))
        for key in first
        if key in second
    }


def _classes(rows: Any, split: str) -> dict[str, Mapping[str, Any]]:
    """The rows of one split by the label of their class."""
    some = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return {label(row): row for row in some if row.get("split") == split}


def _table(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> Table:
    return Table(
        {name: _figures(row, b[name], HEADLINE) for name, row in a.items() if name in b},
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
    )


def _heads(found: Comparison) -> Iterator[tuple[str, str, str]]:
    yield from zip("AB", (found.a, found.b), found.regions, strict=True)


def _figure_lines(figures: Mapping[str, Figure]) -> Iterator[str]:
    yield f"  {'':<10}{'A':>12}{'B':>12}{'B - A':>12}"
    for name, figure in figures.items():
        values = (_told(figure.a, name), _told(figure.b, name), _told(figure.difference, name, "+"))
        line = f"  {name:<10}" + "".join(f"{text:>12}" for text in values)
        if figure.interval_a and figure.interval_b:
            one, other = (
                f"[{_told(lo, name)}, {_told(hi, name)}]"
                for lo, hi in (figure.interval_a, figure.interval_b)
            )
            line += f"   {one} {other} {'overlap' if figure.overlap else 'apart'}"
        yield line


def _table_lines(table: Table) -> Iterator[str]:
    if table.rows:
        wide = max(12, *map(len, table.rows))
        heads = "".join(f"{name + ' A':>11}{'B':>9}{'B - A':>9}" for name in _OF_A_CLASS)
        yield f"  {'':<{wide}}{'n A':>11}{'n B':>11}{heads}"
    for name, row in table.rows.items():
        counts = f"{_told(row['n'].a, 'n'):>11}{_told(row['n'].b, 'n'):>11}"
        if min(row["n"].a or 0, row["n"].b or 0) < FEW:
            yield f"  {name:<{wide}}{counts}"
            continue
        yield f"  {name:<{wide}}{counts}" + "".join(
            f"{_told(row[key].a, key):>11}{_told(row[key].b, key):>9}"
            f"{_told(row[key].difference, key, '+'):>9}"
            for key in _OF_A_CLASS
        )
    for name, labels in (("A", table.only_a), ("B", table.only_b)):
        if labels:
            yield f"  only in {name}: {', '.join(labels)}"


def _told(value: float | None, name: str, sign: str = "") -> str:
    """A figure with the digits that it is worth."""
    if value is None:
        return "–"
    digits = {"n": 0, "r2": 4, "coverage": 4}.get(name, 2)
    return f"{value + 0.0:{sign if value else ''}.{digits}f}"
