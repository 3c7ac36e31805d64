"""What stands beside each height of a map: its novelty and its spread, on any device."""

import numpy as np
import torch
from torch import Tensor

from aeheight.embeddings import NODATA
from aeheight.models import Checkpoint
from aeheight.novelty import BLOCK, Novelty
from aeheight.spread import FARTHEST, STEPS, Spread


def layers_of(checkpoint: Checkpoint, *, novelty: bool, spread: bool) -> tuple[str, ...]:
    """A map's layers: `height`, then, of what is asked for, what the checkpoint knows."""
    known = checkpoint.novelty is not None
    told = {"novelty": novelty and known, "spread": spread and known and checkpoint.spread}
    return ("height", *(name for name, there in told.items() if there))


class Beside(torch.nn.Module):
    """Heights to a map's layers: `Novelty.distance` and `Spread.half_width`, to the last bit."""

    def __init__(self, checkpoint: Checkpoint, layers: tuple[str, ...]) -> None:
        """Of the layers that `layers_of` gives."""
        super().__init__()
        self._layers = layers
        self._distance = self._width = None
        if len(layers) > 1 and checkpoint.novelty is not None:
            self._distance = _Distance(checkpoint.novelty)
        if "spread" in layers and checkpoint.spread is not None:
            self._width = _Width(checkpoint.spread)

    def forward(self, heights: Tensor, codes: Tensor) -> Tensor:
        """(layers, n, h, w) float32; all are NaN where there is no embedding.

        Args:
            heights: (n, h, w) float32 metres, NaN where there is none: there is no spread either.
            codes: (n, 64, h, w) int8.
        """
        made = {"height": heights}
        if self._distance is not None:
            made["novelty"] = self._distance(codes)
        if self._width is not None:
            spread = self._width(codes, made["novelty"])
            made["spread"] = torch.where(heights.isnan(), torch.nan, spread)
        return torch.stack([made[name] for name in self._layers])


class _Distance(torch.nn.Module):
    """`Novelty.distance`."""

    def __init__(self, novelty: Novelty) -> None:
        super().__init__()
        self._reach = novelty.reach
        self._weights: Tensor
        self._offsets: Tensor
        self.register_buffer("_weights", torch.from_numpy(novelty.weights))
        self.register_buffer("_offsets", torch.from_numpy(novelty.offsets))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (n, 64, h, w) to novelty (n, h, w) float32, NaN where there is no embedding."""
        n, bands, height, width = codes.shape
        novelty = torch.empty((n, height * width), device=codes.device)
        for sample, target in zip(codes.reshape(n, bands, -1), novelty, strict=True):
            for start in range(0, height * width, BLOCK):
                part = slice(start, start + BLOCK)
                q = sample[:, part].float()
                nearest = torch.addmm(self._offsets, self._weights, q, beta=-1).amax(dim=0)
                squares = q.square().sum(dim=0) - nearest
                target[part] = squares.double().sqrt() / self._reach
        there = codes[:, 0] != NODATA
        return torch.where(there, novelty.view(n, height, width), torch.nan)


class _Width(torch.nn.Module):
    """`Spread.half_width`."""

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self._spread = spread
        self._head: Tensor
        self._table: Tensor
        head = spread.head.weights.astype(np.float32)
        self.register_buffer("_head", torch.from_numpy(head))
        self.register_buffer("_table", torch.from_numpy(spread.table))

    def forward(self, codes: Tensor, novelty: Tensor) -> Tensor:
        """Codes (n, 64, h, w) and novelty (n, h, w) to metres (n, h, w) float32.

        NaN where there is no embedding.
        """
        head, n = self._spread.head, len(codes)
        sums = torch.empty((n, novelty[0].numel()), device=codes.device)
        for sample, target in zip(codes.reshape(n, codes.shape[1], -1), sums, strict=True):
            for start in range(0, len(target), BLOCK):
                part = slice(start, start + BLOCK)
                target[part] = self._head @ sample[:, part].float()
        low, high = self._spread.lowest, self._spread.highest
        log = (sums.double() * head.scale + head.intercept).clamp(low, high)
        place = ((log - low) * STEPS).round().long()
        width = self._table.index_select(0, place.flatten()).view_as(novelty)
        far = novelty.double().clamp(1.0, FARTHEST)
        for _ in range(self._spread.growth):
            width = width * far
        return width.float()
