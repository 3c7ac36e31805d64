"""The correlation length, against random fields of known range and plain loops over pairs."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.correlation import FEWEST, LAGS, Variogram
from aeheight.errors import InputError
from aeheight.metrics import Stats
from aeheight.report import Report, render
from aeheight.splits import TEST
from tests.runs import arrays

MODELS = {
    # Each at 95 % of its sill where the distance is 1.
    "exponential": lambda h: np.exp(-3 * h),
    "gaussian": lambda h: np.exp(-3 * h**2),
    "spherical": lambda h: np.where(h < 1 / 0.811, 1 - 1.5 * 0.811 * h + 0.5 * (0.811 * h) ** 3, 0),
}


def field(size, practical_range, model, rng):
    """(size, size) a periodic Gaussian random field of variance 1, by its spectrum."""
    steps = np.fft.fftfreq(size) * size
    covariance = MODELS[model](np.hypot(steps[:, None], steps) / practical_range)
    weights = np.sqrt(np.maximum(np.fft.fft2(covariance).real, 0))
    return np.fft.ifft2(weights * np.fft.fft2(rng.standard_normal((size, size)))).real


def measured(errors, judged=None):
    judged = np.ones(errors.shape, bool) if judged is None else judged
    return Variogram.of(errors, judged).length(errors[judged].var())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("practical_range", [5, 10, 20, 40])
def test_the_range_of_a_random_field_is_found(practical_range, model):
    rng = np.random.default_rng(7)
    found = np.mean([measured(field(512, practical_range, model, rng)) for _ in range(4)])
    assert found == pytest.approx(practical_range, rel=0.2)


def test_it_is_found_on_scattered_ground_too():
    """Test ground is blocks here and there; pairs across gaps count as well."""
    rng = np.random.default_rng(8)
    errors = field(512, 12, "exponential", rng)
    judged = np.kron(rng.random((16, 16)) < 0.3, np.ones((32, 32))).astype(bool)
    assert measured(errors, judged) == pytest.approx(12, rel=0.3)


def test_independent_errors_have_a_length_below_a_pixel():
    assert measured(np.random.default_rng(1).standard_normal((300, 300))) < 1


def test_independent_noise_on_top_does_not_hide_the_range():
    rng = np.random.default_rng(2)
    errors = field(512, 20, "gaussian", rng) + rng.standard_normal((512, 512))
    assert measured(errors) == pytest.approx(20, rel=0.25)


def test_errors_that_go_together_farther_than_is_seen_have_no_length():
    rows, cols = np.mgrid[:128, :128]
    plane = 0.5 * rows + 0.3 * cols
    found = Variogram.of(plane, np.ones(plane.shape, bool))
    assert found.length(plane.var()) is None
    assert found.farthest == 64
    facts = found.summary(float(plane.var()), 10.0, 64)
    assert (facts["length_px"], facts["length_m"], facts["covered"]) == (None, None, False)


def brute(errors, judged):
    """Pairs and sums by loops over all pixels."""
    pairs, squares = np.zeros(len(LAGS), int), np.zeros(len(LAGS))
    rows, cols = errors.shape
    for k, lag in enumerate(LAGS):
        for row, col in product(range(rows), range(cols)):
            for other, size, edge in (((row + lag, col), rows, row), ((row, col + lag), cols, col)):
                if lag <= size // 2 and edge + lag < size and judged[row, col] and judged[other]:
                    pairs[k] += 1
                    squares[k] += (errors[row, col] - errors[other]) ** 2
    return pairs, squares


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_sums_are_those_of_plain_loops(shape, share, seed):
    rng = np.random.default_rng(seed)
    errors = rng.normal(5, 3, shape).astype(np.float32)
    judged = rng.random(shape) < share
    errors[~judged & (rng.random(shape) < 0.5)] = np.nan
    found = Variogram.of(errors, judged)
    pairs, squares = brute(errors.astype(float), judged)
    np.testing.assert_array_equal(found.pairs, pairs)
    np.testing.assert_allclose(found.squares, squares, rtol=1e-6)


def test_shards_add_up_to_what_their_pixels_say():
    rng = np.random.default_rng(4)
    errors = field(256, 6, "exponential", rng)
    halves = [errors[:, :128], errors[:, 128:]]
    parts = [Variogram.of(half, np.ones(half.shape, bool)) for half in halves]
    total = Variogram.zero() + parts[0] + parts[1]
    np.testing.assert_array_equal(total.pairs, parts[0].pairs + parts[1].pairs)
    whole = Variogram.of(errors, np.ones(errors.shape, bool))
    short = np.array(LAGS) <= 8
    ratio = total.semivariance()[short] / whole.semivariance()[short]
    np.testing.assert_allclose(ratio, 1, atol=0.02)
    assert total.length(errors.var()) == pytest.approx(whole.length(errors.var()), rel=0.1)


def test_a_constant_error_hides_nothing_and_needs_no_buffer():
    rng = np.random.default_rng(5)
    errors = field(256, 8, "exponential", rng)
    assert measured(errors + 1000) == pytest.approx(measured(errors), rel=1e-6)
    flat = Variogram.of(np.full((32, 32), 7.0), np.ones((32, 32), bool))
    assert flat.length(0.0) == 0
    assert flat.summary(0.0, 10.0, 0)["covered"] is True


@pytest.mark.parametrize(
    ("buffer", "covered"), [(None, None), (0, False), (9, False), (13, True), (500, True)]
)
def test_the_summary_says_whether_the_buffer_is_as_wide(buffer, covered):
    errors = field(512, 11, "exponential", np.random.default_rng(6))
    found = Variogram.of(errors, np.ones(errors.shape, bool))
    facts = found.summary(float(errors.var()), 30.0, buffer)
    assert 10 < facts["length_px"] < 12.5
    assert facts["length_m"] == pytest.approx(30 * facts["length_px"])
    assert facts["covered"] is covered
    assert facts["farthest_px"] == 256
    assert len(facts["lags_px"]) == len(facts["pairs"]) == len(facts["semivariance_m2"])
    assert facts["semivariance_m2"][-2:] == [None, None]
    assert facts["semivariance_m2"][0] == pytest.approx(
        np.mean((errors[1:] - errors[:-1]) ** 2 + (errors[:, 1:] - errors[:, :-1]).T ** 2) / 4
    )


def test_a_buffer_beyond_all_that_is_seen_is_not_judged():
    rows, _ = np.mgrid[:64, :64]
    found = Variogram.of(rows * 1.0, np.ones(rows.shape, bool))
    covered = {buffer: found.summary(1e9, 10.0, buffer)["covered"] for buffer in (5, 32, 33)}
    assert covered == {5: False, 32: False, 33: None}


def test_too_few_pairs_say_nothing():
    assert FEWEST > 2
    found = Variogram.of(np.array([[1.0, 2.0, 4.0]]), np.ones((1, 3), bool))
    assert found.farthest is found.length(1.0) is found.summary(1.0, 10.0, 5)["covered"] is None
    assert np.isnan(found.semivariance()).all()
    assert Variogram.zero().farthest is None


def test_what_cannot_be_summed_is_refused():
    errors, judged = np.zeros((4, 5)), np.ones((4, 5), bool)
    with pytest.raises(InputError, match="NaN or infinite"):
        Variogram.of(np.where(np.arange(5) == 2, np.inf, errors), judged)
    with pytest.raises(InputError, match=r"\(4, 5\) and judged \(5, 4\)"):
        Variogram.of(errors, judged.T)


def test_a_run_tells_the_correlation_of_its_errors(small_run):
    """The sums of the shards that evaluate read, on test ground, and their length."""
    cube, metrics = arrays(small_run.cube), small_run.metrics()
    errors = arrays(small_run.heights)["height"][0] - cube["height"]
    judged = (cube["split"] == TEST) & ~np.isnan(errors)
    edge, total = small_run.settings["cube"]["shard"], Variogram.zero()
    for row, col in product(range(0, errors.shape[0], edge), range(0, errors.shape[1], edge)):
        part = np.s_[row : row + edge, col : col + edge]
        total += Variogram.of(errors[part], judged[part])
    sill = float((errors[judged].astype(float)).var())
    wanted = total.summary(sill, 10.0, small_run.settings["split"]["buffer"])
    found = metrics["correlation"]
    assert found.pop("ground") == "test"
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        for one, other in zip(np.atleast_1d(found[key]), np.atleast_1d(value), strict=True):
            assert one == (None if other is None else pytest.approx(other, rel=1e-5)), key
    assert found["farthest_px"] == 32
    page = (small_run.store / "report" / "index.html").read_text()
    assert "How hard the test is" in page
    assert ("Set split.buffer to" in page) == (found["covered"] is False)


def told(**changes):
    """What the report says of errors that go together over 11 pixels, and how it warns."""
    errors = field(256, 11, "exponential", np.random.default_rng(9))
    found = Variogram.of(errors, np.ones(errors.shape, bool))
    correlation = {"ground": "test", **found.summary(float(errors.var()), 30.0, 2)} | changes
    stats = Stats.of(errors, np.zeros(errors.shape)).summary()
    metrics = {"model": {"test": stats}, "correlation": correlation}
    text = render(Report(name="x", metrics=metrics))
    section = text.partition("How hard the test is")[2].partition("<h2>")[0]
    return correlation, " ".join(section.split())


def test_a_narrow_buffer_is_warned_of_with_the_remedy():
    correlation, text = told()
    least = int(np.ceil(correlation["length_px"]))
    assert f"go together over {correlation['length_px']:.3g} pixels" in text
    assert "The buffer of 2 pixels between ground of different use is narrower" in text
    assert f"Set split.buffer to {least} and split.block to {4 * least} or more" in text


def test_a_buffer_as_wide_is_not_warned_of():
    for changes, words in (
        ({"buffer_px": 20, "covered": True}, "The buffer of 20 pixels"),
        ({"buffer_px": None, "covered": None}, "go together over"),
    ):
        text = told(**changes)[1]
        assert words in text
        assert 'class="warn"' not in text


def test_a_length_that_is_not_seen_is_a_least_one():
    text = told(length_px=None, length_m=None, ground="all")[1]
    assert "Errors on all ground go together farther than 128 pixels" in text
    assert "Set split.buffer to 128 or more and split.block to 512 or more" in text


def test_nothing_is_told_of_ground_too_small():
    assert told(farthest_px=None, length_px=None)[1] == ""
