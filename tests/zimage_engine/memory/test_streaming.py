from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zimage_engine.memory.streaming import ALIGNMENT_BYTES, PLACES, BlockStream, HostWeights, StreamedModule

CPU = torch.device("cpu")


class Tower(torch.nn.Module):
    """Blocks in a row, called in the order that is asked for."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8 + 0 * index) for index in range(count))

    def forward(self, value: torch.Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
        value = self.first(value)
        for index in range(len(self.blocks)) if order is None else order:
            value = torch.tanh(self.blocks[index](value))
        return value


def addresses(tower: Tower) -> list[int]:
    return [block.weight.data_ptr() for block in tower.blocks]


@pytest.mark.parametrize("order", [None, (4, 3, 2, 1, 0), (0, 0, 0), (2, 4), (1, 3, 1, 3, 0)])
@pytest.mark.parametrize("streamed", [(0, 1, 2, 3, 4), (1, 3), (2,), ()])
def test_the_order_of_calls_does_not_matter(order: tuple[int, ...] | None, streamed: tuple[int, ...]) -> None:
    tower, value = Tower(), torch.randn(2, 8)
    plain = tower(value, order)
    stream = BlockStream([tower.blocks[index] for index in streamed], CPU)
    for _ in range(3):
        assert torch.equal(tower(value, order), plain)
    stream.remove()
    assert torch.equal(tower(value, order), plain)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in tower.blocks)


def test_a_block_is_off_the_host_for_its_own_turn_only() -> None:
    tower, seen = Tower(), []
    BlockStream(list(tower.blocks), CPU)
    at_rest = addresses(tower)
    for index, block in enumerate(tower.blocks):
        block.register_forward_pre_hook(
            lambda *_, index=index: seen.append(
                [there != here for there, here in zip(addresses(tower), at_rest, strict=True)].index(True)
                == index
            )
        )
    tower(torch.randn(1, 8))
    assert seen == [True] * 5
    assert addresses(tower) == at_rest


def test_one_is_on_its_way_while_another_computes() -> None:
    tower, held = Tower(), []
    stream = BlockStream(list(tower.blocks), CPU)
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda *_: held.append({place.holds for place in stream._places}))
    tower(torch.randn(1, 8))
    assert held == [{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 0}], "the last is followed by the first"
    assert len(stream._places) == PLACES


def test_a_forward_that_raises_leaves_every_block_on_the_host() -> None:
    tower, value = Tower(), torch.randn(1, 8)
    plain = tower(value)
    BlockStream(list(tower.blocks), CPU)
    at_rest = addresses(tower)
    handle = tower.blocks[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        tower(value)
    assert addresses(tower) == at_rest
    handle.remove()
    assert torch.equal(tower(value), plain)


def test_weights_are_packed_with_their_strides_and_aligned() -> None:
    tensors = [torch.randn(3, 5), torch.randn(4, 6).t(), torch.tensor(2.0), torch.randn(2, 3, 4, 4)]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    before = [(tensor.clone(), tensor.stride()) for tensor in tensors]
    weights = HostWeights(tensors)
    for tensor, (value, stride) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value) and tensor.stride() == stride
        assert (tensor.data_ptr() - weights.flat.data_ptr()) % ALIGNMENT_BYTES == 0
    assert weights.bytes == 4 * ALIGNMENT_BYTES
    assert not weights.is_pinned


def test_a_visitor_comes_when_called_and_goes_when_told() -> None:
    tower, value = Tower(), torch.randn(1, 8)
    plain = tower(value)
    visitor = StreamedModule(tower, [tower.blocks[1]], CPU, visiting=True)
    home = tower.first.weight.data_ptr()
    assert not visitor.is_here
    assert torch.equal(tower(value), plain)
    assert visitor.is_here and tower.first.weight.data_ptr() != home
    visitor.leave()
    assert not visitor.is_here and tower.first.weight.data_ptr() == home
    visitor.remove()
    assert torch.equal(tower(value), plain)
    assert not tower._forward_pre_hooks


def test_a_visitor_comes_in_the_dtype_that_it_was_given_meanwhile() -> None:
    module = torch.nn.Linear(4, 4).to(torch.float16)
    visitor = StreamedModule(module, (), CPU, visiting=True)
    module.to(torch.float32)
    assert module(torch.randn(1, 4)).dtype is torch.float32
    visitor.remove()
    assert module.weight.dtype is torch.float16


def test_a_file_holds_what_is_not_at_work_and_can_go_afterwards(tmp_path: Path) -> None:
    tower, value = Tower(), torch.randn(1, 8)
    plain = tower(value)
    stream = BlockStream(list(tower.blocks), CPU, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert torch.equal(tower(value), plain)
    stream.remove()
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(tower(value), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_a_card_gets_two_places_and_gives_them_back() -> None:
    card = torch.device("cuda:0")
    tower, value = Tower(12).to(torch.bfloat16), torch.randn(64, 8, device=card).to(torch.bfloat16)
    tower.to(card)
    plain = tower(value)
    tower.to("cpu")
    before = torch.cuda.memory_allocated(card)
    streamed = StreamedModule(tower, list(tower.blocks), card)
    assert streamed.is_pinned
    for _ in range(20):
        assert torch.equal(tower(value), plain)
    streamed.remove()
    assert {parameter.device.type for parameter in tower.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated(card) == before
