"""A matrix in int8 that narrows what it meets and multiplies in int8; on the CPU by the fewest operations.

Imports torchao, so it is imported where a matrix is made alone. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

#: The largest int8 on both sides of zero.
_LARGEST = 127.0
#: A row of zeros has a scale all the same.
_LEAST = 1e-12


class Int8Product(Int8Tensor):
    """torchao's tensor, which acts as that does everywhere but in a linear layer on the CPU.

    There torchao 0.18 sums the matrix anew in each call, to have unsigned values, which takes longer than the
    product where the matrix is large; torch's product takes signed ones as quickly, and needs no sums.
    """

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Product:
        """`weight` `(out, in)` with a float32 scale for each row."""
        narrowing = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        made: Int8Product = cls.from_hp(weight, granularity=PerRow(), act_quant_kwargs=narrowing)
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is functional.linear and not kwargs and args[0].device.type == "cpu":
            return _linear(*args)
        return super().__torch_function__(function, types, args, kwargs)


def _linear(values: torch.Tensor, weight: Int8Product, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`values` `(..., in)` by `weight` `(out, in)`, each row narrowed with a scale of its own."""
    rows = values.reshape(-1, values.shape[-1])
    scale = rows.abs().amax(1, keepdim=True).float().clamp_(min=_LEAST) / _LARGEST
    narrow = rows.float().div_(scale).round_().to(torch.int8)
    wide = torch._int_mm(narrow, weight.qdata.t()).float()
    found = wide.mul_(scale).mul_(weight.scale.t()).to(values.dtype)
    found = found.reshape(*values.shape[:-1], weight.shape[0])
    return found if bias is None else found + bias
