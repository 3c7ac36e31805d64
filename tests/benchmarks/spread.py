"""What the spread holds on ground that was left out, beside two simple intervals.

    python -m tests.benchmarks.spread [GROUND ...] [--architecture ridge unet] [--seeds 3]
        [--epochs 8] [--cost]

GROUND is one of `pipelines.experiment_grounds.GROUNDS` or a whole group of it (default: norcal).
Folds are blocks drawn at random, so test ground is like training ground; the sides are not. Each
trial trains a model as `aeheight train` does and judges all test pixels. Beside the spread:

- Gaussian: 1.645 times the model's RMSE on its training ground, everywhere;
- validation alone: a spread from the model's errors on validation ground, without a plain model's
  on training ground; where that is enough for one;
- constant: the 0.9 quantile of the errors on validation ground, everywhere (split conformal).

The interval score is the width and 20 times what lies outside (Gneiting & Raftery 2007). With
`--cost` it prints what the spread costs beside novelty and the network, and nothing else.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import numpy as np
import torch

from aeheight.beside import Beside
from aeheight.embeddings import BANDS
from aeheight.intervals import Intervals
from aeheight.models import Base, HeightModel, Provenance
from aeheight.novelty import Novelty
from aeheight.predictor import Predictor
from aeheight.settings import ModelSettings
from aeheight.splits import TEST, TRAIN, VALIDATION
from aeheight.spread import Errors, Head, Spread
from aeheight.spread import fit as fit_spread
from aeheight.training import fit
from pipelines.experiment_grounds import GROUNDS, Arrays, load
from tests.benchmarks import machine, markdown
from tests.checkpoints import checkpoint_of, codes_of

PROVENANCE = Provenance("", "", "dsm", "EPSG:5773", (2021,), "", "")
GAUSSIAN = 1.645

Held = dict[str, list[dict[str, float | None]]]
"""Figures of each trial, by the kind of interval."""


def trial(ground: Arrays, base: Base, model: ModelSettings) -> Iterator[tuple[str, Intervals]]:
    """Train, predict all of the ground at once, judge its test pixels."""
    predictor = Predictor(fit(ground, model, base, PROVENANCE), precision="float32")
    prior = None if ground.prior is None else ground.prior[None]
    layers = predictor.submit(ground.codes[None], prior).result()[:, 0]
    made = dict(zip(predictor.layers, layers, strict=True))
    errors = made["height"] - ground.height
    known = np.isfinite(errors)
    where = [known & (ground.use == use) for use in (TRAIN, VALIDATION, TEST)]
    train, validation, test = (errors[ground] for ground in where)
    codes, novelty = ground.codes[:, where[2]], made["novelty"][where[2]]
    spread = made["spread"][where[2]]
    yield "spread", Intervals.of(test, spread)
    blocks = ground.cut(0, 0, *ground.use.shape).blocks(ground.block)[where[1]]
    held_out = Errors(ground.codes[:, where[1]], validation, blocks)
    nothing = Errors(codes[:, :0], np.empty(0), np.empty(0, np.int64))
    if alone := fit_spread(held_out, nothing, np.empty(0), model.seed):
        yield "validation alone", Intervals.of(test, alone.half_width(codes, novelty))
    for name, width in (
        ("Gaussian", GAUSSIAN * np.sqrt(np.mean(train.astype(float) ** 2))),
        ("constant", np.quantile(np.abs(validation), 0.9)),
    ):
        yield name, Intervals.of(test, np.full_like(spread, width))


def trials(name: str, architecture: str, seeds: int, epochs: int) -> Held:
    """All kinds of intervals on a ground, for each seed."""
    found: Held = defaultdict(list)
    for seed in range(seeds):
        ground = load(name, seed)
        model = ModelSettings.model_validate(
            {"architecture": architecture, "epochs": epochs, "seed": seed}
        )
        base: Base = "prior" if ground.prior is not None else "ridge"
        for kind, held in trial(ground, base, model):
            found[kind].append(held.summary())
    return found


def row(ground: str, architecture: str, kind: str, held: list[dict[str, float | None]]) -> list:
    """Of the table: coverage of all trials together, its range, mean width, interval score."""
    share, half, score = (
        np.array([figures[key] for figures in held], dtype=float)
        for key in ("coverage", "spread", "score")
    )
    inside = int(np.sum((share >= 0.87) & (share <= 0.93)))
    spans = f"{100 * share.min():.1f} to {100 * share.max():.1f}"
    numbers = [f"{100 * share.mean():.1f}", spans, f"{inside} of {share.size}"]
    return [ground, architecture, kind, *numbers, 2 * half.mean(), score.mean()]


def cost() -> Iterator[list]:
    """CPU seconds for a megapixel, best of five."""
    rng = np.random.default_rng(0)
    head = Head(rng.integers(-127, 128, BANDS).astype(np.int8), 2e-5, 2.0)
    spread = Spread(head, 1.2, 2.9, 1.7, 2, 40, 0.01)
    checkpoint = checkpoint_of(novelty=Novelty(codes_of(128, BANDS), 300.0), spread=spread)
    codes, heights = torch.from_numpy(codes_of(1, BANDS, 512, 512)), torch.zeros(1, 512, 512)
    network = HeightModel(ModelSettings(), "ridge", checkpoint.ridge, 1.0).eval()

    def beside(*layers: str) -> Callable[[], object]:
        made = Beside(checkpoint, ("height", *layers))
        return lambda: made(heights, codes)

    parts: dict[str, Callable[[], object]] = {
        "network and base": lambda: network(codes, None),
        "novelty": beside("novelty"),
        "novelty and spread": beside("novelty", "spread"),
    }
    for name, run in parts.items():
        yield [name, min(_seconds(run) for _ in range(5)) / 512**2 * 1e6]


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    with torch.inference_mode():
        run()
    return time.process_time() - start


def grounds_of(names: list[str]) -> dict[str, list[str]]:
    """Grounds by the group that they are shown as: folds together, each side by itself."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in (part for group in names for part in GROUNDS.get(group, (group,))):
        folds = name.partition("-fold")
        groups[f"{folds[0]}, folds" if folds[1] else name].append(name)
    return groups


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("grounds", nargs="*", default=["norcal"])
    parser.add_argument("--architecture", nargs="+", default=["ridge"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    print(f"{machine()}, {datetime.now(UTC):%Y-%m-%d}\n")
    if asked.cost:
        print(markdown(["", "CPU s a megapixel"], list(cost())))
        return
    rows = []
    for group, names in grounds_of(asked.grounds).items():
        for architecture in asked.architecture:
            found: Held = defaultdict(list)
            for name in names:
                for kind, held in trials(name, architecture, asked.seeds, asked.epochs).items():
                    found[kind] += held
            rows += [row(group, architecture, kind, held) for kind, held in found.items()]
    head = ["ground", "model", "interval", "held %", "from to", "87 to 93 %", "width m", "score m"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
