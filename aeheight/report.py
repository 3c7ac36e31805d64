"""The accuracy report: one HTML page that needs nothing else.

The page carries its style and its figures inside and asks the network for nothing, so that it can
be mailed, archived beside the heights it judges, and printed. The same inputs give the same page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2

from aeheight import embeddings, rows
from aeheight.charts import Histogram
from aeheight.figures import COLOURS, Maps, draw
from aeheight.metrics import GLOSSARY
from aeheight.seams import Seams
from aeheight.terms import TERMS, format_metric

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

    calibration: Histogram | None = None
    """Edges (k + 1,) of |predicted - reference| / spread on test ground, counts (k,)."""

    files: Mapping[str, str] = field(default_factory=dict)
    """What lies beside the page: name, and what it holds."""

    history: Sequence[Mapping[str, float | None]] = ()
    """One row an epoch, as `charts.learning_curves` takes it; further patches_per_second, and
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
        "words": rows.words,
        "fine": _fine,
        "share": _share,
        "held": _held,
    }
    metrics = report.metrics
    split = rows.judged_split(metrics["model"])
    headline = metrics["model"].get(split) or dict.fromkeys(GLOSSARY)
    return environment.get_template("report.html.j2").render(
        report=report,
        about=_about(metrics.get("provenance", {})),
        split=split,
        ground="the ground" if split == "all" else f"{split} ground",
        headline=headline,
        bars=rows.bars(metrics, report.model, split),
        table=list(rows.comparison(metrics, report.model)),
        classes=list(rows.classes(metrics, split)),
        few=rows.FEW,
        glossary=GLOSSARY,
        terms=[(term, text) for term, (key, text) in TERMS.items() if metrics.get(key)],
        confidence=metrics.get("confidence"),
        skill=rows.skill(metrics.get("skill", {})),
        lines=metrics.get("regression"),
        shifted=metrics.get("coregistration"),
        still=rows.still(metrics.get("coregistration", {})),
        seams=metrics.get("seams"),
        splits=[name for name in rows.SPLITS if name in metrics["model"]],
        figures=_figures(report, headline),
        colours=COLOURS,
        novel=rows.novel_share(metrics.get("by", {}).get("novelty", ()), split),
        hardness=rows.hardness(metrics.get("shift", {})),
        buffer=rows.buffer(metrics.get("correlation", {})),
        contiguous=not isinstance(rows.split(metrics).get("test", 0.0), int | float),
        intervals=rows.intervals(metrics),
        interval=metrics.get("intervals", {}).get("model", {}).get(split) or {},
        zones=list(rows.zones(metrics.get("zones", ()), headline.get("rmse"))),
        seam=_chosen_seam(report.prediction),
        learning=_learning(report),
        trust=metrics.get("provenance", {}).get("model", {}).get("trust"),
        base=rows.base_name(metrics),
        provenance=rows.provenance(metrics),
        cautions=[*report.notes, *CAUTIONS],
        attribution=embeddings.ATTRIBUTION,
    )


def _about(provenance: Mapping[str, Any]) -> list[str]:
    """What was mapped and what it is judged by, in a few words each."""
    reference = provenance.get("reference") or {}
    kinds = {"dsm": "surface heights (DSM)", "dtm": "terrain heights (DTM)"}
    told = [
        kinds.get(reference.get("surface", "")),
        reference.get("vertical_datum") and f"vertical datum {reference['vertical_datum']}",
        provenance.get("year") and f"embeddings of {provenance['year']}",
        reference and f"reference: epoch {reference.get('epoch', 'unknown')}",
    ]
    return [words for words in told if words]


def _quantity(value: object, name: str) -> str:
    """A cost: seconds as a duration, numbers with thousands apart, a dash for None."""
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("bytes"):
        return f"{value / 1e9:.2f} GB" if value else "–"
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


def _held(part: float | None) -> str:
    """A share beside 90 %, to a tenth of a percent."""
    return "–" if part is None else f"{100 * part:.1f} %"


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


def _figures(report: Report, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Data URIs of every figure that has data."""
    made = report.prediction
    return draw(
        report.maps,
        scatter=report.scatter,
        errors=report.errors,
        summary=summary,
        calibration=report.calibration,
        correlation=report.metrics.get("correlation"),
        history=report.history,
        seams=made.seams if made else None,
        halo=made.halo_px if made else 0,
        limit=made.limit if made else None,
    )
