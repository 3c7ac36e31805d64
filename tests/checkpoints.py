"""Checkpoints for the tests, without training."""

from dataclasses import replace

import numpy as np
import torch

from aeheight.embeddings import BANDS
from aeheight.models import Checkpoint, Provenance, build
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings

UNET = ModelSettings(architecture="unet")
RIDGE = ModelSettings(architecture="ridge")
PROVENANCE = Provenance(
    cube="a1b2",
    split="c3d4",
    surface="dsm",
    vertical_datum="EPSG:5773",
    years=(2021, 2022),
    embedding_version="AlphaEarth Foundations v1",
    code_version="0.1.0",
)
HISTORY = ({"epoch": 0, "validation_rmse": 0.1 + 0.2}, {"epoch": 1, "validation_rmse": 1 / 3})


def codes_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(-127, 128, shape, dtype=np.int8)


def some_ridge(seed=0):
    return Ridge(np.random.default_rng(seed).normal(size=BANDS) * 30, 12.5, 7.25, 1000)


def checkpoint_of(model=RIDGE, base="ridge", weights=None, **changes):
    whole = Checkpoint(model, base, some_ridge(), 4.0, weights or {}, PROVENANCE, HISTORY)
    return replace(whole, **changes)


def wild_weights(model=UNET):
    """A network's state whose head is not zero: what a trained network looks like."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(model)
        with torch.no_grad():
            for parameter in network.segmentation_head.parameters():
                parameter.normal_()
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
