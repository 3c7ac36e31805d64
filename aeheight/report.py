"""The accuracy report: one HTML page that needs nothing else.

The page carries its style and its figures inside and asks the network for nothing, so that it can
be mailed, archived beside the heights it judges, and printed. The same inputs give the same page.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2

from aeheight.figures import Histogram, Maps, draw, format_metric
from aeheight.metrics import GLOSSARY, Summary
from aeheight.seams import Seams
from aeheight.terms import TERMS

SPLITS: Final = ("test", "validation", "train", "all")
ATTRIBUTION: Final = (
    "The AlphaEarth Foundations Satellite Embedding dataset is produced by "
    "Google and Google DeepMind."
)
CAUTIONS: Final = (
    "AlphaEarth was itself trained with Copernicus DEM and GEDI lidar heights among its targets: "
    "the embeddings have met heights before, and this accuracy is not that of imagery alone.",
    "The reference is not the truth: its own errors, its date, its datum and its surface "
    "(with or without trees and buildings) all count here as errors of the map.",
    "R² grows with the relief of the ground. Compare R² and RMSE on the same ground only.",
    "Neighbouring pixels err together: n counts pixels, not independent samples.",
    "Test ground lies apart from training ground, but in the same region. "
    "Farther away, on other landscapes, expect larger errors.",
)
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
    "distance": ("Distance to training ground", "px"),
    "novelty": ("Novelty (distance from the training ground)", ""),
}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How the map was computed."""

    window_px: int
    """Edge of a window, pixels."""

    halo_px: int
    """Pixels cut from every side of a window's result."""

    extra: float
    """Pixels computed for every pixel of the map."""

    seams: Seams | None = None
    """The checkpoint's, against the halo; None: not measured."""

    limit: float | None = None
    """What a step at seams should stay below, metres: 1 % of the map's RMSE."""

    sessions: Sequence[Mapping[str, Any]] = ()
    """One a run of predict: estimate_seconds, seconds, shards, failed, windows, workers, device."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page shows; what is None or empty is left out."""

    name: str
    """The region's name: the title."""

    metrics: Mapping[str, Any]
    """The whole of metrics.json: model, baselines, by, zones, provenance."""

    model: str = "model"
    """What to call the model, such as U-Net++ (ResNet-18)."""

    maps: Sequence[Maps] = ()
    """One row of maps each."""

    scatter: Histogram | None = None
    """Edges (k + 1,) in metres, counts (k, k) [reference, predicted] on test ground."""

    errors: Histogram | None = None
    """Edges (k + 1,) in metres, counts (k,) of predicted - reference on test ground."""

    history: Sequence[Mapping[str, float | None]] = ()
    """One row an epoch, as `figures.learning_curves` takes it; further patches_per_second, and
    seconds since the start."""

    prediction: Prediction | None = None
    """How the map was computed."""

    cost: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """For each step: seconds, pixels_per_second, and whatever else was measured."""

    notes: Sequence[str] = ()
    """What to be careful about with this run, besides what holds for every run."""


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aeheight"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "metric": format_metric,
        "quantity": _quantity,
        "words": _words,
        "fine": _fine,
        "share": _share,
    }
    split = judged_split(report.metrics["model"])
    headline = report.metrics["model"].get(split) or dict.fromkeys(GLOSSARY)
    return environment.get_template("report.html.j2").render(
        report=report,
        split=split,
        ground="the ground" if split == "all" else f"{split} ground",
        headline=headline,
        bars=_bars(report, split),
        table=list(_comparison(report)),
        classes=list(_classes(report.metrics.get("by", {}), split)),
        glossary=GLOSSARY,
        terms=[(term, text) for term, (key, text) in TERMS.items() if report.metrics.get(key)],
        confidence=report.metrics.get("confidence"),
        skill=_skill(report.metrics.get("skill", {})),
        lines=report.metrics.get("regression"),
        shifted=report.metrics.get("coregistration"),
        still=_still(report.metrics.get("coregistration", {})),
        seams=report.metrics.get("seams"),
        splits=[name for name in SPLITS if name in report.metrics["model"]],
        figures=_figures(report, headline),
        novel=_novel_share(report.metrics.get("by", {}).get("novelty", ()), split),
        hardness=_hardness(report.metrics.get("shift", {})),
        buffer=_buffer(report.metrics.get("correlation", {})),
        contiguous=not isinstance(_split(report.metrics).get("test", 0.0), int | float),
        intervals=list(_intervals(report.metrics, split)),
        interval=report.metrics.get("intervals", {}).get("model", {}).get(split),
        zones=list(_zones(report.metrics.get("zones", ()), headline.get("rmse"))),
        seam=_chosen_seam(report.prediction),
        learning=_learning(report),
        trust=report.metrics.get("provenance", {}).get("model", {}).get("trust"),
        provenance=list(_flat(report.metrics.get("provenance", {}))),
        cautions=[*report.notes, *CAUTIONS],
        attribution=ATTRIBUTION,
    )


def judged_split(model: Mapping[str, Summary]) -> str:
    """The split whose numbers lead the page: test, or the next best that has pixels."""
    return next((name for name in SPLITS if model.get(name, {}).get("n")), "all")


def _quantity(value: object, name: str) -> str:
    """A cost: seconds as a duration, numbers with thousands apart, a dash for None."""
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if name == "seconds" and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
    if name == "seconds":
        return f"{value:.1f} s"
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 100 else f"{value:.3g}"


def _fine(metres: float) -> str:
    """Small lengths by two digits; below 0.01 mm they are rounding."""
    if metres < 1e-5:
        return "under 0.01 mm"
    return f"{metres:.2g} m" if metres < 10 else f"{metres:.0f} m"


def _share(part: float | None) -> str:
    """A share by two digits, in percent."""
    if part is None:
        return "–"
    percent = 100 * part
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _predictors(report: Report) -> dict[str, Mapping[str, Summary]]:
    """The model first, then its baselines from the strongest kind to the weakest."""
    baselines = report.metrics.get("baselines", {})
    order = sorted(baselines, key=lambda name: [*NAMES, name].index(name))
    predictors = {report.model: report.metrics["model"]}
    for name in order:
        label = NAMES.get(name, name)
        # A model may be a ridge itself, and must not vanish behind its baseline.
        predictors[f"{label} (baseline)" if label in predictors else label] = baselines[name]
    return predictors


def _bars(report: Report, split: str) -> list[dict[str, Any]]:
    """RMSE of each predictor, with its width in percent and the model's gain on it."""
    found = {
        name: rmse
        for name, by_split in _predictors(report).items()
        if (rmse := (by_split.get(split) or {}).get("rmse")) is not None
    }
    longest = max(found.values(), default=0) or 1
    own = found.get(report.model)
    return [
        {
            "name": name,
            "rmse": rmse,
            "width": f"{100 * rmse / longest:.1f}",
            "gain": round(100 * (1 - own / rmse)) if own is not None and rmse > 0 else None,
            "stronger": own is not None and rmse < own,
        }
        for name, rmse in found.items()
    ]


def _comparison(report: Report) -> Iterator[tuple[str, list[tuple[str, Summary, set[str]]]]]:
    """For each split: (predictor, its metrics, the metrics in which it is the best)."""
    for split in SPLITS:
        rows = [
            (name, by_split[split])
            for name, by_split in _predictors(report).items()
            if by_split.get(split)
        ]
        best = {metric: _best(metric, rows) for metric in GLOSSARY}
        if rows:
            yield split, [(name, row, {m for m in best if best[m] == name}) for name, row in rows]


def _best(metric: str, rows: list[tuple[str, Summary]]) -> str | None:
    values = {name: value for name, row in rows if (value := row.get(metric)) is not None}
    if len(values) < 2 or metric not in ("mean", "median", "nmad", "rmse", "mae", "le90", "r2"):
        return None
    if metric == "r2":
        return max(values, key=lambda name: values[name])
    return min(values, key=lambda name: abs(values[name]))


def _classes(
    by: Mapping[str, Sequence[Mapping[str, Any]]], split: str
) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """For each criterion: its title and (class, metrics) on the split."""
    for name, rows in by.items():
        title, unit = CLASSES.get(name, (_words(name).capitalize(), ""))
        chosen = [(_interval(row, unit), row) for row in rows if row.get("split") == split]
        if chosen and (name != "zone" or len(chosen) > 1):
            yield title, chosen


def _intervals(
    metrics: Mapping[str, Any], split: str
) -> Iterator[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """Rows of what spreads hold, where there are any: of all splits, then by class on the split."""
    held = metrics.get("intervals", {})
    tables = [("Ground", list(held.get("model", {}).items()))]
    for title, table in [*tables, *_classes(held.get("by", {}), split)]:
        rows = [(name, row) for name, row in table if row["coverage"] is not None]
        if rows:
            yield title, rows


def _interval(row: Mapping[str, Any], unit: str) -> str:
    low, high = (
        None if end is None or not math.isfinite(end) else f"{end:g}".replace("-", "−")
        for end in (row.get("lo"), row.get("hi"))
    )
    gap = " " if unit not in ("°", "") else ""
    if "class" in row:
        return str(row["class"])
    if low is None:
        return f"below {high}{gap}{unit}" if high else "all"
    return f"{low} to {high}{gap}{unit}" if high else f"{low}{gap}{unit} and more"


def _novel_share(rows: Sequence[Mapping[str, Any]], split: str) -> float | None:
    """Share of the judged pixels that are farther from the training ground than 1."""
    judged = [(row["lo"], row["n"]) for row in rows if row.get("split") == split]
    count = sum(n for _, n in judged)
    return sum(n for low, n in judged if low >= 1) / count if count else None


def _hardness(shift: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
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


def _split(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The region's `split`; empty where the metrics do not tell."""
    settings = metrics.get("provenance", {}).get("settings", {})
    found: Mapping[str, Any] = settings.get("split", {})
    return found


def _buffer(correlation: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far errors go together, and what buffer and block that asks for, in pixels."""
    if correlation.get("farthest_px") is None:
        return None
    length = correlation["length_px"]
    least = math.ceil(correlation["farthest_px"] if length is None else length)
    return {**correlation, "least": least, "block": _BLOCK * least}


def _still(shift: Mapping[str, Any]) -> bool:
    """Whether every part of a shift lies within its 95 % limits of none."""
    parts = [(shift.get(f"{name}_m"), shift.get(f"{name}_se_m")) for name in ("dx", "dy", "dz")]
    return all(
        size is not None and error is not None and abs(size) < 1.96 * error for size, error in parts
    )


def _skill(
    skill: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[str, dict[str, float | None]]]:
    """For each baseline, the strongest kind first: its name, and the skill on each split."""
    names = [name for name in NAMES if any(name in row for row in skill.values())]
    return [
        (NAMES[name], {split: row.get(name) for split, row in skill.items()})
        for name in sorted(names, key=["prior", "kernel", "ridge", "mean"].index)
    ]


def _zones(
    rows: Sequence[Mapping[str, Any]], rmse: float | None
) -> Iterator[tuple[str, Mapping[str, Any], float | None]]:
    """For each pair of zones: its name, metrics, and its RMSE as a share of the map's own."""
    for row in rows:
        found = row.get("rmse")
        share = found / rmse if found is not None and rmse else None
        yield " and ".join(row["between"]), row, share


def _chosen_seam(prediction: Prediction | None) -> dict[str, float] | None:
    """What was measured at the chosen halo, metres; None where that halo was not."""
    if prediction is None or prediction.seams is None:
        return None
    curve = prediction.seams
    if prediction.halo_px not in curve.halos:
        return None
    place = list(curve.halos).index(prediction.halo_px)
    return {name: getattr(curve, name)[place] for name in ("rms", "step", "largest")}


def _learning(report: Report) -> dict[str, Any] | None:
    """How training went, for the words beside its curves; None where nothing was trained."""
    known = [
        (rmse, row)
        for row in report.history
        if (rmse := row.get("validation_rmse")) is not None and math.isfinite(rmse)
    ]
    if len(known) < 2:
        return None
    reached, best = min(known, key=lambda pair: pair[0])
    start = known[0][0] if known[0][1].get("epoch") == 0 else None
    model = report.metrics.get("provenance", {}).get("settings", {}).get("model", {})
    last = report.history[-1]
    return {
        "best": best,
        "last": int(last.get("epoch") or 0),
        "asked": model.get("epochs"),
        "diverged": bool(last.get("diverged")),
        "seconds": last.get("seconds"),
        "start": start,
        "gain": round(100 * (1 - reached / start)) if start else 0,
    }


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Rows of a nested value: dotted key and text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{i}")
    elif isinstance(value, list | tuple):
        yield key, ", ".join(str(item) for item in value) or "–"
    else:
        yield key, "–" if value is None else str(value)


def _figures(report: Report, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Data URIs of every figure that has data."""
    made = report.prediction
    return draw(
        report.maps,
        scatter=report.scatter,
        errors=report.errors,
        summary=summary,
        history=report.history,
        seams=made.seams if made else None,
        halo=made.halo_px if made else 0,
        limit=made.limit if made else None,
    )
