"""The models: ridge, U-Net, U-Net++; the checkpoint that holds one; the predictor that runs it.

A model is a base (the ridge regression, the prior, or the mean height) and, unless it is the ridge
alone, a network that adds its correction: `height = base + scale * network(embedding)`.
"""

import difflib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight.embeddings import BANDS, NODATA, decode_table
from aeheight.errors import InputError
from aeheight.ridge import Ridge
from aeheight.settings import ModelSettings

Base = Literal["none", "ridge", "prior"]
"""What the network corrects: the mean height, the ridge regression, or the prior."""

STRIDE: Final = 32
"""Edges of what a network sees are multiples of this, in pixels."""

FORMAT_VERSION: Final = 1

_STRIP = 64
_HEAD = "segmentation_head."


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
        if content["format"] != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has format {content['format']!r}, and this aeheight reads "
                f"{FORMAT_VERSION}: use the version that wrote it, or train again"
            )
        tensors, known = content["tensors"], json.loads(content["facts"])
        bands = len(tensors["ridge.weights"])
        if bands != BANDS:
            raise InputError(
                f"the checkpoint's model takes {bands} bands, and the embeddings have {BANDS}: "
                "use a checkpoint that was trained on AlphaEarth embeddings"
            )
        provenance = known["provenance"] | {"years": tuple(known["provenance"]["years"])}
        prefix = "network."
        return cls(
            model=ModelSettings.model_validate(known["model"]),
            base=known["base"],
            ridge=Ridge(weights=tensors["ridge.weights"].detach().numpy(), **known["ridge"]),
            scale=known["scale"],
            weights={k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
            provenance=Provenance(**provenance),
            history=tuple(json.loads(content["history"])),
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
        return _canonical(facts)

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": tensor for name, tensor in sorted(self.weights.items())}
        return {"ridge.weights": torch.from_numpy(self.ridge.weights.copy()), **network}


def _load(data: bytes) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(
            io.BytesIO(data), map_location="cpu", weights_only=True
        )
        sound = content["format"] != FORMAT_VERSION or content["seal"] == _seal(
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

    def __init__(self, settings: ModelSettings, base: Base, ridge: Ridge, scale: float) -> None:
        super().__init__()
        self.network = None if settings.architecture == "ridge" else build(settings)
        self.base_kind: Base = base if self.network else "ridge"
        self.scale = scale
        self._mean, self._intercept = ridge.mean, ridge.intercept
        self._values: Tensor
        self._terms: Tensor
        self.register_buffer("_values", torch.from_numpy(decode_table(0.0)), persistent=False)
        self.register_buffer("_terms", torch.from_numpy(ridge.terms), persistent=False)

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
        total = torch.full_like(codes[:, 0], self._intercept, dtype=torch.float64)
        for band, terms in enumerate(self._terms):
            total += terms[codes[:, band].int()]
        return total

    def correction(self, codes: Tensor) -> Tensor:
        """The network's output (n, h, w) in units of `scale`; missing embeddings count as 0."""
        assert self.network is not None
        output: Tensor = self.network(self._decoded(codes))
        return output[:, 0]

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


def best_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Predictor:
    """A checkpoint's model on a device, as a function of arrays.

    A sample's bits do not depend on the other samples of its batch, as long as the batch's shape
    is the same.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        """Put the model onto `device`, a name of torch's such as `cpu` or `cuda:0`.

        Raises:
            InputError: the weights do not fit the network that the settings describe.
        """
        model = HeightModel(checkpoint.model, checkpoint.base, checkpoint.ridge, checkpoint.scale)
        if model.network is not None:
            try:
                model.network.load_state_dict(checkpoint.weights)
            except RuntimeError as error:
                raise InputError(
                    f"the checkpoint's weights do not fit {checkpoint.model.architecture} with "
                    f"{checkpoint.model.encoder} as segmentation-models-pytorch {smp.__version__} "
                    "builds it: use the version that trained it, or train again"
                ) from error
        self._model = model.eval().to(device).to(memory_format=torch.channels_last)

    @property
    def stride(self) -> int:
        """Window edges and origins must be multiples of this many pixels."""
        return 1 if self._model.network is None else STRIDE

    @property
    def needs_prior(self) -> bool:
        """Whether a prior must be given."""
        return self._model.needs_prior

    def __call__(
        self, codes: NDArray[np.int8], prior: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Heights in metres, (n, h, w).

        NaN where a pixel has no embedding or, where the base is the prior, no prior.

        Args:
            codes: (n, 64, h, w) codes, -128 where there is none; h and w multiples of `stride`.
            prior: (n, h, w) in metres, NaN where there is none; ignored where it is not needed.

        Raises:
            InputError: shapes do not fit, or the prior is needed and not given.
        """
        self._check(codes, prior)
        with torch.inference_mode():
            given = self._put(prior) if self.needs_prior and prior is not None else None
            heights: NDArray[np.float32] = self._model(self._put(codes), given).cpu().numpy()
        return heights

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._model.device)

    def _check(self, codes: NDArray[np.int8], prior: NDArray[np.float32] | None) -> None:
        n, bands, height, width = codes.shape
        if bands != BANDS:
            raise InputError(f"the model takes {BANDS} bands, and the codes have {bands}")
        if height % self.stride or width % self.stride:
            raise InputError(
                f"a window of {height}x{width} px does not fit the network: choose edges that are "
                f"multiples of {self.stride}"
            )
        if self.needs_prior and (prior is None or prior.shape != (n, height, width)):
            given = "none" if prior is None else f"one of shape {prior.shape}"
            raise InputError(
                f"the model corrects a prior of shape {(n, height, width)}, and {given} was given: "
                "add `prior` to the region, or use a checkpoint with another base"
            )
