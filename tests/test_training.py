"""Training on ground that is made up of arrays, whose best answer is known."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from aeheight.embeddings import NODATA, encode, valid
from aeheight.errors import InputError
from aeheight.models import Provenance
from aeheight.patches import Patch
from aeheight.predictor import Predictor
from aeheight.ridge import RidgeSums
from aeheight.settings import ModelSettings
from aeheight.splits import TEST, TRAIN, UNUSED, VALIDATION
from aeheight.training import fit
from aeheight.trust import WHOLE

EDGE, PATCH = 192, 32
TINY = ModelSettings(architecture="unet", patch=PATCH, batch=8, epochs=2)
RIDGE = ModelSettings(architecture="ridge")
PROVENANCE = Provenance("cube", "split", "dsm", "EPSG:5773", (2021,), "v1", "0.1.0")


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Arrays:
    """A `training.Ground` over whole arrays; a spot is (row, column)."""

    codes: np.ndarray
    height: np.ndarray
    use: np.ndarray
    prior: np.ndarray | None = None
    patches: int = 16

    block: int = 16

    def _cut(self, row, col, height, width):
        """What lies there; nothing past the edges."""
        rows, cols = np.arange(row, row + height), np.arange(col, col + width)
        inside = np.logical_and.outer((rows >= 0) & (rows < EDGE), (cols >= 0) & (cols < EDGE))
        at = np.ix_(rows.clip(0, EDGE - 1), cols.clip(0, EDGE - 1))
        prior = None if self.prior is None else np.where(inside, self.prior[at], np.nan)
        return Patch(
            np.where(inside, self.codes[:, *at], NODATA),
            np.where(inside, self.height[at], np.nan),
            prior,
            np.where(inside, self.use[at], UNUSED).astype(np.uint8),
            (0, row, col),
        )

    def read(self, spot, margin=0):
        edge = PATCH + 2 * margin
        return self._cut(spot[0] - margin, spot[1] - margin, edge, edge)

    def sweep(self):
        for row in range(0, EDGE, 80):
            yield self._cut(row, 0, min(80, EDGE - row), EDGE)

    def epoch(self, number):
        corners = np.random.default_rng(number).integers(0, EDGE - PATCH, (self.patches, 2))
        return [tuple(corner) for corner in corners.tolist()]

    def tiles(self):
        return [(row, col) for row in range(0, EDGE, PATCH) for col in range(0, EDGE, PATCH)]

    def squares(self, edge, count):
        return []

    def validation(self):
        return [spot for spot in self.tiles() if (self.read(spot).use == VALIDATION).any()]


def smooth(rng, radius, n):
    """Gaussian random fields (n, EDGE, EDGE) of SD 1."""
    frequency = np.hypot(np.fft.fftfreq(EDGE)[:, None], np.fft.rfftfreq(EDGE))
    spectrum = np.fft.rfft2(rng.normal(size=(n, EDGE, EDGE)))
    fields = np.fft.irfft2(spectrum * np.exp(-((6.28 * radius * frequency) ** 2) / 2))
    return fields / fields.std(axis=(1, 2), keepdims=True)


def world(noise=0.7, seed=0):
    """Embeddings that show eight fields through noise, heights that follow two of them.

    One field shows in the height by its magnitude, which a regression cannot see; the noise
    differs from pixel to pixel, so that the neighbourhood helps.
    """
    rng = np.random.default_rng(seed)
    fields = smooth(rng, 4, 8)
    values = np.tensordot(rng.normal(size=(64, 8)), fields, 1)
    values += noise * 8 * rng.normal(size=values.shape)
    codes = encode(values / np.linalg.norm(values, axis=0))
    height = 100 + 10 * fields[0] + 10 * np.abs(fields[1])
    use = np.full((EDGE, EDGE), TRAIN, np.uint8)
    use[:, 96:112], use[:, 112:160], use[:, 160:] = UNUSED, VALIDATION, TEST
    return Arrays(codes, height.astype(np.float32), use)


@pytest.fixture(scope="module")
def ground():
    return world()


def run(ground, settings=TINY, base="ridge", **kwargs):
    return fit(ground, settings, base, PROVENANCE, **kwargs)


def rmse(checkpoint, ground, use):
    """By patches, as validation sees the ground: what lies around a patch is not known."""
    patches = [ground.read(spot) for spot in ground.tiles()]
    codes, height, uses = (
        np.stack([getattr(patch, name) for patch in patches]) for name in ("codes", "height", "use")
    )
    predicted = Predictor(checkpoint)(codes)
    there = (uses == use) & np.isfinite(height)
    errors = predicted[there].astype(np.float64) - height[there]
    return np.sqrt((errors**2).mean())


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["ridge", "none"])
def test_a_network_beats_the_ridge_on_ground_that_it_never_saw(ground, base):
    settings = TINY.model_copy(update={"epochs": 8})
    ground = replace(ground, patches=48)
    ridge = rmse(run(ground, RIDGE), ground, TEST)
    network = rmse(run(ground, settings, base), ground, TEST)
    assert ridge < ground.height[ground.use == TEST].std()
    assert network < 0.95 * ridge


def test_the_history_tells_what_the_kept_weights_reach(ground):
    checkpoint = run(ground)
    best = min(record["validation_rmse"] for record in checkpoint.history)
    assert [record["epoch"] for record in checkpoint.history] == [0, 1, 2]
    whole = replace(checkpoint, trust=WHOLE)
    assert best == pytest.approx(rmse(whole, ground, VALIDATION), rel=1e-5)
    assert checkpoint.rmse == pytest.approx(rmse(checkpoint, ground, VALIDATION), rel=1e-5)
    spread = ground.height[ground.use == VALIDATION].astype(np.float64).std()
    first = checkpoint.history[0]
    assert first["validation_r2"] == pytest.approx(1 - (first["validation_rmse"] / spread) ** 2)
    there = ground.use == VALIDATION
    errors = checkpoint.kernel.predict(ground.codes)[there] - ground.height[there]
    assert first["validation_rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert first["train_rmse"] == pytest.approx(checkpoint.scale, rel=1e-9)


def test_the_ridge_is_the_closed_form_over_the_training_pixels(ground):
    checkpoint = run(ground, RIDGE, "prior")
    train = ground.use == TRAIN
    expected = RidgeSums.of(ground.codes[:, train], ground.height[train]).solve(RIDGE.ridge_alpha)
    np.testing.assert_allclose(checkpoint.ridge.weights, expected.weights, rtol=1e-9)
    assert (checkpoint.base, dict(checkpoint.weights)) == ("ridge", {})
    (record,) = checkpoint.history
    assert record["train_rmse"] == pytest.approx(rmse(checkpoint, ground, TRAIN), rel=1e-6)
    assert record["validation_rmse"] == pytest.approx(rmse(checkpoint, ground, VALIDATION))


def test_the_ridge_needs_no_validation_ground(ground):
    use = np.where(ground.use == VALIDATION, UNUSED, ground.use)
    (record,) = run(replace(ground, use=use), RIDGE).history
    assert record.keys() == {"epoch", "train_rmse", "seconds"}


def test_a_biased_prior_is_corrected_from_the_start(ground):
    prior = ground.height - 30 + np.random.default_rng(1).normal(0, 1, ground.height.shape)
    checkpoint = run(replace(ground, prior=prior.astype(np.float32)), base="prior")
    assert checkpoint.history[0]["validation_rmse"] == pytest.approx(30, abs=0.1)
    assert checkpoint.scale == pytest.approx(1, abs=0.05)
    assert checkpoint.history[1]["validation_rmse"] < 2


def test_a_correction_that_does_not_help_is_never_kept(ground):
    """The prior is exact but on training ground, which only teaches errors."""
    rng = np.random.default_rng(2)
    wrong = np.where(ground.use == TRAIN, rng.normal(20, 5, ground.height.shape), 0)
    prior = (ground.height - wrong).astype(np.float32)
    ground = replace(ground, prior=prior)
    checkpoint = run(ground, base="prior")
    assert checkpoint.history[1]["validation_rmse"] > 1
    predicted = Predictor(checkpoint)(ground.codes[None], prior[None])[0]
    np.testing.assert_array_equal(predicted, prior)


# --- what may not matter -----------------------------------------------------------------------


def test_heights_of_other_use_do_not_matter(ground):
    other = np.isin(ground.use, (UNUSED, TEST))
    absurd = np.where(other, np.float32(9e9), ground.height)
    absurd[other & (np.arange(EDGE) % 2 == 0)] = np.nan
    assert run(replace(ground, height=absurd)).digest == run(ground).digest


def gaps(ground, holes):
    return np.random.default_rng(3).random(ground.height.shape) < holes


@pytest.mark.parametrize("base", ["none", "ridge"])
def test_a_missing_height_is_as_ground_of_no_use(ground, base):
    holes = gaps(ground, 0.3)
    missing = replace(ground, height=np.where(holes, np.float32(np.nan), ground.height))
    unused = replace(
        ground,
        height=np.where(holes, np.float32(-9e9), ground.height),
        use=np.where(holes, np.uint8(UNUSED), ground.use),
    )
    assert run(missing, base=base).digest == run(unused, base=base).digest


def test_a_missing_prior_is_as_ground_of_no_use_to_the_network(ground):
    holes = gaps(ground, 0.3)
    prior = ground.height + 3 * np.random.default_rng(4).normal(size=holes.shape)
    prior = prior.astype(np.float32)
    missing = run(replace(ground, prior=np.where(holes, np.float32(np.nan), prior)), base="prior")
    use = np.where(holes, np.uint8(UNUSED), ground.use)
    unused = run(replace(ground, prior=prior, use=use), base="prior")
    assert missing.scale == unused.scale
    for name, tensor in unused.weights.items():
        assert torch.equal(missing.weights[name], tensor), name


def test_missing_embeddings_leak_nothing(ground):
    codes = ground.codes.copy()
    holes = gaps(ground, 0.2)
    codes[:, holes] = NODATA
    checkpoint = run(replace(ground, codes=codes))
    assert checkpoint.ridge.n == int((valid(codes) & (ground.use == TRAIN)).sum())
    assert all(np.isfinite(list(record.values())).all() for record in checkpoint.history)
    assert all(tensor.isfinite().all() for tensor in checkpoint.weights.values())


def test_patches_without_a_training_pixel_do_no_harm(ground):
    use = ground.use.copy()
    use[:, :64] = UNUSED
    checkpoint = run(replace(ground, use=use, patches=24), TINY.model_copy(update={"batch": 2}))
    assert all("diverged" not in record for record in checkpoint.history)


def test_one_seed_gives_one_model_and_another_seed_another(ground):
    first = run(ground).digest
    torch.manual_seed(123)
    assert run(ground).digest == first
    other = TINY.model_copy(update={"seed": 1})
    one, two = run(ground, other), run(ground)
    name = next(iter(two.weights))
    assert not torch.equal(one.weights[name], two.weights[name])


# --- the course --------------------------------------------------------------------------------


def test_every_epoch_is_reported_as_it_comes(ground):
    records = []
    checkpoint = run(ground, on_epoch=records.append)
    times = [record.pop("eta_seconds") for record in records]
    assert tuple(records) == checkpoint.history
    assert times[0] == times[-1] == 0
    assert times[1] > 0
    assert records[1]["patches_per_second"] > 0
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_training_stops_when_validation_does_not_improve(ground):
    prior = ground.height + np.where(ground.use == TRAIN, 5, 0).astype(np.float32)
    settings = TINY.model_copy(update={"epochs": 20, "patience": 2})
    checkpoint = run(replace(ground, prior=prior), settings, "prior")
    assert len(checkpoint.history) == 3


def test_divergence_ends_training_and_keeps_the_best(ground, caplog):
    settings = TINY.model_copy(update={"learning_rate": 1e30, "epochs": 9})
    with caplog.at_level(logging.WARNING, "aeheight.journal"):
        checkpoint = run(ground, settings)
    assert checkpoint.history[-1]["diverged"] == 1
    assert len(checkpoint.history) < 10
    assert "Lower model.learning_rate (1e+30)" in caplog.text
    best = min(record.get("validation_rmse", np.inf) for record in checkpoint.history)
    assert rmse(checkpoint, ground, VALIDATION) == pytest.approx(best, rel=1e-5)
    checkpoint.to_bytes()


def test_training_leaves_no_trace(ground, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    run(ground, TINY.model_copy(update={"epochs": 1}))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Recorder:
    """A ground whose reads can be counted."""

    def __init__(self, ground):
        self._ground, self.reads = ground, []

    def __getattr__(self, name):
        return getattr(self._ground, name)

    def read(self, spot, margin=0):
        self.reads.append(spot)
        return self._ground.read(spot, margin)


def test_the_last_batch_is_filled_up(ground):
    ground = replace(ground, patches=11)
    recorder = Recorder(ground)
    run(recorder, TINY.model_copy(update={"epochs": 1}))
    spots, cover = ground.epoch(1), ground.validation()
    drawn = [spot for spot in recorder.reads if spot not in cover]
    assert sorted(drawn) == sorted(spots + spots[:5])


# --- bad input ---------------------------------------------------------------------------------


def test_ground_that_teaches_nothing_is_named(ground):
    def used(old):
        return replace(ground, use=np.where(ground.use == old, np.uint8(TEST), ground.use))

    with pytest.raises(InputError, match=r"0 training pixels.*`split`"):
        run(used(TRAIN))
    with pytest.raises(InputError, match=r"no validation pixel.*split\.validation"):
        run(used(VALIDATION))
    with pytest.raises(InputError, match=r"are the same.*`split`"):
        run(replace(ground, height=np.full_like(ground.height, 5.1)))


def test_a_prior_that_covers_nothing_is_named(ground):
    for prior in (None, np.full_like(ground.height, np.nan)):
        with pytest.raises(InputError, match=r"prior has no value.*model\.base to ridge"):
            run(replace(ground, prior=prior), base="prior")


def test_a_batch_of_one_value_is_named(ground):
    with pytest.raises(InputError, match=r"batch 1 of patches of 32 px.*model\.batch to 2"):
        run(ground, TINY.model_copy(update={"batch": 1}))
