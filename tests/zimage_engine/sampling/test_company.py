"""Which calls of a denoiser are made as one, how they are joined, and how drawings of several parts go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from zimage_engine.sampling.company import MERGES, Company, Drawing

UNET = MERGES["UNet2DConditionModel"]
PIXART = MERGES["PixArtTransformer2DModel"]


def rows(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)).to(dtype)


def unet_call(count: int, at: float = 3.0, **others: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = {
        "encoder_hidden_states": rows(count, 77, 8),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": {"text_embeds": rows(count, 5), "time_ids": rows(count, 6)},
        "return_dict": False,
    }
    return (rows(count, 4, 8, 8), torch.tensor(at)), named | others


def pixart_call(count: int, at: float = 3.0, **others: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = {
        "encoder_hidden_states": rows(count, 20, 8),
        "encoder_attention_mask": torch.ones(count, 20),
        "timestep": torch.tensor([at]).expand(count),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return (rows(count, 4, 8, 8),), named | others


@pytest.mark.parametrize(
    ("merge", "one", "other", "share"),
    [
        (UNET, unet_call(1), unet_call(1, at=9.0), True),
        (UNET, unet_call(1), unet_call(2), True),
        (UNET, unet_call(1), unet_call(1, encoder_hidden_states=rows(1, 154, 8)), False),
        (UNET, unet_call(1), unet_call(1, timestep_cond=rows(1, 7)), False),
        (UNET, unet_call(1), unet_call(1, encoder_hidden_states=rows(1, 77, 8, dtype=torch.bfloat16)), False),
        (UNET, unet_call(1), unet_call(1, return_dict=True), False),
        (PIXART, pixart_call(1), pixart_call(2, at=9.0), True),
        (PIXART, pixart_call(1), pixart_call(1, encoder_attention_mask=None), False),
        (PIXART, pixart_call(1), pixart_call(1, encoder_hidden_states=rows(1, 30, 8)), False),
    ],
)
def test_calls_share_a_pass_where_their_rows_can_stand_beside_each_other(
    merge: Any, one: Any, other: Any, share: bool
) -> None:
    assert merge.key(*one) is not None
    assert (merge.key(*one) == merge.key(*other)) is share


@pytest.mark.parametrize(
    ("merge", "call"),
    [
        (UNET, unet_call(1, down_block_additional_residuals=[rows(1, 4)])),
        (UNET, unet_call(1, cross_attention_kwargs={"scale": 0.5})),
        (UNET, unet_call(2, encoder_hidden_states=rows(1, 77, 8))),
        (UNET, pixart_call(1)),
        (PIXART, unet_call(1)),
    ],
)
def test_what_is_not_known_is_made_alone(merge: Any, call: Any) -> None:
    assert merge.key(*call) is None


@pytest.mark.parametrize(("merge", "call"), [(UNET, unet_call), (PIXART, pixart_call)])
def test_rows_are_joined_and_parted_in_their_order(merge: Any, call: Any) -> None:
    calls = [call(1), call(2, at=9.0), call(1, at=5.0)]
    args, kwargs = merge.merged(calls)
    assert torch.equal(args[0], torch.cat([each[0][0] for each in calls]))
    times = args[1] if merge is UNET else kwargs["timestep"]
    assert times.tolist() == [3.0, 9.0, 9.0, 5.0]
    assert merge.key(args, kwargs) is not None
    assert len(kwargs["encoder_hidden_states"]) == 4
    parts = merge.parts((args[0],), calls)
    assert [torch.equal(part, each[0][0]) for (part,), each in zip(parts, calls, strict=True)] == [True] * 3
    named = merge.parts(Transformer2DModelOutput(args[0]), calls)
    assert [torch.equal(one.sample, part) for one, (part,) in zip(named, parts, strict=True)] == [True] * 3


class Denoiser(torch.nn.Module):
    """Half of what comes in; of no class that is known, so its passes are not shared."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.dtype = torch.float32

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.weight / 2


class Stock:
    """What a pipeline's components are looked up in."""

    def __init__(self) -> None:
        self.denoiser, self.vae = Denoiser(), torch.nn.Identity()


def drawn_in_parts(most: int, parts: int, fails_at: int | None = None) -> tuple[list[Any], list[str]]:
    """What a drawing of so many parts, of two steps each, ends with, and what happened in order."""
    stock, told, ends = Stock(), [], []
    company = Company(stock.denoiser, most)

    def part(number: int, seat: Any) -> float:
        at = torch.tensor([float(number)])
        for _ in range(2):
            told.append(f"{number}")
            at = seat.pipeline.denoiser(at)
            if number == fails_at:
                raise ValueError(f"{number} cannot be drawn")
        return float(at)

    def whole() -> None:
        seats = [company.seat(stock, "denoiser") for _ in range(parts)]
        try:
            made = company.each(
                [(seat, lambda number=at, seat=seat: part(number, seat)) for at, seat in enumerate(seats)]
            )
        except ValueError as error:
            ends.append(str(error))
        else:
            ends.append(made)
            # It can do so again.
            ends.append(company.each([(seats[0], lambda: part(8, seats[0]))]))

    todo = [Drawing(company.seat(stock, "denoiser"), whole)]
    company.run(lambda: [todo.pop()] if todo else [])
    return ends, told


def test_parts_are_begun_as_places_come_free() -> None:
    ends, told = drawn_in_parts(2, 3)
    assert ends == [[0.0, 0.25, 0.5], [2.0]]
    assert told == ["0", "1", "0", "1", "2", "2", "8", "8"]


def test_a_part_that_fails_keeps_those_from_beginning_that_have_not() -> None:
    ends, told = drawn_in_parts(2, 5, fails_at=1)
    assert ends == ["1 cannot be drawn"]
    assert told == ["0", "1", "0"]
