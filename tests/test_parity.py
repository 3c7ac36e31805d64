"""The report's statistics of a whole run against those of geoutils and xdem on whole arrays."""

import numpy as np
import pytest

from aeheight.relief import FLAT, SECTORS, facing, gradient, roughness, steepness
from tests.runs import arrays

geoutils = pytest.importorskip("geoutils")
xdem = pytest.importorskip("xdem")

HALF_BIN = 0.005


@pytest.mark.parametrize("use", [("train", 1), ("validation", 2), ("test", 3)])
def test_figures_are_those_of_geoutils(small_run, use):
    """Its `linear_error` is P95 - P5, as the glossary warns."""
    cube, table = arrays(small_run.cube), small_run.metrics()["model"]
    split, number = use
    errors = arrays(small_run.heights)["height"][0].astype(np.float64) - cube["height"]
    errors = errors[cube["split"] == number]
    stats = geoutils.stats
    row = table[split]
    assert row["rmse"] == pytest.approx(stats.rmse(errors), rel=1e-6)
    assert row["nmad"] == pytest.approx(stats.nmad(errors), abs=1.4826 * 2 * HALF_BIN)
    assert row["p95"] - row["p5"] == pytest.approx(stats.linear_error(errors), abs=2 * HALF_BIN)
    assert row["le90"] < row["p95"] - row["p5"]


@pytest.fixture(scope="module")
def terrain():
    """Hills of some tens of metres, a plain and a hole, pixels of 10 m; and what xdem knows."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:120, :150] / 12
    heights = 40 * np.sin(x) * np.cos(y * 1.3) + 3 * x + rng.normal(0, 0.5, x.shape)
    heights[:20] = 7.0
    heights[60:63, 70:74] = np.nan
    return heights.astype(np.float32)


def of_xdem(name, terrain, **options):
    found = xdem.terrain.get_terrain_attribute(terrain, name, resolution=10.0, **options)
    return np.asarray(found)[1:-1, 1:-1]


def test_slope_and_roughness_are_those_of_xdem(terrain):
    wanted = of_xdem("slope", terrain, surface_fit="Horn")
    np.testing.assert_allclose(steepness(*gradient(terrain, 10, 10)), wanted, atol=2e-4)
    np.testing.assert_allclose(roughness(terrain), of_xdem("roughness", terrain), atol=1e-5)


def test_aspect_is_that_of_xdem(terrain):
    """Where it is not flat, nor within rounding of two sectors' border."""
    east, north = gradient(terrain, 10, 10)
    wanted = of_xdem("aspect", terrain, surface_fit="Horn") / 45
    clear = (np.abs(wanted % 1 - 0.5) > 1e-3) & (steepness(*gradient(terrain, 10, 10)) > FLAT)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(facing(east, north)[clear], np.rint(wanted[clear]) % 8)
    assert SECTORS[0] == "north"
