"""The experiments on the base: every variant tells heights, and the linear ones a linear truth."""

import numpy as np
import pytest

from aeheight.embeddings import decode, encode
from aeheight.splits import TEST, TRAIN, VALIDATION
from pipelines.experiment_grounds import Arrays
from pipelines.experiments_base import Scene, _linear, _sums, main, places, variants
from tests.tifs import DATA


def some_scene(size=96):
    """Heights that are linear in the embedding, which is smooth; means are shorter than 1."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, size + 4, size + 4))
    values = _sums(values, 2)[:, 2:-2, 2:-2]
    values /= np.linalg.norm(values, axis=0) * rng.uniform(1, 1.3, (size, size))
    codes = encode(values)
    height = (400 + 900 * decode(codes)[0] - 300 * decode(codes)[7]).astype(np.float32)
    use = np.full((size, size), TRAIN, np.uint8)
    use[:, size // 3 : size // 2], use[:, size // 2 :] = VALIDATION, TEST
    return Scene(Arrays(codes, height, None, use, edge=32))


@pytest.fixture(scope="module")
def scene():
    return some_scene()


@pytest.mark.parametrize("name", sorted(variants()))
def test_every_variant_tells_a_height_of_every_test_pixel(scene, name):
    heights = variants()[name](scene)
    assert heights.shape == (int((scene.ground.use == TEST).sum()),)
    assert np.isfinite(heights).all()


def test_the_plain_one_finds_a_linear_truth(scene):
    truth = scene.ground.height[scene.where(TEST)]
    np.testing.assert_allclose(_linear(scene, scene.plain, 1e-9), truth, atol=0.05)


def test_sums_over_squares_are_those_of_the_loop():
    values = np.random.default_rng(1).normal(size=(3, 9, 11))
    for row, col in ((0, 0), (4, 5), (8, 10)):
        part = values[:, max(row - 2, 0) : row + 3, max(col - 2, 0) : col + 3]
        np.testing.assert_allclose(_sums(values, 2)[:, row, col], part.sum(axis=(1, 2)))


def test_an_unknown_ground_is_named(capsys):
    assert main(["--ground", "atlantis", "--variant", "ridge", "--seeds", "1"]) == 2
    assert "atlantis" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"real ground is not in {DATA}")
def test_places_that_test_are_far_from_those_that_train():
    for ground in places(0, count=2):
        rows, cols = np.nonzero(ground.use == TEST)
        near = np.zeros(ground.use.shape, bool)
        near[max(rows.min() - 5, 0) : rows.max() + 6, max(cols.min() - 5, 0) : cols.max() + 6] = (
            True
        )
        assert not (near & np.isin(ground.use, (TRAIN, VALIDATION))).any()
        assert (ground.use == VALIDATION).any()
