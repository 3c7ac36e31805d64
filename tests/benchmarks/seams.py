"""What windows' edges cost: the error that a halo leaves, and whether blending buys anything.

    python -m tests.benchmarks.seams CHECKPOINT CUBE [--group NAME] [--year YEAR] [--edge 1024]
        [--ground 1312] [--windows 256 512 1152] [--figure PATH]

The first table is the curve that training measures (`aeheight/seams.py`). The second draws real
maps: every window of a lattice goes through the network once, and its results are cropped, or
cropped less and blended over 32 or 64 px. That costs the same computation, since the windows are
the same; all are held against one window over the whole ground (codes of the cube, mirrored), away
from its edges. The step of a map is the largest RMS difference of the error from one pixel to the
next, across the line where windows meet or within the blend. Errors do not depend on the prior,
which is added to all windows alike: it is 0 here.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from aeheight.charts import BLUE, GREEN, ORANGE, STYLE
from aeheight.cube import open_tree
from aeheight.embeddings import BANDS, NODATA
from aeheight.models import Checkpoint
from aeheight.patches import Patches
from aeheight.predictor import Predictor, best_device
from aeheight.seams import SHARE, Seams, measure
from aeheight.store import Store
from aeheight.windows import Lattice, Region, whole
from tests.benchmarks import machine, markdown, mirrored

MARGINS = (32, 64, 80, 96, 128)
"""Pixels given up on every side of a window: the halo and half the blend."""
BLENDS = (0, 32, 64)
MOST_EXTRA = 4.0
"""Computed pixels for every pixel of the map, above which windows are left out."""
AWAY = 192
"""Pixels from the ground's own edges that are left out."""
FLOOR = 1e-5
"""Metres: what is smaller is float rounding."""

Heights = Callable[[NDArray[np.int8]], NDArray[np.float32]]
"""(64, h, w) codes to (h, w) metres."""


@dataclass(frozen=True)
class Map:
    """How a map of overlapping windows differs from that of one."""

    window: int
    margin: int
    blend: int
    extra: float
    """Computed pixels for every pixel of the map."""
    rms: float
    """Metres, as the rest."""
    largest: float
    step: float


def main() -> None:
    """Measure, print and draw."""
    options = _options()
    checkpoint = Checkpoint.from_bytes(options.checkpoint.read_bytes())
    predictor = Predictor(checkpoint, best_device(), "float32", novelty=False)
    tree = open_tree(Store.at(str(options.cube)))
    patches = Patches(tree, checkpoint.model.patch, checkpoint.model.seed)
    for _ in patches.sweep():
        pass
    ground = [patches.read(spot) for spot in patches.squares(options.edge, options.count)]
    if not ground:
        sys.exit(f"no ground of {options.cube} that trains holds a square of 64 px or more")
    seams = measure(predictor, [(square.codes, square.prior) for square in ground])
    limit = SHARE * (checkpoint.rmse or np.nan)
    halo = seams.halo(checkpoint.rmse or np.nan)
    print(f"{datetime.now(UTC):%Y-%m-%d}; {machine()}; {checkpoint.model.architecture} on "
          f"{checkpoint.base}, trained to {checkpoint.rmse:.2f} m; {seams.pixels} pixels of halves "
          f"of {seams.edge} px held against the whole; for steps below {limit:.3g} m a halo "
          f"of {halo} px is enough\n")  # fmt: skip
    head = ["halo px", "RMS error m", "largest m", "step at seams m"]
    rows = zip(seams.halos, seams.rms, seams.largest, seams.step, strict=True)
    print(markdown(head, [[f"**{row[0]}**" if row[0] == halo else row[0], *row[1:]]
                          for row in rows if row[0] <= 256]), end="\n\n")  # fmt: skip
    codes = mirrored(_full(ground[0].codes), options.ground)
    maps = list(maps_of(predictor, codes, options.windows)) if options.windows else []
    names = ["window", "margin", "blend", "extra", "RMS error m", "largest m", "step at seams m"]
    print(markdown(names, [list(vars(one).values()) for one in maps]))
    if options.figure:
        draw(seams, maps, limit, halo).savefig(options.figure, dpi=200)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="such as runs/demo/model/best.ckpt")
    parser.add_argument("cube", type=Path, help="that it was trained on: runs/demo/cube.zarr")
    parser.add_argument("--edge", type=int, default=1024, help="of the squares of the first table")
    parser.add_argument("--count", type=int, default=4, help="of the squares")
    parser.add_argument("--ground", type=int, default=1312, help="edge of the maps: 2 kB a pixel")
    parser.add_argument("--windows", type=int, nargs="*", default=[256, 512, 1152])
    parser.add_argument("--figure", type=Path, help="PNG or SVG to draw the curves into")
    return parser.parse_args()


def _full(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Missing pixels as 0, which the network takes them for: all windows then count everywhere."""
    return np.where(codes == NODATA, 0, codes).astype(np.int8)


def maps_of(predictor: Predictor, codes: NDArray[np.int8], windows: Sequence[int]) -> Iterator[Map]:
    """Maps of windows of each size, cropped and blended, against one window over all of it."""

    def heights(part: NDArray[np.int8]) -> NDArray[np.float32]:
        zero = np.zeros((1, *part.shape[1:]), np.float32)
        found: NDArray[np.float32] = predictor(part[None], zero)[0]
        return found

    reference = {phase: _from(heights, codes, phase) for phase in {m % 32 for m in MARGINS}}
    for window in windows:
        for margin in MARGINS:
            stride = window - 2 * margin
            if stride <= 0 or (window / stride) ** 2 > MOST_EXTRA:
                continue
            lattices = [Lattice(codes.shape[1:], window, margin - blend // 2, blend)
                        for blend in BLENDS if blend <= min(2 * margin, stride)]  # fmt: skip
            for lattice, drawn in zip(lattices, _drawn(heights, codes, lattices), strict=True):
                yield _judged(lattice, drawn - reference[margin % 32])


def _from(heights: Heights, codes: NDArray[np.int8], phase: int) -> NDArray[np.float32]:
    """One window over everything that starts `phase` px before the ground, as the others do."""
    edge = codes.shape[1]
    reach = -(-(edge + phase) // 32) * 32
    return heights(_read(codes, Region(-phase, -phase, reach, reach)))[phase:, phase:][:edge, :edge]


def _read(codes: NDArray[np.int8], region: Region) -> NDArray[np.int8]:
    out = np.full((BANDS, *region.shape), NODATA, dtype=np.int8)
    inside = region.intersect(whole(codes.shape[1:]))
    assert inside is not None
    out[(..., *inside.within(region).slices)] = codes[(..., *inside.slices)]
    return out


def _drawn(
    heights: Heights, codes: NDArray[np.int8], lattices: Sequence[Lattice]
) -> list[NDArray[np.float64]]:
    """The maps of lattices that share their windows and differ in what they blend."""
    area = whole(codes.shape[1:])
    sums, weights = ([np.zeros(area.shape) for _ in lattices] for _ in range(2))
    for window in lattices[0].windows(area.expand(-AWAY)):
        found = heights(_read(codes, window))
        for lattice, total, weight in zip(lattices, sums, weights, strict=True):
            kept = lattice.kept(window)
            shared = kept.intersect(area)
            assert shared is not None
            taper = lattice.taper()[shared.within(kept).slices]
            total[shared.slices] += taper * found[shared.within(window).slices]
            weight[shared.slices] += taper
    with np.errstate(invalid="ignore"):  # ground that no window of the middle keeps
        return [total / weight for total, weight in zip(sums, weights, strict=True)]


def _judged(lattice: Lattice, errors: NDArray[np.float64]) -> Map:
    inside = errors[AWAY:-AWAY, AWAY:-AWAY]
    steps = np.sqrt([np.square(np.diff(e, axis=0)).mean(axis=1) for e in (inside, inside.T)])
    zones = [
        np.arange(seam - lattice.blend // 2 - 1, seam + lattice.blend // 2 + 1) - AWAY
        for seam in range(lattice.stride, errors.shape[0], lattice.stride)
    ]
    at = [steps[:, zone] for zone in zones if zone[0] >= 0 and zone[-1] < steps.shape[1]]
    # The steepest line of pixels of each zone, then all seams together.
    step = np.sqrt(np.square([zone.max(axis=1) for zone in at]).mean()) if at else np.nan
    return Map(
        window=lattice.window,
        margin=lattice.margin,
        blend=lattice.blend,
        extra=(lattice.window / lattice.stride) ** 2,
        rms=float(np.sqrt(np.square(inside).mean())),
        largest=float(np.abs(inside).max()),
        step=float(step),
    )


def draw(seams: Seams, maps: Sequence[Map], limit: float, halo: int | None) -> Figure:
    """The curve of the network on the left, crops against blends on the right."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_curve(left, seams)
        _draw_maps(right, maps)
        for axes in (left, right):
            axes.axhline(limit, color="black", lw=1, ls=(0, (4, 3)))
            axes.set_yscale("log")
            axes.grid(axis="y", color="#e5e8ea", lw=0.6)
            axes.set_axisbelow(True)
        left.annotate("1 % of the map's RMSE", (256, limit), (0, 3), textcoords="offset points",
                      ha="right", fontsize=8)  # fmt: skip
        if halo is not None:
            left.axvline(halo, color=GREEN, lw=1)
            left.annotate(f"{halo} px suffice", (halo, FLOOR), (4, 4), textcoords="offset points",
                          color=GREEN, fontsize=8)  # fmt: skip
    return figure


def _draw_curve(axes: Axes, seams: Seams) -> None:
    shown = [k for k, halo in enumerate(seams.halos) if halo <= 256]
    halos = [seams.halos[k] for k in shown]
    for values, style, colour, label in (
        (seams.largest, ":", "#8a949c", "largest error"),
        (seams.step, "o-", BLUE, "RMS step where windows meet"),
        (seams.rms, "--", BLUE, "RMS error of the outermost 32 px"),
    ):
        drawn = [max(values[k], FLOOR) for k in shown]
        axes.plot(halos, drawn, style, color=colour, ms=4, lw=1.2, label=label)
    axes.set(xlabel="halo cut from every side of a window [px]", ylabel="metres",
             title="What a halo leaves", xticks=range(0, 257, 32))  # fmt: skip
    axes.legend(frameon=False, fontsize=8)


def _draw_maps(axes: Axes, maps: Sequence[Map]) -> None:
    window = sorted({one.window for one in maps})[len({one.window for one in maps}) // 2 :][:1]
    styles = {0: (BLUE, "o", "crop"), 32: (ORANGE, "s", "blend over 32 px"),
              64: (GREEN, "^", "blend over 64 px")}  # fmt: skip
    for blend, (colour, marker, label) in styles.items():
        of = [one for one in maps if one.blend == blend and [one.window] == window]
        margins = [one.margin for one in of]
        axes.plot(margins, [max(one.step, FLOOR) for one in of], color=colour, marker=marker,
                  ms=4, label=f"{label}: step")  # fmt: skip
        axes.plot(margins, [max(one.rms, FLOOR) for one in of], color=colour, marker=marker, ms=4,
                  lw=1, ls="--", mfc="white", label=f"{label}: RMS error")  # fmt: skip
    axes.set(xlabel="halo + half the blend [px]: equal computation", xticks=MARGINS,
             title=f"Crop or blend, windows of {window[0] if window else '-'} px")  # fmt: skip
    axes.legend(frameon=False, fontsize=8, ncols=2)


if __name__ == "__main__":
    main()
