"""The experiments: what they cut, what they train, and that each row can be had."""

import numpy as np
import pytest
import torch

from aeheight.embeddings import encode
from aeheight.patches import Patch
from aeheight.settings import ModelSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION
from pipelines.experiment_grounds import FOLDS, GROUNDS, Arrays, _split, _tests, coarse, load
from pipelines.experiment_variants import (
    VARIANTS,
    balanced,
    huber,
    levelless,
    mixed,
    rarity,
    relief_error,
    relief_only,
    unit,
)
from pipelines.experiments import SCREENING, Row, judged, main
from tests.tifs import DATA

TINY = ModelSettings.model_validate(
    {**SCREENING, "patch": 32, "epochs": 1, "patches_per_epoch": 8, "batch": 4}
)


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def some_ground(prior=False):
    """Heights that follow the first band."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 96, 96))
    values /= np.linalg.norm(values, axis=0)
    height = (100 + 300 * values[0]).astype(np.float32)
    use = np.full((96, 96), TRAIN, np.uint8)
    use[:, 32:64], use[:, 64:] = VALIDATION, TEST
    return Arrays(encode(values), height, height + 5 if prior else None, use, edge=32)


# --- grounds -------------------------------------------------------------------------------------


def test_every_pixel_tests_in_one_fold_and_in_one_of_two_opposite_sides():
    shape = (169, 237)
    folds = [_tests(shape, f"fold{i}", 3, 20) for i in range(FOLDS)]
    np.testing.assert_array_equal(np.sum(folds, axis=0), 1)
    for one, other in (("west-east", "east-west"), ("north-south", "south-north")):
        np.testing.assert_array_equal(_tests(shape, one, 0, 20), ~_tests(shape, other, 0, 20))
    assert _tests(shape, "west-east", 0, 20)[:, -1].all()
    assert _tests(shape, "north-south", 0, 20)[-1].all()


def test_training_ground_keeps_its_distance_from_test_ground():
    use = _split((80, 120), "west-east", 0, 20, 2, 20)
    assert set(np.unique(use)) == {UNUSED, TRAIN, VALIDATION, TEST}
    np.testing.assert_array_equal(use == TEST, _tests((80, 120), "west-east", 0, 20))
    assert np.isin(use[:, 58:60], (UNUSED, VALIDATION)).all()
    assert not (use[:, 58:60] == TRAIN).any()


def test_a_coarse_prior_is_off_by_its_noise_on_even_ground():
    prior = coarse(np.full((90, 130), 500, np.float32), np.random.default_rng(0))
    middle = prior[10:70, 10:100].astype(np.float64)
    assert middle.mean() == pytest.approx(500, abs=3)
    assert 10 < middle.std() < 10 * np.sqrt(2)


def test_spots_hold_training_ground():
    ground = some_ground()
    for spot in ground.epoch(1):
        assert ground.read(spot).usable(TRAIN).any()
    assert ground.epoch(1) == ground.epoch(1) != ground.epoch(2)


def test_balanced_spots_favour_rare_heights():
    ground = some_ground()
    ground.height[:] = 100
    ground.height[80:, :10] = 900
    often = np.mean([row > 48 for row, _ in balanced(ground, 1)])
    assert often > np.mean([row > 48 for row, _ in ground.epoch(1)])


# --- variants ------------------------------------------------------------------------------------


def test_rare_heights_weigh_more_and_the_mean_weight_is_one():
    heights = np.concatenate([np.full(9000, 10.0), np.linspace(0, 1000, 1000)]).astype(np.float32)
    edges, weights = rarity(heights)
    each = weights[torch.bucketize(torch.from_numpy(heights), edges)]
    assert each.mean() == pytest.approx(1, abs=1e-4)
    assert each[-1] > 3 * each[0]


def test_huber_is_half_the_square_near_and_linear_far():
    there = torch.ones(1, 1, 2, dtype=torch.bool)
    loss = huber(torch.tensor([[[0.5, 4.0]]]), torch.zeros(1, 1, 2), there, torch.zeros(1, 1, 2))
    assert float(loss) == pytest.approx((0.125 + 3.5) / 2)


def test_a_relief_error_does_not_care_for_the_level_of_the_target():
    torch.manual_seed(0)
    output, target = torch.randn(2, 1, 40, 40)
    there = torch.ones(1, 40, 40, dtype=torch.bool)
    losses = [relief_error(output, each, there, target) for each in (target, target + 7)]
    torch.testing.assert_close(*losses)


def test_what_networks_see_is_changed_as_said():
    values = torch.randn(2, 64, 32, 32)
    level = torch.randn(2, 64, 1, 1)
    inside = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(
        relief_only(values + level)[inside], relief_only(values)[inside], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(unit(values).norm(dim=1), torch.ones(2, 32, 32))


def test_a_network_without_level_tells_nothing_of_even_ground():
    torch.manual_seed(0)
    network = levelless(TINY).eval()
    network.segmentation_head[0].reset_parameters()
    with torch.inference_mode():
        output = network(torch.ones(1, 64, 128, 128) * 0.1)
    middle = output[..., 60:68, 60:68]
    assert float(middle.abs().max()) < 1e-4


def test_a_mixture_lies_between_its_patches():
    codes = [np.full((64, 32, 32), code, np.int8) for code in (-50, 50)]
    use = np.full((32, 32), TRAIN, np.uint8)
    patches = [
        Patch(each, np.full((32, 32), height, np.float32), None, use)
        for each, height in zip(codes, (0, 10), strict=True)
    ]
    for seed in range(5):
        for patch in mixed(patches, np.random.default_rng(seed)):
            share = patch.height[0, 0] / 10
            assert 0 <= share <= 1
            assert abs(float(patch.codes[0, 0, 0])) <= 50


@pytest.mark.parametrize("name", ["thin", "soft-bins", "lds", "mix", "levelless", "shift"])
def test_every_kind_of_variant_trains_and_starts_from_its_base(name):
    row = judged(name, "made up", some_ground(), TINY)
    assert isinstance(row, Row)
    assert row.base < 5
    assert row.trusted <= row.base * 1.05
    assert row.line().startswith(name)


def test_a_prior_is_corrected_where_the_ground_has_one():
    row = judged("thin", "made up", some_ground(prior=True), TINY)
    assert row.base == pytest.approx(5, abs=1e-3)


# --- the command ---------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_those_that_exist(capsys):
    assert main(["--variant", "nonsense"]) == 2
    assert "soft-bins" in capsys.readouterr().err
    assert main(["--variant", "thin", "--ground", "atlantis"]) == 2
    assert GROUNDS["norcal"][0] in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "norcal_900m").exists(), reason="the real data is not there")
def test_real_ground_is_read_from_its_region_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ground = load("norcal-west-east", 0)
    assert ground.codes.shape == (64, 192, 256)
    assert np.isfinite(ground.height[ground.use == TEST]).mean() > 0.5
    assert (ground.use[169:] == UNUSED).all()


def test_all_variants_are_named_once_and_have_sound_settings():
    assert len(VARIANTS) >= 25
    for variant in VARIANTS.values():
        ModelSettings.model_validate({**SCREENING, **variant.settings})
