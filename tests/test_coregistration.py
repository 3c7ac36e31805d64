"""Co-registration: a shift that was put in is found, as by numpy and by xdem's Nuth & Kääb."""

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.blocks import Blocks, Gathered
from aeheight.coregistration import Facets, coregister, terms
from aeheight.relief import gradient
from aeheight.windows import tile

PIXEL = 10.0


def hills(rows=160, cols=200, dx=0.0, dy=0.0, seed=0, height=30.0):
    """Smooth hills of known form, seen `dx` m further west and `dy` m further south."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :cols]
    x, y = x * PIXEL - dx, -y * PIXEL - dy
    z = np.zeros(x.shape)
    for _ in range(12):
        angle, length, start = rng.uniform(0, [2 * np.pi, 1, 2 * np.pi])
        wave = 2 * np.pi / (300 + 900 * length)
        z += height * np.sin(wave * (x * np.cos(angle) + y * np.sin(angle)) + start)
    return z


def summed(predicted, reference, judged, cut=None, edge=20):
    """Of the inner pixels of arrays that are one pixel wider on every side."""
    gathered, facets = Gathered(), Facets.zero()
    shape = judged.shape
    for piece in tile(shape, cut or max(shape)):
        wide = slice(piece.row, piece.bottom + 2), slice(piece.col, piece.right + 2)
        around = reference[wide].astype(np.float32)
        errors = (predicted[wide] - reference[wide])[1:-1, 1:-1]
        rise, there = gradient(around, PIXEL, PIXEL), judged[piece.slices]
        known = there & ~np.isnan(errors)
        inner = around[1:-1, 1:-1]
        counted = terms((rise[0][known], rise[1][known]), errors[known])
        gathered.add(Blocks.of((0, piece, edge), errors, inner, known, counted))
        facets += Facets.of(rise, errors, known)
    return gathered.total(), facets


def everything(array):
    return np.ones((array.shape[0] - 2, array.shape[1] - 2), bool)


@pytest.mark.parametrize("shift", [(4.0, -2.0, 1.5), (-3.0, 0.0, 0.0), (0.0, 5.0, -7.0)])
def test_a_shift_that_was_put_in_is_found(shift):
    dx, dy, dz = shift
    reference = hills()
    noise = np.random.default_rng(1).normal(0, 1.0, reference.shape)
    predicted = hills(dx=dx, dy=dy) + dz + noise
    found = coregister(*summed(predicted, reference, everything(reference)))
    assert found["refused"] is None
    for name, value in zip(("dx", "dy", "dz"), shift, strict=True):
        error = found[f"{name}_se_m"]
        assert abs(found[f"{name}_m"] - value) < 4 * error + 0.03 * np.hypot(dx, dy)
        assert error < 0.2
    assert found["raw"]["rmse"] > found["coregistered"]["rmse"]
    assert found["coregistered"]["rmse"] == pytest.approx(1.0, rel=0.03)
    assert found["coregistered"]["nmad"] == pytest.approx(1.0, rel=0.05)
    assert abs(found["coregistered"]["mean"]) < 0.05


def test_it_is_the_least_squares_of_numpy_and_what_is_left_too():
    reference = hills()
    predicted = hills(dx=3) + np.random.default_rng(1).normal(0, 2, reference.shape)
    predicted[50:60, 70:90] = np.nan
    found = coregister(*summed(predicted, reference, everything(reference), cut=37))
    east, north = gradient(reference.astype(np.float32), PIXEL, PIXEL)
    d = (predicted - reference)[1:-1, 1:-1]
    known = ~np.isnan(d)
    steep = known & (np.degrees(np.arctan(np.hypot(east, north))) > 3)
    g = np.stack([-east, -north, np.ones_like(east)], axis=-1)
    shift = np.linalg.lstsq(g[steep], d[steep], rcond=None)[0]
    shift[2] = np.mean(d[known] - g[known, :2] @ shift[:2])
    np.testing.assert_allclose([found[f"{k}_m"] for k in ("dx", "dy", "dz")], shift, rtol=1e-7)
    left = d[known] - g[known] @ shift
    assert found["coregistered"]["rmse"] == pytest.approx(np.sqrt(np.mean(left**2)), rel=1e-7)
    assert found["coregistered"]["mean"] == pytest.approx(left.mean(), abs=1e-7)
    nmad = 1.4826 * np.median(np.abs(left - np.median(left)))
    assert found["coregistered"]["nmad"] == pytest.approx(nmad, rel=0.02)
    raw = d[known]
    assert found["raw"]["nmad"] == pytest.approx(
        1.4826 * np.median(np.abs(raw - np.median(raw))), abs=0.0149
    )
    assert found["steep"] == pytest.approx(steep.sum() / known.sum())


@given(st.integers(5, 90), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_no_cut_shows(cut, seed):
    reference = hills(62, 82, seed=seed)
    rng = np.random.default_rng(seed)
    predicted = hills(62, 82, dx=2, seed=seed) + rng.normal(0, 1, reference.shape)
    judged = rng.random((60, 80)) < 0.8
    one = coregister(*summed(predicted, reference, judged, cut=cut))
    other = coregister(*summed(predicted, reference, judged))
    for name, value in other.items():
        assert one[name] == (pytest.approx(value, rel=1e-6) if value is not None else None), name


def test_standard_errors_are_those_of_errors_that_go_together():
    """Errors that are one for a whole block: the spread over trials is what is told."""
    reference, found = hills(122, 162, height=10), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = np.kron(rng.normal(0, 2, (7, 9)), np.ones((20, 20)))[:122, :162]
        noise = np.roll(noise, 1, axis=(0, 1))  # blocks begin where the inner pixels do
        found.append(coregister(*summed(reference + noise, reference, everything(reference))))
    for name in ("dx", "dy", "dz"):
        spread = np.std([row[f"{name}_m"] for row in found])
        told = np.mean([row[f"{name}_se_m"] for row in found])
        assert 0.6 < told / spread < 1.5, name


def test_flat_ground_and_slopes_that_face_one_way_are_refused():
    flat = hills(height=0.2)
    found = coregister(*summed(flat + 1, flat, everything(flat)))
    assert "too flat: 0 % of the ground is steeper than 3°" in found["refused"]
    assert "dx_m" not in found
    ramp = 0.3 * PIXEL * np.mgrid[:80, :90][1] + np.random.default_rng(0).normal(0, 0.02, (80, 90))
    found = coregister(*summed(ramp + 1, ramp, everything(ramp)))
    assert "do not face enough ways" in found["refused"]
    nothing = np.zeros((78, 88), bool)
    assert "no ground" in coregister(*summed(ramp, ramp, nothing))["refused"]


@pytest.mark.filterwarnings("ignore")
def test_as_nuth_and_kaeaeb_by_xdem():
    xdem = pytest.importorskip("xdem")
    import geoutils  # noqa: PLC0415 (only with xdem)

    dx, dy, dz = 3.0, -4.0, 2.0
    reference = hills(260, 300)
    noise = np.random.default_rng(1).normal(0, 0.5, reference.shape)
    predicted = hills(260, 300, dx=dx, dy=dy) + dz + noise
    transform = Affine(PIXEL, 0, 500000, 0, -PIXEL, 5000000)
    ours = coregister(*summed(predicted, reference, everything(reference)))
    one, other = (
        xdem.DEM.from_array(values.astype(np.float32), transform=transform, crs=32631, nodata=-9999)
        for values in (reference, predicted)
    )
    assert geoutils is not None
    fitted = xdem.coreg.NuthKaab().fit(one, other, random_state=1)
    found = fitted.meta["outputs"]["affine"]
    # xdem tells how to move the map back; it iterates, we take the first step.
    for name, axis in (("dx", "shift_x"), ("dy", "shift_y"), ("dz", "shift_z")):
        assert ours[f"{name}_m"] == pytest.approx(-found[axis], abs=0.15), name
