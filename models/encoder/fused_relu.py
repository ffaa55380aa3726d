"""Backward pass of bias and ReLU in one Triton kernel; import it only where Triton is.

It reads gradient and result of a convolution once, writes what goes through the ReLU, and sums that over the pixels for
the bias. Partial sums are added up in a second step, in a fixed order.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _STEPS = 32, 64, 16


@triton.jit
def _relu_backward(
    grad_at,
    result_at,
    out_at,
    sums_at,
    pixels,
    channels,
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    first = tl.program_id(0).to(tl.int64) * (rows * steps)
    total = tl.zeros([rows, columns], tl.float32)
    for step in range(steps):
        pixel = first + step * rows + tl.arange(0, rows)
        places = pixel[:, None] * channels + channel[None, :]
        inside = (pixel[:, None] < pixels) & (channel[None, :] < channels)
        grad = tl.load(grad_at + places, mask=inside, other=0.0)
        result = tl.load(result_at + places, mask=inside, other=0.0)
        grad = tl.where(result <= 0.0, 0.0, grad)
        tl.store(out_at + places, grad, mask=inside)
        total += grad.to(tl.float32)
    sums = sums_at + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(sums, tl.sum(total, 0), mask=channel < channels)


def relu_backward(grad: Tensor, result: Tensor) -> Tuple[Tensor, Tensor]:
    """What of a gradient goes through the ReLU, and its sum per channel.

    Args:
        grad, result: [n, C, H, W], channels last in memory, of one type.

    Returns:
        like ``grad``; [C] in the same type.
    """
    count, channels, height, width = result.shape
    pixels = count * height * width
    out = torch.empty_like(result)
    blocks = triton.cdiv(pixels, _ROWS * _STEPS)
    sums = torch.empty(blocks, channels, dtype=torch.float32, device=grad.device)
    grid = blocks, triton.cdiv(channels, _COLUMNS)
    with torch.cuda.device_of(grad):
        _relu_backward[grid](grad, result, out, sums, pixels, channels, rows=_ROWS, columns=_COLUMNS, steps=_STEPS)
    return out, sums.sum(0).to(grad.dtype)
