"""Max pooling 3x3 with stride 2 in one Triton kernel that keeps no places; import it only where Triton is.

PyTorch's also writes, for every result, where it came from, in eight bytes, whether or not a gradient will be wanted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 32


@triton.jit
def _pool(
    x_at, out_at, height, width, out_height, out_width, count, channels: tl.constexpr, block: tl.constexpr,
    pixels: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * pixels + tl.arange(0, pixels)
    column, row = place % out_width, place // out_width % out_height
    image = (place // out_width // out_height).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = (place < count)[:, None] & (channel < channels)[None, :]
    largest = tl.full([pixels, block], float('-inf'), x_at.dtype.element_ty)
    for step in tl.static_range(9):
        y, x = 2 * row + (step // 3 - 1), 2 * column + (step % 3 - 1)
        seen = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        source = ((image * height + y) * width + x)[:, None] * channels + channel[None, :]
        values = tl.load(x_at + source, mask=seen[:, None] & inside, other=float('-inf'))
        largest = tl.maximum(largest, values, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_at + place.to(tl.int64)[:, None] * channels + channel[None, :], largest, mask=inside)


def max_pool(x: Tensor) -> Tensor:
    """x [n, C, H, W], channels last in memory -> [n, C, ceil(H / 2), ceil(W / 2)], likewise; without gradients."""
    images, channels, height, width = x.shape
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    out = torch.empty((images, out_height, out_width, channels), dtype=x.dtype, device=x.device)
    count, block = images * out_height * out_width, min(64, triton.next_power_of_2(channels))
    grid = triton.cdiv(count, _PIXELS), triton.cdiv(channels, block)
    with torch.cuda.device_of(x):
        _pool[grid](x, out, height, width, out_height, out_width, count, channels=channels, block=block, pixels=_PIXELS)
    return out.permute(0, 3, 1, 2)
