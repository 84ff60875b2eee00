"""Stores the matrices of a denoiser in one byte a value by torchao, and takes that back; knows no plan.

`int8` and `fp8` are weight-only: arithmetic stays in the model's dtype, and each matrix is widened when it is
used. `int8-dynamic` and `fp8-dynamic` narrow each token's activations too, with a scale of their own, and
multiply in the small type, which is what makes them quicker on hardware that does so.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping

import torch

from zimage_engine.errors import InvalidRequest
from zimage_engine.memory.residency import QUANTISATIONS
from zimage_engine.memory.streaming import move, tensors_of

#: peft keeps the layer that it adapts under this name.
_ADAPTED = ".base_layer"


def _int8(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, granularity=PerRow())


def _fp8(weight: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import Float8Tensor, PerRow

    return Float8Tensor.from_hp(weight, granularity=PerRow())


def _int8_dynamic(weight: torch.Tensor) -> torch.Tensor:
    from zimage_engine.memory.int8_product import Int8Product

    return Int8Product.of(weight) if _is_multiple(weight, 8) else _int8(weight)


def _fp8_dynamic(weight: torch.Tensor) -> torch.Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    if not _is_multiple(weight, 16):
        return _fp8(weight)
    # torch's own kernel whatever else is installed, so that one picture does not depend on it.
    kernel = KernelPreference.TORCH
    # cuBLAS of CUDA 12.9 refuses some shapes with fast accumulation (github.com/pytorch/ao/issues/4582).
    is_fast = not (torch.version.cuda or "").startswith("12.9")
    return Float8Tensor.from_hp(
        weight,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=is_fast),
        kernel_preference=kernel,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow(), kernel_preference=kernel),
    )


def _is_multiple(weight: torch.Tensor, of: int) -> bool:
    """Whether cards multiply in the small type by this matrix; one that they do not is widened instead."""
    return all(side % of == 0 for side in weight.shape)


#: What a matrix `(out, in)` is stored as, for each word of `zimage_engine.memory.residency.QUANTISATIONS`.
#: torchao's tensors are made directly: its `quantize_` refuses fp8-dynamic on every processor, and a CPU can
#: draw such pictures, if slowly.
STORED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": _int8,
    "fp8": _fp8,
    "int8-dynamic": _int8_dynamic,
    "fp8-dynamic": _fp8_dynamic,
}


#: What is logged when torchao is imported, which diffusers does wherever it is installed, by logger:
#: kernels that we do not use, built for another Python or card, and names that are no longer there.
_SAID_OF_NOTHING = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


def quiet_torchao() -> None:
    """What torchao's import logs about nothing that we use is hidden; call it before diffusers is there."""
    for name, words in _SAID_OF_NOTHING.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(words))


class _Without(logging.Filter):
    """Lets every record pass but those with certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in record.getMessage()


def check_quantisation(quantize: str | None, device: str, dtype: torch.dtype | None = None) -> None:
    """Raises InvalidRequest where `quantize` cannot be done: no torchao, or a device without the type.

    `dtype` is what the denoiser computes in, None: not known yet.
    """
    if quantize is None:
        return
    if importlib.util.find_spec("torchao") is None:
        raise InvalidRequest(
            f"quantize {quantize} needs the package torchao, which is not installed; "
            "run: pip install 'zimage-turbo[quantize]'",
            "quantize",
        )
    kind = torch.device(device).type
    is_nvidia = kind == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if is_nvidia else None
    has_int8 = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    reason = refusal(quantize, kind, capability, dtype, has_int8=has_int8)
    if reason is not None:
        raise InvalidRequest(reason, "quantize")


def refusal(
    quantize: str,
    kind: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype | None = None,
    *,
    has_int8: bool = True,
) -> str | None:
    """Why a device of this kind cannot do it, as a sentence, or None: it can.

    `kind` is "cpu", "cuda" or "mps"; `capability` that of an Nvidia card, None for others. `has_int8`: the
    processor multiplies in int8 by instructions of its own; sums can overflow without them, as torchao's
    `reduce_range` tells. A CPU multiplies in float8 by widening, slowly, so that pictures can be compared.
    """
    row = QUANTISATIONS[quantize]
    if kind == "cpu" and row.needs_int8 and not has_int8:
        return (
            f"quantize {quantize} needs a processor that {row.verb} (AVX-512 VNNI or AMX), and this one does "
            f"not; use {row.instead}, which widens the matrices instead"
        )
    if kind == "mps" and not row.is_on_apple:
        return f"quantize {quantize} needs a device that {row.verb}, and Apple's GPU does not; use int8"
    if kind != "cuda" or row.capability is None:
        return None
    needed = ".".join(map(str, row.capability))
    if capability is None or capability < row.capability:
        got = "another maker's" if capability is None else "one of {}.{}".format(*capability)
        return (
            f"quantize {quantize} needs a card that {row.verb}, of compute capability {needed} or more, "
            f"got {got}; use {row.instead}, which widens the matrices instead"
        )
    if row.answers is not None and dtype is not None and str(dtype) != f"torch.{row.answers}":
        return (
            f"quantize {quantize} answers in {row.answers} on a card, and the denoiser computes in "
            f"{str(dtype).removeprefix('torch.')}; leave out dtype, or use {row.instead}"
        )
    return None


class QuantisedLayers:
    """The linear layers of `denoiser` whose whole path matches `layers`, quantised; others stay as they are.

    What they were is kept on the host, because quantising cannot be undone. LoRAs that are on stay in their
    own dtype beside the quantised weight. Each weight is quantised on `device`, which is fast, and goes back
    to where it was.
    """

    def __init__(self, denoiser: torch.nn.Module, layers: str, quantize: str, device: torch.device) -> None:
        named, stored = re.compile(layers), STORED[quantize]
        self._before: list[tuple[torch.nn.Linear, torch.Tensor, torch.device]] = []
        try:
            for path, layer in denoiser.named_modules():
                if not isinstance(layer, torch.nn.Linear) or not named.fullmatch(path.removesuffix(_ADAPTED)):
                    continue
                weight, home = layer.weight, layer.weight.device
                self._before.append((layer, weight, home))
                small = stored(weight.detach().to(device))
                layer.weight = torch.nn.Parameter(small, requires_grad=False)
                move((part for part in tensors_of((layer,)) if part is not layer.bias), home)
                move((weight,), torch.device("cpu"))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """The layers have their own weights again, to the bit."""
        while self._before:
            layer, weight, home = self._before.pop()
            move((weight,), home)
            layer.weight = weight
