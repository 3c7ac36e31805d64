"""The kernel regression on the device that runs the network, to the bits of `kernel`."""

import torch
from torch import Tensor

from aeheight.kernel import BLOCK, Kernel
from aeheight.ridge import SHORTEST, squares

_STRIP = 64
_GPU_BLOCK = 65_536


class Regression(torch.nn.Module):
    """Codes to heights, pixel by pixel; it has nothing to train and keeps no state."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        ridge = kernel.ridge
        self._intercept, self._evened = ridge.intercept, ridge.evened
        self._bumps = len(kernel.weights)
        self._terms: Tensor
        self._squares: Tensor
        self._doubled: Tensor
        self._rooms: Tensor
        self._steps: Tensor
        for name, table in (
            ("_terms", ridge.terms),
            ("_squares", squares()),
            ("_doubled", kernel.doubled),
            ("_rooms", kernel.rooms),
            ("_steps", kernel.steps),
        ):
            self.register_buffer(name, torch.from_numpy(table.copy()), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """(n, 64, h, w) codes to (n, h, w) float64 metres; any value where there are none."""
        total = self._linear(codes)
        return total + self._bent(codes) if self._bumps else total

    def _linear(self, codes: Tensor) -> Tensor:
        """(n, h, w) float64, bit for bit as `Ridge.total`."""
        start = 0.0 if self._evened else self._intercept
        total = torch.full_like(codes[:, 0], start, dtype=torch.float64)
        squares = torch.zeros_like(total) if self._evened else None
        height = codes.shape[2]
        # A CPU is three times as fast where a strip stays in its cache.
        rows = _STRIP if codes.device.type == "cpu" else height
        for top in range(0, height, rows):
            strip, sums = codes[:, :, top : top + rows], total[:, top : top + rows]
            for band, terms in enumerate(self._terms):
                index = strip[:, band].contiguous().view(torch.uint8).int()
                sums += terms.index_select(0, index.flatten()).view(index.shape)
                if squares is not None:
                    added = self._squares.index_select(0, index.flatten()).view(index.shape)
                    squares[:, top : top + rows] += added
        if squares is None:
            return total
        return total / squares.sqrt().clamp(min=SHORTEST).sqrt() + self._intercept

    def _bent(self, codes: Tensor) -> Tensor:
        """(n, h, w) float64, bit for bit as `Kernel.bent`."""
        n, bands, height, width = codes.shape
        added = torch.zeros((n, height * width), dtype=torch.float32, device=codes.device)
        size = BLOCK if codes.device.type == "cpu" else _GPU_BLOCK
        with torch.autocast(codes.device.type, enabled=False):
            for pixels, out in zip(codes.reshape(n, bands, -1), added, strict=True):
                for start in range(0, height * width, size):
                    part = slice(start, start + size)
                    out[part] = self._raised(pixels[:, part].float())
        return added.view(n, height, width).double()

    def _raised(self, q: Tensor) -> Tensor:
        """(p,) metres that the bumps add to pixels (64, p)."""
        bumps = torch.addmm(self._rooms, self._doubled, q)
        bumps.sub_(q.square().sum(dim=0)).clamp_(min=0).square_().square_().mul_(self._steps)
        while len(bumps) > 1:  # a sum in a fixed order, as `Kernel.bent` has it
            half = len(bumps) // 2
            bumps = bumps[:half].add_(bumps[half:])
        return bumps[0]
