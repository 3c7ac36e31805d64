"""The kernel as the base of a network: the same bits in torch, and in a checkpoint."""

import json

import numpy as np
import pytest
import torch

from aeheight.embeddings import NODATA
from aeheight.kernel import Kernel
from aeheight.models import FORMAT_VERSION, Checkpoint, HeightModel
from aeheight.predictor import Predictor
from tests.checkpoints import UNET, checkpoint_of, codes_of, some_ridge, wild_weights
from tests.test_kernel import near, some_kernel


def ground(found, size=96):
    """(64, size, size) codes about a centre and far from all, some of them missing."""
    codes = near(found.centres[0].astype(float), size * size, 28).reshape(-1, size, size)
    codes[:, : size // 4] = codes_of(len(codes), size // 4, size)
    codes[:, -5:, :9] = NODATA
    return codes


@pytest.mark.parametrize("count", [0, 1, 64])
def test_torch_and_numpy_agree_to_the_bit(count):
    whole = some_kernel(max(count, 1))
    found = Kernel(whole.ridge, whole.centres[:count], whole.weights[:count])
    model = HeightModel(UNET, "ridge", some_ridge(), 4.0, kernel=found).eval()
    codes = ground(whole)
    with torch.inference_mode():
        heights = model(torch.from_numpy(codes)[None], None)[0].numpy()
    np.testing.assert_array_equal(heights, found.predict(codes))


def test_a_window_has_the_bits_of_the_whole():
    found = some_kernel(64)
    model = HeightModel(UNET, "ridge", some_ridge(), 4.0, kernel=found)
    codes = torch.from_numpy(ground(found))[None]
    whole, part = (model.base(c, None) for c in (codes, codes[..., 17:70, 3:90]))
    np.testing.assert_array_equal(part, whole[..., 17:70, 3:90])


def test_a_checkpoint_keeps_the_kernel_to_the_bit():
    before = checkpoint_of(UNET, weights=wild_weights(), kernel=some_kernel(64))
    after = Checkpoint.from_bytes(before.to_bytes())
    assert after.digest == before.digest
    assert after.digest != checkpoint_of(UNET, weights=wild_weights()).digest
    assert after.kernel is not None
    assert after.kernel.ridge.evened
    codes = ground(before.kernel)
    np.testing.assert_array_equal(after.kernel.predict(codes), before.kernel.predict(codes))


def test_predict_corrects_the_kernel_that_the_checkpoint_has():
    codes = ground(some_kernel(64))[None]
    plain, bent = (
        Predictor(checkpoint_of(UNET, weights=wild_weights(), kernel=kernel))(codes)[0]
        for kernel in (None, some_kernel(64))
    )
    bases = [found.predict(codes[0]) for found in (some_ridge(), some_kernel(64))]
    np.testing.assert_allclose(bent - plain, bases[1] - bases[0], atol=0.01)


def test_a_checkpoint_without_a_kernel_corrects_the_plain_ridge():
    old = checkpoint_of(UNET, weights=wild_weights())
    assert "kernel" not in json.loads(old._facts())
    assert Checkpoint.from_bytes(old.to_bytes()).kernel is None
    assert FORMAT_VERSION == 3  # an older version would take the plain ridge for the base
