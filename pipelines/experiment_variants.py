"""What the experiments try: networks, losses, samples and augmentations that plug into `Recipe`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from aeheight import models
from aeheight.embeddings import BANDS, decode, encode
from aeheight.models import Base
from aeheight.patches import Patch
from aeheight.recipe import Recipe, eight_ways, mean_square
from aeheight.settings import ModelSettings
from aeheight.splits import TRAIN
from aeheight.trust import RADIUS
from pipelines.experiment_grounds import Arrays

_BINS: Final = 32
_REACH: Final = 3.0
_HEIGHT_BINS: Final = 50


# --- networks --------------------------------------------------------------------------------


def thin(_: ModelSettings, classes: int = 1) -> torch.nn.Module:
    """The U-Net of the screening: three stages of ResNet-18, so that it sees less ground."""
    network = smp.Unet(
        "resnet18",
        encoder_depth=3,
        encoder_weights=None,
        in_channels=BANDS,
        classes=classes,
        decoder_channels=(64, 32, 16),
    )
    return _zero_headed(network)


def small(_: ModelSettings, kernel: int = 1, width: int = 64, layers: int = 2) -> torch.nn.Module:
    """A few convolutions; with a kernel of 1 a perceptron for each pixel."""
    steps: list[torch.nn.Module] = []
    for number in range(layers):
        inputs = width if number else BANDS
        steps += [torch.nn.Conv2d(inputs, width, kernel, padding=kernel // 2), torch.nn.GELU()]
    head = torch.nn.Conv2d(width, 1, 1)
    torch.nn.init.zeros_(head.weight)
    assert head.bias is not None
    torch.nn.init.zeros_(head.bias)
    return torch.nn.Sequential(*steps, head)


def _zero_headed(network: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in network.named_parameters():
        if name.startswith("segmentation_head."):
            torch.nn.init.zeros_(parameter)
    return network


class SoftBins(torch.nn.Module):
    """Bins over what is left to learn; the answer is their mean, weighted by a softmax."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.network = thin(settings, _BINS)
        self.centres: Tensor
        self.register_buffer("centres", torch.linspace(-_REACH, _REACH, _BINS))

    def forward(self, values: Tensor) -> Tensor:
        """(n, 64, h, w) to (n, 1, h, w)."""
        shares: Tensor = self.network(values).softmax(1)
        return (shares * self.centres[:, None, None]).sum(1, keepdim=True)


Change = Callable[[Tensor], Tensor]
"""Of values (n, 64, h, w), 0 where there is no embedding."""


def seen_through(change: Change, settings: ModelSettings, *, judged: bool) -> torch.nn.Module:
    """The thin U-Net, which sees the embedding changed: always, or only while it trains."""
    network = thin(settings)

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (change(inputs[0]),) if judged or module.training else None

    network.register_forward_pre_hook(hook)
    return network


def levelless(settings: ModelSettings, radius: int = RADIUS) -> torch.nn.Module:
    """The thin U-Net less the local mean of its output: in training too."""
    network = thin(settings)

    def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        there = inputs[0].ne(0).any(1, keepdim=True).to(output.dtype)
        level = _local(output * there, radius) / _local(there, radius).clamp(min=1e-6)
        return output - level

    network.register_forward_hook(hook)
    return network


def _local(pixels: Tensor, radius: int = RADIUS) -> Tensor:
    return functional.avg_pool2d(pixels, 2 * radius + 1, 1, radius)


def relief_only(values: Tensor) -> Tensor:
    """Each band less its local mean."""
    there = values.ne(0).any(1, keepdim=True).to(values.dtype)
    return (values - _local(values, 5) / _local(there, 5).clamp(min=1e-6)) * there


def unit(values: Tensor) -> Tensor:
    """Embeddings of length 1: means over an area are shorter."""
    return functional.normalize(values, dim=1)


def shifted(values: Tensor, share: float = 1.0) -> Tensor:
    """One random vector added to all pixels of a patch, as large as the bands' spread."""
    there = values.ne(0).any(1, keepdim=True)
    spread = values.std((0, 2, 3), keepdim=True)
    return values + there * torch.randn_like(values[:, :, :1, :1]) * spread * share


def noisy(values: Tensor, share: float = 1.0) -> Tensor:
    """Noise in every pixel, as large as the bands' spread."""
    there = values.ne(0).any(1, keepdim=True)
    return values + there * torch.randn_like(values) * values.std((0, 2, 3), keepdim=True) * share


def turned(values: Tensor, size: float = 0.3) -> Tensor:
    """All vectors of a batch turned by the same small random rotation."""
    drawn = torch.randn(BANDS, BANDS, device=values.device) * size / BANDS**0.5
    return torch.einsum("ij,njhw->nihw", torch.matrix_exp(drawn - drawn.T), values)


def dropped(values: Tensor, share: float = 0.3) -> Tensor:
    """Some bands of each patch left out."""
    return functional.dropout2d(values, share)


# --- losses and samples ----------------------------------------------------------------------


def absolute_error(output: Tensor, target: Tensor, there: Tensor, _: Tensor) -> Tensor:
    """Mean absolute error."""
    return (output - target).abs().masked_fill(~there, 0).sum() / there.sum().clamp(min=1)


def huber(output: Tensor, target: Tensor, there: Tensor, _: Tensor) -> Tensor:
    """Huber's loss (1964), square up to one unit of the scale."""
    each = functional.huber_loss(output, target, reduction="none").masked_fill(~there, 0)
    return each.sum() / there.sum().clamp(min=1)


def huber_and_gradient(output: Tensor, target: Tensor, there: Tensor, height: Tensor) -> Tensor:
    """Huber's loss, and half the absolute error of the slopes."""
    loss = huber(output, target, there, height)
    for axis in (1, 2):
        pairs = there.narrow(axis, 1, there.shape[axis] - 1) & there.narrow(
            axis, 0, there.shape[axis] - 1
        )
        slopes = (output - target).diff(dim=axis).abs().masked_fill(~pairs, 0)
        loss = loss + 0.5 * slopes.sum() / there.sum().clamp(min=1)
    return loss


def relief_error(output: Tensor, target: Tensor, there: Tensor, height: Tensor) -> Tensor:
    """Squared error against the target less its local mean over training pixels."""
    known = there[:, None].to(target.dtype)
    level = _local(target[:, None] * known, 5) / _local(known, 5).clamp(min=1e-6)
    return mean_square(output, target - level[:, 0], there, height)


def small_answers(output: Tensor, target: Tensor, there: Tensor, height: Tensor) -> Tensor:
    """Squared error, and 0.3 times the square of the correction itself."""
    return mean_square(output, target, there, height) + 0.3 * output.square().mean()


def smoothed(
    edges: Tensor, weights: Tensor, output: Tensor, target: Tensor, there: Tensor, height: Tensor
) -> Tensor:
    """Squared error, weighted by how rare the height is."""
    weight = weights[torch.bucketize(height.nan_to_num(), edges)]
    errors = (output - target).square().masked_fill(~there, 0)
    return (errors * weight).sum() / there.sum().clamp(min=1)


def rarity(heights: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Edges (49,) and weights (50,) of bins of height: label distribution smoothing.

    The inverse square root of the density, smoothed by a Gaussian of two bins; the mean weight of a
    pixel is 1. Source: Yang et al. (2021), arXiv 2102.09554.
    """
    low, high = (float(np.percentile(heights, share)) for share in (0.5, 99.5))
    edges = np.linspace(low, high, _HEIGHT_BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(edges, heights), minlength=_HEIGHT_BINS).astype(float)
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 8)
    density = np.convolve(counts, kernel / kernel.sum(), "same")
    weights = 1 / np.sqrt(np.maximum(density, 1))
    weights /= (weights * counts).sum() / counts.sum()
    return torch.tensor(edges, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)


def balanced(ground: Arrays, number: int) -> Sequence[tuple[int, int]]:
    """Spots drawn so that all heights have about the same chance."""
    there = ground.cut(0, 0, *ground.height.shape).usable(TRAIN)
    heights = ground.height[there]
    edges = np.linspace(heights.min(), heights.max(), 11)[1:-1]
    bins = np.searchsorted(edges, heights)
    weight = np.zeros(there.shape)
    weight[there] = 1 / np.maximum(np.bincount(bins, minlength=10), 20)[bins]
    return ground.drawn(weight, number)


def mixed(patches: Sequence[Patch], rng: np.random.Generator) -> Sequence[Patch]:
    """Pairs of patches, mixed: embeddings and heights alike (Zhang et al. 2018, 1710.09412)."""
    patches = eight_ways(patches, rng)
    partners, share = rng.permutation(len(patches)), float(rng.beta(0.4, 0.4))
    return [_mix(each, patches[int(i)], share) for each, i in zip(patches, partners, strict=True)]


def _mix(one: Patch, other: Patch, share: float) -> Patch:
    def mix(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
        return share * first + (1 - share) * second

    prior = None
    if one.prior is not None and other.prior is not None:
        prior = mix(one.prior, other.prior).astype(np.float32)
    return Patch(
        encode(mix(decode(one.codes), decode(other.codes))),
        mix(one.height, other.height).astype(np.float32),
        prior,
        np.where((one.use == TRAIN) & (other.use == TRAIN), one.use, 0).astype(np.uint8),
    )


def as_they_lie(patches: Sequence[Patch], _: np.random.Generator) -> Sequence[Patch]:
    """No augmentation."""
    return patches


# --- what is tried ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """What one row of the table changes of the screening."""

    recipe: Callable[[Arrays], Recipe] = lambda _: Recipe(build=thin, bends=False)
    """Of the ground, whose heights some need to know."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the model."""
    base: Base | None = None
    """None: the prior where the ground has one, else the ridge."""
    validation_block: int | None = None
    """Edge of a block that validates, pixels; None: as the region's."""


def _with(**parts: Any) -> Variant:
    return Variant(lambda _: Recipe(**{"build": thin, "bends": False, **parts}))


def _seen(change: Change, *, judged: bool = False) -> Variant:
    return _with(build=partial(seen_through, change, judged=judged))


def _lds(ground: Arrays) -> Recipe:
    edges, weights = rarity(ground.height[ground.cut(0, 0, *ground.height.shape).usable(TRAIN)])
    return Recipe(build=thin, bends=False, loss=partial(smoothed, edges, weights))


_library: Final = _with(build=models.build)

VARIANTS: Final[Mapping[str, Variant]] = {
    "default": Variant(
        lambda _: Recipe(),
        {"architecture": "unetplusplus", "epochs": 30, "patches_per_epoch": 128, "patience": 10},
    ),
    "thin": Variant(),
    "unet": _library,
    "unetplusplus": Variant(_library.recipe, {"architecture": "unetplusplus"}),
    "pixel": _with(build=small),
    "shallow": _with(build=partial(small, kernel=5, width=16)),
    "absolute": Variant(_library.recipe, base="none"),
    "levelless": _with(build=levelless),
    "levelless-5": _with(build=partial(levelless, radius=5)),
    "relief-target": _with(loss=relief_error),
    "relief-in": _seen(relief_only, judged=True),
    "unit": _seen(unit, judged=True),
    "soft-bins": _with(build=SoftBins),
    "l1": _with(loss=absolute_error),
    "huber": _with(loss=huber),
    "huber-gradient": _with(loss=huber_and_gradient),
    "small-answers": _with(loss=small_answers),
    "lds": Variant(_lds),
    "balanced": _with(draw=balanced),
    "shift": _seen(shifted),
    "noise": _seen(noisy),
    "turn": _seen(turned),
    "band-dropout": _seen(dropped),
    "mix": _with(prepare=mixed),
    "no-augmentation": _with(prepare=as_they_lie),
    "average": _with(averaging=0.95),
    "decay-1": Variant(settings={"weight_decay": 1.0}),
    "slow": Variant(settings={"learning_rate": 1e-4}),
    "long": Variant(settings={"epochs": 24}),
    "thorough": Variant(settings={"epochs": 14, "patches_per_epoch": 320}),
    "levelless-long": Variant(_with(build=levelless).recipe, {"epochs": 24}),
    "far-validation": Variant(validation_block=40),
}
