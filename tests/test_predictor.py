"""The predictor against the plain network, out of memory, in half precision, asked by many."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from aeheight.embeddings import BANDS, NODATA, decode
from aeheight.errors import InputError
from aeheight.models import build
from aeheight.novelty import Novelty
from aeheight.predictor import Predictor
from aeheight.settings import ModelSettings
from tests.checkpoints import RIDGE, UNET, checkpoint_of, codes_of, some_ridge, wild_weights


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wild():
    return wild_weights()


def scene(n=2, edge=64):
    """Codes with gaps and a prior with other gaps."""
    rng = np.random.default_rng(5)
    codes = codes_of(n, BANDS, edge, edge, seed=6)
    no_code = rng.random((n, edge, edge)) < 0.1
    codes.transpose(0, 2, 3, 1)[no_code] = NODATA
    prior = rng.normal(300, 50, (n, edge, edge)).astype(np.float32)
    no_prior = rng.random((n, edge, edge)) < 0.1
    prior[no_prior] = np.nan
    return codes, prior, no_code, no_prior


def base_of(base, codes, prior):
    ridge = some_ridge()
    if base == "ridge":
        return np.stack([ridge.predict(sample) for sample in codes])
    return prior if base == "prior" else np.full_like(prior, ridge.mean)


@pytest.mark.parametrize("base", ["none", "ridge", "prior"])
def test_prediction_is_base_plus_scaled_network_and_nan_where_declared(base, wild):
    codes, prior, no_code, no_prior = scene()
    network = build(UNET).eval()
    network.load_state_dict(wild)
    with torch.inference_mode():
        values = torch.from_numpy(decode(codes, nodata=0.0))
        output = network(values)[:, 0].numpy()
    predictor = Predictor(checkpoint_of(UNET, base, wild))
    heights = predictor(codes, prior)
    missing = no_code | no_prior if base == "prior" else no_code
    np.testing.assert_array_equal(np.isnan(heights), missing)
    expected = base_of(base, codes, prior) + 4.0 * output
    assert np.abs(output).mean() > 0.1
    np.testing.assert_allclose(heights[~missing], expected[~missing], rtol=1e-4, atol=1e-3)
    assert heights.dtype == np.float32
    assert (predictor.stride, predictor.needs_prior) == (32, base == "prior")


@pytest.mark.parametrize("base", ["none", "ridge", "prior"])
def test_an_untrained_model_is_its_base_to_the_bit(base):
    codes, prior, no_code, _ = scene()
    weights = build(UNET).state_dict()
    heights = Predictor(checkpoint_of(UNET, base, weights))(codes, prior)
    expected = np.where(no_code, np.nan, base_of(base, codes, prior)).astype(np.float32)
    np.testing.assert_array_equal(heights, expected)


@pytest.mark.parametrize("architecture", ["unet", "unetplusplus"])
def test_a_sample_keeps_its_bits_whatever_its_companions(architecture, wild):
    model = ModelSettings(architecture=architecture)
    weights = wild
    if architecture == "unetplusplus":
        network = build(model)
        torch.nn.init.normal_(network.segmentation_head[0].weight)
        weights = network.state_dict()
    predictor = Predictor(checkpoint_of(model, "ridge", weights))
    codes = codes_of(4, BANDS, 96, 96)
    together = predictor(codes)
    for index in range(4):
        others = np.full_like(codes, NODATA)
        others[index] = codes[index]
        np.testing.assert_array_equal(predictor(others)[index], together[index])


def test_the_ridge_takes_any_window_and_ignores_a_prior():
    codes, prior, *_ = scene(edge=13)
    predictor = Predictor(checkpoint_of(RIDGE, "prior"))
    assert (predictor.stride, predictor.needs_prior) == (1, False)
    np.testing.assert_array_equal(predictor(codes, prior), base_of("ridge", codes, prior))


def test_arrays_that_cannot_be_written_or_are_strided_are_read():
    codes = codes_of(1, BANDS, 16, 32)
    codes.flags.writeable = False
    predictor = Predictor(checkpoint_of())
    np.testing.assert_array_equal(predictor(codes[:, :, ::-1]), predictor(codes)[:, ::-1])


def test_wrong_input_is_named(wild):
    predictor = Predictor(checkpoint_of(UNET, "prior", wild))
    codes, prior, *_ = scene()
    with pytest.raises(InputError, match="takes 64 bands, and the codes have 63"):
        predictor(codes[:, 1:], prior)
    with pytest.raises(InputError, match=r"window of 33x64 px.*multiples of 32"):
        predictor(codes[:, :, :33], prior[:, :33])
    with pytest.raises(InputError, match=r"none was given.*add `prior`"):
        predictor(codes)
    with pytest.raises(InputError, match=r"one of shape \(2, 32, 64\) was given"):
        predictor(codes, prior[:, :32])


def test_weights_of_another_network_are_named(wild):
    with pytest.raises(InputError, match="do not fit unetplusplus with resnet18"):
        Predictor(checkpoint_of(ModelSettings(), "none", wild))


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("halo", [0, 8, 16])
def test_the_middle_of_a_batch_is_the_middle_of_the_whole(wild, halo):
    codes, prior, *_ = scene()
    predictor = Predictor(checkpoint_of(UNET, "prior", wild))
    middle = predictor.submit(codes, prior, halo).result()
    assert middle.shape == (1, 2, 64 - 2 * halo, 64 - 2 * halo)
    inner = slice(halo, 64 - halo)
    np.testing.assert_array_equal(middle[0], predictor(codes, prior)[:, inner, inner])


def test_novelty_is_numpys_to_the_bit_and_told_without_a_prior_too(wild):
    codes, prior, no_code, _ = scene()
    known = Novelty(codes_of(7, BANDS, seed=3), 350.0)
    predictor = Predictor(checkpoint_of(UNET, "prior", wild, novelty=known))
    assert predictor.layers == ("height", "novelty")
    novelty = predictor.submit(codes, prior, 8).result()[1]
    inner = (slice(None), slice(8, -8), slice(8, -8))
    expected = np.stack([known.distance(sample) for sample in codes])[inner]
    np.testing.assert_array_equal(novelty, expected)
    np.testing.assert_array_equal(np.isnan(novelty), no_code[inner])
    plain = Predictor(checkpoint_of(UNET, "prior", wild, novelty=known), novelty=False)
    assert plain.layers == ("height",)
    assert plain.submit(codes, prior).result().shape[0] == 1


def test_many_threads_may_ask_at_once(wild):
    predictor = Predictor(checkpoint_of(UNET, "ridge", wild))
    samples = [codes_of(1, BANDS, 64, 64, seed=seed) for seed in range(8)]
    alone = [predictor(sample) for sample in samples]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(predictor, samples))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


# --- what the model sees where there is nothing ---------------------------------------------------


def test_missing_neighbours_are_seen_as_zeros_and_poison_nobody(wild):
    """The heights beside a gap are those of a network that is shown the value 0 there."""
    codes = codes_of(1, BANDS, 64, 64)
    codes[0, :, 20:30, 10:50] = NODATA
    predictor = Predictor(checkpoint_of(UNET, "none", wild))
    heights = predictor(codes)
    gap = codes[0, 0] == NODATA
    assert np.isfinite(heights[0][~gap]).all()
    assert np.isnan(heights[0][gap]).all()
    filled = codes.copy()
    filled[filled == NODATA] = 0  # the code of the value 0
    np.testing.assert_array_equal(heights[0][~gap], predictor(filled)[0][~gap])


# --- memory ------------------------------------------------------------------------------------


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Cramped(torch.nn.Module):
    """A network on a device with room for so many windows."""

    def __init__(self, network, room, error=GPU_FULL):
        super().__init__()
        self.network, self.room, self.error, self.sizes = network, room, error, []

    def forward(self, values):
        self.sizes.append(len(values))
        if len(values) > self.room:
            raise self.error
        return self.network(values)


def cramped(wild, room):
    predictor = Predictor(checkpoint_of(UNET, "ridge", wild))
    predictor._model.network = Cramped(predictor._model.network, room)
    return predictor


@pytest.mark.parametrize(("room", "sizes"), [(4, [4]), (3, [4, 2, 2]), (1, [4, 2, 1, 1, 1, 1])])
def test_out_of_memory_halves_the_batch_and_says_so(wild, room, sizes):
    codes = codes_of(4, BANDS, 64, 64)
    whole = Predictor(checkpoint_of(UNET, "ridge", wild))(codes)
    predictor = cramped(wild, room)
    heights = predictor(codes)
    assert predictor._model.network.sizes == sizes
    assert len(predictor.remarks) == [4, 3, 1].index(room)
    assert all("out of memory" in remark for remark in predictor.remarks)
    # The stated tolerance of a halved batch on a CPU.
    np.testing.assert_allclose(heights, whole, atol=1e-3, rtol=0)
    predictor(codes)
    assert predictor._model.network.sizes[len(sizes) :] == [sizes[-1]] * (4 // sizes[-1])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("could not create a primitive"),  # oneDNN's, seen under RLIMIT_AS
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=repr,
)
def test_a_lack_of_memory_has_many_words(wild, error):
    predictor = Predictor(checkpoint_of(UNET, "ridge", wild))
    predictor._model.network = Cramped(predictor._model.network, 1, error)
    predictor(codes_of(2, BANDS, 64, 64))
    assert predictor._model.network.sizes == [2, 1, 1]


def test_one_window_that_does_not_fit_is_named(wild):
    with pytest.raises(InputError, match=r"one window of 64 px .*memory of cpu; make predict.win"):
        cramped(wild, 0)(codes_of(2, BANDS, 64, 64))


def test_another_error_is_not_taken_for_a_lack_of_memory(wild):
    predictor = Predictor(checkpoint_of(UNET, "ridge", wild))
    predictor._model.network = torch.nn.Conv2d(3, 1, 1)
    with pytest.raises(RuntimeError, match="channels"):
        predictor(codes_of(1, BANDS, 64, 64))
    assert predictor.remarks == []


STARVED = """
import resource, sys
import numpy as np, torch
from aeheight.predictor import Predictor
from tests.checkpoints import UNET, checkpoint_of, codes_of, wild_weights

predictor = Predictor(checkpoint_of(UNET, "ridge", wild_weights()))
codes = codes_of(8, 64, 256, 256)
one = predictor(codes[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
heights = predictor(codes)
assert np.abs(heights[0] - one[0]).max() < 1e-3
print(predictor.remarks)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's limits")
def test_a_process_without_memory_halves_the_batch():
    """A real allocator that refuses: 8 windows of 256 px take more than 300 MB."""
    done = subprocess.run(
        [sys.executable, "-c", STARVED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory with 8 windows of 256 px: 4 at a time" in done.stdout


# --- half precision ----------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_is_near(wild, precision, bound):
    codes = codes_of(2, BANDS, 64, 64)
    checkpoint = checkpoint_of(UNET, "none", wild)
    whole = Predictor(checkpoint, precision="float32")(codes)
    half = Predictor(checkpoint, precision=precision)(codes)
    error = np.sqrt(np.square(half - whole).mean()) / whole.std()
    assert 0 < error < bound


def test_what_overflows_in_float16_is_computed_in_float32(wild):
    codes = codes_of(1, BANDS, 64, 64)
    loud = {name: tensor.clone() for name, tensor in wild.items()}
    loud["encoder.bn1.weight"] *= 1e6
    checkpoint = checkpoint_of(UNET, "none", loud)
    whole = Predictor(checkpoint, precision="float32")(codes)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(Predictor(checkpoint, precision="float16")(codes), whole)


def test_heights_that_are_not_finite_are_an_error(wild):
    broken = {name: tensor.clone() for name, tensor in wild.items()}
    broken["segmentation_head.0.bias"] += torch.nan
    with pytest.raises(ValueError, match="4096 heights that are not finite"):
        Predictor(checkpoint_of(UNET, "none", broken))(codes_of(1, BANDS, 64, 64))


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    def test_heights_are_near_and_novelty_is_the_same(self, wild):
        codes, prior, *_ = scene(4, 128)
        checkpoint = checkpoint_of(
            UNET, "prior", wild, novelty=Novelty(codes_of(7, BANDS, seed=3), 350.0)
        )
        here = Predictor(checkpoint).submit(codes, prior, 16).result()
        for precision, bound in (("float32", 1e-3), ("float16", 2e-3)):
            there = Predictor(checkpoint, "cuda", precision).submit(codes, prior, 16).result()
            np.testing.assert_array_equal(there[1], here[1])
            np.testing.assert_array_equal(np.isnan(there[0]), np.isnan(here[0]))
            assert (
                np.nanmax(np.abs(there[0] - here[0]))
                < bound * np.nanstd(here[0] - prior[:, 16:-16, 16:-16]) * 5
            )

    def test_batches_in_flight_keep_apart(self, wild):
        predictor = Predictor(checkpoint_of(UNET, "ridge", wild), "cuda")
        samples = [codes_of(2, BANDS, 256, 256, seed=seed) for seed in range(6)]
        alone = [predictor(sample) for sample in samples]
        running = [predictor.submit(sample) for sample in samples]
        for batch, one in zip(running, alone, strict=True):
            np.testing.assert_array_equal(batch.result()[0], one)

    def test_out_of_memory_halves_the_batch(self, wild):
        predictor = Predictor(checkpoint_of(UNET, "ridge", wild), "cuda")
        codes = codes_of(8, BANDS, 512, 512)
        one = predictor(codes[:1])
        share = torch.cuda.memory_reserved() * 3 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            heights = predictor(codes)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert predictor.remarks
        assert np.abs(heights[0] - one[0]).max() < 0.1
