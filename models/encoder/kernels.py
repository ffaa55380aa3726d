"""The encoder's Triton kernels, which save passes over memory; import it only where Triton is.

Input: jitter, normalisation and padding in one kernel. A pixel is read as three bytes and written once, in the type
that the backbone computes in and with its channels last. PyTorch's operators make some forty passes over float32
images in training, seven in inference.

Backward pass of bias and ReLU: gradient and result of a convolution are read once, what goes through the ReLU is
written, and that is summed over the pixels for the bias. Partial sums are added up in a second step, in a fixed
order.

The stem's input: squares of 2x2 pixels as pixels of 16 channels, with the convolution's padding around them.

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
_COLUMNS_OF_SQUARES = 64  # of the first convolution, per program
_FINISHED = dict(rows=128, columns=64, num_warps=8, num_stages=2)  # pixels, and channels of the result at a time
_STORED = 4096  # values per program
_FEW = 132  # programs that leave some of a GPU idle
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
def _prepare_squares(
    images_at, settings_at, out_at, height, width, rows, columns, count, to_rgb: tl.constexpr, squares: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0) * squares + tl.arange(0, squares)
    channel = tl.arange(0, 16)
    column, row, image = place % columns, place // columns % rows, place // columns // rows
    y = 2 * (row[:, None] - 2) + channel[None, :] // 6
    x = 2 * (column[:, None] - 2) + channel[None, :] // 3 % 2
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (channel < 12)[None, :] & (place < count)[:, None]
    colour = channel % 3
    plane = 2 - colour if to_rgb else colour
    source = ((image.to(tl.int64)[:, None] * 3 + plane[None, :]) * height + y) * width + x
    values = tl.load(images_at + source, mask=inside, other=0).to(tl.float32)
    deviation = tl.load(settings_at + 3 + colour)[None, :] + tl.zeros([squares, 16], tl.float32)
    values = tl.div_rn(values - tl.load(settings_at + colour)[None, :], deviation)
    values = tl.where(inside, values, 0.0).to(out_at.dtype.element_ty)
    tl.store(out_at + place.to(tl.int64)[:, None] * 16 + channel[None, :], values, mask=(place < count)[:, None])


def prepare_squares(images: Tensor, settings: Tensor, sizes: InputSizes, to_rgb: bool, dtype: torch.dtype) -> Tensor:
    """``gather_squares`` of what :func:`prepare_images` makes of these arguments without jitter, in one pass."""
    rows, columns = sizes.padded_height // 2 + 3, sizes.padded_width // 2 + 3
    out = torch.empty((len(images), rows, columns, 16), dtype=dtype, device=images.device)
    count = len(images) * rows * columns
    with torch.cuda.device_of(images):
        _prepare_squares[(triton.cdiv(count, _SQUARES),)](
            images, settings, out, sizes.height, sizes.width, rows, columns, count, to_rgb=to_rgb, squares=_SQUARES
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
def _store_row(total, bias, out_at, place, channel, seen, channels):
    values = tl.maximum(total + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = out_at + place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out, values.to(out_at.dtype.element_ty), mask=seen[:, None])


@triton.jit
def _convolve_squares(
    squares_at, weight_at, bias_at, out_at, height, width, channels: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * block + tl.arange(0, block)
    first, image = tl.program_id(1) * 4, tl.program_id(2)
    tap, channel = tl.arange(0, 64), tl.arange(0, channels)  # four squares of 16 channels side by side
    weight = weight_at + channel[None, :] * 256 + tap[:, None]
    w0, w1, w2, w3 = tl.load(weight), tl.load(weight + 64), tl.load(weight + 128), tl.load(weight + 192)
    line = (width + 3) * 16
    start = squares_at + (image * (height + 3) + first).to(tl.int64) * line + column[:, None] * 16 + tap[None, :]
    seen, left = column < width, height + 3 - first  # lines there are
    known = seen[:, None]
    values = tl.load(start, mask=known, other=0.0)
    sum0 = tl.dot(values, w0)
    values = tl.load(start + line, mask=known, other=0.0)
    sum0 += tl.dot(values, w1)
    sum1 = tl.dot(values, w0)
    values = tl.load(start + 2 * line, mask=known, other=0.0)
    sum0 += tl.dot(values, w2)
    sum1 += tl.dot(values, w1)
    sum2 = tl.dot(values, w0)
    values = tl.load(start + 3 * line, mask=known, other=0.0)
    sum0 += tl.dot(values, w3)
    sum1 += tl.dot(values, w2)
    sum2 += tl.dot(values, w1)
    sum3 = tl.dot(values, w0)
    values = tl.load(start + 4 * line, mask=known & (left > 4), other=0.0)
    sum1 += tl.dot(values, w3)
    sum2 += tl.dot(values, w2)
    sum3 += tl.dot(values, w1)
    values = tl.load(start + 5 * line, mask=known & (left > 5), other=0.0)
    sum2 += tl.dot(values, w3)
    sum3 += tl.dot(values, w2)
    values = tl.load(start + 6 * line, mask=known & (left > 6), other=0.0)
    sum3 += tl.dot(values, w3)
    bias = tl.load(bias_at + channel).to(tl.float32)
    place = (image * height + first) * width + column
    _store_row(sum0, bias, out_at, place, channel, seen, channels)
    _store_row(sum1, bias, out_at, place + width, channel, seen & (left > 4), channels)
    _store_row(sum2, bias, out_at, place + 2 * width, channel, seen & (left > 5), channels)
    _store_row(sum3, bias, out_at, place + 3 * width, channel, seen & (left > 6), channels)


def can_convolve_squares(squares: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve_squares` serves: in half precision, on GPUs whose tensor cores read shared memory."""
    halves = squares.dtype in (torch.float16, torch.bfloat16) and len(weight) in (16, 32, 64)
    return halves and torch.cuda.get_device_capability(squares.device)[0] == 9


def convolve_squares(squares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The stem's convolution over ``squares_of`` images, and ReLU; without gradients.

    Four lines of results read seven of squares, so that most of what is read comes once.

    Args:
        squares: float16 or bfloat16 [n, 16, H + 3, W + 3], channels last.
        weight: ``squared_weight`` [C, 16, 4, 4], channels last, of the same type; C is 16, 32 or 64.
        bias: [C].

    Returns:
        [n, C, H, W], channels last.
    """
    count, _, height, width = squares.shape
    height, width, channels = height - 3, width - 3, len(weight)
    out = torch.empty((count, height, width, channels), dtype=squares.dtype, device=squares.device)
    grid = triton.cdiv(width, _COLUMNS_OF_SQUARES), triton.cdiv(height, 4), count
    with torch.cuda.device_of(squares):
        _convolve_squares[grid](
            squares, weight, bias, out, height, width, channels=channels, block=_COLUMNS_OF_SQUARES, num_warps=4
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
    for first in range(0, wide, columns):
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
    return powers and max(depth, source_depth) <= _FINISHED['columns'] and wide % _FINISHED['columns'] == 0


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
    with torch.cuda.device_of(x):
        _finish_block[(triton.cdiv(pixels, _FINISHED['rows']),)](
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
            **_FINISHED,
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _merge_level(
    stage_at, weight_at, bias_at, coarse_at, out_at, pixels, height, width, depth, channels,
    adds: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr,
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
    if adds:
        image, row, column = pixel // width // height, pixel // width % height, pixel % width
        nearest = (image * (height // 2) + row // 2) * (width // 2) + column // 2
        places = nearest.to(tl.int64)[:, None] * channels + channel[None, :]
        total += tl.load(coarse_at + places, mask=inside, other=0.0).to(tl.float32)
    places = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_at + places, total.to(out_at.dtype.element_ty), mask=inside)


def merge_level(stage: Tensor, weight: Tensor, bias: Tensor, coarse: Optional[Tensor]) -> Tensor:
    """1x1 convolution of a stage, plus bias, plus the level above enlarged by its nearest values.

    Args:
        stage: float16 or bfloat16 [n, C_in, H, W], channels last.
        weight: [C, C_in], contiguous, of the same type.
        bias: [C].
        coarse: [n, C, H/2, W/2], channels last; None: there is none above.

    Returns:
        [n, C, H, W], channels last.
    """
    count, depth, height, width = stage.shape
    channels, pixels = len(weight), count * height * width
    out = torch.empty((count, height, width, channels), dtype=stage.dtype, device=stage.device)
    sizes = dict(rows=64, columns=min(256, max(16, triton.next_power_of_2(channels))), inner=64, num_warps=4)
    if triton.cdiv(pixels, sizes['rows']) < _FEW:
        sizes.update(columns=min(64, sizes['columns']))
    grid = triton.cdiv(pixels, sizes['rows']), triton.cdiv(channels, sizes['columns'])
    with torch.cuda.device_of(stage):
        _merge_level[grid](
            stage,
            weight,
            bias,
            stage if coarse is None else coarse,
            out,
            pixels,
            height,
            width,
            depth,
            channels,
            adds=coarse is not None,
            num_stages=2,
            **sizes,
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
