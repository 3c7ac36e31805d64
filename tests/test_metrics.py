import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.counts import Counts
from aeheight.errors import InputError
from aeheight.metrics import BIN, CELL, GLOSSARY, Scatter, Stats
from aeheight.sums import dump, load, merge, merge_tables

HALF = BIN / 2 + 1e-9
EXACT = ("mean", "std", "mae", "rmse", "r2", "pearson", "min", "max", "coverage")


def oracle(p, r):
    """Every metric by numpy on whole float64 arrays."""
    p, r = p.astype(np.float64), r.astype(np.float64)
    d = p - r
    size = np.abs(d)
    return {
        "n": d.size,
        "coverage": 1.0,
        "mean": d.mean(),
        "median": np.median(d),
        "std": d.std(),
        "nmad": 1.4826 * np.median(np.abs(d - np.median(d))),
        "mae": size.mean(),
        "rmse": np.sqrt(np.mean(d**2)),
        "r2": 1 - np.sum(d**2) / np.sum((r - r.mean()) ** 2),
        "pearson": np.corrcoef(p, r)[0, 1],
        "le68": np.quantile(size, 0.68),
        "le90": np.quantile(size, 0.90),
        "le95": np.quantile(size, 0.95),
        "p5": np.quantile(d, 0.05),
        "p95": np.quantile(d, 0.95),
        "min": d.min(),
        "max": d.max(),
    }


def check(summary, expected):
    assert list(summary) == list(GLOSSARY) == list(expected)
    assert summary["n"] == expected["n"]
    for name in EXACT:
        assert summary[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name
    for name in ("median", "le68", "le90", "le95", "p5", "p95"):
        assert abs(summary[name] - expected[name]) <= HALF, name
    assert abs(summary["nmad"] - expected["nmad"]) <= 1.4826 * BIN + 1e-9


@st.composite
def landscapes(draw):
    """Heights, a flawed prediction of them, and a partition in a random order."""
    n = draw(st.integers(2, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0.0, -400.0, 3000.0, 8848.0]))
    reference = (offset + draw(st.sampled_from([1.0, 50.0])) * rng.normal(size=n)).astype(
        np.float32
    )
    error = draw(st.sampled_from([0.003, 0.5, 20.0])) * rng.standard_t(2, size=n)
    predicted = (reference + draw(st.sampled_from([0.0, -7.22])) + error).astype(np.float32)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=12)))
    pieces = list(zip([0, *cuts], [*cuts, n], strict=True))
    return predicted, reference, draw(st.permutations(pieces))


@given(landscapes())
@settings(max_examples=200, deadline=None)
def test_any_partition_in_any_order_equals_numpy_on_the_whole(case):
    predicted, reference, pieces = case
    parts = [Stats.of(predicted[a:b], reference[a:b]) for a, b in pieces]
    check(merge(parts).summary(), oracle(predicted, reference))

    left = Stats.zero()
    for part in parts:
        left = left + part
    check(left.summary(), oracle(predicted, reference))
    assert left.histogram == merge(reversed(parts)).histogram


@given(landscapes())
@settings(max_examples=50, deadline=None)
def test_integers_and_extremes_do_not_depend_on_the_order(case):
    predicted, reference, pieces = case
    parts = [Stats.of(predicted[a:b], reference[a:b]) for a, b in pieces]
    whole = Stats.of(predicted, reference)
    for total in (merge(parts), merge(reversed(parts))):
        for name in ("n", "n_reference", "minimum", "maximum", "histogram"):
            assert getattr(total, name) == getattr(whole, name)
    scatter = [Scatter.of(predicted[a:b], reference[a:b]) for a, b in pieces]
    assert sum(scatter, Scatter.zero()) == Scatter.of(predicted, reference)


def test_sums_far_from_zero_keep_their_precision():
    # float32 sums, or E[x²] - E[x]², fail here by percents and more.
    rng = np.random.default_rng(1)
    reference = (3000 + rng.normal(size=(1024, 1024))).astype(np.float32)
    predicted = (reference + 0.1 * rng.normal(size=reference.shape)).astype(np.float32)
    total = merge(
        Stats.of(p, r)
        for p, r in zip(np.split(predicted, 64), np.split(reference, 64), strict=True)
    )
    expected = oracle(predicted.ravel(), reference.ravel())
    summary = total.summary()
    assert summary["r2"] == pytest.approx(expected["r2"], rel=1e-12)
    assert summary["std"] == pytest.approx(expected["std"], rel=1e-12)


def test_known_answers_by_hand():
    reference = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    predicted = reference + np.array([-1.0, 0.0, 1.0, 2.0, 8.0])
    summary = Stats.of(predicted, reference).summary()
    assert summary == pytest.approx(
        {
            "n": 5,
            "coverage": 1.0,
            "mean": 2.0,
            "median": 1.0,
            "std": 10**0.5,  # (9 + 4 + 1 + 0 + 36) / 5
            "nmad": 1.4826,  # deviations 2 1 0 1 7
            "mae": 2.4,
            "rmse": 14**0.5,  # (1 + 0 + 1 + 4 + 64) / 5
            "r2": 1 - 70 / 1000,
            "pearson": 1200 / (1000 * 1450) ** 0.5,
            "le68": 1.72,  # |d| 0 1 1 2 8 at position 2.72
            "le90": 5.6,
            "le95": 6.8,
            "p5": -0.8,
            "p95": 6.8,
            "min": -1.0,
            "max": 8.0,
        }
    )


def test_the_mean_of_the_reference_scores_zero():
    reference = np.random.default_rng(2).gamma(2, 30, 5000)
    summary = Stats.of(np.full(5000, reference.mean()), reference).summary()
    assert summary["r2"] == pytest.approx(0, abs=1e-12)
    assert summary["pearson"] is None


def test_a_perfect_map_has_no_error_at_all():
    reference = np.random.default_rng(3).normal(2000, 300, 999)
    summary = Stats.of(reference, reference).summary()
    zeros = set(GLOSSARY) - {"n", "coverage", "r2", "pearson"}
    assert {name: summary[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
    assert summary["r2"] == 1
    assert summary["pearson"] == pytest.approx(1, rel=1e-12)


def test_no_pixels_and_no_predictions():
    empty = Stats.zero().summary()
    assert empty == dict.fromkeys(GLOSSARY) | {"n": 0}
    missing = Stats.of(np.full(4, np.nan), np.arange(4.0), predicted_valid=np.zeros(4, bool))
    assert missing.summary() == dict.fromkeys(GLOSSARY) | {"n": 0, "coverage": 0.0}
    one = Stats.of([3.0], [1.0])
    assert (missing + one).summary()["coverage"] == (one + missing).summary()["coverage"] == 1 / 5
    assert one + Stats.zero() == Stats.zero() + one == merge([one]) == one
    assert merge([]) == Stats.zero()


def test_one_pixel_has_no_correlation():
    summary = Stats.of([7.123], [5.0]).summary()
    assert summary["r2"] is None
    assert summary["pearson"] is None
    assert summary["std"] == summary["nmad"] == 0
    assert summary["median"] == summary["le90"] == summary["p5"] == pytest.approx(2.123)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 3000.7])
def test_flat_ground_has_no_r2_however_it_is_cut(constant):
    reference = np.full(1000, constant)
    predicted = reference + np.random.default_rng(4).normal(size=1000)
    parts = [
        Stats.of(p, r)
        for p, r in zip(
            np.split(predicted, [7, 300, 301]), np.split(reference, [7, 300, 301]), strict=True
        )
    ]
    summary = merge(parts).summary()
    assert summary["r2"] is None
    assert summary["pearson"] is None


def test_masks_select_and_coverage_counts():
    reference = np.array([[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]])
    predicted = np.array([[1.5, np.nan, 3.0], [4.5, np.nan, 6.5]])
    stats = Stats.of(
        predicted,
        reference,
        reference_valid=np.isfinite(reference),
        predicted_valid=np.isfinite(predicted),
    )
    assert (stats.n_reference, stats.n) == (5, 3)
    assert stats.summary()["coverage"] == 3 / 5
    assert stats.summary()["mean"] == 0.5


@pytest.mark.parametrize("kind", [Stats, Scatter])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_missing_must_be_declared(kind, bad):
    good, holed = np.zeros(9), np.zeros(9)
    holed[[2, 5]] = bad
    with pytest.raises(InputError, match="2 of 9 predicted pixels declared valid are NaN"):
        kind.of(holed, good)
    with pytest.raises(InputError, match=r"2 of 9 reference .*declare .* in reference_valid"):
        kind.of(good, holed)


def test_masks_and_shapes_are_checked():
    with pytest.raises(InputError, match=r"shape \(3,\) and reference \(4,\)"):
        Stats.of(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match="predicted_valid is int64"):
        Stats.of(np.zeros(3), np.zeros(3), predicted_valid=np.ones(3, np.int64))
    with pytest.raises(InputError, match="reference_valid is bool of shape"):
        Stats.of(np.zeros(3), np.zeros(3), reference_valid=np.ones(1, bool))


def test_a_prediction_that_exploded_is_counted_not_refused():
    stats = Stats.of(np.array([1e30, -1e30, 5.0]), np.zeros(3))
    assert stats.n == 3
    assert stats.summary()["median"] == 5
    assert stats.summary()["max"] == 1e30
    assert Scatter.of(np.array([1e30]), np.zeros(1)).n == 1


def test_counts_with_a_huge_span_equal_those_with_a_small_one():
    bins = np.array([5, -3, 5, 7, -3, 5], np.int64)
    wide = Counts.of(np.append(bins, 2**50))
    assert wide.bins.tolist() == [-3, 5, 7, 2**50]
    assert wide.counts.tolist() == [2, 3, 1, 1]
    assert Counts.of(bins) + Counts.of(np.array([2**50])) == wide
    assert Counts.of(bins) != wide
    assert Counts.of(bins) != "counts"


def test_the_scatter_counts_like_numpy():
    rng = np.random.default_rng(5)
    reference = rng.uniform(-40, 60, 3000)
    predicted = reference + rng.normal(0, 9, 3000)
    scatter = Scatter.of(predicted, reference)
    edges, counts = scatter.dense(max_bins=1000)
    assert np.all(np.diff(edges) == CELL)
    expected, _, _ = np.histogram2d(reference, predicted, bins=[edges, edges])
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == scatter.n == 3000


@given(st.integers(1, 60), st.floats(-9000, 9000), st.floats(0.1, 5000))
@settings(max_examples=60, deadline=None)
def test_a_coarser_scatter_keeps_every_pixel(max_bins, middle, spread):
    rng = np.random.default_rng(6)
    reference = middle + spread * rng.normal(size=200)
    predicted = middle + spread * rng.normal(size=200)
    edges, counts = Scatter.of(predicted, reference).dense(max_bins)
    assert counts.shape == (len(edges) - 1,) * 2
    assert len(edges) - 1 <= max_bins
    expected, _, _ = np.histogram2d(reference, predicted, bins=[edges, edges])
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == 200


def test_a_trimmed_scatter_leaves_wild_values_out():
    rng = np.random.default_rng(7)
    reference = rng.uniform(0, 100, 10_000)
    predicted = reference.copy()
    predicted[0] = 1e6
    edges, counts = Scatter.of(predicted, reference).dense(trim=0.001)
    assert edges[-1] <= 101
    assert counts.sum() == 9999


def test_the_displayed_errors_count_like_numpy():
    d = np.random.default_rng(8).normal(1.5, 4, 20_000)
    stats = Stats.of(d, np.zeros_like(d))
    edges, counts = stats.errors(max_bins=50, trim=0)
    assert len(counts) <= 50
    np.testing.assert_array_equal(counts, np.histogram(d, edges)[0])
    assert counts.sum() == 20_000
    trimmed = stats.errors(max_bins=50, trim=0.01)[1]
    assert 0.98 * 20_000 <= trimmed.sum() < 20_000


def test_nothing_can_be_displayed_too():
    assert Stats.zero().errors()[1].sum() == 0
    assert Scatter.zero().dense()[1].sum() == 0


def example():
    rng = np.random.default_rng(9)
    reference = 100 * rng.normal(size=2000)
    predicted = reference + rng.normal(size=2000)
    return {
        "model/test": Stats.of(predicted, reference),
        "model/train": Stats.zero(),
        "scatter": Scatter.of(predicted, reference),
    }


def test_dump_and_load_are_exact():
    table = example()
    assert load(dump(table)) == table
    assert load(dump({})) == {}


def test_the_same_sums_give_the_same_bytes():
    table = example()
    assert dump(table) == dump(dict(reversed(table.items()))) == dump(load(dump(table)))


def test_damaged_or_foreign_bytes_are_refused():
    data = dump(example())
    for bad in (b"", b"not sums", data[:-9], zlib.compress(b"[]"), zlib.compress(b'{"a": 1}')):
        with pytest.raises(InputError, match=r"cannot be read .* --overwrite"):
            load(bad)
    text, _, arrays = zlib.decompress(data).partition(b"\0")
    with pytest.raises(InputError, match="cannot be read"):
        load(zlib.compress(text + b"\0" + arrays[:-1]))
    document = json.loads(text)
    document["sums"]["scatter"]["kind"] = "Spline"
    with pytest.raises(InputError, match="cannot be read"):
        load(zlib.compress(json.dumps(document).encode() + b"\0" + arrays))
    document["version"] = 99
    with pytest.raises(InputError, match=r"version 99, and this .* version 3"):
        load(zlib.compress(json.dumps(document).encode()))


def test_tables_merge_by_name():
    a, b, c = (Stats.of([float(i)], [0.0]) for i in range(3))
    dots = Scatter.of([1.0], [1.0])
    merged = merge_tables([{"x": a}, {"x": b, "y": c}, {"s": dots}, {}, {"s": dots}])
    assert merged == {"x": a + b, "y": c, "s": dots + dots}
    assert merge_tables([]) == {}
    with pytest.raises(InputError, match="'x' is Stats in one table and Scatter"):
        merge_tables([{"x": a}, {"x": dots}])


def test_many_parts_merge_as_one():
    rng = np.random.default_rng(10)
    reference, predicted = rng.normal(3000, 1, (2, 1000))
    parts = [Stats.of([p], [r]) for p, r in zip(predicted, reference, strict=True)]
    check(merge(parts).summary(), oracle(predicted, reference))


@given(landscapes(), st.integers(1, 7), st.sampled_from([np.float32, np.float64]))
def test_classes_in_one_pass_are_each_class_alone(landscape, count, kind):
    predicted, reference = (values.astype(kind) for values in landscape[:2])
    rng = np.random.default_rng(predicted.size)
    labels = rng.integers(-1, count, predicted.shape).astype(np.int32)
    predicted[rng.random(predicted.shape) < 0.2] = np.nan
    found = Stats.by(predicted, reference, labels, count)
    for number, stats in enumerate(found):
        own = labels == number
        p, r = predicted[own], reference[own]
        assert stats == Stats.of(p, r, predicted_valid=~np.isnan(p))


def test_errors_far_from_all_others_are_counted_in_their_bins():
    rng = np.random.default_rng(0)
    reference = np.zeros(5000, np.float32)
    predicted = rng.normal(0, 1, 5000).astype(np.float32)
    predicted[::500] = rng.uniform(-1e6, 1e6, 10)
    labels = np.arange(5000, dtype=np.int32) % 1000  # so many that few bins are counted densely
    total = sum(Stats.by(predicted, reference, labels, 1000), Stats.zero())
    d = predicted.astype(np.float64)
    assert total.histogram == Counts.of(np.floor(d / BIN + 0.5).astype(np.int64))


@pytest.mark.parametrize(
    ("predicted", "reference", "label", "said"),
    [
        (np.inf, 1.0, 0, "1 of 2 pixels to be judged have an infinite prediction"),
        (1.0, np.nan, 0, "a reference that is NaN"),
        (1.0, -np.inf, 0, "1 of 2 pixels"),
        (1.0, 1.0, 2, "labels run from 0 to 2; give -1 to 1"),
        (1.0, 1.0, -2, "labels run from -2 to 0"),
    ],
)
def test_what_cannot_be_summed_by_class_is_refused(predicted, reference, label, said):
    p, r = np.array([0.0, predicted]), np.array([0.0, reference])
    with pytest.raises(InputError, match=said):
        Stats.by(p, r, np.array([0, label], np.int32), 2)
    with pytest.raises(InputError, match="shape"):
        Stats.by(p, r[:1], np.zeros(2, np.int32), 1)
