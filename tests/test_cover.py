"""What a map's windows, halo and shards are where the region file leaves them open."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aeheight.errors import InputError
from aeheight.grid import Grid
from aeheight.models import Checkpoint, Provenance
from aeheight.novelty import Novelty
from aeheight.ridge import Ridge
from aeheight.seams import Seams
from aeheight.settings import CubeSettings, ModelSettings, PredictSettings
from aeheight.steps.cover import UNMEASURED_HALO, lattice, settled, template
from aeheight.template import Layer, Template

LARGE = (20_000, 30_000)


def cube(shape=LARGE, shard=1024, chunk=256, ground=()):
    grid = Grid("EPSG:32631", 10.0, 400_000.0, 5_200_000.0, shape)
    layer = Layer("embedding", "int8", -128, timed=True)
    cut = CubeSettings(shard=shard, chunk=chunk)
    return Template((grid,), (layer,), (2021,), cut, "small cube", ground)


def checkpoint(halo=None, rmse=10.0, *, network=True, novelty=None):
    """One whose training measured that `halo` suffices (None: nothing was measured)."""
    seams = None
    if halo is not None:
        halos = tuple(range(0, halo + 33, 16))
        step = tuple(0.0 if h >= halo else rmse for h in halos)
        seams = Seams(640, 1, halos, step, step, step)
    return Checkpoint(
        model=ModelSettings(architecture="unet" if network else "ridge"),
        base="ridge",
        ridge=Ridge(np.zeros(64), 0.0, 0.0, 1),
        scale=1.0,
        weights={"w": torch.zeros(1)} if network else {},
        provenance=Provenance("c", "s", "dsm", "EPSG:5773", (2021,), "v1", "0.1.0"),
        history=({"epoch": 0, "validation_rmse": rmse},),
        novelty=novelty,
        seams=seams,
    )


def extra(settings, template):
    """Pixels that all shards compute, for every pixel of the map."""
    shape = template.grids[0].shape
    windows = lattice(settings, shape)
    made = replace(template, cut=template.cut.model_copy(update={"shard": settings.shard}))
    computed = sum(windows.count(shard.region) for shard in made.shards("embedding"))
    return computed * settings.window**2 / (shape[0] * shape[1])


@pytest.mark.parametrize(
    ("halo", "window", "shard"),
    [(0, 1024, 1024), (32, 1088, 1024), (80, 1184, 1024), (96, 1472, 1280), (128, 2048, 1792)],
)
def test_the_halo_is_the_checkpoints_and_the_window_keeps_a_shard(halo, window, shard):
    found = settled(PredictSettings(), checkpoint(halo), cube())
    assert (found.halo, found.window, found.shard) == (halo, window, shard)


@given(
    halo=st.sampled_from(range(0, 161, 16)),
    shard=st.sampled_from([256, 512, 1024, 1536, 2048, 4096]),
)
def test_the_default_computes_little_twice_whatever_the_cubes_shard(halo, shard):
    """The grid's own edges, which reach past it, count too."""
    template = cube(shard=shard)
    found = settled(PredictSettings(), checkpoint(halo), template)
    core = found.window - 2 * halo
    filled = [ceil(size / core) * core / size for size in LARGE]
    assert extra(found, template) <= 1.35 * filled[0] * filled[1]
    assert found.window % 32 == (found.window - 2 * found.halo) % 32 == 0
    same = settled(PredictSettings(), checkpoint(halo), cube())
    assert (found.window, found.halo) == (same.window, same.halo)


def test_where_nothing_was_measured():
    assert settled(PredictSettings(), checkpoint(), cube()).halo == UNMEASURED_HALO
    assert settled(PredictSettings(), checkpoint(network=False), cube()).halo == 0


def test_where_even_the_widest_measured_halo_is_not_enough():
    found = checkpoint(96)
    assert found.seams is not None
    short = replace(found.seams, step=tuple(1.0 for _ in found.seams.step))
    halo = settled(PredictSettings(), replace(found, seams=short), cube()).halo
    assert halo == max(short.halos)


def test_small_ground_has_small_windows():
    found = settled(PredictSettings(), checkpoint(32), cube((169, 237)))
    assert (found.window, found.shard) == (256 + 64, 1024)


def test_what_is_given_stays():
    given = PredictSettings(window=256, halo=64, batch=4)
    assert settled(given, checkpoint(0), cube(shard=512)) == given.model_copy(update={"shard": 512})


@pytest.mark.parametrize(
    ("shard", "halo", "window"),
    [(256, 80, 416), (2048, 32, 1088), (8192, 80, 1184), (2048, 96, 1216)],
)
def test_a_shard_that_is_given_holds_whole_windows(shard, halo, window):
    found = settled(PredictSettings(shard=shard), checkpoint(halo), cube())
    assert (found.shard, found.window) == (shard, window)


def test_past_a_zones_edge_the_halo_is_no_wider_than_the_ground():
    two = replace(cube(), grids=cube().grids * 2)
    assert settled(PredictSettings(), checkpoint(160), two).halo == 128


def test_squares_on_which_nothing_could_be_measured():
    empty = replace(checkpoint(32), seams=Seams(64, 0, (), (), (), ()))
    assert settled(PredictSettings(), empty, cube()).halo == UNMEASURED_HALO


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"window": 250, "halo": 64}, r"window \(250\)"),
        ({"window": 256, "halo": 40}, "halo 40"),
        ({"window": 128, "halo": 64}, "no core"),
        ({"halo": 72}, "A halo is a multiple of 16"),
        ({"blend": 16}, "a blend of 32"),
    ],
)
def test_windows_that_do_not_fit_are_named(asked, words):
    with pytest.raises(InputError, match=words):
        settled(PredictSettings(**asked), checkpoint(64), cube())


@pytest.mark.parametrize("edge", [256, 512, 128, 384, 4096])
def test_the_map_has_the_cubes_ground_in_shards_of_any_size(edge):
    ground = ((0, 0, 1), (1, 2, 5), (4, 3, 4))
    small = cube((5 * 256, 5 * 256), shard=256, ground=(ground,))
    made = template(small, checkpoint(0), PredictSettings(shard=edge))
    assert [layer.name for layer in made.layers] == ["height"]
    ground = np.zeros(small.grids[0].shape, bool)
    for shard in small.shards("embedding"):
        ground[shard.region.slices] = True
    shards = made.shards("height")
    for shard in shards:
        assert ground[shard.region.slices].any()
        ground[shard.region.slices] = False
    assert not ground.any()
    assert len(set(shards)) == len(shards)


def test_novelty_is_a_layer_where_the_model_knows_it():
    known = checkpoint(0, novelty=Novelty(np.zeros((1, 64), np.int8), 1.0))
    names = {
        told: [layer.name for layer in template(cube(), known, settings).layers]
        for told in (True, False)
        for settings in [PredictSettings(shard=1024, novelty=told)]
    }
    assert names == {True: ["height", "novelty"], False: ["height"]}
