"""Batch norm that learns its statistics, with the residual and the ReLU after it; import it only where Triton is.

By PyTorch's operators a residual and a ReLU are passes over the feature maps of their own, and in the backward pass
two more. Here the forward pass reads a convolution's result twice (statistics, result) and writes once; the backward
pass reads gradient and convolution's result twice and writes once, and once more where a residual passes the gradient
on. Statistics and sums are float32; partial sums are added up in a fixed order.

Shapes: [n, C, H, W], channels last in memory.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ROWS, _COLUMNS, _STEPS = 32, 64, 16  # pixels and channels at a time, and how often, of a program


@triton.jit
def _near_mean(x_at, channel, pixels, channels, rows: tl.constexpr):
    """Means of a few pixels from all over the map: sums around it lose nothing, whichever pixel is far off."""
    pixel = tl.arange(0, rows).to(tl.int64) * pixels // rows
    places = pixel[:, None] * channels + channel[None, :]
    x = tl.load(x_at + places, mask=(channel < channels)[None, :], other=0.0).to(tl.float32)
    return tl.sum(x, 0) / rows


@triton.jit
def _measure(x_at, sums_at, pixels, channels, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr):
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    shift = _near_mean(x_at, channel, pixels, channels, rows)
    first = tl.program_id(0).to(tl.int64) * (rows * steps)
    total = tl.zeros([rows, columns], tl.float32)
    squares = tl.zeros([rows, columns], tl.float32)
    for step in range(steps):
        pixel = first + step * rows + tl.arange(0, rows)
        inside = (pixel[:, None] < pixels) & (channel[None, :] < channels)
        x = tl.load(x_at + pixel[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, x - shift[None, :], 0.0)
        total += off
        squares += off * off
    sums = sums_at + tl.program_id(0).to(tl.int64) * (2 * channels) + channel
    tl.store(sums, tl.sum(total, 0), mask=channel < channels)
    tl.store(sums + channels, tl.sum(squares, 0), mask=channel < channels)


@triton.jit
def _settle(
    x_at, sums_at, statistics_at, mean_at, var_at, pixels, channels, eps, momentum,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * columns + tl.arange(0, columns)
    known = channel < channels
    first = tl.load(sums_at + channel, mask=known, other=0.0) / pixels
    var = tl.load(sums_at + channels + channel, mask=known, other=0.0) / pixels - first * first
    var = tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean = _near_mean(x_at, channel, pixels, channels, rows) + first
    tl.store(statistics_at + channel, mean, mask=known)
    tl.store(statistics_at + channels + channel, 1.0 / tl.sqrt(var + eps), mask=known)
    old_mean = tl.load(mean_at + channel, mask=known, other=0.0)
    old_var = tl.load(var_at + channel, mask=known, other=0.0)
    tl.store(mean_at + channel, (1.0 - momentum) * old_mean + momentum * mean, mask=known)
    unbiased = var * (pixels / tl.maximum(pixels - 1.0, 1.0))
    tl.store(var_at + channel, (1.0 - momentum) * old_var + momentum * unbiased, mask=known)


@triton.jit
def _normalise(
    x_at, added_at, statistics_at, weight_at, bias_at, out_at, pixels, channels,
    adds: tl.constexpr, rectifies: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    known = channel < channels
    mean = tl.load(statistics_at + channel, mask=known, other=0.0)[None, :]
    scale = tl.load(statistics_at + channels + channel, mask=known, other=0.0)
    scale = (scale * tl.load(weight_at + channel, mask=known, other=0.0))[None, :]
    bias = tl.load(bias_at + channel, mask=known, other=0.0)[None, :]
    first = tl.program_id(0).to(tl.int64) * (rows * steps)
    for step in range(steps):
        pixel = first + step * rows + tl.arange(0, rows)
        places = pixel[:, None] * channels + channel[None, :]
        inside = (pixel[:, None] < pixels) & known[None, :]
        x = tl.load(x_at + places, mask=inside, other=0.0)
        y = (x.to(tl.float32) - mean) * scale + bias
        if adds:
            y += tl.load(added_at + places, mask=inside, other=0.0).to(tl.float32)
        if rectifies:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_at + places, y.to(x.dtype), mask=inside)


@triton.jit
def _sum_gradients(
    grad_at, x_at, y_at, passed_at, statistics_at, weight_at, bias_at, sums_at, pixels, channels,
    adds: tl.constexpr, rectifies: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    known = channel < channels
    mean = tl.load(statistics_at + channel, mask=known, other=0.0)[None, :]
    scale = tl.load(statistics_at + channels + channel, mask=known, other=0.0)
    scale = (scale * tl.load(weight_at + channel, mask=known, other=0.0))[None, :]
    bias = tl.load(bias_at + channel, mask=known, other=0.0)[None, :]
    first = tl.program_id(0).to(tl.int64) * (rows * steps)
    total = tl.zeros([rows, columns], tl.float32)
    dots = tl.zeros([rows, columns], tl.float32)
    for step in range(steps):
        pixel = first + step * rows + tl.arange(0, rows)
        places = pixel[:, None] * channels + channel[None, :]
        inside = (pixel[:, None] < pixels) & known[None, :]
        grad = tl.load(grad_at + places, mask=inside, other=0.0)
        off = tl.load(x_at + places, mask=inside, other=0.0).to(tl.float32) - mean
        if adds:
            if rectifies:
                grad = tl.where(tl.load(y_at + places, mask=inside, other=0.0) <= 0.0, 0.0, grad)
                tl.store(passed_at + places, grad, mask=inside)
        elif rectifies:
            grad = tl.where(off * scale + bias <= 0.0, 0.0, grad)
        wide = tl.where(inside, grad.to(tl.float32), 0.0)
        total += wide
        dots += wide * off
    sums = sums_at + tl.program_id(0).to(tl.int64) * (2 * channels) + channel
    tl.store(sums, tl.sum(total, 0), mask=known)
    tl.store(sums + channels, tl.sum(dots, 0), mask=known)


@triton.jit
def _normalise_backward(
    grad_at, x_at, statistics_at, weight_at, bias_at, sums_at, out_at, pixels, channels,
    rectifies: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    known = channel < channels
    mean = tl.load(statistics_at + channel, mask=known, other=0.0)[None, :]
    inverse = tl.load(statistics_at + channels + channel, mask=known, other=0.0)
    scale = inverse * tl.load(weight_at + channel, mask=known, other=0.0)
    bias = tl.load(bias_at + channel, mask=known, other=0.0)[None, :]
    constant = (tl.load(sums_at + channel, mask=known, other=0.0) / pixels)[None, :]
    slope = tl.load(sums_at + channels + channel, mask=known, other=0.0) / pixels
    slope = (slope * inverse * inverse)[None, :]
    scale = scale[None, :]
    first = tl.program_id(0).to(tl.int64) * (rows * steps)
    for step in range(steps):
        pixel = first + step * rows + tl.arange(0, rows)
        places = pixel[:, None] * channels + channel[None, :]
        inside = (pixel[:, None] < pixels) & known[None, :]
        grad = tl.load(grad_at + places, mask=inside, other=0.0)
        off = tl.load(x_at + places, mask=inside, other=0.0).to(tl.float32) - mean
        wide = grad.to(tl.float32)
        if rectifies:
            wide = tl.where(off * scale + bias <= 0.0, 0.0, wide)
        tl.store(out_at + places, (scale * (wide - constant - off * slope)).to(grad.dtype), mask=inside)


class _Norm(torch.autograd.Function):
    """``norm_relu``."""

    @staticmethod
    def forward(ctx, norm: nn.BatchNorm2d, rectifies: bool, x, added, weight, bias):
        pixels, channels, tiles = _sizes(x)
        sums = _partial_sums(x, tiles)
        statistics = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        settings = norm.eps, norm.momentum
        with torch.cuda.device_of(x):
            _measure[tiles](x, sums, pixels, channels, rows=_ROWS, columns=_COLUMNS, steps=_STEPS)
            _settle[(tiles[1],)](
                x, sums.sum(0), statistics, norm.running_mean, norm.running_var, pixels, channels, *settings,
                rows=_ROWS, columns=_COLUMNS,
            )  # fmt: skip
            _normalise[tiles](
                x, x if added is None else added, statistics, weight, bias, out, pixels, channels,
                adds=added is not None, rectifies=rectifies, rows=_ROWS, columns=_COLUMNS, steps=_STEPS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, statistics, *(() if added is None else (out,)))
        ctx.rectifies, ctx.adds = rectifies, added is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, statistics, *results = ctx.saved_tensors
        pixels, channels, tiles = _sizes(x)
        grad = grad.contiguous(memory_format=torch.channels_last)
        partial, out = _partial_sums(x, tiles), torch.empty_like(x)
        passes = ctx.adds and ctx.rectifies
        passed = torch.empty_like(grad) if passes else grad
        given = statistics, weight, bias
        with torch.cuda.device_of(x):
            _sum_gradients[tiles](
                grad, x, results[0] if passes else x, passed, *given, partial, pixels, channels,
                adds=ctx.adds, rectifies=ctx.rectifies, rows=_ROWS, columns=_COLUMNS, steps=_STEPS,
            )  # fmt: skip
            sums = partial.sum(0)
            _normalise_backward[tiles](
                passed, x, *given, sums, out, pixels, channels,
                rectifies=ctx.rectifies and not passes, rows=_ROWS, columns=_COLUMNS, steps=_STEPS,
            )  # fmt: skip
        return None, None, out, passed if ctx.adds else None, sums[1] * statistics[1], sums[0]


def _sizes(x: Tensor) -> Tuple[int, int, Tuple[int, int]]:
    """Pixels, channels, and how many programs share each of the two."""
    count, channels, height, width = x.shape
    pixels = count * height * width
    return pixels, channels, (triton.cdiv(pixels, _ROWS * _STEPS), triton.cdiv(channels, _COLUMNS))


def _partial_sums(x: Tensor, tiles: Tuple[int, int]) -> Tensor:
    """float32, for two sums of every program."""
    return torch.empty(tiles[0], 2, x.shape[1], dtype=torch.float32, device=x.device)


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, added: Optional[Tensor] = None, rectifies: bool = True) -> Tensor:
    """relu(norm(x) [+ added]) of a norm that learns its statistics; it counts no batches.

    Args:
        norm: with weights, running statistics and a momentum.
        x, added: of one type.
        rectifies: False leaves the ReLU out.

    Returns:
        like ``x``.
    """
    layout = torch.channels_last
    x = x.contiguous(memory_format=layout)
    added = None if added is None else added.contiguous(memory_format=layout)
    return _Norm.apply(norm, rectifies, x, added, norm.weight, norm.bias)
