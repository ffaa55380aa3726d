"""The encoder's Triton kernels, which save passes over memory; import it only where Triton is.

Input: jitter, normalisation and padding in one kernel. A pixel is read as three bytes and written once, in the type
that the backbone computes in and with its channels last. PyTorch's operators make some forty passes over float32
images in training, seven in inference.

Backward pass of bias and ReLU: gradient and result of a convolution are read once, what goes through the ReLU is
written, and that is summed over the pixels for the bias. Partial sums are added up in a second step, in a fixed
order.

The stem: squares of 2x2 pixels as pixels of 16 channels, with the convolution's padding around them; at inference the
convolution over them, ReLU and pooling are one kernel.

FPN: a bias is added, and a coarser level, in one pass each over a level where it lies; and a gradient of a level is
summed up for the coarser one. PyTorch's operators, for which these are not contiguous, take two to four times as long.

Max pooling 3x3 with stride 2 that keeps no places: PyTorch's also writes, for every result, where it came from, in
eight bytes, whether or not a gradient will be wanted.

The end of a bottleneck of the ResNet at inference is one kernel where it is narrow: its last convolution, the shortcut
or the shortcut's projection, and the ReLU. cuDNN takes half as long again for it.

The FPN at inference: a level's 1x1 convolution, its bias and the level above are one kernel; the bias of its result
is added on the way to where the maps of frames are stored.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # pixels of the input
_ROWS, _COLUMNS, _STEPS = 32, 64, 16  # of the backward pass
_PIXELS = 32  # of pooling
_SQUARES = 64
_PREPARED = 128  # squares per program
_POOLED = dict(rows=16, block=32, stages=3, num_warps=4)  # of what the first convolution leaves, per program
_FINISHED = 64  # channels of a block's result at a time
_PROJECTED, _PASSED_ON = dict(rows=128, num_warps=8), dict(rows=64, num_warps=4)  # pixels per program
_STORED = 4096  # values per program
_FEW = 132  # programs; fewer leave some of an H100 idle
_LARGE = dict(rows=64, columns=128, stages=3, num_warps=4)  # of the FPN's largest level, per program
_LEVEL_PIXELS, _LEVEL_CHANNELS = 16, 256  # of levels of the FPN


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


@triton.jit
def _normalise(corner, settings_at, seen, width, plane, channel: tl.constexpr, to_rgb: tl.constexpr):
    """One of twelve channels of squares; float32, zero where nothing is seen."""
    colour: tl.constexpr = channel % 3
    source: tl.constexpr = 2 - colour if to_rgb else colour
    values = tl.load(corner + (source * plane + channel // 6 * width + channel // 3 % 2), mask=seen, other=0)
    values = values.to(tl.float32)
    deviation = tl.load(settings_at + 3 + colour) + tl.zeros_like(values)
    return tl.where(seen, tl.div_rn(values - tl.load(settings_at + colour), deviation), 0.0)


@triton.jit
def _prepare_squares(
    images_at, settings_at, out_at, height, width, rows, columns, count, to_rgb: tl.constexpr, squares: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0) * squares + tl.arange(0, squares)
    image, plane = (place // columns // rows).to(tl.int64), height * width
    y, x = 2 * (place // columns % rows - 2), 2 * (place % columns - 2)
    corner = images_at + (image * (3 * plane) + y * width + x)
    upper, lower = (y >= 0) & (y < height) & (place < count), (y >= -1) & (y < height - 1) & (place < count)
    left, right = (x >= 0) & (x < width), (x >= -1) & (x < width - 1)
    s00, s01, s10, s11 = upper & left, upper & right, lower & left, lower & right
    v0 = _normalise(corner, settings_at, s00, width, plane, 0, to_rgb)
    v1 = _normalise(corner, settings_at, s00, width, plane, 1, to_rgb)
    v2 = _normalise(corner, settings_at, s00, width, plane, 2, to_rgb)
    v3 = _normalise(corner, settings_at, s01, width, plane, 3, to_rgb)
    v4 = _normalise(corner, settings_at, s01, width, plane, 4, to_rgb)
    v5 = _normalise(corner, settings_at, s01, width, plane, 5, to_rgb)
    v6 = _normalise(corner, settings_at, s10, width, plane, 6, to_rgb)
    v7 = _normalise(corner, settings_at, s10, width, plane, 7, to_rgb)
    v8 = _normalise(corner, settings_at, s10, width, plane, 8, to_rgb)
    v9 = _normalise(corner, settings_at, s11, width, plane, 9, to_rgb)
    v10 = _normalise(corner, settings_at, s11, width, plane, 10, to_rgb)
    v11 = _normalise(corner, settings_at, s11, width, plane, 11, to_rgb)
    zero = tl.zeros_like(v0)
    even = tl.join(tl.join(tl.join(v0, v8), tl.join(v4, zero)), tl.join(tl.join(v2, v10), tl.join(v6, zero)))
    odd = tl.join(tl.join(tl.join(v1, v9), tl.join(v5, zero)), tl.join(tl.join(v3, v11), tl.join(v7, zero)))
    values = tl.reshape(
        tl.join(even, odd), [squares, 16]
    )  # by the channel's bits, of which the highest was joined first
    out = out_at + place.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out, values.to(out_at.dtype.element_ty), mask=(place < count)[:, None])


def can_prepare_squares() -> bool:
    """Whether Triton has what :func:`prepare_squares` needs, as it does from 3.0 on."""
    return hasattr(tl, 'join')


def prepare_squares(images: Tensor, settings: Tensor, sizes: InputSizes, to_rgb: bool, dtype: torch.dtype) -> Tensor:
    """``gather_squares`` of what :func:`prepare_images` makes of these arguments without jitter, in one pass."""
    rows, columns = sizes.padded_height // 2 + 3, sizes.padded_width // 2 + 3
    out = torch.empty((len(images), rows, columns, 16), dtype=dtype, device=images.device)
    count = len(images) * rows * columns
    with torch.cuda.device_of(images):
        _prepare_squares[(triton.cdiv(count, _PREPARED),)](
            images, settings, out, sizes.height, sizes.width, rows, columns, count, to_rgb=to_rgb, squares=_PREPARED
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _multiply_matrices(left_at, right_at, out_at, count, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    start, row, column = place // 16 * 16, place // 4 % 4, place % 4
    total = tl.zeros([block], tl.float64)
    for step in tl.static_range(4):
        left = tl.load(left_at + start + row * 4 + step, mask=inside, other=0.0).to(tl.float64)
        total += left * tl.load(right_at + start + step * 4 + column, mask=inside, other=0.0).to(tl.float64)
    tl.store(out_at + place, total.to(tl.float32), mask=inside)


def multiply_matrices(left: Tensor, right: Tensor) -> Tensor:
    """float32 or float64 [..., 4, 4] each, of one shape -> float32, computed in float64."""
    out = torch.empty(left.shape, dtype=torch.float32, device=left.device)
    with torch.cuda.device_of(left):
        _multiply_matrices[(triton.cdiv(left.numel(), 256),)](
            left.contiguous(), right.contiguous(), out, left.numel(), block=256
        )
    return out


@triton.jit
def _gather_squares(images_at, out_at, height, width, rows, columns, count, squares: tl.constexpr):
    place = tl.program_id(0) * squares + tl.arange(0, squares)
    channel = tl.arange(0, 16)
    column, row, image = place % columns, place // columns % rows, place // columns // rows
    y = 2 * (row[:, None] - 2) + channel[None, :] // 6
    x = 2 * (column[:, None] - 2) + channel[None, :] // 3 % 2
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (channel < 12)[None, :] & (place < count)[:, None]
    source = ((image[:, None] * height + y) * width + x) * 3 + channel[None, :] % 3
    values = tl.load(images_at + source, mask=inside, other=0.0)
    tl.store(out_at + place[:, None] * 16 + channel[None, :], values, mask=(place < count)[:, None])


def gather_squares(images: Tensor) -> Tensor:
    """``models.encoder.fused.squares_of`` images [n, 3, H, W], channels last in memory; without gradients."""
    number, _, height, width = images.shape
    rows, columns = height // 2 + 3, width // 2 + 3
    out = torch.empty((number, rows, columns, 16), dtype=images.dtype, device=images.device)
    count = number * rows * columns
    with torch.cuda.device_of(images):
        _gather_squares[(triton.cdiv(count, _SQUARES),)](
            images, out, height, width, rows, columns, count, squares=_SQUARES
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _rectify(total, bias, seen, kind: tl.constexpr):
    return tl.where(seen, tl.maximum(total + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0).to(kind)


@triton.jit
def _larger(values, others):
    return tl.maximum(values, others, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _convolve_and_pool(
    squares_at, weight_at, bias_at, out_at, height, width, out_height, out_width,
    channels: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    kind = out_at.dtype.element_ty
    image, top = tl.program_id(2), tl.program_id(1) * rows
    left = tl.program_id(0) * (block - 1) - 1  # the first column is there for the odd one that its neighbour needs
    place, tap, channel = tl.arange(0, 2 * block), tl.arange(0, 64), tl.arange(0, channels)
    x = 2 * (left + place % block) + place // block  # even columns, then odd ones
    weight = weight_at + channel[None, :] * 256 + tap[:, None]  # four squares of 16 channels side by side
    w0, w1, w2, w3 = tl.load(weight), tl.load(weight + 64), tl.load(weight + 128), tl.load(weight + 192)
    bias = tl.load(bias_at + channel).to(tl.float32)
    inside, line = ((x >= 0) & (x < width))[:, None], (width + 3) * 16
    start = squares_at + (image * (height + 3)).to(tl.int64) * line + x[:, None] * 16 + tap[None, :]
    zero = tl.zeros([2 * block, channels], tl.float32)
    sum1, sum2, sum3, before = zero, zero, zero, zero.to(kind)  # results of the next three lines; the last one
    column = left + tl.arange(0, block)
    shown = ((tl.arange(0, block) > 0) & (column < out_width))[:, None]
    previous = tl.maximum(tl.arange(0, block) - 1, 0)[:, None] + tl.zeros([block, channels], tl.int32)
    for step in tl.range(0, rows + 2, num_stages=stages):
        first = 2 * (top + step) - 1  # line of squares; four of them end a line of results, the lowest of these lines
        values = tl.load(start + first * line, mask=inside & (first >= 0) & (first < height + 3), other=0.0)
        done, sum1 = tl.dot(values, w3, sum1), tl.dot(values, w2, sum2)
        sum2, sum3 = tl.dot(values, w1, sum3), tl.dot(values, w0)
        upper = _rectify(done, bias, inside & (first >= 3) & (first < height + 3), kind)
        values = tl.load(start + (first + 1) * line, mask=inside & (first + 1 < height + 3), other=0.0)
        done, sum1 = tl.dot(values, w3, sum1), tl.dot(values, w2, sum2)
        sum2, sum3 = tl.dot(values, w1, sum3), tl.dot(values, w0)
        lower = _rectify(done, bias, inside & (first >= 2) & (first < height + 2), kind)
        largest = _larger(_larger(upper, lower), before)
        before = lower
        even, odd = tl.split(tl.permute(tl.reshape(largest, [2, block, channels]), (1, 2, 0)))
        largest = _larger(_larger(even, odd), tl.gather(odd, previous, 0))
        row = top + step - 2
        out = out_at + ((image * out_height + row) * out_width + column).to(tl.int64)[:, None] * channels
        tl.store(out + channel[None, :], largest, mask=shown & (step >= 2) & (row < out_height))


def can_convolve_and_pool(squares: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve_and_pool` serves: in half precision, on GPUs whose tensor cores read shared memory."""
    halves = squares.dtype in (torch.float16, torch.bfloat16) and len(weight) in (16, 32, 64)
    is_recent = hasattr(tl, 'gather') and torch.cuda.get_device_capability(squares.device)[0] == 9
    return halves and is_recent


def convolve_and_pool(squares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The stem's convolution over ``squares_of`` images, ReLU and max pooling 3x3 with stride 2; without gradients.

    A program goes down some lines of its columns. A line of squares is read once, for the sums of four lines of
    results, of which only what pooling leaves is written.

    Args:
        squares: float16 or bfloat16 [n, 16, H + 3, W + 3], channels last.
        weight: ``squared_weight`` [C, 16, 4, 4], channels last, of the same type; C is 16, 32 or 64.
        bias: [C].

    Returns:
        [n, C, ceil(H / 2), ceil(W / 2)], channels last.
    """
    count, _, height, width = squares.shape
    height, width, channels = height - 3, width - 3, len(weight)
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    out = torch.empty((count, out_height, out_width, channels), dtype=squares.dtype, device=squares.device)
    grid = triton.cdiv(out_width, _POOLED['block'] - 1), triton.cdiv(out_height, _POOLED['rows']), count
    with torch.cuda.device_of(squares):
        _convolve_and_pool[grid](
            squares, weight, bias, out, height, width, out_height, out_width, channels=channels, **_POOLED
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _relu_backward(
    grad_at,
    other_at,
    result_at,
    out_at,
    sums_at,
    pixels,
    channels,
    has_other: tl.constexpr,
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
        if has_other:
            other = tl.load(other_at + places, mask=inside, other=0.0)
            grad = (grad.to(tl.float32) + other.to(tl.float32)).to(grad.dtype)
        grad = tl.where(result <= 0.0, 0.0, grad)
        tl.store(out_at + places, grad, mask=inside)
        total += grad.to(tl.float32)
    sums = sums_at + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(sums, tl.sum(total, 0), mask=channel < channels)


def relu_backward(result: Tensor, grad: Tensor, other: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """What of a gradient, or of the sum of two, goes through the ReLU, and its sum per channel.

    Args:
        result, grad, other: [n, C, H, W], channels last in memory, of one type.

    Returns:
        like ``grad``; [C] in the same type.
    """
    count, channels, height, width = result.shape
    pixels = count * height * width
    out = torch.empty_like(result)
    blocks = triton.cdiv(pixels, _ROWS * _STEPS)
    sums = torch.empty(blocks, channels, dtype=torch.float32, device=grad.device)
    grid = blocks, triton.cdiv(channels, _COLUMNS)
    given = grad, grad if other is None else other
    with torch.cuda.device_of(grad):
        _relu_backward[grid](
            *given, result, out, sums, pixels, channels,
            has_other=other is not None, rows=_ROWS, columns=_COLUMNS, steps=_STEPS,
        )  # fmt: skip
    return out, sums.sum(0).to(grad.dtype)


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


@triton.jit
def _finish_block(
    x_at, expand_at, bias_at, source_at, project_at, out_at, pixels, height, width, source_height, source_width,
    depth: tl.constexpr, wide: tl.constexpr, source_depth: tl.constexpr, stride: tl.constexpr, projects: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * rows + tl.arange(0, rows)
    known, pixel = (number < pixels)[:, None], number.to(tl.int64)[:, None]
    feature = tl.arange(0, depth)
    x = tl.load(x_at + pixel * depth + feature[None, :], mask=known, other=0.0)
    row, column = number // width % height, number % width
    source = number // width // height * (source_height * source_width)
    source = (source + row * (stride * source_width) + column * stride).to(tl.int64)[:, None]
    for first in tl.range(0, wide, columns, num_stages=2):
        at = first + tl.arange(0, columns)
        values = tl.dot(x, tl.load(expand_at + at[None, :] * depth + feature[:, None]))
        if projects:
            for start in tl.static_range(0, source_depth, inner):
                place = start + tl.arange(0, inner)
                part = tl.load(source_at + source * source_depth + place[None, :], mask=known, other=0.0)
                values += tl.dot(part, tl.load(project_at + at[None, :] * source_depth + place[:, None]))
        else:
            values += tl.load(source_at + pixel * wide + at[None, :], mask=known, other=0.0).to(tl.float32)
        values += tl.load(bias_at + at).to(tl.float32)[None, :]
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_at + pixel * wide + at[None, :], values.to(x.dtype), mask=known)


def can_finish(depth: int, wide: int, source_depth: int) -> bool:
    """Whether :func:`finish_block` has room for these numbers of channels; the last is 0 without a projection."""
    powers = all(n == 0 or n >= 16 and n & (n - 1) == 0 for n in (depth, source_depth))
    return hasattr(tl, 'range') and powers and max(depth, source_depth) <= _FINISHED and wide % _FINISHED == 0


def finish_block(x: Tensor, expand: Tensor, bias: Tensor, source: Tensor, project: Optional[Tensor]) -> Tensor:
    """The end of a bottleneck: ReLU(expand(x) + bias + source), or with project(source) in the place of source.

    Args:
        x: [n, C, H, W], float16 or bfloat16, channels last, as all maps are here.
        expand, bias: [C', C, 1, 1] and [C'].
        source: [n, C', H, W], or what is projected, [n, C'', s * H, s * W] for a stride s.
        project: [C', C'', 1, 1].

    Returns:
        [n, C', H, W], channels last.
    """
    count, depth, height, width = x.shape
    pixels, wide, source_depth = count * height * width, len(expand), source.shape[1]
    out = torch.empty((count, height, width, wide), dtype=x.dtype, device=x.device)
    sizes = _PASSED_ON if project is None else _PROJECTED
    with torch.cuda.device_of(x):
        _finish_block[(triton.cdiv(pixels, sizes['rows']),)](
            x,
            expand.flatten(1).contiguous(),
            bias,
            source,
            x if project is None else project.flatten(1).contiguous(),
            out,
            pixels,
            height,
            width,
            *source.shape[2:],
            depth=depth,
            wide=wide,
            source_depth=source_depth,
            stride=-(-source.shape[3] // width),
            projects=project is not None,
            inner=min(64, source_depth),
            columns=_FINISHED,
            **sizes,
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _merge_level(
    stage_at, weight_at, bias_at, coarse_at, out_at, pixels, height, width, depth, channels,
    rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    known = pixel < pixels
    start = pixel.to(tl.int64) * depth
    total = tl.zeros([rows, columns], tl.float32)
    for first in range(0, depth, inner):
        feature = first + tl.arange(0, inner)
        seen = known[:, None] & (feature < depth)[None, :]
        left = tl.load(stage_at + start[:, None] + feature[None, :], mask=seen, other=0.0)
        seen = (feature < depth)[:, None] & (channel < channels)[None, :]
        right = tl.load(weight_at + channel[None, :] * depth + feature[:, None], mask=seen, other=0.0)
        total += tl.dot(left, right)
    total += tl.load(bias_at + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    inside = known[:, None] & (channel < channels)[None, :]
    image, row, column = pixel // width // height, pixel // width % height, pixel % width
    nearest = (image * (height // 2) + row // 2) * (width // 2) + column // 2
    places = nearest.to(tl.int64)[:, None] * channels + channel[None, :]
    total += tl.load(coarse_at + places, mask=inside, other=0.0).to(tl.float32)
    places = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_at + places, total.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _merge_large_level(
    stage_at, weight_at, bias_at, coarse_at, out_at, pixels, height, width, channels, programs,
    depth: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    feature, pair, own = tl.arange(0, depth), tl.arange(0, rows // 2), tl.arange(0, rows)
    weight = tl.load(weight_at + channel[None, :] * depth + feature[:, None])
    bias = tl.load(bias_at + channel).to(tl.float32)
    picks = (own[:, None] // 2 == pair[None, :]).to(stage_at.dtype.element_ty)  # pixels of a pair share the one above
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, rows), programs, num_stages=stages):
        pixel, first = tile * rows + own, tile * rows + 2 * pair
        known = (pixel < pixels)[:, None]
        values = tl.load(stage_at + pixel.to(tl.int64)[:, None] * depth + feature[None, :], mask=known, other=0.0)
        image, row, column = first // width // height, first // width % height, first % width
        nearest = ((image * (height // 2) + row // 2) * (width // 2) + column // 2).to(tl.int64)[:, None]
        above = coarse_at + nearest * channels + channel[None, :]
        total = tl.dot(picks, tl.load(above, mask=(first < pixels)[:, None], other=0.0), tl.dot(values, weight))
        total += bias[None, :]
        out = out_at + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(out, total.to(out_at.dtype.element_ty), mask=known)


def merge_level(stage: Tensor, weight: Tensor, bias: Tensor, coarse: Tensor) -> Tensor:
    """1x1 convolution of a stage, plus bias, plus the level above enlarged by its nearest values.

    Args:
        stage: float16 or bfloat16 [n, C_in, H, W], channels last.
        weight: [C, C_in], contiguous, of the same type.
        bias: [C].
        coarse: [n, C, H/2, W/2], channels last.

    Returns:
        [n, C, H, W], channels last.
    """
    count, depth, height, width = stage.shape
    channels, pixels = len(weight), count * height * width
    hopper = stage.is_cuda and torch.cuda.get_device_capability(stage.device)[0] == 9
    if hopper and can_merge_large(pixels, depth, channels):
        return merge_large_level(stage, weight, bias, coarse)
    out = torch.empty((count, height, width, channels), dtype=stage.dtype, device=stage.device)
    columns = max(16, triton.next_power_of_2(channels))
    if not hopper:
        sizes = dict(rows=64, columns=min(256, columns), num_warps=4, num_stages=2)
    elif triton.cdiv(pixels, 128) < _FEW:
        sizes = dict(rows=64, columns=min(128, columns), num_warps=4, num_stages=4)
    else:
        sizes = dict(rows=128, columns=min(256, columns), num_warps=8, num_stages=4)
    grid = triton.cdiv(pixels, sizes['rows']), triton.cdiv(channels, sizes['columns'])
    with torch.cuda.device_of(stage):
        _merge_level[grid](stage, weight, bias, coarse, out, pixels, height, width, depth, channels, inner=64, **sizes)
    return out.permute(0, 3, 1, 2)


def can_merge_large(pixels: int, depth: int, channels: int) -> bool:
    """Whether :func:`merge_large_level` serves, on GPUs whose shared memory holds its part of the weights."""
    many = pixels >= _FEW * _LARGE['rows'] and hasattr(tl, 'range')
    return many and depth in (16, 32, 64, 128, 256) and channels % _LARGE['columns'] == 0


def merge_large_level(stage: Tensor, weight: Tensor, bias: Tensor, coarse: Tensor) -> Tensor:
    """:func:`merge_level` by programs that keep their part of the weights and go over the pixels.

    Read for every few pixels, as there, the weights take longer than the pixels of a large level.
    """
    count, depth, height, width = stage.shape
    channels, pixels = len(weight), count * height * width
    out = torch.empty((count, height, width, channels), dtype=stage.dtype, device=stage.device)
    parts = channels // _LARGE['columns']
    programs = max(1, _FEW // parts)
    with torch.cuda.device_of(stage):
        _merge_large_level[(programs, parts)](
            stage, weight, bias, coarse, out, pixels, height, width, channels, programs, depth=depth, **_LARGE
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _store_level(level_at, bias_at, stored_at, slots_at, count, channels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    frame = tl.program_id(1).to(tl.int64)
    values = tl.load(level_at + frame * count + place, mask=place < count, other=0.0).to(tl.float32)
    values += tl.load(bias_at + place % channels).to(tl.float32)
    to = stored_at + tl.load(slots_at + frame) * count + place
    tl.store(to, values.to(stored_at.dtype.element_ty), mask=place < count)


def store_level(level: Tensor, bias: Tensor, stored: Tensor, slots: Tensor) -> None:
    """stored[slots] = level + bias.

    Args:
        level: [F*N, C, H, W], channels last.
        bias: [C].
        stored: [S, N, H, W, C], contiguous; may be of another type.
        slots: int64 [F], 0..S-1.
    """
    count = stored[0].numel()
    with torch.cuda.device_of(level):
        _store_level[(triton.cdiv(count, _STORED), len(slots))](
            level, bias, stored, slots, count, channels=level.shape[1], block=_STORED, num_warps=8
        )


@triton.jit
def _add_to_level(
    level_at, coarse_at, bias_at, count, height, width, channels,
    has_coarse: tl.constexpr, has_bias: tl.constexpr, pixels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * pixels + tl.arange(0, pixels)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = (place < count)[:, None] & (channel < channels)[None, :]
    at = level_at + place.to(tl.int64)[:, None] * channels + channel[None, :]
    level = tl.load(at, mask=inside, other=0.0)
    added = tl.zeros([pixels, block], level.dtype)
    if has_coarse:
        column, row, image = place % width, place // width % height, place // width // height
        source = (image * (height // 2) + row // 2) * (width // 2) + column // 2
        added = tl.load(coarse_at + source.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    if has_bias:
        bias = tl.load(bias_at + channel, mask=channel < channels, other=0.0)
        added = (added.to(tl.float32) + bias.to(tl.float32)[None, :]).to(level.dtype)
    tl.store(at, (level.to(tl.float32) + added.to(tl.float32)).to(level.dtype), mask=inside)


def add_to_level(level: Tensor, coarse: Optional[Tensor], bias: Optional[Tensor]) -> Tensor:
    """Adds a coarser level at twice its size, and a bias, to a level where it lies; the two's sum is rounded first.

    Args:
        level: [n, C, H, W], channels last in memory; overwritten.
        coarse: [n, C, H/2, W/2], likewise, or None.
        bias: [C], or None.

    Returns:
        level.
    """
    images, channels, height, width = level.shape
    count = images * height * width
    grid = triton.cdiv(count, _LEVEL_PIXELS), triton.cdiv(channels, _LEVEL_CHANNELS)
    given = level if coarse is None else coarse, level if bias is None else bias
    with torch.cuda.device_of(level):
        _add_to_level[grid](
            level, *given, count, height, width, channels,
            has_coarse=coarse is not None, has_bias=bias is not None, pixels=_LEVEL_PIXELS, block=_LEVEL_CHANNELS,
        )  # fmt: skip
    return level


@triton.jit
def _sum_squares(grad_at, out_at, count, height, width, channels, pixels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * pixels + tl.arange(0, pixels)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = (place < count)[:, None] & (channel < channels)[None, :]
    column, row, image = place % width, place // width % height, place // width // height
    total = tl.zeros([pixels, block], tl.float32)
    for step in tl.static_range(4):
        source = (image * (2 * height) + 2 * row + step // 2) * (2 * width) + 2 * column + step % 2
        values = tl.load(grad_at + source.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        total += values.to(tl.float32)
    kind = out_at.dtype.element_ty
    tl.store(out_at + place.to(tl.int64)[:, None] * channels + channel[None, :], total.to(kind), mask=inside)


def sum_squares(grad: Tensor) -> Tensor:
    """Sums of 2x2 pixels: [n, C, H, W], channels last in memory, H and W even -> [n, C, H/2, W/2], likewise."""
    images, channels, height, width = grad.shape
    out = torch.empty((images, height // 2, width // 2, channels), dtype=grad.dtype, device=grad.device)
    count = images * (height // 2) * (width // 2)
    grid = triton.cdiv(count, _LEVEL_PIXELS), triton.cdiv(channels, _LEVEL_CHANNELS)
    with torch.cuda.device_of(grad):
        _sum_squares[grid](
            grad, out, count, height // 2, width // 2, channels, pixels=_LEVEL_PIXELS, block=_LEVEL_CHANNELS
        )
    return out.permute(0, 3, 1, 2)
