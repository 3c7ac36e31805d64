"""Which training makes a network earn its keep on ground that it has not seen: one command a row.

    python -m pipelines.experiments --variant NAME [--ground norcal] [--seeds 3]

Each variant is what it changes of the screening training: a small U-Net that corrects the plain
ridge regression (or the prior), on patches of 64 px, 8 epochs of 48 patches; `default` is the
product's training. What came of it stands in EXPERIMENTS.md. The library holds only what won; what
lost lives in `experiment_variants`, as functions that plug into `Recipe`.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from aeheight import __version__, embeddings
from aeheight.embeddings import NODATA
from aeheight.errors import InputError
from aeheight.models import HeightModel, Provenance
from aeheight.settings import ModelSettings
from aeheight.splits import TEST
from aeheight.training import fit
from aeheight.trust import WHOLE
from pipelines.experiment_grounds import GROUNDS, Arrays, load, with_patches
from pipelines.experiment_variants import VARIANTS

SCREENING: Final[Mapping[str, Any]] = {
    "architecture": "unet",
    "patch": 64,
    "epochs": 8,
    "patches_per_epoch": 48,
    "patience": 99,
}


@dataclass(frozen=True, slots=True)
class Row:
    """What a variant reached on test ground that it has not seen; metres."""

    variant: str
    ground: str
    seed: int
    ridge: float
    """RMSE of the plain ridge regression."""
    base: float
    """RMSE of what is corrected."""
    whole: float
    """RMSE with the network's whole correction."""
    trusted: float
    """RMSE with as much of it as earned trust: what the product predicts."""
    r2_base: float
    r2_trusted: float
    relief: float
    """Trust in the correction's relief, 0 to 1."""
    level: float
    """Trust in its level."""
    seconds: float
    """Of training."""

    def line(self) -> str:
        """For a table."""
        gains = [100 * (rmse / self.base - 1) for rmse in (self.whole, self.trusted)]
        return (
            f"{self.variant:16} {self.ground:19} {self.seed:4} {self.ridge:8.2f} {self.base:8.2f} "
            f"{gains[0]:+8.2f} {gains[1]:+8.2f} {self.r2_base:8.4f} {self.r2_trusted:8.4f} "
            f"{self.relief:6.2f} {self.level:6.2f} {self.seconds:5.0f}"
        )


HEAD: Final = (
    f"{'variant':16} {'ground':19} {'seed':>4} {'ridge, m':>8} {'base, m':>8} "
    f"{'whole, %':>8} {'trust, %':>8} {'R² base':>8} {'R² trust':>8} "
    f"{'relief':>6} {'level':>6} {'s':>5}"
)


def run(name: str, ground_name: str, seed: int, **changes: Any) -> Row:
    """Train a variant on a ground and judge it on the ground that it has not seen.

    Args:
        name: of the variant.
        ground_name: as `load` takes it.
        seed: of the split and of the training.
        changes: of the settings, after the variant's own.

    Raises:
        InputError: no such variant or ground, or the ground's data is missing.
    """
    if name not in VARIANTS:
        raise InputError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    asked = {**SCREENING, **variant.settings, "seed": seed, **changes}
    settings = ModelSettings.model_validate(asked)
    ground = load(ground_name, seed, settings.patch, variant.validation_block)
    return judged(name, ground_name, ground, settings)


def judged(name: str, ground_name: str, ground: Arrays, settings: ModelSettings) -> Row:
    """As `run`, on ground that is at hand."""
    variant = VARIANTS[name]
    base = variant.base or ("ridge" if ground.prior is None else "prior")
    recipe = variant.recipe(ground)
    ground = with_patches(ground, settings.patches_per_epoch or ground.per_epoch)
    about = Provenance("", "", "dsm", "EPSG:5773", (), embeddings.VERSION, __version__)
    begun = time.monotonic()
    checkpoint = fit(ground, settings, base, about, recipe=recipe)
    seconds = time.monotonic() - begun
    model = HeightModel(
        settings, base, checkpoint.ridge, checkpoint.scale, recipe.build, checkpoint.kernel
    ).eval()
    assert model.network is not None
    model.network.load_state_dict(checkpoint.weights)
    codes = torch.from_numpy(ground.codes)[None]
    prior = None if ground.prior is None else torch.from_numpy(ground.prior)[None]
    there = (ground.use == TEST) & np.isfinite(ground.height) & (ground.codes[0] != NODATA)
    heights = ground.height[there].astype(np.float64)
    with torch.inference_mode():
        bases = checkpoint.ridge.predict(ground.codes), model.base(codes, prior)[0].numpy()
        errors = [each[there] - heights for each in bases]
        for trust in (WHOLE, checkpoint.trust):
            model.trust = trust
            errors.append(model(codes, prior)[0].double().numpy()[there] - heights)
    squares = [float(np.square(each).mean()) for each in errors]
    ridge, base_rmse, whole, trusted = (each**0.5 for each in squares)
    r2 = [1 - each / float(heights.var()) for each in squares]
    return Row(
        variant=name,
        ground=ground_name,
        seed=settings.seed,
        ridge=ridge,
        base=base_rmse,
        whole=whole,
        trusted=trusted,
        r2_base=r2[1],
        r2_trusted=r2[3],
        relief=checkpoint.trust.relief,
        level=checkpoint.trust.level,
        seconds=seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each ground and seed; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variant", required=True, metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--ground", default="norcal", help="norcal, prior, demo, or a part of one")
    parser.add_argument("--seeds", type=int, default=1, help="how many (1)")
    asked = parser.parse_args(arguments)
    print(HEAD, flush=True)
    try:
        for ground in GROUNDS.get(asked.ground, (asked.ground,)):
            for seed in range(asked.seeds):
                print(run(asked.variant, ground, seed).line(), flush=True)
    except InputError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
