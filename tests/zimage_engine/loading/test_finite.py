"""NaN and infinity among weights are found."""

from __future__ import annotations

import pytest
import torch

from zimage_engine.loading.finite import is_finite

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_largest_numbers_of_either_sign_and_the_smallest_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [limits.max, limits.min, limits.smallest_normal, limits.smallest_normal / 4, 0, -0.0]
    assert is_finite(torch.tensor(values).to(dtype))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 262_144, 600_000])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.linspace(-1, 1, 600_001).to(dtype)
    weight[place] = value
    assert not is_finite(weight)


def test_integers_and_empty_tensors_are_finite() -> None:
    assert is_finite(torch.full((4,), -1)) and is_finite(torch.ones(0))
