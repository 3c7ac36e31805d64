"""What the page says of intervals, skill, shift and seams."""

import numpy as np
import pytest

from aeheight.confidence import METRICS
from aeheight.metrics import Stats
from aeheight.report import Report, render
from tests.test_report import Page

SPLITS = ("train", "validation", "test", "all")


def confidence(**changes):
    row = {"value": 2.5, "lo": 2.125, "hi": 3.0}
    told = {"split": "test", "level": 0.95, "blocks": 40, "block_px": 256, "few": False}
    told |= {"draws": 1000, "seed": 0, "bin_m": 0.01, "metrics": dict.fromkeys(METRICS, row)}
    return told | changes


def shift(**changes):
    left = {"mean": 0.5, "rmse": 4.5, "nmad": 3.25}
    told = {"split": "test", "n": 1000, "steep": 0.4, "refused": None, "raw": left}
    told |= {"coregistered": {"mean": 0.0, "rmse": 4.25, "nmad": 3.125}}
    told |= {"dx_m": 3.5, "dy_m": -2.25, "dz_m": 0.5}
    return told | {"dx_se_m": 0.5, "dy_se_m": 0.5, "dz_se_m": 0.1} | changes


def seam(ratio, error):
    told = {"every_px": 1024, "pairs": 5000, "across_m": 1.5 * ratio, "beside_m": 1.5}
    return told | {"ratio": ratio, "lo": ratio - error, "hi": ratio + error}


def words(**more):
    rng = np.random.default_rng(0)
    reference = rng.normal(100, 30, 500)
    summary = Stats.of(reference + rng.normal(0, 2, 500), reference).summary()
    metrics = {"model": dict.fromkeys(SPLITS, summary), "baselines": {}}
    return Page(render(Report(name="x", metrics=metrics | more))).words


def test_intervals_stand_beside_what_was_measured():
    told = words(confidence=confidence())
    assert "The test ground is 40 blocks of 256 px" in told
    assert "RMSE [m] 2.50 2.12 3.00" in told
    assert "the true ones are wider" not in told
    assert "2.5 % and 97.5 % quantiles" in told  # the glossary
    assert "How sure" not in words()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"blocks": 7, "few": True}, "Fewer than 20 blocks"),
        ({"blocks": 1, "few": True}, "One block says nothing of others"),
    ],
)
def test_intervals_of_few_blocks_are_not_trusted(changes, warning):
    assert warning in words(confidence=confidence(**changes))


def test_blocks_narrower_than_errors_reach_are_named():
    reach = {"ground": "test", "length_px": 400.0, "length_m": 4000.0, "farthest_px": 512}
    reach |= {"buffer_px": None, "covered": None, "sill_m2": 4.0}
    told = words(confidence=confidence(), correlation=reach)
    assert "farther than these blocks are wide" in told
    wide = words(confidence=confidence(block_px=512), correlation=reach)
    assert "farther than these blocks are wide" not in wide


def test_a_shift_is_told_with_its_limits():
    told = words(coregistration=shift())
    assert "3.50 m east (± 0.98 m), 2.25 m south (± 0.98 m) and 0.50 m above" in told
    assert "raw 4.50 3.25 +0.50" in told
    assert "co-registered 4.25 3.12 +0.00" in told
    assert "No part of it" not in told
    still = shift(dx_m=0.1, dy_m=0.1, dz_m=0.1)
    assert "No part of it can be told from none." in words(coregistration=still)


def test_a_refused_shift_says_why():
    told = words(coregistration={"split": "test", "n": 9, "steep": 0.0, "refused": "too flat: so"})
    assert "No shift between them can be told: too flat: so." in told
    assert "co-registered 4" not in told


def test_seams_that_show_are_warned_of():
    hidden = words(seams={"windows": seam(1.01, 0.05)})
    assert "changes no more across the edges" in hidden
    shown = words(seams={"windows": seam(1.2, 0.05), "shards": seam(1.0, 0.1)})
    assert "seams may be seen" in shown
    alone = {"windows": seam(1.2, 0.0) | {"lo": None, "hi": None}}
    assert "as far as can be told" in words(seams=alone)


def test_skill_and_lines_have_their_tables():
    line = {"slope": 0.9, "intercept_m": 12.0, "slope_of_reference": 1.02}
    skill = {split: {"mean": 0.9, "prior": -0.25} for split in SPLITS}
    told = words(skill=skill, regression=dict.fromkeys(SPLITS, line))
    assert "skill against the prior DEM the mean height" in told
    assert "test −0.250 0.900" in told
    assert "heights are pulled towards their mean" in told
    assert "test 0.900 +12.00 1.020" in told


def test_named_classes_and_open_ends_are_rows():
    rng = np.random.default_rng(1)
    summary = Stats.of(rng.normal(0, 1, 50), np.zeros(50)).summary()
    ends = {"split": "test", "lo": None, "hi": 5.0} | summary
    named = {"split": "test", "lo": None, "hi": None, "class": "built-up"} | summary
    told = words(by={"predicted": [ends], "land_cover": [named], "zone": [named]})
    assert "Predicted height" in told
    assert "below 5 m" in told
    assert "Land cover, test ground" in told
    assert told.count("built-up") == 1  # one zone alone is no table
