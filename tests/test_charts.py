"""The report's pictures: what they hold, and that every eye can read them."""

import base64
import dataclasses
import io

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from aeheight.charts import calibration_curve, learning_curves, seam_curves, variogram_plot
from aeheight.figures import COLOURS, USES, Maps, draw
from aeheight.metrics import GLOSSARY
from aeheight.report import Report, render
from aeheight.rows import FEW, base_name, classes
from aeheight.seams import Seams
from tests.test_report import Page

# Machado, Oliveira & Fernandes (2009), doi:10.1109/TVCG.2009.113: severity 1, linear RGB.
SIGHT = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                 [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(colours, sight):
    """(n, 3) sRGB colours as that eye sees them, in CIELAB (D65)."""
    rgb = np.asarray(colours, float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.asarray(SIGHT[sight]).T, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = seen @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("sight", SIGHT)
def test_every_eye_can_order_the_colours(sight):
    for kind in ("heights", "novelty", "spread"):
        seen = lab(matplotlib.colormaps[COLOURS[kind]](np.linspace(0, 1, 32))[:, :3], sight)
        steps = np.diff(seen[:, 0])
        assert (np.sign(steps) == np.sign(steps[0])).all(), kind
        assert abs(seen[-1, 0] - seen[0, 0]) > 50
    low, zero, high = lab(
        matplotlib.colormaps[COLOURS["difference"]]([0.1, 0.5, 0.9])[:, :3], sight
    )
    assert zero[0] > max(low[0], high[0]) + 25
    assert np.linalg.norm(low - high) > 25


@pytest.mark.parametrize("sight", SIGHT)
def test_every_eye_can_tell_the_split(sight):
    seen = lab([to_rgb(colour) for colour in USES], sight)
    for k, one in enumerate(seen):
        for other in seen[:k]:
            assert np.linalg.norm(one - other) > 10  # 2.3 is just noticeable


def test_a_rainbow_would_not_pass():
    seen = lab(matplotlib.colormaps["jet"](np.linspace(0, 1, 32))[:, :3], "no green")
    assert len(np.unique(np.sign(np.diff(seen[:, 0])))) > 1


def panel(**changes):
    rows, cols = np.mgrid[:60, :90].astype(np.float32)
    known = {"reference": rows, "predicted": rows + 1, "difference": rows * 0 + 1}
    return Maps(group="utm10n", crs="EPSG:32610", bounds=(0, 0, 900, 600), pixel=(10, 10),
                **known | {"spread": 10 + cols / 90} | changes)  # fmt: skip


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")


def test_colour_bars_are_smooth_and_white_is_white():
    """The palette keeps the colours of the map; a spread from 10 to 11 m fills its scale."""
    found = picture(draw([panel()])["maps"][0]["spread"])
    colours = {colour for _, colour in found.getcolors(10**6)}
    assert len(colours) > 150
    assert found.getpixel((0, 0)) == (255, 255, 255)
    pixels = np.asarray(found).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (0, 0, 4)).sum(axis=1) < 30).mean() > 0.002  # its darkest colour
    assert (np.abs(pixels - (252, 253, 191)).sum(axis=1) < 30).mean() > 0.002


def test_infinite_and_missing_values_do_not_move_the_scales():
    odd = np.full((60, 90), np.nan, np.float32)
    odd[:5] = np.inf
    drawn = draw([panel(spread=odd, novelty=odd)])["maps"][0]
    assert set(drawn) == {"reference", "predicted", "difference", "novelty", "spread"}


def history(*validation):
    return [
        {"epoch": k, "validation_rmse": value, "validation_r2": 1 - (value / 40) ** 2}
        for k, value in enumerate(validation)
    ]


def test_a_spike_does_not_squash_the_curves():
    figure = learning_curves(history(16.0, 400.0, 12.0, 10.0, 9.0, 8.5, 8.2, 8.1))
    assert figure is not None
    rmse, r2 = figure.axes
    assert rmse.get_ylim()[1] < 30
    assert "400" in rmse.texts[0].get_text()
    assert r2.get_ylim()[0] > 0.5
    assert r2.get_ylim()[1] < 1.1
    steady = learning_curves(history(10.0, 11.0, 13.0, 16.0, 20.0, 25.0))
    assert steady is not None
    assert steady.axes[0].get_ylim()[1] > 25  # what grows is no spike


def test_the_calibration_is_what_was_counted():
    rng = np.random.default_rng(0)
    ratio = np.abs(rng.normal(0, 1 / 1.645, 10**5))
    edges = np.append(np.linspace(0, 8, 129), np.inf)
    counts = np.histogram(ratio, edges)[0]
    (axes,) = calibration_curve(edges, counts).axes
    held, wanted = (np.array(line.get_ydata(), float) for line in axes.lines[:2])
    np.testing.assert_allclose(held, wanted, atol=0.6)
    at = list(axes.lines[0].get_xdata()).index(1.0)
    assert held[at] == pytest.approx(100 * (ratio < 1).mean())


def test_the_variogram_leaves_out_what_has_no_pairs():
    told = {"lags_px": [1, 2, 4], "semivariance_m2": [1.0, 2.0, None], "sill_m2": 3.0}
    figure = variogram_plot(told | {"length_px": None})
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 2.0]
    assert variogram_plot(told | {"semivariance_m2": [1.0, None, None]}) is None


def test_rounding_alone_is_no_seam_to_draw():
    quiet = Seams(edge=64, pixels=9, halos=(0, 16), rms=(0.0, 1e-7), largest=(0, 0), step=(0, 0))
    assert seam_curves(quiet, 0, None) is None
    assert seam_curves(dataclasses.replace(quiet, step=(0.5, 0.1)), 0, None) is not None


def judged(n, **more):
    figures = dict.fromkeys(GLOSSARY, 1.0) | {"n": n, "rmse": 2.0, "r2": -8e4}
    return {"split": "test", "lo": 0.0, "hi": 5.0} | figures | more


@pytest.mark.parametrize(("n", "told"), [(FEW - 1, {"n"}), (FEW, {"n", "rmse", "held", "width"})])
def test_a_class_of_few_pixels_has_its_number_alone(n, told):
    ((_, ((_, row),)),) = classes({"by": {"slope": [judged(n)]}}, "test")
    assert set(row) >= told
    assert ("rmse" in row) == (n >= FEW)


def test_a_class_without_predictions_is_no_figure():
    empty = judged(0, rmse=None)
    metrics = {"model": {}, "baselines": {}, "by": {"slope": [empty, judged(500, lo=5.0, hi=9.0)]}}
    page = Page(
        render(Report(name="x", metrics=metrics | {"model": {"test": judged(500, r2=0.5)}}))
    )
    assert set(page.row("0 to 5°")[1:-1]) == {"–"}
    assert page.row("5 to 9°")[1] == "2.00"
    assert "80000" not in page.words


def test_what_the_network_corrects_has_a_name():
    assert base_name({"provenance": {"model": {"corrects": "prior"}}}) == "the prior DEM"
    assert base_name({}) == "its base"
