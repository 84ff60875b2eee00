"""Float32 arithmetic and plain attention for a while, whatever the weights are stored as.

Knows nothing of pipelines. Weights, buffers and offload hooks are never touched, so there is nothing to
put back: each operation's half-precision operands are widened as it runs, and results stay wide.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF_DTYPES = (torch.bfloat16, torch.float16)

#: These carry values and compute none. Offloading moves weights with them, and must get back what it gave.
_CARRYING = frozenset(
    {
        torch.ops.aten.copy_.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.is_pinned.default,
        torch.ops.aten._pin_memory.default,
    }
)


class Float32Arithmetic(TorchDispatchMode):
    """While active, every operation reads bfloat16 and float16 as float32 and answers in float32.

    A cast down to half precision is left out, so that code which casts to its weights' dtype stays wide;
    operations in place and views keep the dtype that they are given. Tensor subclasses (quantised weights)
    are left to themselves here, and `wide` widens those that narrow activations too. Only eager code is seen:
    compiled code runs eagerly within `wide`.
    """

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if operation is torch.ops.aten._to_copy.default:
            if args[0].dtype is torch.float32 and named.get("dtype") in HALF_DTYPES:
                named.pop("dtype")
            return operation(*args, **named)
        if operation in _CARRYING or operation.is_view or operation._schema.is_mutable:
            return operation(*args, **named)
        if named.get("dtype") in HALF_DTYPES:
            named["dtype"] = torch.float32
        return operation(*tree_map(_widened, args), **tree_map(_widened, named))


#: These compare the dtypes of what they are given before any operation of theirs runs.
_COMPARING = frozenset(
    {
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
        functional.group_norm,
        functional.layer_norm,
        functional.linear,
        functional.rms_norm,
        functional.scaled_dot_product_attention,
    }
)


class _Float32Operands(TorchFunctionMode):
    """Gives float32 to those functions that would refuse operands of two dtypes."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if function in _COMPARING:
            return function(*tree_map(_operand, args), **tree_map(_operand, named))
        return function(*args, **named)


def _operand(value: Any) -> Any:
    """As `_widened`; a quantised weight that would narrow what it meets stands as its values instead."""
    if getattr(value, "act_quant_kwargs", None) is not None:
        return value.dequantize(torch.float32)
    return _widened(value)


def _widened(value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dtype in HALF_DTYPES:
        return value.to(torch.float32)
    return value


class _PlainKernels:
    """The process's switches for it. torch gives back what it found on entering, which is wrong where two
    overlap without one being within the other; here the first turns them and the last turns them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._switches = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._switches.enter_context(sdpa_kernel(SDPBackend.MATH))
                self._switches.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._switches.close()


_plain_kernels = _PlainKernels()


@contextmanager
def plain_attention(module: torch.nn.Module) -> Iterator[None]:
    """Attention by matrix products and a softmax: no fused kernel, and compiled code runs eagerly."""
    processors: list[Any] = [getattr(part, "processor", None) for part in module.modules()]
    chosen = [each for each in processors if getattr(each, "_attention_backend", None) is not None]
    backends = [processor._attention_backend for processor in chosen]
    for processor in chosen:  # None is torch's own attention, which sdpa_kernel rules
        processor._attention_backend = None
    try:
        with _plain_kernels:
            yield
    finally:
        for processor, backend in zip(chosen, backends, strict=True):
            processor._attention_backend = backend


@contextmanager
def wide(module: torch.nn.Module) -> Iterator[None]:
    """Float32 arithmetic with plain attention: fused kernels take half precision alone."""
    with plain_attention(module), _Float32Operands(), Float32Arithmetic():
        yield


def during_forward(module: torch.nn.Module, context: Callable[[torch.nn.Module], Any]) -> Callable[[], None]:
    """Hold `context(module)` during each forward pass of `module`; what comes out has the dtype that went in.

    Returns what takes it away again.
    """
    running: list[tuple[ExitStack, torch.dtype | None]] = []

    def enter(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        stack = ExitStack()
        stack.enter_context(context(module))
        running.append((stack, _first_dtype([args, kwargs])))

    def leave(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        stack, dtype = running.pop()
        stack.close()
        return output if dtype is None else tree_map(lambda value: _as(value, dtype), output)

    handles = (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()
        while running:
            running.pop()[0].close()

    return remove


def _as(value: Any, dtype: torch.dtype) -> Any:
    is_wide = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return value.to(dtype) if is_wide and dtype in HALF_DTYPES else value


def _first_dtype(value: Any) -> torch.dtype | None:
    """The dtype of the first floating tensor within; pipelines give the latents first."""
    if isinstance(value, torch.Tensor):
        return value.dtype if value.is_floating_point() else None
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((dtype for each in inner if (dtype := _first_dtype(each)) is not None), None)
