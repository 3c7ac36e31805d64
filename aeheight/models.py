"""The models: ridge, U-Net, U-Net++; the checkpoint that holds one; the predictor that runs it.

A model is a base (the ridge regression, the prior, or the mean height) and, unless it is the ridge
alone, a network that adds its correction: `height = base + scale * network(embedding)`.
"""

import difflib
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight.embeddings import BANDS, NODATA, decode_table, valid
from aeheight.errors import InputError
from aeheight.settings import ModelSettings

Base = Literal["none", "ridge", "prior"]
"""What the network corrects: the mean height, the ridge regression, or the prior."""

STRIDE: Final = 32
"""Edges of what a network sees are multiples of this, in pixels."""

FORMAT_VERSION: Final = 1

_BLOCK = 65_536
_STRIP = 64
_HEAD = "segmentation_head."


@dataclass(frozen=True, slots=True)
class Ridge:
    """A linear regression of height on the embedding, pixel by pixel."""

    weights: NDArray[np.float64]
    """(64,) metres for one unit of each band."""
    intercept: float
    """Metres."""
    mean: float
    """Mean of the heights that it was fitted on, metres: the simplest baseline."""
    n: int
    """Pixels that it was fitted on."""

    @property
    def terms(self) -> NDArray[np.float64]:
        """What each code of each band adds to the height, metres: (64, 256), by unsigned byte."""
        return self.weights[:, None] * decode_table(0.0).astype(np.float64)

    def predict(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Heights in metres of codes (64, ...): shape (...), NaN where there is no embedding.

        Bands are added one by one, so that a pixel's value has the same bits wherever it lies and
        whichever device computes it, which a matrix product does not promise.
        """
        total = np.full(codes.shape[1:], self.intercept)
        for terms, band in zip(self.terms, codes, strict=True):
            total += terms[band]  # a negative code counts from the table's end: its unsigned byte
        return np.where(valid(codes), total, np.nan).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RidgeSums:
    """All that a ridge regression needs of its pixels; `+` merges the sums of two sets.

    Centred float64 moments and their pairwise update: Chan, Golub & LeVeque (1983),
    doi:10.1080/00031305.1983.10483115.
    """

    n: int
    """Pixels."""
    mean_x: NDArray[np.float64]
    """(64,) mean of each band."""
    mean_y: float
    """Mean height, metres."""
    c_xx: NDArray[np.float64]
    """(64, 64) sum of the products of the bands' deviations from their means."""
    c_xy: NDArray[np.float64]
    """(64,) the same of bands and height, metres."""
    m2_y: float
    """Sum of the squared deviations of the heights, square metres."""

    @classmethod
    def of(cls, codes: NDArray[np.int8], heights: NDArray[np.float32]) -> "RidgeSums":
        """The sums of codes (64, n) and heights (n,) in metres; all of them must be there."""
        bands, n = codes.shape
        total = cls(0, np.zeros(bands), 0.0, np.zeros((bands, bands)), np.zeros(bands), 0.0)
        for start in range(0, n, _BLOCK):
            stop = start + _BLOCK
            total += cls._of_block(codes[:, start:stop], heights[start:stop])
        return total

    @classmethod
    def _of_block(cls, codes: NDArray[np.int8], heights: NDArray[np.float32]) -> "RidgeSums":
        x = decode_table()[codes].astype(np.float64)
        y = heights.astype(np.float64)
        mean_x, mean_y = x.mean(axis=1), float(y.mean())
        x -= mean_x[:, None]
        y -= mean_y
        return cls(y.size, mean_x, mean_y, x @ x.T, x @ y, float(y @ y))

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        n = self.n + other.n
        if n == 0:
            return self
        share = other.n / n
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * share
        return RidgeSums(
            n,
            self.mean_x + step_x * share,
            self.mean_y + step_y * share,
            self.c_xx + other.c_xx + np.outer(step_x, step_x) * weight,
            self.c_xy + other.c_xy + step_x * (step_y * weight),
            self.m2_y + other.m2_y + step_y * step_y * weight,
        )

    def solve(self, alpha: float) -> Ridge:
        """The ridge regression of these pixels: `(Cxx + penalty I) w = Cxy`.

        Args:
            alpha: the penalty as a share of the mean variance of a band.

        Raises:
            InputError: fewer than two pixels, or heights or embeddings that are all the same.
        """
        if self.n < 2:
            raise InputError(
                f"{self.n} training pixels have both an embedding and a reference height, and a "
                "model needs at least 2: let `split` leave more ground to training "
                "(smaller test, validation or buffer), or check that `height` covers it"
            )
        spread = float(np.trace(self.c_xx)) / len(self.c_xy)
        if math.sqrt(self.m2_y / self.n) < 1e-6 or spread == 0:
            what = "embeddings" if spread == 0 else f"heights ({self.mean_y:.3f} m)"
            raise InputError(
                f"the {what} of all {self.n} training pixels are the same, so there is nothing to "
                "learn: let `split` leave other ground to training, or check the sources"
            )
        penalised = self.c_xx + alpha * spread * np.eye(len(self.c_xy))
        weights = np.linalg.solve(penalised, self.c_xy).astype(np.float64)
        intercept = self.mean_y - float(weights @ self.mean_x)
        return Ridge(weights, intercept, self.mean_y, self.n)

    def rmse(self, ridge: Ridge) -> float:
        """Root mean square error in metres of `ridge`, solved from these sums, on their pixels."""
        w = ridge.weights
        squares = self.m2_y - 2 * float(w @ self.c_xy) + float(w @ self.c_xx @ w)
        return math.sqrt(max(squares, 0.0) / self.n)


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
            "provenance": asdict(self.provenance),
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
