"""Words of the report beside the metrics' own, with formula and source."""

import math
from typing import Final

TERMS: Final = {
    "interval": (
        "confidence",
        "95 % interval by a block bootstrap: the 2.5 % and 97.5 % quantiles of the metric over "
        "draws of blocks with replacement (Künsch 1989, Lahiri 2003).",
    ),
    "skill": (
        "skill",
        "1 − MSE / MSE of a baseline, MSE = Σd² / n; undefined where their numbers of "
        "pixels differ by more than 1 % (Murphy 1988).",
    ),
    "slope": (
        "regression",
        "Of the least-squares line: Σ(r − mean r)(p − mean p) / Σ(r − mean r)² of prediction p on "
        "reference r; of the reference on the prediction with p in the denominator.",
    ),
    "co-registered": (
        "coregistration",
        "After the shift (dx, dy, dz) that d = −dx · ∂h/∂x − dy · ∂h/∂y + dz fits best by least "
        "squares on slopes over 3°; h is the reference (one step of Nuth & Kääb 2011).",
    ),
    "step ratio": (
        "seams",
        "Mean |step of d| across a seam / mean |step of d| one pixel to either side of it; 1 where "
        "no seam shows (a ratio of two sums, Cochran 1977).",
    ),
    "slope class": (
        "by",
        "Slope and aspect of the reference from 3 × 3 pixels by Horn (1981); roughness is the "
        "highest less the lowest of them (Wilson et al. 2007). Distance to training ground is the "
        "larger of rows and columns apart.",
    ),
    "quantiles": (
        "model",
        "Of median, LE68, LE90, LE95, P5 and P95: linear between order statistics (Hyndman & Fan "
        "1996, type 7), from a histogram of 1 cm bins: at most 0.5 cm off, NMAD at most 1.5 cm.",
    ),
    "spread": (
        "intervals",
        "Half the width of the interval that is to hold 90 % of the true heights; held is the "
        "share whose |d| is at most the spread. The right spread is the told one × the 90 % "
        "quantile of |d| / spread (Lei et al. 2018).",
    ),
    "interval score": (
        "intervals",
        "Mean of 2 · spread + 20 · max(|d| − spread, 0): narrow and right is low (Gneiting & "
        "Raftery 2007, eq. 43, at 90 %).",
    ),
    "semivariance": (
        "correlation",
        "Σ(d(x) − d(x + h))² / 2N over the N pairs of pixels h apart along rows and columns "
        "(Matheron 1963); errors go together up to where it reaches 95 % of the variance of d.",
    ),
    "from training": (
        "shift",
        "Wasserstein-1 distance ∫|F − G| of two distributions of heights (Vallender 1974); overlap "
        "is the sum of the smaller of their shares (Inman & Bradley 1989).",
    ),
}
"""Words beside the metrics' own: the key of metrics.json that uses each, and what it means."""


def format_metric(value: float | None, name: str) -> str:
    """A metric as a person reads it; a dash where it is undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    if name == "n":
        return f"{value:,.0f}".replace(",", "\u202f")
    if name == "coverage":
        # Never rounded up to a full 100 %, which would hide the gaps.
        return f"{math.floor(value * 1000) / 10:.1f} %"
    if name in ("r2", "pearson"):
        return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")
    sign = "+" if name in ("mean", "median", "p5", "p95", "min", "max") else ""
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")
