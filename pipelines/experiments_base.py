"""Which base, without any network, carries best to ground that it has not seen.

    python -m pipelines.experiments_base [--variant NAME ...] [--ground norcal] [--seeds 3]

Prints one row a variant: its RMSE on each ground over that of the plain ridge regression, so below
1 is better. `--ground places` trains on one rectangle of norcal and tests on another far from it.
What came of it stands in EXPERIMENTS.md; `kernel` is what the library has.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aeheight import kernel
from aeheight.embeddings import decode, valid
from aeheight.errors import InputError
from aeheight.kernel import STIFFER, Pixels
from aeheight.ridge import RidgeSums
from aeheight.splits import TEST, TRAIN, VALIDATION
from pipelines.experiment_grounds import GROUNDS, Arrays, load

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

ALPHA: Final = 1e-3
_BANDS: Final = 64
_LARGE: Final = 40
_MOST: Final = 40_000
_PLACES: Final = 24
_APART: Final = 5


@dataclass(frozen=True)
class Scene:
    """A ground as the variants see it."""

    ground: Arrays
    """What is where."""

    def where(self, use: int) -> Mask:
        """(h, w) pixels of a use that count; on large ground, an even share of them."""
        there = valid(self.ground.codes) & np.isfinite(self.ground.height)
        flat = np.flatnonzero(there & (self.ground.use == use))
        chosen = np.zeros(there.size, bool)
        chosen[flat[:: max(flat.size // _MOST, 1)]] = True
        return chosen.reshape(there.shape)

    @cached_property
    def plain(self) -> Floats:
        """(64, h, w) embeddings, 0 where there are none."""
        return decode(self.ground.codes, 0.0).astype(np.float64)

    def shortened(self, power: float) -> Floats:
        """(64, h, w) the embeddings divided by a power of their length."""
        length: Floats = np.maximum(np.linalg.norm(self.plain, axis=0), 1e-3)
        return self.plain / length**power

    def with_means(self, power: float, radii: Sequence[int]) -> Floats:
        """(64 (1 + r), h, w): the embedding, and how its means over ever larger squares differ."""
        parts = [self.shortened(power)]
        there = valid(self.ground.codes)
        for radius in radii:
            n = np.maximum(np.round(_sums(there.astype(np.float64), radius)), 1)
            parts.append(_sums(parts[0] * there, radius) / n)
        steps = [after - before for before, after in itertools.pairwise(parts)]
        return np.concatenate([parts[0], *steps])

    def pixels(self, use: int) -> Pixels:
        """The pixels of a use."""
        there = self.where(use)
        return Pixels(self.ground.codes[:, there], self.ground.height[there])


Variant = Callable[[Scene], NDArray[np.floating]]
"""A scene to (n,) heights in metres of its test pixels."""


def _sums(values: Floats, radius: int) -> Floats:
    """Sums over squares of (2 radius + 1)^2 px; nothing lies beyond the edge."""
    edges = [(0, 0)] * (values.ndim - 2) + [(radius + 1, radius)] * 2
    whole, k = np.pad(values, edges).cumsum(-1).cumsum(-2), 2 * radius + 1
    sums: Floats = (
        whole[..., k:, k:] - whole[..., :-k, k:] - whole[..., k:, :-k] + whole[..., :-k, :-k]
    )
    return sums


def _linear(
    scene: Scene,
    features: Floats,
    alpha: float = ALPHA,
    further: float = 1.0,
    weigh: Callable[[Floats, Floats], Floats] | None = None,
) -> Floats:
    """A ridge regression; features past the first 64 are penalised `further` times as much.

    `weigh` makes weights of the heights and of what the last round left; there are eight rounds.
    """
    there = scene.where(TRAIN)
    x, y = features[:, there], scene.ground.height[there].astype(np.float64)
    weights, left = np.ones(y.size), y - y.mean()
    factor = np.where(np.arange(len(x)) < _BANDS, 1.0, further)
    for _ in range(8 if weigh else 1):
        if weigh:
            weights = weigh(y, left)
        share = weights / weights.sum()
        mean_x, mean_y = x @ share, float(y @ share)
        centred = x - mean_x[:, None]
        squares = (centred * share) @ centred.T
        penalty = alpha * np.trace(squares[:_BANDS, :_BANDS]) / _BANDS
        products = (centred * share) @ (y - mean_y)
        solution: Floats = np.linalg.solve(squares + penalty * np.diag(factor), products)
        left = y - mean_y - solution @ centred
    heights: Floats = solution @ features[:, scene.where(TEST)]
    return heights + (mean_y - float(solution @ mean_x))


def _penalised(scene: Scene, alpha: float) -> Floats:
    return _linear(scene, scene.plain, alpha)


def _huber(_: Floats, left: Floats, cut: float = 1.35) -> Floats:
    size = np.abs(left)
    weights: Floats = np.minimum(1, cut * 1.4826 * np.median(size) / np.maximum(size, 1e-9))
    return weights


def _by_density(heights: Floats, _: Floats) -> Floats:
    """Rare heights count more: one over the root of their smoothed density (Yang et al. 2021)."""
    counts, edges = np.histogram(heights, 40)
    smooth = np.convolve(counts, [0.1, 0.2, 0.4, 0.2, 0.1], "same")
    weights: Floats = smooth[np.clip(np.digitize(heights, edges) - 1, 0, 39)] ** -0.5
    return weights


def _anchored(scene: Scene, gamma: float) -> Floats:
    """Differences between large blocks count `gamma` times (Rothenhäusler et al. 2021)."""
    there = scene.where(TRAIN)
    x, y = scene.plain[:, there], scene.ground.height[there].astype(np.float64)
    _, block = np.unique(_blocks(scene)[there], return_inverse=True)
    mean_x, mean_y = x.mean(axis=1), y.mean()
    both = np.vstack([x - mean_x[:, None], y - mean_y])
    n = np.bincount(block)
    between = np.stack([np.bincount(block, row) for row in both]) / np.sqrt(n)
    sums = both @ both.T + (gamma - 1) * between @ between.T
    penalty = ALPHA * np.trace(both[:-1] @ both[:-1].T) / _BANDS
    solution: Floats = np.linalg.solve(sums[:-1, :-1] + penalty * np.eye(_BANDS), sums[:-1, -1])
    told: Floats = solution @ scene.plain[:, scene.where(TEST)]
    told += mean_y - float(solution @ mean_x)
    return told


def _blocks(scene: Scene) -> NDArray[np.int64]:
    rows, cols = np.indices(scene.ground.height.shape)
    return np.asarray(rows // _LARGE * 1000 + cols // _LARGE, np.int64)


def _cross_validated(scene: Scene) -> Floats:
    """The penalty with the least error on large blocks, each left out in turn."""
    there = scene.where(TRAIN)
    codes, heights, block = scene.ground.codes, scene.ground.height, _blocks(scene)
    parts = [there & (block == number) for number in np.unique(block[there])]
    sums = [RidgeSums.of(codes[:, part], heights[part]) for part in parts]
    none = RidgeSums.of(codes[:, :0, 0], heights[:0, 0])

    def error(alpha: float) -> float:
        total = 0.0
        for k, part in enumerate(parts):
            ridge = sum((*sums[:k], *sums[k + 1 :]), none).solve(alpha)
            total += float(np.square(ridge.total(codes[:, part]) - heights[part]).sum())
        return total

    return _linear(scene, scene.plain, min((1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), key=error))


def _components(scene: Scene, count: int) -> Floats:
    """A regression on the first principal components."""
    train = scene.plain[:, scene.where(TRAIN)]
    axes = np.linalg.eigh(np.cov(train))[1][:, -count:]
    return _linear(scene, np.einsum("bk,bhw->khw", axes, scene.plain), 1e-9)


def _squared(scene: Scene, count: int, further: float) -> Floats:
    """All products of the first principal components as further terms."""
    train = scene.plain[:, scene.where(TRAIN)]
    values, axes = np.linalg.eigh(np.cov(train))
    whitened = axes[:, -count:] / np.sqrt(values[-count:])
    z = np.einsum("bk,bhw->khw", whitened, scene.plain - train.mean(axis=1)[:, None, None])
    one, other = np.triu_indices(count)
    products = z[one] * z[other] * np.sqrt(values.mean())
    return _linear(scene, np.concatenate([scene.plain, products]), ALPHA, further)


def _kernel(scene: Scene, *, evened: bool = True, alpha: float = STIFFER * ALPHA) -> Floats:
    """The library's base, or one on another linear term."""
    train = scene.pixels(TRAIN)
    ridge = RidgeSums.of(train.codes, train.heights, evened=evened).solve(alpha)
    step = max(train.heights.size // 20_000, 1)
    sample = Pixels(train.codes[:, ::step], train.heights[::step])
    found = kernel.fit(ridge, sample, scene.pixels(VALIDATION))
    test = scene.ground.codes[:, scene.where(TEST)]
    return ridge.total(test) + found.bent(test)


def variants() -> Mapping[str, Variant]:
    """All that can be tried, by name."""
    found: dict[str, Variant] = {"ridge": lambda s: _linear(s, s.plain)}
    for alpha in (1e-4, 3e-3, 1e-2, 3e-2, 0.1):
        found[f"alpha-{alpha:g}"] = partial(_penalised, alpha=alpha)
    found |= {
        "alpha-cv": _cross_validated,
        "unit": lambda s: _linear(s, s.shortened(1), 3e-3),
        "evened": lambda s: _linear(s, s.shortened(0.5), 3e-3),
        "means": lambda s: _linear(s, s.with_means(0, (1, 2, 4)), further=100),
        "means-wide": lambda s: _linear(s, s.with_means(0, (2, 8)), further=30),
        "evened-means": lambda s: _linear(s, s.with_means(0.5, (2, 8)), further=30),
        "huber": lambda s: _linear(s, s.plain, weigh=_huber),
        "density": lambda s: _linear(s, s.plain, weigh=_by_density),
        "anchor-0.1": partial(_anchored, gamma=0.1),
        "anchor-10": partial(_anchored, gamma=10),
        "components-20": partial(_components, count=20),
        "components-45": partial(_components, count=45),
        "squares-6": partial(_squared, count=6, further=30),
        "squares-20": partial(_squared, count=20, further=100),
        "kernel-plain": partial(_kernel, evened=False, alpha=ALPHA),
        "kernel": _kernel,
    }
    return found


def places(seed: int, count: int = _PLACES) -> Iterator[Arrays]:
    """Norcal with a rectangle that trains, and one far from it that tests; blocks validate."""
    ground = load("norcal-west-east", 0)
    height, width = ground.height.shape
    rng, found = np.random.default_rng(seed), 0
    rows, cols = np.indices((height, width))
    while found < count:
        masks = []
        for low, high in ((50, 110), (40, 80)):
            h, w = rng.integers(low, high, 2)
            top, left = rng.integers(0, height - h), rng.integers(0, width - w)
            masks.append((rows - top, h, cols - left, w))
        train, test = [(r >= 0) & (r < h) & (c >= 0) & (c < w) for r, h, c, w in masks]
        near = _sums(test.astype(np.float64), _APART) > 0.5
        there = valid(ground.codes) & np.isfinite(ground.height)
        if (near & train).any() or (there & train).sum() < 3000 or (there & test).sum() < 1000:
            continue
        use = np.zeros_like(ground.use)
        use[train] = np.where((rows // 10 + cols // 10 * 3) % 7 == 0, VALIDATION, TRAIN)[train]
        use[test] = TEST
        found += 1
        yield Arrays(ground.codes, ground.height, None, use)


def _grounds(name: str, seeds: int) -> Iterator[tuple[str, Arrays]]:
    if name == "places":
        for seed in range(seeds):
            yield from (("places", ground) for ground in places(seed))
        return
    for part in GROUNDS.get(name, (name,)):
        for seed in range(seeds):
            yield ("folds" if "fold" in part else part), load(part, seed)


def _rmse(scene: Scene, heights: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(heights - scene.ground.height[scene.where(TEST)]))))


def table(names: Sequence[str], ground: str, seeds: int) -> Iterator[str]:
    """A line a variant: ratio to the ridge on each ground (geometric mean), and the worst."""
    tried, ratios = variants(), {name: dict[str, list[float]]() for name in names}
    for part, arrays in _grounds(ground, seeds):
        scene = Scene(arrays)
        plain = _rmse(scene, tried["ridge"](scene))
        for name in names:
            ratio = _rmse(scene, tried[name](scene)) / plain
            ratios[name].setdefault(part, []).append(ratio)
    for name, parts in ratios.items():
        cells = [
            f"{part} {np.exp(np.mean(np.log(r))):.3f} (worst {max(r):.3f})"
            for part, r in parts.items()
        ]
        yield f"{name:<14} " + ", ".join(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows that are asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", nargs="*", choices=sorted(variants()), default=None)
    parser.add_argument("--ground", default="norcal", help="as in experiment_grounds, or places")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(arguments)
    try:
        for line in table(asked.variant or list(variants()), asked.ground, asked.seeds):
            print(line, flush=True)
    except InputError as error:
        print(f"experiments_base: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
