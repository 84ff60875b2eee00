"""Stores the matrices of a denoiser in one byte a value by torchao, and takes that back; knows no plan.

Weight-only: activations and arithmetic stay in the model's dtype, and each matrix is widened when it is used.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zimage_engine.errors import InvalidRequest
from zimage_engine.families import family_named
from zimage_engine.memory.streaming import move, tensors_of

#: peft keeps the layer that it adapts under this name.
_ADAPTED = ".base_layer"


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


#: torchao's settings for each word of `zimage_engine.memory.residency.QUANTISATIONS`.
CONFIGS: Mapping[str, Callable[[], Any]] = {"int8": _int8, "fp8": _fp8}


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


def check_quantisation(quantize: str | None, device: str) -> None:
    """Raises InvalidRequest where `quantize` cannot be done: no torchao, or a device without the type."""
    if quantize is None:
        return
    if importlib.util.find_spec("torchao") is None:
        raise InvalidRequest(
            f"quantize {quantize} needs the package torchao, which is not installed; "
            "run: pip install 'zimage-turbo[quantize]'",
            "quantize",
        )
    if quantize == "fp8" and torch.device(device).type == "mps":
        raise InvalidRequest(
            "quantize fp8 needs a device that reads float8 values, and Apple's GPU has none; use int8",
            "quantize",
        )


class QuantisedLayers:
    """The linear layers of `denoiser` that the family names, quantised; others stay as they are.

    What they were is kept on the host, because quantising cannot be undone. LoRAs that are on stay in their
    own dtype beside the quantised weight. Each weight is quantised on `device`, which is fast, and goes back
    to where it was.
    """

    def __init__(self, denoiser: torch.nn.Module, family: str, quantize: str, device: torch.device) -> None:
        from torchao.quantization import quantize_

        named = re.compile(family_named(family).quantised_layers)
        config = CONFIGS[quantize]()
        self._before: list[tuple[torch.nn.Linear, torch.Tensor, torch.device]] = []
        try:
            for path, layer in denoiser.named_modules():
                if not isinstance(layer, torch.nn.Linear) or not named.fullmatch(path.removesuffix(_ADAPTED)):
                    continue
                weight, home = layer.weight, layer.weight.device
                self._before.append((layer, weight, home))
                layer.weight = torch.nn.Parameter(weight.detach().to(device), requires_grad=False)
                quantize_(layer, config)
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
            # torchao hangs a description of the quantised weight on the layer.
            vars(layer).pop("extra_repr", None)
