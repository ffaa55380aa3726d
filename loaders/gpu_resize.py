"""Resizing on a GPU with the arithmetic of ``pipelines.resize``, in Triton; import it only where Triton is."""

import functools
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pipelines.resize import bicubic_taps

_BLOCK = 256  # pixels of a row


@triton.jit
def _blend(
    images_at, out_at, first_at, weights_at, in_height, in_width, out_height, out_width, top,
    taps: tl.constexpr, along_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of a row of the result: weighted sums along the row, or along the columns, of one colour of an image."""
    plane = (tl.program_id(0) // out_height).to(tl.int64)
    y, x = tl.program_id(0) % out_height, tl.program_id(1) * block + tl.arange(0, block)
    inside = x < out_width
    place = x if along_rows else y + tl.zeros([block], tl.int32)
    first = tl.load(first_at + place, mask=inside, other=0)
    total = tl.full([block], 1 << 21, tl.int32)
    for k in tl.static_range(taps):
        row, column = (top + y, first + k) if along_rows else (top + first + k, x)
        there = inside & (row < in_height) & (column < in_width)
        pixel = tl.load(images_at + (plane * in_height + row) * in_width + column, mask=there, other=0)
        total += tl.load(weights_at + place * taps + k, mask=inside, other=0) * pixel.to(tl.int32)
    total = tl.minimum(tl.maximum(total >> 22, 0), 255)
    tl.store(out_at + (plane * out_height + y) * out_width + x, total.to(tl.uint8), mask=inside)


def resize_window(images: Tensor, resized: Tuple[int, int], rows: Tuple[int, int], columns: Tuple[int, int]) -> Tensor:
    """Part of resized images; the same bits as ``pipelines.resize.resize_window``.

    Args:
        images: uint8 [n, C, H, W], contiguous, on a GPU.
        resized, rows, columns: as there.

    Returns:
        uint8 [n, C, stop - start of rows, stop - start of columns].
    """
    device = images.device
    top, bottom = bicubic_taps(images.shape[2], resized[0]).of(*rows).span()
    across, down = _taps(images.shape[3], resized[1], columns, device), _taps(images.shape[2], resized[0], rows, device)
    narrow = _run(images, across, (bottom - top, columns[1] - columns[0]), top, along_rows=True)
    return _run(narrow, down, (rows[1] - rows[0], columns[1] - columns[0]), -top, along_rows=False)


@functools.lru_cache(maxsize=64)
def _taps(length: int, resized: int, part: Tuple[int, int], device: torch.device) -> Tuple[Tensor, Tensor]:
    """Of a stretch of a resized line, on the device. Kept: copying waits for the work there. Not to be written to."""
    first, weights = bicubic_taps(length, resized).of(*part)
    return torch.from_numpy(first.copy()).to(device), torch.from_numpy(weights.copy()).to(device)


def _run(images: Tensor, taps: Tuple[Tensor, Tensor], size: Tuple[int, int], top: int, along_rows: bool) -> Tensor:
    """One direction; ``top`` is added to the row of every pixel that is read."""
    first, weights = taps
    out = images.new_empty(images.shape[:2] + size)
    grid = images.shape[0] * images.shape[1] * size[0], triton.cdiv(size[1], _BLOCK)
    constants = dict(taps=weights.shape[1], along_rows=along_rows, block=_BLOCK)
    with torch.cuda.device_of(images):
        _blend[grid](images, out, first, weights, *images.shape[2:], *size, top, **constants)
    return out
