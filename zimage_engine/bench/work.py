"""Counts the arithmetic of a picture from what its modules are really given: matrix products, convolutions
and attention; a multiplication and an addition are two operations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zimage_engine.families import ModelFamily

#: What is counted for, beside what is left over: the VAE is entered by methods of its own.
_ENCODE, _DENOISE, _DECODE = "encode", "denoise", "decode"


@dataclass(frozen=True, slots=True)
class Work:
    """Floating point operations of one picture; `denoise` is all its steps. `denoiser_calls`: one a step."""

    encode_flops: float
    denoise_flops: float
    decode_flops: float
    denoiser_calls: int


def count_work(pipeline: Any, family: ModelFamily, draw: Callable[[], object]) -> Work:
    """The work of what `draw` draws with `pipeline`, eagerly, in this thread."""
    counter = _Counter()
    calls = Counter[str]()

    def entered(stage: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            counter.stage = stage
            calls[stage] += 1

        return enter

    def left(*_: object) -> None:
        counter.stage = _DECODE

    staged = {family.denoiser: _DENOISE, **{name: _ENCODE for _, name in family.text_encoders}}
    with ExitStack() as stack:
        for name, stage in staged.items():
            module: torch.nn.Module = getattr(pipeline, name)
            stack.callback(module.register_forward_pre_hook(entered(stage)).remove)
            stack.callback(module.register_forward_hook(left).remove)
        stack.enter_context(counter)
        draw()
    found = counter.flops
    return Work(found[_ENCODE], found[_DENOISE], found[_DECODE], calls[_DENOISE])


class _Counter(TorchFunctionMode):
    """Above the dispatcher, so that quantised and streamed weights are counted as what they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = _DECODE
        self.flops: defaultdict[str, float] = defaultdict(float)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        if (count := _COUNTS.get(func)) is not None:
            self.flops[self.stage] += count(answer, *args, **(kwargs or {}))
        return answer


def _linear(answer: torch.Tensor, input: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * answer.numel() * input.shape[-1]


def _matmul(answer: torch.Tensor, left: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * answer.numel() * left.shape[-1]


def _sum_of_products(answer: torch.Tensor, _added: Any, left: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * answer.numel() * left.shape[-1]


def _convolution(answer: torch.Tensor, _input: Any, weight: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * answer.numel() * weight[0].numel()


def _attention(answer: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> float:
    # Every query with every key, and the weights with the values; what a mask leaves out is computed too.
    return 2.0 * key.shape[-2] * (query.numel() + answer.numel())


_COUNTS: Mapping[Any, Callable[..., float]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.addmm: _sum_of_products,
    torch.baddbmm: _sum_of_products,
    functional.conv2d: _convolution,
    functional.scaled_dot_product_attention: _attention,
}
