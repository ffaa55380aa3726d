"""Jitter, normalisation and padding of images in one Triton kernel; import it only where Triton is.

A pixel is read as three bytes and written once, in the type that the backbone computes in and with its channels last.
PyTorch's operators make some forty passes over float32 images in training, seven in inference.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


class InputSizes(NamedTuple):
    """Of the images and of the padded result, pixels."""

    height: int
    width: int
    padded_height: int
    padded_width: int


@triton.jit
def _from_hue(value, chroma, sector, offset: tl.constexpr):
    k = sector + offset
    k = tl.where(k >= 6.0, k - 6.0, k)
    return value - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _pick(order, blue, green, red):
    return tl.where(order == 0.0, blue, tl.where(order == 1.0, green, red))


@triton.jit
def _prepare(
    images_at, settings_at, jitter_at, out_at, height, width, padded_height, padded_width,
    jitters: tl.constexpr, to_rgb: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1).to(tl.int64)
    row, column = place // padded_width, place % padded_width
    inside = (row < height) & (column < width)
    start = images_at + image * 3 * height * width + row * width + column
    blue = tl.load(start, mask=inside, other=0).to(tl.float32)
    green = tl.load(start + height * width, mask=inside, other=0).to(tl.float32)
    red = tl.load(start + 2 * height * width, mask=inside, other=0).to(tl.float32)
    if jitters:
        own = jitter_at + image * 8  # brightness, contrast, saturation, sixths of hue, contrast, channel order
        blue = (blue + tl.load(own)) * tl.load(own + 1)
        green = (green + tl.load(own)) * tl.load(own + 1)
        red = (red + tl.load(own)) * tl.load(own + 1)
        value = tl.maximum(tl.maximum(blue, green), red)
        chroma = value - tl.minimum(tl.minimum(blue, green), red)
        safe = tl.where(chroma > 0.0, chroma, 1.0)
        other = tl.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe)
        sector = tl.where(value == red, (green - blue) / safe, other) + tl.load(own + 3)
        sector = tl.where(sector < 0.0, sector + 6.0, sector)
        sector = tl.where(sector >= 6.0, sector - 6.0, sector)
        chroma = chroma * tl.load(own + 2)
        contrast = tl.load(own + 4)
        b = _from_hue(value, chroma, sector, 1) * contrast
        g = _from_hue(value, chroma, sector, 3) * contrast
        r = _from_hue(value, chroma, sector, 5) * contrast
        blue, green, red = (
            _pick(tl.load(own + 5), b, g, r),
            _pick(tl.load(own + 6), b, g, r),
            _pick(tl.load(own + 7), b, g, r),
        )
    if to_rgb:
        first, last = red, blue
    else:
        first, last = blue, red
    kind = out_at.dtype.element_ty
    out = out_at + (image * padded_height * padded_width + place) * 3
    fits = place < padded_height * padded_width
    first = tl.div_rn(first - tl.load(settings_at), tl.load(settings_at + 3) + tl.zeros([block], tl.float32))
    green = tl.div_rn(green - tl.load(settings_at + 1), tl.load(settings_at + 4) + tl.zeros([block], tl.float32))
    last = tl.div_rn(last - tl.load(settings_at + 2), tl.load(settings_at + 5) + tl.zeros([block], tl.float32))
    tl.store(out, tl.where(inside, first, 0.0).to(kind), mask=fits)
    tl.store(out + 1, tl.where(inside, green, 0.0).to(kind), mask=fits)
    tl.store(out + 2, tl.where(inside, last, 0.0).to(kind), mask=fits)


def prepare_images(
    images: Tensor, settings: Tensor, jitter: Optional[Tensor], sizes: InputSizes, to_rgb: bool, dtype: torch.dtype
) -> Tensor:
    """Jittered, normalised, padded images.

    Args:
        images: uint8 [n, 3, H, W] BGR, contiguous.
        settings: float32 [6], mean and std of each channel of the result.
        jitter: float32 [n, 8]: brightness to add, contrast before, saturation, sixths of a turn of hue, contrast
            after, and for each channel which one it takes; None jitters nothing.
        sizes: H, W and what they are padded to.
        to_rgb: reverse the channels.
        dtype: of the result.

    Returns:
        [n, 3, H', W'], channels last in memory.
    """
    count, height, width = len(images), sizes.padded_height, sizes.padded_width
    out = torch.empty((count, height, width, 3), dtype=dtype, device=images.device)
    grid = triton.cdiv(height * width, _BLOCK), count
    given = settings if jitter is None else jitter
    with torch.cuda.device_of(images):
        _prepare[grid](images, settings, given, out, *sizes, jitters=jitter is not None, to_rgb=to_rgb, block=_BLOCK)
    return out.permute(0, 3, 1, 2)
