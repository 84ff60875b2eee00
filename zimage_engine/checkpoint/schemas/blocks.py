"""The building blocks that several diffusers models share."""

from __future__ import annotations

from zimage_engine.checkpoint.schemas.schema import TensorTable


def add_resnet(table: TensorTable, name: str, in_size: int, out_size: int, time_size: int | None) -> None:
    """A ResnetBlock2D; a VAE's have no time, so `time_size` is None there."""
    table.norm(f"{name}.norm1", in_size)
    table.conv(f"{name}.conv1", out_size, in_size, kernel=3)
    if time_size is not None:
        table.linear(f"{name}.time_emb_proj", out_size, time_size)
    table.norm(f"{name}.norm2", out_size)
    table.conv(f"{name}.conv2", out_size, out_size, kernel=3)
    if in_size != out_size:
        table.conv(f"{name}.conv_shortcut", out_size, in_size, kernel=1)


def add_attention(
    table: TensorTable, name: str, width: int, context_width: int, inner_width: int, bias: bool
) -> None:
    """An Attention over `context_width` wide values (its own `width` for self-attention); its way out has a
    bias in every case."""
    table.linear(f"{name}.to_q", inner_width, width, bias)
    table.linear(f"{name}.to_k", inner_width, context_width, bias)
    table.linear(f"{name}.to_v", inner_width, context_width, bias)
    table.linear(f"{name}.to_out.0", width, inner_width)


def add_feed_forward(table: TensorTable, name: str, width: int, gated: bool) -> None:
    hidden = 4 * width
    table.linear(f"{name}.net.0.proj", 2 * hidden if gated else hidden, width)
    table.linear(f"{name}.net.2", width, hidden)


def add_time_embedding(table: TensorTable, name: str, out_size: int, in_size: int) -> None:
    table.linear(f"{name}.linear_1", out_size, in_size)
    table.linear(f"{name}.linear_2", out_size, out_size)
