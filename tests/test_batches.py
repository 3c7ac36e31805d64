"""Batches against plain loops over the spots, and what a recipe can vary."""

import threading
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
import torch

from aeheight.batches import Epoch, in_batches
from aeheight.journal import Journal
from aeheight.learning import Course, Machine, Target, learn
from aeheight.models import HeightModel
from aeheight.patches import Patch
from aeheight.recipe import Average, Recipe, eight_ways
from aeheight.ridge import Ridge
from aeheight.training import fit
from tests.test_training import PROVENANCE, TINY, world

CPU = Machine("cpu", 1)


@dataclass
class Numbered:
    """Ground whose patch of a spot says which it is; reads may end in any order."""

    delay: bool = False

    def read(self, spot):
        if self.delay:
            threading.Event().wait(0.01 * (spot % 3))
        return Patch(np.full((64, 2, 2), spot, np.int8), np.full((2, 2), spot, np.float32), None,
                     np.zeros((2, 2), np.uint8))  # fmt: skip


def as_it_is(patches, rng):
    return patches


def numbers(batches):
    return [batch.height[:, 0, 0].int().tolist() for batch in batches]


def test_batches_keep_the_order_of_their_spots():
    epoch = Epoch(Numbered(delay=True), range(11), 4, (0, 1), Recipe(prepare=as_it_is))
    assert numbers(epoch) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]
    assert len(epoch) == 3
    assert numbers(in_batches(Numbered(delay=True), range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert numbers(in_batches(Numbered(), [], 2)) == []


@pytest.mark.parametrize(
    ("spots", "batch", "ranks"), [(16, 4, 2), (11, 4, 2), (7, 3, 2), (9, 4, 3)]
)
def test_ranks_share_the_spots_in_stretches(spots, batch, ranks):
    epochs = [
        Epoch(Numbered(), range(spots), batch, (0, 1), Recipe(prepare=as_it_is), rank, ranks)
        for rank in range(ranks)
    ]
    shares = [[*chain.from_iterable(numbers(epoch))] for epoch in epochs]
    assert len({len(epoch) for epoch in epochs}) == len({len(share) for share in shares}) == 1
    drawn = [*chain.from_iterable(shares)]
    assert drawn == [n % spots for n in range(len(drawn))]
    assert set(drawn) == set(range(spots))


def test_a_reader_that_fails_is_heard():
    class Broken(Numbered):
        def read(self, spot):
            if spot == 3:
                raise OSError("gone")
            return super().read(spot)

    with pytest.raises(OSError, match="gone"):
        numbers(Epoch(Broken(), range(8), 2, (0, 1), Recipe(prepare=as_it_is)))


def test_eight_ways_are_the_ways_of_a_square():
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    codes = np.broadcast_to(values.astype(np.int8), (64, 4, 4))
    patch = Patch(codes, values, values, values.astype(np.uint8))
    laid = eight_ways([patch] * 200, np.random.default_rng(0))
    seen = {way.height.tobytes() for way in laid}
    turned = [np.rot90(flipped, k) for flipped in (values, values[:, ::-1]) for k in range(4)]
    assert seen == {np.ascontiguousarray(way).tobytes() for way in turned}
    for way in laid:
        np.testing.assert_array_equal(way.codes[7], way.height)
        np.testing.assert_array_equal(way.use, way.prior)


# --- what a recipe can vary --------------------------------------------------------------------


def test_an_average_is_that_of_a_plain_loop():
    network = torch.nn.BatchNorm1d(3)
    average, expected = Average(network, 0.9), network.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            network.weight.copy_(torch.full((3,), float(step % 7)))
            network.num_batches_tracked += 1
        average.follow()
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (step % 7)
    own = network.weight.detach().clone()
    with average.judged():
        torch.testing.assert_close(network.weight.detach(), expected)
        assert network.num_batches_tracked == 39
    assert torch.equal(network.weight, own)


def test_a_loss_and_a_network_of_several_channels():
    """A head of three channels while it trains, whose mean is the height while it is judged."""
    shapes = set()

    def build(settings):
        network = torch.nn.Sequential(torch.nn.Conv2d(64, 3, 1))
        torch.nn.init.zeros_(network[0].weight)
        torch.nn.init.zeros_(network[0].bias)

        def judged(module, _, output):
            return output if module.training else output.mean(dim=1, keepdim=True)

        network.register_forward_hook(judged)
        return network

    def loss(output, target, there, height):
        shapes.add((tuple(output.shape), tuple(target.shape), tuple(height.shape)))
        return (output - target[:, None]).abs().mul(there[:, None]).mean()

    found = fit(world(), TINY, "none", PROVENANCE, machine=CPU,
                recipe=Recipe(loss=loss, build=build))  # fmt: skip
    assert shapes == {((8, 3, 32, 32), (8, 32, 32), (8, 32, 32))}
    assert "train_rmse" not in found.history[1]
    assert found.history[1]["loss"] > 0
    assert found.rmse <= found.history[0]["validation_rmse"]


def test_a_long_epoch_tells_how_far_it_is():
    ground = replace(world(), patches=24)
    told = []
    model = HeightModel(TINY, "none", Ridge(np.zeros(64), 0.0, 100.0, 1), 10.0)
    course = Course(ground, TINY, Recipe(), Target(0.0, 10.0), told.append, every=0.0)
    learn(model, course, Journal(TINY), None, CPU)
    assert [(r["epoch"], r["patches"], r["patches_of"]) for r in told] == [
        (epoch, done, 24) for epoch in (1, 2) for done in (8, 16, 24)
    ]
    assert all(record["patches_per_second"] > 0 for record in told)
    assert told[0]["eta_seconds"] > 0
    assert told[-1]["eta_seconds"] == pytest.approx(0, abs=1e-6)
