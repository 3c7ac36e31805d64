"""What differs between two reports' provenance, and what of that makes their figures unlike."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_WIDEST = 72
"""Characters of a value in a line."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something of the provenance that is not the same."""

    topic: str
    """Name of a part of the provenance."""
    key: str
    """Dotted, within the topic; empty where the topic is one value."""
    a: Any
    b: Any
    vital: bool
    """Figures cannot be compared because of it."""

    @property
    def values(self) -> tuple[str, str]:
        """Both in words; of files those that the other has not."""
        a, b = _files(self.a), _files(self.b)
        if a is None or b is None or a.keys() == b.keys():
            return _short(self.a), _short(self.b)
        return _short([a[n] for n in a if n not in b]), _short([b[n] for n in b if n not in a])


@dataclass(frozen=True, slots=True)
class _Topic:
    """A part of the provenance that is compared as one."""

    name: str
    path: tuple[str, ...]
    """Keys that lead to it."""
    apart: tuple[str, ...] = ()
    """Keys within it that are told elsewhere, or say nothing of the figures."""
    vital: bool = False
    named: bool = False
    """Its keys are names, such as zones: one that is missing is a difference, not an older form."""


_REFERENCE = ("surface", "vertical_datum", "href", "access", "source")
_TOPICS: Final = (
    _Topic("vertical datum", ("reference", "vertical_datum"), vital=True),
    _Topic("surface", ("reference", "surface"), vital=True),
    _Topic("reference", ("reference",), _REFERENCE, vital=True),
    _Topic("year", ("year",), vital=True),
    _Topic("ground", ("grids",), vital=True, named=True),
    _Topic("split", ("settings", "split"), vital=True),
    _Topic("embeddings", ("embeddings",), ("attribution", "disclosure")),
    _Topic("prior", ("prior",), ("href", "access", "source")),
    _Topic("classes", ("classes",), named=True),
    _Topic("model", ("model",)),
    _Topic("settings of the model", ("settings", "model")),
    _Topic(
        "settings",
        ("settings",),
        (
            *("name", "note", "store", "grid", "embeddings", "height", "prior", "split", "model"),
            *("export", "evaluate.classes"),
        ),
    ),
    _Topic("versions", ("versions",)),
)
"""In the order of telling."""


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[tuple[Difference, ...], list[str]]:
    """What two reports were not made the same by.

    Args:
        a: the `provenance` of a metrics.json.
        b: the other's.

    Returns:
        The differences, the vertical datum and the surface first; and what only one of them tells,
        such as a setting that an older version did not have, in words.
    """
    told = [_compared(topic, a, b) for topic in _TOPICS]
    differences = tuple(found for some, _ in told for found in some)
    return differences, [line for _, lines in told for line in lines]


def reasons(differences: Iterable[Difference]) -> dict[str, str]:
    """Why figures cannot be compared, in words, by the topics of the vital differences."""
    vital: dict[str, list[Difference]] = {}
    for found in differences:
        if found.vital:
            vital.setdefault(found.topic, []).append(found)
    return {topic: f"unlike {topic} ({_why(some)})" for topic, some in vital.items()}


def _why(some: Sequence[Difference]) -> str:
    if len(some) > 1:
        return "see what differs: " + ", ".join(found.key for found in some)
    a, b = some[0].values
    return f"{a} in A, {b} in B"


def _compared(
    topic: _Topic, a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[list[Difference], list[str]]:
    """What differs in one topic, and which keys only one report has."""
    *parents, last = topic.path
    one, other = part(a, *parents), part(b, *parents)
    if last not in one and last not in other:
        return [], [f"{topic.name}: neither tells it"] * topic.vital
    if last not in one or last not in other:
        return [], [f"{topic.name}: only {'A' if last in one else 'B'} tells it"]
    alone: dict[str, list[str]] = {"A": [], "B": []}
    differences = list(_walk(topic, "", one[last], other[last], alone))
    lines = [f"{topic.name}: only {k} tells {', '.join(keys)}" for k, keys in alone.items() if keys]
    return differences, lines


def _walk(
    topic: _Topic, key: str, a: Any, b: Any, alone: Mapping[str, list[str]]
) -> Iterator[Difference]:
    """The differences at and below a key; keys that only one has are added to `alone`."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        if a != b:
            yield _difference(topic, key, a, b)
        return
    for name in {**a, **b}:
        inner = f"{key}.{name}" if key else str(name)
        if inner in topic.apart:
            continue
        if topic.named or (name in a and name in b):
            yield from _walk(topic, inner, a.get(name), b.get(name), alone)
        else:
            alone["A" if name in a else "B"].append(inner)


def _difference(topic: _Topic, key: str, a: Any, b: Any) -> Difference:
    files, others = _files(a), _files(b)
    if files is not None and others is not None and files.keys() == others.keys():
        # As receipts have it: files are known by name, and data may move.
        return Difference(topic.name, f"{key} (same names, elsewhere)".strip(), a, b, vital=False)
    return Difference(topic.name, key, a, b, topic.vital)


def _files(value: Any) -> dict[str, str] | None:
    """A list of files by their names without folders; None of others, and where names recur."""
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        return None
    named = {entry.rsplit("/", 1)[-1]: entry for entry in value}
    return named if len(named) == len(value) else None


def part(found: Any, *keys: str) -> Mapping[str, Any]:
    """What lies under some keys, empty where that is no mapping."""
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _short(value: Any) -> str:
    """A value in a line: of several files their number and the first."""
    text = "none" if value is None or value == [] else str(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        text = value[0] if len(value[0]) <= _WIDEST else f"…{value[0][-_WIDEST:]}"
        text = f"{text} and {len(value) - 1} more" if len(value) > 1 else text
    return text if len(text) <= 2 * _WIDEST else f"{text[:_WIDEST]}…"
