"""Strengthens the contrast of fine detail in a tensor of colours; knows nothing of files or of PIL.

A high-pass of the luma is added back where the neighbourhood is busy, and nowhere else:

1. luma, and its extrema in the 5 x 5 neighbourhood of each pixel;
2. detail = luma - binomial 5 x 5 blur, less what is small enough to be noise (coring);
3. times a weight that is 0 up to FLAT_RANGE between the extrema and 1 from BUSY_RANGE on;
4. held within the extrema plus OVERSHOOT, and within what the colours have room for.

One whole number is added to red, green and blue alike, so their differences (chroma, hue) stay exactly
as they were, and the luma moves by exactly that number. All is whole numbers except one product and its
rounding, both exact to the last bit by IEEE 754: every device gives the same picture bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: A pixel lies in a flat region where the luma in its 5 x 5 neighbourhood spans no more than this (of
#: 255). It is left exactly as it is: a VAE's ripple and JPEG noise of plus or minus 6 stay below.
FLAT_RANGE = 12
#: From this span on the detail is added in full; in between it fades in, so that no seam shows.
BUSY_RANGE = 28
#: Detail weaker than this (of 255) is never added, and stronger detail only by what exceeds it: faint noise
#: in a busy region.
CORE = 2
#: The halo bound: no luma leaves the extrema of its 5 x 5 neighbourhood by more than this (of 255).
OVERSHOOT = 6

#: Luma weights of ITU-R BT.601 in 1/128. They sum to 128, so 128 * 255 still fits 16 bits.
_RED, _GREEN, _BLUE = 38, 75, 15
_RADIUS = 2
_SPAN = 2 * _RADIUS + 1


def luma(colours: Tensor) -> Tensor:
    """The luma, uint8 `(..., H, W)`, of uint8 colours `(..., 3, H, W)`: the one that all bounds speak of."""
    return _rounded(_luma_128ths(colours), 7).to(torch.uint8)


def local_extrema(plane: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in the 5 x 5 neighbourhood of each pixel, cut off at the border."""
    bordered = _bordered(plane)
    return _slide(bordered, torch.minimum), _slide(bordered, torch.maximum)


def luma_change(colours: Tensor, strength: float) -> Tensor:
    """What is to be added to red, green and blue alike: int16 `(..., H, W)` for uint8 `(..., 3, H, W)`.

    Added to the colours it never leaves 0 to 255, so the sum needs no clipping.
    """
    fine = _luma_128ths(colours)
    coarse = _rounded(fine, 7).to(torch.uint8)
    least, greatest = local_extrema(coarse)
    weight = (greatest - least).clamp_(FLAT_RANGE, BUSY_RANGE).sub_(FLAT_RANGE)
    detail = _detail_128ths(_rounded(fine, 4))
    detail -= detail.clamp(-CORE * 128, CORE * 128)
    change = detail.to(torch.float32).mul_(weight)
    change = change.mul_(strength / (128 * (BUSY_RANGE - FLAT_RANGE))).round_().to(torch.int16)
    level = coarse.to(torch.int16)
    darkest, brightest = colours.amin(-3), colours.amax(-3)
    lowest = torch.maximum((least - level).sub_(OVERSHOOT), darkest.to(torch.int16).neg_())
    highest = torch.minimum((greatest - level).add_(OVERSHOOT), 255 - brightest.to(torch.int16))
    return torch.minimum(torch.maximum(change, lowest, out=change), highest, out=change)


def _luma_128ths(colours: Tensor) -> Tensor:
    red, green, blue = (plane.to(torch.int16) for plane in colours.unbind(-3))
    return red.mul_(_RED).add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE)


def _detail_128ths(eighths: Tensor) -> Tensor:
    """Luma less its blur, in 1/128. The blur's weights sum to 16 an axis: 16 * 8 * 255 fits 16 bits."""
    rows = _rounded(_binomial(_bordered(eighths), -2), 4)
    blurred_128ths = _binomial(rows, -1)
    return eighths.mul(16).sub_(blurred_128ths)


def _rounded(whole: Tensor, bits: int) -> Tensor:
    return (whole + (1 << (bits - 1))) >> bits


def _bordered(plane: Tensor) -> Tensor:
    """`(..., H + 4, W + 4)`: the outermost rows and columns repeated."""
    height, width = plane.shape[-2:]
    wide = plane.new_empty((*plane.shape[:-2], height + 2 * _RADIUS, width + 2 * _RADIUS))
    inner_rows = wide[..., _RADIUS : _RADIUS + height, :]
    inner_rows[..., _RADIUS : _RADIUS + width] = plane
    inner_rows[..., :_RADIUS] = plane[..., :1]
    inner_rows[..., _RADIUS + width :] = plane[..., -1:]
    wide[..., :_RADIUS, :] = inner_rows[..., :1, :]
    wide[..., _RADIUS + height :, :] = inner_rows[..., -1:, :]
    return wide


def _slide(bordered: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`pick` over each 5 x 5 window, as pairs, then pairs of pairs, then the fifth, an axis at a time."""
    for dim in (-2, -1):
        length = bordered.shape[dim] - _SPAN + 1
        pairs = pick(bordered.narrow(dim, 0, length + 3), bordered.narrow(dim, 1, length + 3))
        fours = pick(pairs.narrow(dim, 0, length), pairs.narrow(dim, 2, length))
        bordered = pick(fours, bordered.narrow(dim, 4, length))
    return bordered


def _binomial(plane: Tensor, dim: int) -> Tensor:
    """Weights 1 4 6 4 1 along `dim`, not divided by their sum: the sum of neighbours, taken four times."""
    for _ in range(_SPAN - 1):
        length = plane.shape[dim] - 1
        plane = plane.narrow(dim, 0, length) + plane.narrow(dim, 1, length)
    return plane
