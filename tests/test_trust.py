"""Trust: known answers first, then what chance may not do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.embeddings import NODATA
from aeheight.models import Checkpoint, HeightModel, Provenance
from aeheight.predictor import Predictor
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings
from aeheight.trust import FEWEST, RADIUS, WHOLE, Held, Trust, earned

UNET = ModelSettings(architecture="unet", patch=64)


def held(errors, relief, level, block=0):
    return Held(errors, relief, level, np.full(len(errors), block))


def patches(factor, noise, level=0.0, number=12, seed=0):
    """Errors that are `factor` times a relief of SD 1, and `level` times a level, and noise."""
    rng = np.random.default_rng(seed)
    for block in range(number):
        relief, levels, errors = rng.normal(size=(3, 400))
        yield held(factor * relief + level * levels + noise * errors, relief, levels, block)


def test_a_correction_that_explains_everything_is_believed():
    trust = earned(patches(1, 0, level=1))
    assert (trust.relief, trust.level) == pytest.approx((1, 1), abs=0.01)
    assert trust.rmse == pytest.approx(0, abs=0.01)


def test_a_relief_is_shrunk_to_what_it_earns_and_the_level_is_not_believed():
    trust = earned(patches(0.5, 2.0, number=400))
    assert trust.relief == pytest.approx(0.5, abs=0.03)
    assert trust.level == 0
    assert trust.rmse == pytest.approx(2.0, rel=0.01)


def test_half_explained_is_half_way():
    relief, level = np.random.default_rng(0).normal(size=(2, 1000))
    level *= np.linalg.norm(relief) / np.linalg.norm(level)
    level -= relief * (relief @ level) / (relief @ relief)  # at right angles
    errors = relief + level * 0
    half = [held(errors, relief / 2, 0 * level, block) for block in range(8)]
    assert earned(half).level == 1  # 1 - 0.5² of it is explained
    part = (1 - np.sqrt(0.5)) * relief
    weak = [held(errors, part, 0 * level, block) for block in range(8)]
    assert earned(weak).level == pytest.approx(0.5)


def test_a_level_that_is_right_believes_no_relief_that_is_noise():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(2, 400)) for _ in range(20)]
    trust = earned([held(level, noise / 2, level, k) for k, (level, noise) in enumerate(parts)])
    assert trust.level == 1
    assert trust.relief == pytest.approx(0, abs=0.01)
    assert trust.rmse == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("pieces", [[], list(patches(1, 1, number=FEWEST - 1))])
def test_too_little_ground_earns_nothing_of_a_weak_correction(pieces):
    trust = earned([replace(each, errors=3 * each.errors) for each in pieces])
    assert (trust.relief, trust.level) == (0, 0)


def test_chance_is_hardly_ever_believed():
    believed = [earned(patches(0, 1, seed=seed)).relief for seed in range(200)]
    assert np.mean(np.array(believed) > 0) < 0.08


@pytest.mark.parametrize("pieces", [1, 4, 16])
def test_neighbours_of_one_block_are_no_proof(pieces):
    """Six blocks of ground whose errors follow the relief by chance, each in its own way."""
    believed = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        slopes = np.repeat(rng.normal(size=FEWEST), pieces)
        reliefs = rng.normal(size=(len(slopes), 60))
        noise = 0.3 * rng.normal(size=reliefs.shape)
        parts = zip(slopes, reliefs, noise, range(len(slopes)), strict=True)
        trust = earned([held(s * r + n, r, 0 * r, k // pieces) for s, r, n, k in parts])
        believed.append(trust.relief > 0)
    assert np.mean(believed) < 0.1


def test_one_block_that_outweighs_all_others_proves_nothing():
    relief = np.random.default_rng(0).normal(size=400)
    sizes = [1e9, *[1e-3] * 9]
    pieces = [held(size * relief, size * relief, 0 * relief, k) for k, size in enumerate(sizes)]
    trust = earned([replace(each, errors=4 * each.errors) for each in pieces])
    assert (trust.relief, trust.level) == (0, pytest.approx(0.3125))


@settings(max_examples=50, deadline=None)
@given(st.floats(-2, 3), st.floats(0, 3), st.floats(-2, 3), st.integers(1, 20), st.integers(0, 99))
def test_on_the_ground_that_it_was_earned_on_it_never_harms(factor, noise, level, number, seed):
    pieces = list(patches(factor, noise, level, number, seed))
    trust = earned(pieces)
    left = [h.errors - trust.relief * h.relief - trust.level * h.level for h in pieces]
    rmse = np.sqrt(np.mean(np.square(left)))
    assert rmse <= np.sqrt(np.mean([h.errors**2 for h in pieces])) + 1e-9
    assert 0 <= trust.level <= 1
    assert 0 <= trust.relief <= 1
    if trust.rmse is not None:
        assert trust.rmse == pytest.approx(rmse, abs=1e-6)


# --- in the model --------------------------------------------------------------------------------


def some_model(trust):
    torch.manual_seed(0)
    ridge = Ridge(np.linspace(-5, 5, 64), 100.0, 90.0, 10)
    model = HeightModel(UNET, "ridge", ridge, 4.0).eval()
    model.network.segmentation_head[0].reset_parameters()
    model.trust = trust
    return model, ridge


def some_codes():
    codes = np.random.default_rng(1).integers(-127, 128, (1, 64, 64, 64)).astype(np.int8)
    codes[:, :, 10:20, 30:50] = NODATA
    return torch.from_numpy(codes)


def test_parts_are_the_mean_of_the_square_around_a_pixel_and_the_rest():
    model, _ = some_model(WHOLE)
    codes = some_codes()
    with torch.inference_mode():
        relief, level = (part[0].double().numpy() for part in model.parts(codes))
        output = model.correction(codes)[0].double().numpy()
    there = codes[0, 0].numpy() != NODATA
    for row, col in ((32, 32), (0, 0), (15, 29), (63, 5)):
        part = tuple(slice(max(at - RADIUS, 0), at + RADIUS + 1) for at in (row, col))
        assert level[row, col] == pytest.approx(output[part][there[part]].mean(), abs=1e-5)
    np.testing.assert_allclose(relief + level, output, atol=1e-5)


def test_a_checkpoint_carries_its_trust_to_the_map():
    trust = Trust(0.5, 0.25, 3.0)
    model, ridge = some_model(trust)
    codes = some_codes()
    about = Provenance("cube", "split", "dsm", "EPSG:5773", (2021,), "v1", "0.1.0")
    weights = {name: each.clone() for name, each in model.network.state_dict().items()}
    checkpoint = Checkpoint(UNET, "ridge", ridge, 4.0, weights, about, (), trust=trust)
    again = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert (again.trust, again.rmse, again.digest) == (trust, 3.0, checkpoint.digest)
    assert replace(checkpoint, trust=WHOLE).digest != checkpoint.digest
    with torch.inference_mode():
        relief, level = model.parts(codes)
        expected = model.base(codes, None) + 4.0 * (0.5 * relief + 0.25 * level).double()
    there = codes[0, 0].numpy() != NODATA
    predicted = Predictor(again)(codes.numpy())[0]
    np.testing.assert_allclose(predicted[there], expected[0].numpy()[there], rtol=1e-5)
