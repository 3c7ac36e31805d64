"""The models against closed forms, and the checkpoint against damage."""

import io
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.embeddings import BANDS, NODATA, decode
from aeheight.errors import InputError
from aeheight.models import (
    Checkpoint,
    HeightModel,
    build,
)
from aeheight.predictor import Predictor
from aeheight.ridge import Ridge, RidgeSums
from aeheight.settings import ModelSettings
from tests.checkpoints import HISTORY, PROVENANCE, UNET, checkpoint_of, codes_of, some_ridge


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def small_checkpoint():
    """A few kilobytes, with tensors of every kind that a network's state has."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "norm.running_var": torch.rand(4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(17),
    }
    return checkpoint_of(UNET, "prior", weights)


# --- ridge -------------------------------------------------------------------------------------


def ridge_by_lstsq(codes, heights, alpha):
    """The oracle: least squares with the penalty written as 64 more rows."""
    x = decode(codes).astype(np.float64).T
    mean_x, mean_y = x.mean(axis=0), heights.astype(np.float64).mean()
    penalty = np.sqrt(alpha * ((x - mean_x) ** 2).sum() / BANDS)
    rows = np.vstack([x - mean_x, penalty * np.eye(BANDS)])
    target = np.concatenate([heights - mean_y, np.zeros(BANDS)])
    weights = np.linalg.lstsq(rows, target, rcond=None)[0]
    return weights, mean_y - weights @ mean_x


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), seed=st.integers(0, 99))
def test_ridge_of_any_partition_is_the_ridge_of_the_whole(cuts, seed):
    rng = np.random.default_rng(seed)
    codes = codes_of(BANDS, 300, seed=seed)
    heights = (3000 + rng.normal(size=300)).astype(np.float32)
    edges = [0, *sorted(cuts), 300]
    parts = [RidgeSums.of(codes[:, a:b], heights[a:b]) for a, b in itertools.pairwise(edges)]
    rng.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    ridge = total.solve(1e-3)
    weights, intercept = ridge_by_lstsq(codes, heights, 1e-3)
    np.testing.assert_allclose(ridge.weights, weights, rtol=1e-8, atol=1e-9)
    assert ridge.intercept == pytest.approx(intercept, rel=1e-12)
    assert ridge.mean == pytest.approx(heights.astype(np.float64).mean(), rel=1e-14)
    assert ridge.n == 300


def test_ridge_recovers_a_linear_map_over_several_blocks():
    codes = codes_of(BANDS, 150_000)
    truth = np.random.default_rng(1).normal(size=BANDS)
    heights = (truth @ decode(codes).astype(np.float64) + 42).astype(np.float32)
    sums = RidgeSums.of(codes, heights)
    ridge = sums.solve(1e-12)
    np.testing.assert_allclose(ridge.weights, truth, atol=1e-5)
    assert ridge.intercept == pytest.approx(42, abs=1e-5)


def test_rmse_from_the_sums_is_that_of_the_predictions():
    codes = codes_of(BANDS, 500)
    heights = np.random.default_rng(2).normal(100, 20, 500).astype(np.float32)
    sums = RidgeSums.of(codes, heights)
    ridge = sums.solve(0.1)
    errors = ridge.predict(codes).astype(np.float64) - heights
    assert sums.rmse(ridge) == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("codes", "heights", "message"),
    [
        (codes_of(BANDS, 0), [], "0 training pixels"),
        (codes_of(BANDS, 1), [3.0], "1 training pixels"),
        (codes_of(BANDS, 9), [100.1] * 9, r"heights \(100\.100 m\) of all 9 training pixels"),
        (np.full((BANDS, 9), 5, np.int8), range(9), "embeddings of all 9 training pixels"),
    ],
)
def test_ridge_needs_something_to_learn(codes, heights, message):
    with pytest.raises(InputError, match=message):
        RidgeSums.of(codes, np.array(heights, dtype=np.float32)).solve(1e-3)


def test_ridge_predicts_the_formula_and_nan_exactly_where_there_is_no_embedding():
    codes, ridge = codes_of(BANDS, 20, 30), some_ridge()
    missing = np.random.default_rng(3).random((20, 30)) < 0.3
    codes[:, missing] = NODATA
    heights = ridge.predict(codes)
    expected = np.tensordot(ridge.weights, decode(codes).astype(np.float64), 1) + ridge.intercept
    assert heights.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(heights), missing)
    np.testing.assert_allclose(heights[~missing], expected[~missing], rtol=1e-6, atol=1e-5)


def test_ridge_gives_a_pixel_the_same_bits_wherever_it_lies():
    codes, ridge = codes_of(BANDS, 37, 53), some_ridge()
    whole = ridge.predict(codes)
    np.testing.assert_array_equal(ridge.predict(codes[:, 5:6, 7:50]), whole[5:6, 7:50])
    np.testing.assert_array_equal(Predictor(checkpoint_of())(codes[None])[0], whole)


# --- checkpoint --------------------------------------------------------------------------------


def test_checkpoint_round_trip_is_exact():
    before = small_checkpoint()
    after = Checkpoint.from_bytes(before.to_bytes())
    assert after.digest == before.digest
    for name in ("model", "base", "scale", "provenance", "history"):
        assert getattr(after, name) == getattr(before, name)
    np.testing.assert_array_equal(after.ridge.weights, before.ridge.weights)
    assert replace(after.ridge, weights=0) == replace(before.ridge, weights=0)
    assert after.weights.keys() == before.weights.keys()
    for name, tensor in before.weights.items():
        assert after.weights[name].dtype == tensor.dtype
        assert torch.equal(after.weights[name], tensor)


def test_the_same_model_gives_the_same_bytes_whatever_the_memory_format():
    one = small_checkpoint()
    weights = dict(reversed(one.weights.items()))
    weights["conv.weight"] = weights["conv.weight"].to(memory_format=torch.channels_last)
    assert replace(one, weights=weights).digest == one.digest
    assert one.to_bytes() == small_checkpoint().to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 4.0000001},
        {"base": "none"},
        {"provenance": replace(PROVENANCE, cube="other")},
        {"ridge": some_ridge(seed=1)},
        {"model": ModelSettings(architecture="unet", seed=1)},
        {"weights": {"conv.weight": torch.zeros(4, 3, 2, 2)}},
    ],
)
def test_every_part_enters_the_digest(change):
    assert replace(small_checkpoint(), **change).digest != small_checkpoint().digest


def test_the_history_is_sealed_but_no_part_of_the_identity():
    renewed = replace(small_checkpoint(), history=({"epoch": 0, "seconds": 1.5},))
    assert renewed.digest == DIGEST
    assert Checkpoint.from_bytes(renewed.to_bytes()).history == renewed.history
    content = torch.load(io.BytesIO(DATA), weights_only=True)
    with pytest.raises(InputError, match="does not match its digest"):
        Checkpoint.from_bytes(saved(content | {"history": "[]"}))


DATA = small_checkpoint().to_bytes()
DIGEST = small_checkpoint().digest


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(DATA) - 1), flip=st.integers(1, 255))
def test_a_damaged_byte_is_refused_or_without_effect(place, flip):
    """Padding and time stamps of the container may change; the content never does unseen."""
    damaged = bytearray(DATA)
    damaged[place] ^= flip
    try:
        checkpoint = Checkpoint.from_bytes(bytes(damaged))
    except InputError:
        return
    assert checkpoint.digest == DIGEST
    assert checkpoint.history == HISTORY


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, len(DATA) - 64))
def test_a_lost_sector_is_refused_or_without_effect(start):
    damaged = DATA[:start] + bytes(64) + DATA[start + 64 :]
    try:
        checkpoint = Checkpoint.from_bytes(damaged)
    except InputError:
        return
    assert checkpoint.digest == DIGEST


def test_every_flipped_bit_of_a_weight_is_refused():
    start = DATA.index(small_checkpoint().weights["conv.weight"].numpy().tobytes())
    for place in range(start, start + 4 * 48, 7):
        damaged = bytearray(DATA)
        damaged[place] ^= 1
        with pytest.raises(InputError, match="damaged"):
            Checkpoint.from_bytes(bytes(damaged))


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no checkpoint",
        bytes(range(256)) * 40,
        DATA[: len(DATA) // 2],
        DATA[:-1],
        pickle.dumps(Harmful()),
        saved(Harmful()),
        saved({"format": 1, "seal": "", "history": "", "facts": Harmful(), "tensors": {}}),
        saved([1, 2]),
        saved({"state_dict": {}}),
        saved({"format": 1}),
        saved({"format": 1, "seal": "", "history": "", "facts": "{}", "tensors": {"a": 1}}),
        saved({"format": 1, "seal": "", "history": "", "facts": "{}", "tensors": {}}),
    ],
)
def test_what_is_no_checkpoint_is_refused(data):
    with pytest.raises(InputError, match=r"damaged, or no checkpoint.*train again"):
        Checkpoint.from_bytes(data)


def test_an_unknown_format_is_named():
    content = torch.load(io.BytesIO(DATA), weights_only=True)
    with pytest.raises(InputError, match="format 99, and this aeheight reads 1, 2 and 3:"):
        Checkpoint.from_bytes(saved(content | {"format": 99}))


def test_another_number_of_bands_is_named():
    wide = Ridge(np.ones(12), 0.0, 0.0, 5)
    with pytest.raises(InputError, match="takes 12 bands, and the embeddings have 64"):
        Checkpoint.from_bytes(checkpoint_of(ridge=wide).to_bytes())


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["unet", "unetplusplus"])
def test_an_untrained_network_adds_nothing(architecture):
    network = build(ModelSettings(architecture=architecture)).eval()
    with torch.inference_mode():
        output = network(torch.rand(1, BANDS, 32, 64))
    assert output.shape == (1, 1, 32, 64)
    assert not output.any()


def test_unetplusplus_has_the_size_that_is_known():
    parameters = build(ModelSettings()).parameters()
    assert sum(p.numel() for p in parameters) == pytest.approx(16.2e6, rel=0.01)


def test_an_unknown_encoder_names_near_ones():
    with pytest.raises(InputError, match=r"'resnet19' is unknown.*near ones are.*resnet18"):
        build(ModelSettings(encoder="resnet19"))
    with pytest.raises(InputError, match=r"'zzz' is unknown.*near ones are resnet18"):
        build(ModelSettings(encoder="zzz"))


def test_an_encoder_that_cannot_be_made_is_bad_input():
    with pytest.raises(InputError, match="'tu-zzz' cannot be used with 64 bands"):
        build(ModelSettings(encoder="tu-zzz"))


def test_an_offset_moves_the_untrained_network():
    model = HeightModel(UNET, "prior", some_ridge(), 4.0).eval()
    model.start_at(-3.0)
    codes = codes_of(1, BANDS, 64, 64, seed=6)
    prior = np.random.default_rng(5).normal(300, 50, (1, 64, 64)).astype(np.float32)
    with torch.inference_mode():
        heights = model(torch.from_numpy(codes), torch.from_numpy(prior)).numpy()
    there = np.isfinite(heights)
    np.testing.assert_allclose(heights[there], prior[there] - 3, rtol=1e-6)
