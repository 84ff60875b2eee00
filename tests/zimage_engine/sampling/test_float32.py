"""Float32 for a while draws what a module that was really converted draws, and leaves nothing behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from tests.zimage_engine.sampling.faults import FAMILIES
from zimage_engine.engine import Engine
from zimage_engine.sampling import float32

#: As large a share of the largest value may the two differ by: rounding alone, in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("float32")
    loaded: dict[str, Any] = {}

    def pipeline(family: str) -> Any:
        if family not in loaded:
            loaded[family] = Engine.load(FAMILIES[family](folder / family), device="cpu").pipeline
        return loaded[family]

    return pipeline


@functools.cache
def noise(*shape: int) -> torch.Tensor:
    """Made once, outside of any mode, so that all are given the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


TOKENS = torch.tensor([[5, 9, 17, 3, 1, 1]])


def z_image_transformer(module: Any) -> tuple[Any, ...]:
    captions = [noise(6, module.config.cap_feat_dim)]
    return module([noise(4, 1, 4, 4)], torch.tensor([0.3]), captions, return_dict=False)


def pixart_transformer(module: Any) -> tuple[Any, ...]:
    added = {"resolution": None, "aspect_ratio": None}
    return module(
        noise(1, 4, 8, 8),
        encoder_hidden_states=noise(1, 6, module.config.caption_channels),
        timestep=torch.tensor([500]),
        added_cond_kwargs=added,
        return_dict=False,
    )


def sdxl_unet(module: Any) -> tuple[Any, ...]:
    added = {"text_embeds": noise(1, 64), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    condition = noise(1, 256) if module.config.time_cond_proj_dim else None
    return module(
        noise(1, 4, 16, 16),
        500,
        noise(1, 6, module.config.cross_attention_dim),
        timestep_cond=condition,
        added_cond_kwargs=added,
        return_dict=False,
    )


def text_encoder(module: Any) -> Any:
    answer = module(input_ids=TOKENS, output_hidden_states=True)
    return tuple(tree_leaves(dict(answer)))


def vae_decoder(module: Any) -> Any:
    return module.decode(noise(1, 4, 8, 8), return_dict=False)


#: family, the pipeline's component, how it is called.
MODULES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "z-image transformer": ("z-image", "transformer", z_image_transformer),
    "z-image qwen3": ("z-image", "text_encoder", text_encoder),
    "z-image vae": ("z-image", "vae", vae_decoder),
    "pixart transformer": ("pixart", "transformer", pixart_transformer),
    "pixart t5": ("pixart", "text_encoder", text_encoder),
    "pixart vae": ("pixart", "vae", vae_decoder),
    "sdxl unet": ("sdxl-euler", "unet", sdxl_unet),
    "sdxl clip": ("sdxl-euler", "text_encoder", text_encoder),
    "sdxl openclip": ("sdxl-euler", "text_encoder_2", text_encoder),
    "sdxl vae": ("sdxl-euler", "vae", vae_decoder),
    "lcm unet": ("sdxl-lcm", "unet", sdxl_unet),
}


@pytest.fixture(params=MODULES)
def called(
    request: pytest.FixtureRequest, pipelines: Callable[[str], Any]
) -> tuple[torch.nn.Module, Callable[[Any], Any]]:
    family, component, call = MODULES[request.param]
    return getattr(pipelines(family), component), call


@pytest.fixture(autouse=True)
def no_mode_before_or_after() -> Iterator[None]:
    assert modes() == []
    yield
    assert modes() == []


def modes() -> list[Any]:
    return [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]


def floating(values: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(list(values))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def state(module: torch.nn.Module) -> dict[str, tuple[torch.dtype, int, int]]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (tensor.dtype, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()}


@torch.no_grad()
def test_wide_is_as_a_module_that_was_converted(
    called: tuple[torch.nn.Module, Callable[[Any], Any]],
) -> None:
    module, call = called
    converted = copy.deepcopy(module).to(torch.float32)
    with float32_inputs():
        right = floating(call(converted))
    before = state(module)
    narrow = floating(call(module))
    with float32.wide(module):
        widened = floating(call(module))

    assert state(module) == before
    assert len(widened) == len(right) == len(narrow)
    for own, converted_own in zip(widened, right, strict=True):
        assert own.dtype is torch.float32
        assert relative_difference(own, converted_own) < ROUNDING
    # Otherwise the comparison would say nothing.
    assert relative_difference(narrow[0].float(), right[0]) > 10 * ROUNDING
    assert all(torch.equal(a, b) for a, b in zip(narrow, floating(call(module)), strict=True))


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


class float32_inputs:
    """Calls within are given the same values in float32: a converted module takes no bfloat16."""

    def __enter__(self) -> None:
        self._noise = globals()["noise"]
        globals()["noise"] = lambda *shape: self._noise(*shape).float()

    def __exit__(self, *_: object) -> None:
        globals()["noise"] = self._noise


BF16 = torch.bfloat16


def rounded() -> torch.Tensor:
    """1 + 3/128 squared has more digits than bfloat16 keeps."""
    return torch.full((4,), 1.0234375, dtype=BF16)


def module_with_nothing() -> torch.nn.Module:
    return torch.nn.Identity()


def test_results_are_wide_and_exact() -> None:
    with float32.wide(module_with_nothing()):
        product = rounded() * rounded()
    assert product.dtype is torch.float32
    assert float(product[0]) == 1.0234375**2


def test_a_cast_down_is_left_out_but_one_between_others_is_made() -> None:
    value = torch.full((2,), 1.0001)
    with float32.wide(module_with_nothing()):
        assert value.to(BF16).dtype is torch.float32
        assert value.half().dtype is torch.float32
        assert value.double().dtype is torch.float64
        assert value.long().dtype is torch.int64
        assert torch.equal(value.to(BF16), value)


def test_operations_in_place_keep_dtype_and_memory() -> None:
    value = rounded()
    pointer = value.data_ptr()
    with float32.wide(module_with_nothing()):
        value += 1
        value.mul_(2.0)
        value[0] = 7.0
        value.copy_(torch.full((4,), 3.0))
        value.clamp_(max=2.0)
    assert (value.dtype, value.data_ptr()) == (BF16, pointer)
    assert value.tolist() == [2.0] * 4


def test_a_view_shows_and_writes_what_it_is_a_view_of() -> None:
    value = torch.zeros(2, 4, dtype=BF16)
    with float32.wide(module_with_nothing()):
        view = value.view(4, 2)[1:3].transpose(0, 1)
        view.fill_(5.0)
        half, _ = value.chunk(2, dim=1)
        half[0, 0] = 9.0
    assert view.dtype is BF16 and view._base is not None
    assert value.flatten().tolist() == [9.0, 0, 5, 5, 5, 5, 0, 0]


def test_what_is_made_within_is_wide_where_half_was_asked() -> None:
    with float32.wide(module_with_nothing()):
        assert torch.zeros(2, dtype=BF16).dtype is torch.float32
        assert torch.arange(2, dtype=torch.float16).dtype is torch.float32
        assert torch.zeros_like(rounded(), dtype=BF16).dtype is torch.float32
        assert torch.zeros(2, dtype=torch.int64).dtype is torch.int64


def test_operands_of_two_dtypes_are_taken_by_functions_that_compare_them() -> None:
    linear = torch.nn.Linear(4, 4).to(BF16)
    norm = torch.nn.LayerNorm(4).to(BF16)
    with torch.no_grad(), float32.wide(linear):
        assert norm(linear(torch.ones(1, 4))).dtype is torch.float32
        query = torch.ones(1, 1, 2, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(query, query.to(BF16), query)
        assert attended.dtype is torch.float32
    assert linear.weight.dtype is BF16


def test_within_itself_it_is_the_same() -> None:
    module = module_with_nothing()
    with float32.wide(module):
        once = rounded() * rounded()
        with float32.wide(module):
            twice = rounded() * rounded()
        assert torch.equal(once, twice)
        assert (rounded() * rounded()).dtype is torch.float32
    assert (rounded() * rounded()).dtype is BF16


def test_an_exception_within_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), float32.wide(module_with_nothing()):
        raise ZeroDivisionError
    assert (rounded() * rounded()).dtype is BF16


class Fragile(torch.nn.Module):
    """Multiplies its weight with what it is given, and breaks when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rounded(), requires_grad=False)
        self.breaks = False
        self.active: list[int] = []

    def forward(self, value: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.active.append(len(modes()))
        if self.breaks:
            raise ZeroDivisionError
        product = value * self.weight
        return product - 1.0 if scale is None else product * scale


def test_during_forward_alone_and_in_the_dtype_that_went_in() -> None:
    module = Fragile()
    narrow = module(rounded())
    end = float32.during_forward(module, float32.wide)
    widened = module(rounded())
    outside = rounded() * rounded()
    end()

    assert module.active[0] == 0 and module.active[1] > 0
    assert widened.dtype is BF16 and outside.dtype is BF16
    # One rounding, at the end, and not another one before the subtraction.
    assert float(widened[0]) == float(torch.tensor(1.0234375**2 - 1.0).to(BF16))
    assert not torch.equal(widened, narrow)
    assert module(rounded(), scale=torch.ones(4)).dtype is torch.float32
    assert torch.equal(module(rounded()), narrow)
    assert module.active[-1] == 0
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_during_forward_keeps_float32_that_went_in() -> None:
    module = Fragile()
    end = float32.during_forward(module, float32.wide)
    assert module(torch.ones(4)).dtype is torch.float32
    end()


def test_a_forward_pass_that_breaks_leaves_no_mode() -> None:
    module = Fragile()
    module.breaks = True
    end = float32.during_forward(module, float32.wide)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            module(rounded())
        assert modes() == []
    module.breaks = False
    assert module(rounded()).dtype is BF16
    end()
    assert modes() == []


def test_a_hook_that_breaks_before_the_module_leaves_no_mode() -> None:
    module = Fragile()
    end = float32.during_forward(module, float32.wide)

    def breaks(_module: Any, _args: Any) -> None:
        raise ZeroDivisionError

    later = module.register_forward_pre_hook(breaks)
    with pytest.raises(ZeroDivisionError):
        module(rounded())
    later.remove()
    end()
    assert modes() == []
    assert (rounded() * rounded()).dtype is BF16


def test_taken_away_by_another_order_than_it_was_put_on() -> None:
    module = Fragile()
    with ExitStack() as stack:
        ends = [float32.during_forward(module, float32.wide) for _ in range(2)]
        assert module(rounded()).dtype is BF16
        for end in ends:
            stack.callback(end)
    assert not module._forward_hooks


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_fused_kernels_are_back_when_the_last_of_two_has_ended(first_to_end: int) -> None:
    ends = [ExitStack(), ExitStack()]
    for end in ends:
        end.enter_context(float32.plain_attention(Fragile()))
    ends[first_to_end].close()
    assert not torch.backends.cuda.flash_sdp_enabled()
    ends[1 - first_to_end].close()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_plain_attention_gives_the_chosen_backends_back(
    pipelines: Callable[[str], Any], tmp_path: Path
) -> None:
    transformer = pipelines("z-image").transformer
    processors = [part.processor for part in transformer.modules() if hasattr(part, "processor")]
    before = [processor._attention_backend for processor in processors]
    transformer.set_attention_backend("native")
    chosen = [processor._attention_backend for processor in processors]
    try:
        with pytest.raises(ZeroDivisionError), float32.plain_attention(transformer):
            assert [processor._attention_backend for processor in processors] == [None] * len(processors)
            raise ZeroDivisionError
        assert [processor._attention_backend for processor in processors] == chosen
        assert None not in chosen
    finally:
        for processor, backend in zip(processors, before, strict=True):
            processor._attention_backend = backend
