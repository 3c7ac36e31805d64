"""A checkpoint's model on a device: windows of codes in, layers of the map out.

One thread of a process runs the network, whoever asks: several tasks may read, fill batches and
write while the device works, and it never holds more than one forward pass.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeheight.beside import Beside, layers_of
from aeheight.embeddings import BANDS
from aeheight.errors import InputError
from aeheight.models import Checkpoint, HeightModel
from aeheight.windows import STRIDE

Precision = Literal["auto", "float32", "float16", "bfloat16"]
"""Of the network but its last layer; `auto` is float16 on a GPU, float32 on a CPU."""

_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
_log = logging.getLogger(__name__)


def best_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A batch, where the device can fetch it from."""

    codes: Tensor
    """(n, 64, h, w) int8."""
    prior: Tensor | None
    """(n, h, w) float32 metres."""
    halo: int
    """Pixels to cut from every side of the result."""

    def split(self, size: int) -> Iterator["_Inputs"]:
        """The same in batches of `size`."""
        for first in range(0, len(self.codes), size):
            part = slice(first, first + size)
            prior = None if self.prior is None else self.prior[part]
            yield _Inputs(self.codes[part], prior, self.halo)


@dataclass(frozen=True, slots=True)
class _Launched:
    """What the device gives, or will have given after `wait`."""

    values: Tensor
    """(layers, n, k, k) float32 in host memory."""
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that the device works on."""

    _inputs: _Inputs
    _begin: Callable[[_Inputs, torch.dtype], "Future[_Launched]"]
    _dtype: torch.dtype
    _launched: "Future[_Launched]"

    def result(self) -> NDArray[np.float32]:
        """(layers, n, k, k), once it is there; in float32, where a smaller type overflowed.

        Raises:
            InputError: one window does not fit into the device's memory.
            ValueError: the model's heights are not finite.
        """
        values = self._values(self._launched)
        if np.isinf(values[0]).any() and self._dtype != torch.float32:
            values = self._values(self._begin(self._inputs, torch.float32))
        if wrong := int(np.isinf(values[0]).sum()):
            raise ValueError(f"the model gave {wrong} heights that are not finite; train it again")
        return values

    @staticmethod
    def _values(launched: "Future[_Launched]") -> NDArray[np.float32]:
        there = launched.result()
        there.wait()
        values: NDArray[np.float32] = there.values.numpy()
        return values


class Predictor:
    """A checkpoint's model on a device, as a function of arrays.

    A sample's bits do not depend on the other samples of its batch, as long as the batch's shape
    is the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        precision: Precision = "auto",
        *,
        novelty: bool = True,
        spread: bool = True,
    ) -> None:
        """Put the model onto a device.

        Args:
            checkpoint: the model.
            device: `cpu`, or `cuda` for the process's own GPU.
            precision: of the network.
            novelty: give it beside the heights, where the checkpoint knows how.
            spread: likewise.

        Raises:
            InputError: the weights do not fit the network that the settings describe.
        """
        model = HeightModel(
            checkpoint.model,
            checkpoint.base,
            checkpoint.ridge,
            checkpoint.scale,
            kernel=checkpoint.kernel,
        )
        model.trust = checkpoint.trust
        if model.network is not None:
            _load(model.network, checkpoint)
            head: Any = model.network.segmentation_head
            model.network.segmentation_head = _InFloat32(head)
        if not checkpoint.corrects:
            model.network = None
        self._model = model.eval().to(device).to(memory_format=torch.channels_last)
        if precision == "auto":
            precision = "float16" if self._model.device.type == "cuda" else "float32"
        self._dtype = _DTYPES[precision]
        self.layers = layers_of(checkpoint, novelty=novelty, spread=spread)
        """What `submit` gives."""
        self._beside = Beside(checkpoint, self.layers).to(device)
        self._most: int | None = None
        self._upload = torch.cuda.Stream() if self._on_gpu else None
        self.remarks: list[str] = []
        """What a user should know of how this model ran, such as halved batches."""

    @property
    def device(self) -> str:
        """Where it runs, in words, such as `cpu, float32` or `NVIDIA H100, float16`."""
        place = torch.cuda.get_device_name(self._model.device) if self._on_gpu else "cpu"
        return f"{place}, {str(self._dtype).removeprefix('torch.')}"

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

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
            InputError: shapes do not fit, the prior is needed and not given, or one window does
                not fit into the device's memory.
        """
        heights: NDArray[np.float32] = self.submit(codes, prior).result()[0]
        return heights

    def submit(
        self, codes: NDArray[np.int8], prior: NDArray[np.float32] | None = None, halo: int = 0
    ) -> Batch:
        """Begin with a batch; its result is (layers, n, h - 2 * halo, w - 2 * halo) float32.

        Args and errors as in `__call__`; errors come with the result.
        """
        self._check(codes, prior)
        given = self._staged(prior) if self.needs_prior and prior is not None else None
        inputs = _Inputs(self._staged(codes), given, halo)
        return Batch(inputs, self._begin, self._dtype, self._begin(inputs, self._dtype))

    def _begin(self, inputs: _Inputs, dtype: torch.dtype) -> "Future[_Launched]":
        return _device_thread.submit(self._launch, inputs, dtype)

    def _staged(self, array: NDArray[Any]) -> Tensor:
        """An array where the device can fetch it from."""
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return tensor.pin_memory() if self._on_gpu else tensor

    def _launch(self, inputs: _Inputs, dtype: torch.dtype) -> _Launched:
        """Compute a batch, on the device's thread; on a GPU the work is only begun here."""
        while True:
            size = min(self._most or len(inputs.codes), len(inputs.codes))
            try:
                with torch.inference_mode(), full_precision():
                    return self._run(inputs, size, dtype)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            self._halve(size, inputs.codes.shape[-1])

    def _halve(self, size: int, edge: int) -> None:
        """Make do with less of the device's memory.

        Raises:
            InputError: it was one window only.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        if size == 1:
            raise InputError(
                f"one window of {edge} px does not fit into the memory of {self._model.device}; "
                "make predict.window smaller"
            )
        self._most = size // 2
        remark = (
            f"{self._model.device} was out of memory with {size} windows of {edge} px: "
            f"{self._most} at a time"
        )
        self.remarks.append(remark)
        _log.warning(remark)

    def _run(self, inputs: _Inputs, size: int, dtype: torch.dtype) -> _Launched:
        parts = []
        for part in inputs.split(size):
            codes, prior = self._put(part.codes), part.prior
            parts.append(
                self._layers(codes, None if prior is None else self._put(prior), part.halo, dtype)
            )
        layers = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if not self._on_gpu:
            return _Launched(layers)
        out = torch.empty(layers.shape, dtype=layers.dtype, pin_memory=True)
        out.copy_(layers, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # a thread that waits must sleep
        done.record()
        return _Launched(out, done.synchronize)

    def _put(self, staged: Tensor) -> Tensor:
        """To the device; on a GPU while it still computes the batch before."""
        if self._upload is None:
            return staged
        with torch.cuda.stream(self._upload):
            there = staged.to(self._model.device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._upload)
        there.record_stream(torch.cuda.current_stream())
        return there

    def _layers(self, codes: Tensor, prior: Tensor | None, halo: int, dtype: torch.dtype) -> Tensor:
        """(layers, n, k, k); a height that overflowed is infinite."""
        model, kept = self._model, _middle(codes, halo)
        kept_prior = None if prior is None else _middle(prior, halo)
        heights = model.base(kept, kept_prior)
        if model.network is not None:
            with torch.autocast(codes.device.type, dtype, enabled=dtype != torch.float32):
                correction = _middle(model.correction(codes), halo).double()
            correction = correction.nan_to_num(torch.inf, torch.inf, torch.inf)
            heights = heights + model.scale * correction
        heights = torch.where(model.usable(kept, kept_prior), heights, torch.nan).float()
        layers: Tensor = self._beside(heights, kept)
        return layers

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


def full_precision() -> AbstractContextManager[None]:
    """Convolutions in float32 round as float32 does: by itself cuDNN rounds them as TF32, 1e-3."""
    exact: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return exact


class _InFloat32(torch.nn.Module):
    """The last layer, whose output counts in metres."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, features: Tensor) -> Tensor:
        """As the layer, whatever type the network before it has."""
        with torch.autocast(features.device.type, enabled=False):
            output: Tensor = self._layer(features.float())
        return output


def _load(network: torch.nn.Module, checkpoint: Checkpoint) -> None:
    try:
        network.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise InputError(
            f"the checkpoint's weights do not fit {checkpoint.model.architecture} with "
            f"{checkpoint.model.encoder} as segmentation-models-pytorch {smp.__version__} "
            "builds it: use the version that trained it, or train again"
        ) from error


def _middle(pixels: Tensor, halo: int) -> Tensor:
    """(..., h, w) without `halo` pixels on every side."""
    height, width = pixels.shape[-2:]
    return pixels[..., halo : height - halo, halo : width - halo]


def _is_out_of_memory(error: Exception) -> bool:
    """On a GPU an error of its own; on a CPU the words of PyTorch, C++ or oneDNN."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or any(
            words in text
            for words in (
                *("out of memory", "ALLOC_FAILED"),
                *("can't allocate memory", "not enough memory"),
            )
        )
        or text in ("std::bad_alloc", "could not create a primitive", "could not create a memory")
    )
