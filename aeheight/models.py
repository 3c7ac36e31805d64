"""The models: ridge, U-Net, U-Net++; the checkpoint that holds one.

A model is a base (the ridge regression, the prior, or the mean height) and, unless it is the ridge
alone, a network that adds its correction: `height = base + scale * network(embedding)`.
"""

import difflib
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal

import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight.embeddings import BANDS, NODATA, decode_table
from aeheight.errors import InputError
from aeheight.kernel import Kernel
from aeheight.novelty import Novelty
from aeheight.regression import Regression
from aeheight.ridge import Ridge
from aeheight.seams import Seams
from aeheight.settings import ModelSettings
from aeheight.spread import Spread
from aeheight.trust import RADIUS, WHOLE, Trust

Base = Literal["none", "ridge", "prior"]
"""What the network corrects: the mean height, the kernel over a linear regression (in models of
older versions the plain ridge regression), or the prior."""

FORMAT_VERSION: Final = 3
_READABLE: Final = (1, 2, FORMAT_VERSION)
"""Version 1 told neither novelty nor seams; networks of 1 and 2 correct the plain ridge."""

_STRIP = 64
_HEAD = "segmentation_head."
_PROTOTYPES = "novelty.prototypes"
_KERNEL = ("kernel.ridge", "kernel.centres", "kernel.weights")
_SLIVER = 1e-6


@dataclass(frozen=True, slots=True)
class Further:
    """Another run's cube that a model was trained on too."""

    cube: str
    """Its identity."""
    split: str
    """Fingerprint of its split."""
    years: tuple[int, ...]
    """Years of its embeddings."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from, and what its heights mean."""

    cube: str
    """Identity of the cube that it was trained on."""
    split: str
    """Fingerprint of the split."""
    surface: str
    """`dsm` or `dtm`, of the reference."""
    vertical_datum: str
    """Of the reference, such as `EPSG:5773`."""
    years: tuple[int, ...]
    """Years of the embeddings."""
    embedding_version: str
    """Such as `AlphaEarth Foundations v1`."""
    code_version: str
    """Version of aeheight that trained it."""
    pixel_metres: float | None = None
    """Height of a pixel on the ground, metres; None: unknown."""
    also: tuple[Further, ...] | None = None
    """Further cubes that it was trained on; None: none."""

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Provenance":
        """What `dataclasses.asdict` made of one, from JSON."""
        also = [Further(**each | {"years": tuple(each["years"])}) for each in known.get("also", [])]
        return cls(**{**known, "years": tuple(known["years"]), "also": tuple(also) or None})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that is needed to use a model."""

    model: ModelSettings
    """The settings that it was trained with."""
    base: Base
    """What it corrects, with `auto` resolved; `ridge` for the architecture ridge."""
    ridge: Ridge
    """Fitted on the same training ground: base or baseline, and with its mean the other one."""
    scale: float
    """Metres in one unit of the network's output: SD of height - base on the training ground."""
    weights: Mapping[str, Tensor]
    """The network's state; empty for the architecture ridge."""
    provenance: Provenance
    """Where it comes from."""
    history: tuple[dict[str, float], ...]
    """What each epoch reached, as `training.fit` reports it."""
    novelty: Novelty | None = None
    """Where it has been; None: trained by an older version."""
    seams: Seams | None = None
    """What a crop of a halo leaves of its windows' edges; None: not measured, or no network."""
    spread: Spread | None = None
    """How far its heights may be off; None: too little ground to tell, or an older version."""

    trust: Trust = WHOLE
    """How much of the network's correction is believed; all of it in models of older versions."""

    kernel: Kernel | None = None
    """What a network with the base `ridge` corrects; None: another base, or an older version's,
    which corrects `ridge`."""

    @property
    def corrects(self) -> bool:
        """Whether a network takes part: there is one, and something of it is believed."""
        return bool(self.weights) and bool(self.trust.relief or self.trust.level)

    @property
    def rmse(self) -> float | None:
        """RMSE on the validation ground of what was kept, metres."""
        if self.trust.rmse is not None:
            return self.trust.rmse
        reached = [r["validation_rmse"] for r in self.history if "validation_rmse" in r]
        return min(reached, default=None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all but the history, which has times: the same model, the same digest."""
        return _digest(self._facts(), self._tensors())

    def to_bytes(self) -> bytes:
        """The checkpoint as a file that `torch.load(..., weights_only=True)` opens."""
        buffer = io.BytesIO()
        history = _canonical(self.history)
        content = {
            "format": FORMAT_VERSION,
            "seal": _seal(self.digest, history),
            "facts": self._facts(),
            "history": history,
            "tensors": self._tensors(),
        }
        torch.save(content, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Read what `to_bytes` wrote, bit for bit, onto the CPU.

        Raises:
            InputError: the bytes are damaged or no checkpoint, of another format version, or of a
                model with another number of bands.
        """
        content = _load(data)
        if content["format"] not in _READABLE:
            raise InputError(
                f"the checkpoint has format {content['format']!r}, and this aeheight reads "
                f"{', '.join(map(str, _READABLE[:-1]))} and {_READABLE[-1]}: use the version that "
                "wrote it, or train again"
            )
        tensors, known = content["tensors"], json.loads(content["facts"])
        bands = len(tensors["ridge.weights"])
        if bands != BANDS:
            raise InputError(
                f"the checkpoint's model takes {bands} bands, and the embeddings have {BANDS}: "
                "use a checkpoint that was trained on AlphaEarth embeddings"
            )
        prefix = "network."
        return cls(
            model=ModelSettings.model_validate(known["model"]),
            base=known["base"],
            ridge=Ridge(weights=tensors["ridge.weights"].detach().numpy(), **known["ridge"]),
            scale=known["scale"],
            weights={k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
            provenance=Provenance.from_dict(known["provenance"]),
            history=tuple(json.loads(content["history"])),
            novelty=_novelty(known, tensors),
            seams=Seams.from_dict(known["seams"]) if "seams" in known else None,
            spread=Spread.from_dict(known["spread"]) if "spread" in known else None,
            trust=Trust.from_dict(known["trust"]) if "trust" in known else WHOLE,
            kernel=_kernel(known, tensors),
        )

    def _facts(self) -> str:
        facts = {
            "model": self.model.model_dump(mode="json"),
            "base": self.base,
            "ridge": {
                "intercept": self.ridge.intercept,
                "mean": self.ridge.mean,
                "n": self.ridge.n,
            },
            "scale": self.scale,
            # What an older version did not record is left out: its models keep their digest.
            "provenance": {k: v for k, v in asdict(self.provenance).items() if v is not None},
        }
        if self.novelty is not None:
            facts["novelty"] = {"reach": self.novelty.reach}
        if self.seams is not None:
            facts["seams"] = self.seams.to_dict()
        if self.spread is not None:
            facts["spread"] = self.spread.to_dict()
        if self.trust != WHOLE:
            facts["trust"] = self.trust.to_dict()
        if self.kernel is not None:
            linear = self.kernel.ridge
            facts["kernel"] = {"intercept": linear.intercept, "mean": linear.mean, "n": linear.n}
        return _canonical(facts)

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": tensor for name, tensor in sorted(self.weights.items())}
        tensors = {"ridge.weights": torch.from_numpy(self.ridge.weights.copy()), **network}
        if self.novelty is not None:
            tensors[_PROTOTYPES] = torch.from_numpy(self.novelty.prototypes.copy())
        if self.kernel is not None:
            kernel = self.kernel
            parts: tuple[NDArray[Any], ...] = kernel.ridge.weights, kernel.centres, kernel.weights
            for name, part in zip(_KERNEL, parts, strict=True):
                tensors[name] = torch.from_numpy(part.copy())
        return tensors


def _boxed(pixels: Tensor) -> Tensor:
    """(n, 1, h, w) means over squares of `RADIUS` around each pixel, 0 past the edge."""
    return torch.nn.functional.avg_pool2d(pixels, 2 * RADIUS + 1, 1, RADIUS)


def _novelty(known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Novelty | None:
    if "novelty" not in known:
        return None
    return Novelty(tensors[_PROTOTYPES].detach().numpy(), **known["novelty"])


def _kernel(known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kernel | None:
    if "kernel" not in known:
        return None
    linear, centres, weights = (tensors[name].detach().numpy() for name in _KERNEL)
    return Kernel(Ridge(linear, **known["kernel"], evened=True), centres, weights)


def _load(data: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(
            io.BytesIO(data), map_location="cpu", weights_only=True
        )
        sound = content["format"] not in _READABLE or content["seal"] == _seal(
            _digest(content["facts"], content["tensors"]), content["history"]
        )
    except Exception as error:  # damaged bytes fail anywhere, with any error
        raise _damaged(f"{type(error).__name__} while reading {len(data)} bytes") from error
    if not sound:
        raise _damaged("its content does not match its digest")
    return content


def _canonical(facts: object) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(digest: str, history: str) -> str:
    return hashlib.sha256(f"{digest}\n{history}".encode()).hexdigest()


def _damaged(detail: str) -> InputError:
    return InputError(
        f"the checkpoint is damaged, or no checkpoint of aeheight ({detail}): copy it anew, or "
        "train again with --overwrite"
    )


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build(model: ModelSettings, bands: int = BANDS) -> torch.nn.Module:
    """The network: (n, bands, h, w) float32 to (n, 1, h, w), h and w multiples of 32.

    Its last layer starts at zero, so that an untrained network adds nothing to its base.
    Source: U-Net++ of Zhou et al. (2018), arXiv 1807.10165, as in segmentation-models-pytorch.

    Raises:
        InputError: the encoder is unknown, or does not take that many bands.
    """
    make = smp.Unet if model.architecture == "unet" else smp.UnetPlusPlus
    try:
        network: torch.nn.Module = make(
            model.encoder, encoder_weights=None, in_channels=bands, classes=1
        )
    except KeyError:
        near = difflib.get_close_matches(model.encoder, smp.encoders.get_encoder_names(), n=3)
        raise InputError(
            f"model.encoder {model.encoder!r} is unknown to segmentation-models-pytorch; "
            f"near ones are {', '.join(near or ['resnet18', 'resnet34', 'efficientnet-b0'])}"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"model.encoder {model.encoder!r} cannot be used with {bands} bands and "
            f"{model.architecture}: {error}; take another, such as resnet18"
        ) from error
    for name, parameter in network.named_parameters():
        if name.startswith(_HEAD):
            torch.nn.init.zeros_(parameter)
    return network


class HeightModel(torch.nn.Module):
    """Codes to heights on the device that it is moved to: the base and what the network adds."""

    def __init__(
        self,
        settings: ModelSettings,
        base: Base,
        ridge: Ridge,
        scale: float,
        make: Callable[[ModelSettings], torch.nn.Module] = build,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.trust = WHOLE
        self.network = None if settings.architecture == "ridge" else make(settings)
        self.base_kind: Base = base if self.network else "ridge"
        self.scale = scale
        self._mean = ridge.mean
        self._regression = Regression(kernel or Kernel.of(ridge))
        self._values: Tensor
        self.register_buffer("_values", torch.from_numpy(decode_table(0.0)), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._values.device

    @property
    def needs_prior(self) -> bool:
        """Whether the base is the prior."""
        return self.base_kind == "prior"

    def start_at(self, offset: float) -> None:
        """Let the untrained network add `offset` metres everywhere, such as a prior's bias."""
        for name, parameter in self.named_parameters():
            if _HEAD in name and parameter.ndim == 1:
                torch.nn.init.constant_(parameter, offset / self.scale)

    def usable(self, codes: Tensor, prior: Tensor | None) -> Tensor:
        """Where a height can be told: (n, 64, h, w) codes to (n, h, w) bool."""
        there = codes[:, 0] != NODATA
        return there & prior.isfinite() if self.needs_prior and prior is not None else there

    def base(self, codes: Tensor, prior: Tensor | None) -> Tensor:
        """The base's heights in metres, (n, h, w) float64; any value where it is not usable."""
        if self.needs_prior and prior is not None:
            return prior.double()
        if self.base_kind == "none":
            return torch.full_like(codes[:, 0], self._mean, dtype=torch.float64)
        heights: Tensor = self._regression(codes)
        return heights

    def correction(self, codes: Tensor) -> Tensor:
        """What is added to the base, (n, h, w) in units of `scale`, as far as it is trusted."""
        if self.trust.whole:
            return self.output(codes)[:, 0]
        relief, level = self.parts(codes)
        return self.trust.relief * relief + self.trust.level * level

    def parts(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Relief and level of the network's output, each (n, h, w) in units of `scale`.

        The level is the mean over the pixels within `RADIUS` rows and columns that have an
        embedding and lie in the window.
        """
        output, there = self.output(codes)[:, :1], (codes[:, :1] != NODATA)
        sums = _boxed(torch.where(there, output, 0))
        level = sums / _boxed(there.to(output.dtype)).clamp(min=_SLIVER)
        return (output - level)[:, 0], level[:, 0]

    def output(self, codes: Tensor) -> Tensor:
        """All channels that the network gives, (n, channels, h, w); no embedding counts as 0."""
        assert self.network is not None
        output: Tensor = self.network(self._decoded(codes))
        return output

    def _decoded(self, codes: Tensor) -> Tensor:
        """Values (n, 64, h, w) float32 in the memory format channels_last.

        In strips, because the lookup's index takes four bytes for every code.
        """
        n, bands, height, width = codes.shape
        values = self._values.new_empty((n, height, width, bands))
        for top in range(0, height, _STRIP):
            strip = codes[:, :, top : top + _STRIP].permute(0, 2, 3, 1).contiguous()
            index = strip.view(torch.uint8).int().flatten()
            values[:, top : top + _STRIP] = self._values.index_select(0, index).view(strip.shape)
        return values.permute(0, 3, 1, 2)

    def forward(self, codes: Tensor, prior: Tensor | None) -> Tensor:
        """Heights in metres, (n, h, w) float32, NaN where none can be told.

        Args:
            codes: (n, 64, h, w) int8.
            prior: (n, h, w) float32 in metres; needed where the base is the prior.
        """
        heights = self.base(codes, prior)
        if self.network is not None:
            heights = heights + self.scale * self.correction(codes).double()
        return torch.where(self.usable(codes, prior), heights, torch.nan).float()
