"""The rows of the report's page, from metrics.json: plain values, in the order they are shown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from aeheight.metrics import GLOSSARY, Summary, comparable

SPLITS: Final = ("test", "validation", "train", "all")
FEW: Final = 100
"""Pixels: of a class with fewer the page shows their number alone."""
NAMES: Final = {
    "kernel": "kernel regression",
    "ridge": "ridge regression",
    "prior": "the prior DEM",
    "mean": "the mean height",
}
_BLOCK: Final = 4
"""Edge of a block in buffers: of smaller ones the buffer leaves less than half to training."""
CLASSES: Final = {
    "slope": ("Slope of the reference", "°"),
    "height": ("Reference height", "m"),
    "predicted": ("Predicted height", "m"),
    "aspect": ("Aspect of the reference (downhill; flat is under 2°)", ""),
    "roughness": ("Roughness of the reference (highest less lowest of 3 × 3 pixels)", "m"),
    "distance": (
        "Pixels to the nearest training ground (rows or columns, whichever are more)",
        "px",
    ),
    "novelty": ("Novelty (how unlike the embeddings of the training ground)", ""),
}


def judged_split(model: Mapping[str, Summary]) -> str:
    """The split whose numbers lead the page: test, or the next best that has pixels."""
    return next((name for name in SPLITS if model.get(name, {}).get("n")), "all")


def words(name: str) -> str:
    """A key as a person reads it."""
    return name.replace("_", " ")


def predictors(metrics: Mapping[str, Any], model: str) -> dict[str, Mapping[str, Summary]]:
    """The model first, then its baselines from the strongest kind to the weakest."""
    baselines = metrics.get("baselines", {})
    order = sorted(baselines, key=lambda name: [*NAMES, name].index(name))
    found = {model: metrics["model"]}
    for name in order:
        label = NAMES.get(name, name)
        # A model may be a ridge itself, and must not vanish behind its baseline.
        found[f"{label} (baseline)" if label in found else label] = baselines[name]
    return found


def base_name(metrics: Mapping[str, Any]) -> str:
    """What the network corrects, in words."""
    corrects = metrics.get("provenance", {}).get("model", {}).get("corrects")
    return NAMES.get(corrects, "its base")


def bars(metrics: Mapping[str, Any], model: str, split: str) -> list[dict[str, Any]]:
    """RMSE of each predictor, with its width in percent and the model's gain on it.

    Of predictors that were judged on the model's pixels: others are left out.
    """
    own = metrics["model"].get(split) or {}
    if own.get("rmse") is None:
        return []
    found = {
        name: row["rmse"]
        for name, by_split in predictors(metrics, model).items()
        if (row := by_split.get(split)) and row["rmse"] is not None and comparable(own, row)
    }
    longest = max(found.values()) or 1
    return [
        {
            "name": name,
            "rmse": rmse,
            "width": f"{100 * rmse / longest:.1f}",
            "gain": round(100 * (1 - own["rmse"] / rmse)) if rmse > 0 else None,
            "stronger": rmse < own["rmse"],
        }
        for name, rmse in found.items()
    ]


def comparison(
    metrics: Mapping[str, Any], model: str
) -> Iterator[tuple[str, list[tuple[str, Summary, set[str]]]]]:
    """For each split: (predictor, its metrics, the metrics in which it is the best).

    Of a baseline that is not judged there (the kernel regression on its own training ground) there
    is no row.
    """
    for split in SPLITS:
        rows = [
            (name, row)
            for name, by_split in predictors(metrics, model).items()
            if (row := by_split.get(split)) and (row["n"] or name == model)
        ]
        best = {metric: _best(metric, rows) for metric in GLOSSARY}
        if rows:
            yield split, [(name, row, {m for m in best if best[m] == name}) for name, row in rows]


def _best(metric: str, rows: list[tuple[str, Summary]]) -> str | None:
    values = {
        name: value
        for name, row in rows
        if (value := row.get(metric)) is not None and comparable(rows[0][1], row)
    }
    if len(values) < 2 or metric not in ("mean", "median", "nmad", "rmse", "mae", "le90", "r2"):
        return None
    if metric == "r2":
        return max(values, key=lambda name: values[name])
    return min(values, key=lambda name: abs(values[name]))


def classes(
    metrics: Mapping[str, Any], split: str
) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """For each criterion: its title and (class, figures) on the split.

    Figures are the class's metrics, `held` and `spread` of its intervals where the map has them,
    and `width`, its RMSE as a share of the largest in percent. Of a class of fewer than `FEW`
    pixels there is `n` alone. Of a class raster the last row tells the pixels in no class; one that
    names no judged pixel has no rows.
    """
    judged = (metrics.get("model", {}).get(split) or {}).get("n", 0)
    held = metrics.get("intervals", {}).get("by", {})
    asked = metrics.get("provenance", {}).get("classes") or {}
    for name, rows in metrics.get("by", {}).items():
        title, unit = CLASSES.get(name, (words(name).capitalize(), ""))
        known = {label(row, unit): row for row in held.get(name, ()) if row.get("split") == split}
        chosen = [(label(row, unit), row) for row in rows if row.get("split") == split]
        if (chosen or name in asked) and (name != "zone" or len(chosen) > 1):
            longest = max((row["rmse"] for _, row in chosen if _tells(row)), default=0) or 1
            found: list[tuple[str, Mapping[str, Any]]] = [
                (lab, _figures(row, known.get(lab), longest)) for lab, row in chosen
            ]
            classed = sum(row["n"] for _, row in chosen)
            if name in asked and judged > classed:
                found.append(("in no class", {"n": judged - classed}))
            yield title, found if classed else []


def _tells(row: Mapping[str, Any]) -> bool:
    return row["n"] >= FEW and row["rmse"] is not None


def _figures(
    row: Mapping[str, Any], interval: Mapping[str, Any] | None, longest: float
) -> dict[str, Any]:
    if not _tells(row):
        return {"n": row["n"]}
    told = interval or {}
    return {
        **row,
        "held": told.get("coverage"),
        "spread": told.get("spread"),
        "width": 100 * row["rmse"] / longest,
    }


def intervals(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What the map's intervals hold on each split, where there are any."""
    held = metrics.get("intervals", {}).get("model", {})
    return [
        (name, held[name])
        for name in SPLITS
        if held.get(name) and held[name]["coverage"] is not None
    ]


def label(row: Mapping[str, Any], unit: str = "") -> str:
    """What a class is called: its name, or where it begins and ends."""
    low, high = _end(row.get("lo")), _end(row.get("hi"))
    gap = " " if unit not in ("°", "") else ""
    if row.get("class") is not None:
        return str(row["class"])
    if low is None:
        return f"below {high}{gap}{unit}" if high else "all"
    return f"{low} to {high}{gap}{unit}" if high else f"{low}{gap}{unit} or more"


def _end(value: Any) -> str | None:
    """An end of a class in words; None: it has none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:g}".replace("-", "−") if known else None


def novel_share(rows: Sequence[Mapping[str, Any]], split: str) -> float | None:
    """Share of the judged pixels that are farther from the training ground than 1."""
    judged = [(row["lo"], row["n"]) for row in rows if row.get("split") == split]
    count = sum(n for _, n in judged)
    return sum(n for low, n in judged if low >= 1) / count if count else None


def hardness(shift: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How unlike test ground is to training ground in its heights; None where nothing is known."""
    rows = [(name, shift[name]) for name in SPLITS if shift.get(name, {}).get("n")]
    if not rows:
        return None
    test, train = shift.get("test", {}), shift.get("train", {})
    moved, spread = test.get("wasserstein_m"), train.get("std")
    return {
        "rows": rows,
        "test": test if moved is not None else None,
        "relative": moved / spread if moved is not None and spread else None,
    }


def split(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The region's `split`; empty where the metrics do not tell."""
    settings = metrics.get("provenance", {}).get("settings", {})
    found: Mapping[str, Any] = settings.get("split", {})
    return found


def buffer(correlation: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far errors go together, and what buffer and block that asks for, in pixels."""
    if correlation.get("farthest_px") is None:
        return None
    length = correlation["length_px"]
    least = math.ceil(correlation["farthest_px"] if length is None else length)
    return {**correlation, "least": least, "block": _BLOCK * least}


def still(shift: Mapping[str, Any]) -> bool:
    """Whether every part of a shift lies within its 95 % limits of none."""
    parts = [(shift.get(f"{name}_m"), shift.get(f"{name}_se_m")) for name in ("dx", "dy", "dz")]
    return all(
        size is not None and error is not None and abs(size) < 1.96 * error for size, error in parts
    )


def skill(
    skill: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[str, dict[str, float | None]]]:
    """For each baseline, in the order of NAMES: its name, and the skill on each split."""
    names = [name for name in NAMES if any(name in row for row in skill.values())]
    return [(NAMES[name], {split: row.get(name) for split, row in skill.items()}) for name in names]


def zones(
    rows: Sequence[Mapping[str, Any]], rmse: float | None
) -> Iterator[tuple[str, Mapping[str, Any], float | None]]:
    """For each pair of zones: its name, metrics, and its RMSE as a share of the map's own."""
    for row in rows:
        found = row.get("rmse")
        share = found / rmse if found is not None and rmse else None
        yield " and ".join(row["between"]), row, share


_LISTED: Final = 20
"""Of a longer list, such as the files of a country, the page shows so many."""


def provenance(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each part of the provenance its rows: dotted key and text.

    The settings of reference and prior are parts of their own, and not repeated.
    """
    whole = dict(metrics.get("provenance", {}))
    if "settings" in whole:
        again = {"height", "prior"} if "reference" in whole else set()
        whole["settings"] = {k: v for k, v in whole["settings"].items() if k not in again}
    rows = groupby(_flat(whole), lambda row: row[0].partition(".")[0])
    return [(name, list(found)) for name, found in rows]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Rows of a nested value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list) for v in value):
        for i, inner in enumerate(value[:_LISTED]):
            yield from _flat(inner, f"{key}.{i}")
        if len(value) > _LISTED:
            yield f"{key}.{_LISTED}", _more(value)
    elif isinstance(value, list | tuple):
        shown = [str(item) for item in value[:_LISTED]]
        shown += [_more(value)] if len(value) > _LISTED else []
        yield key, ", ".join(shown) or "–"
    else:
        yield key, "–" if value is None else str(value)


def _more(values: Sequence[Any]) -> str:
    return f"and {len(values) - _LISTED} more, see metrics.json"
