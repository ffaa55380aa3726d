"""The decoders' Triton kernels of inference, which save passes and launches; import it only where Triton is.

Between its products a decoder does many small things to its queries: sums, norms, conversions, drawing of voxels,
choice of the best. With PyTorch's operators each is a kernel of some microseconds, most of them spent on starting; at
batch 1 they took longer than the products. Here what follows one product and goes before the next is one kernel.

Shapes: B batch, Q queries, K kept voxels, C channels, n candidates. Sums are in float32.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ROWS = 4  # of a norm, per program
_BINS = 256  # of a digit of a key: 8 of its 32 bits
_KEYS = 1024  # candidates per program
_TAKEN = 32  # voxels per program
_PIECE = 256  # voxels that are counted together
_PIECES = 8  # of them per program
_MERGED = 32  # voxels per program
_MOST_CLASSES, _MOST_QUERIES = 32, 128  # of merging, which holds all of them in registers


# -- norms


@triton.jit
def _normalise_rows(values, inside, weight_at, bias_at, channel, count, eps):
    """LayerNorm over the second axis, with affine."""
    centred = tl.where(inside, values - (tl.sum(values, 1) / count)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / count + eps)
    weight = tl.load(weight_at + channel, mask=channel < count, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + channel, mask=channel < count, other=0.0).to(tl.float32)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _norm(
    x_at, added_at, weight_at, bias_at, after_at, out_at, rows, channels, eps,
    adds: tl.constexpr, positive: tl.constexpr, adds_after: tl.constexpr, block: tl.constexpr, each: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * each + tl.arange(0, each)
    channel = tl.arange(0, block)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    places = row.to(tl.int64)[:, None] * channels + channel[None, :]
    values = tl.load(x_at + places, mask=inside, other=0.0).to(tl.float32)
    if adds:
        values += tl.load(added_at + places, mask=inside, other=0.0).to(tl.float32)
    values = _normalise_rows(values, inside, weight_at, bias_at, channel, channels, eps)
    if positive:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if adds_after:
        values += tl.load(after_at + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + places, values.to(out_at.dtype.element_ty), mask=inside)


def add_and_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
    added: Optional[Tensor] = None,
    positive: bool = False,
    after: Optional[Tensor] = None,
) -> Tensor:
    """LayerNorm(x [+ added]) [, ReLU] [+ after].

    Args:
        x, added, after: [..., C], any float types.
        norm: over C, with affine.
        dtype: of the result.
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    channels = x.shape[-1]
    rows = x.numel() // channels
    with torch.cuda.device_of(x):
        _norm[(triton.cdiv(rows, _ROWS),)](
            x,
            x if added is None else added.contiguous(),
            norm.weight,
            norm.bias,
            x if after is None else after.contiguous(),
            out,
            rows,
            channels,
            norm.eps,
            adds=added is not None,
            positive=positive,
            adds_after=after is not None,
            block=triton.next_power_of_2(channels),
            each=_ROWS,
        )
    return out


# -- products of float32 by TF32


@triton.jit
def _split(values_at, out_at, rows, width, second: tl.constexpr, each: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * each + tl.arange(0, each)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(values_at + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    bits = value.to(tl.uint32, bitcast=True)
    large = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)  # rounded to TF32
    small = value - large
    out = out_at + row[:, None] * (3 * width) + column[None, :]
    tl.store(out, large, mask=inside)
    tl.store(out + width, large if second else small, mask=inside)
    tl.store(out + 2 * width, small if second else large, mask=inside)


def split_for_tf32(values: Tensor, second: bool) -> Tensor:
    """Factors of a product of float32 as those of one of TF32 that is three times as long: large x large, small x
    large and large x small, which is float32 but for what a float32 sum rounds.

    Args:
        values: float32 [rows, n]; the product adds up over n.
        second: of both factors.

    Returns:
        float32 [rows, 3 n].
    """
    values = values.contiguous()
    rows, width = values.shape
    out = torch.empty(rows, 3 * width, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        _split[(triton.cdiv(rows, 8), triton.cdiv(width, 256))](
            values, out, rows, width, second=second, each=8, block=256
        )
    return out


# -- positions and points of blocks


@triton.jit
def _embed(
    coords_at, grid_at, line_at, shift_at, weight_at, bias_at, out_at, corners_at, rows, channels, eps, voxel_size,
    block: tl.constexpr, each: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * each + tl.arange(0, each)
    channel = tl.arange(0, block)
    known, inside = row < rows, (row < rows)[:, None] & (channel < channels)[None, :]
    values = tl.load(shift_at + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    for axis in tl.static_range(3):
        place = tl.load(coords_at + row * 3 + axis, mask=known, other=0).to(tl.float32)
        tl.store(corners_at + row * 3 + axis, place * voxel_size, mask=known)
        line = tl.load(line_at + channel * 3 + axis, mask=channel < channels, other=0.0).to(tl.float32)
        values = values + (place / tl.load(grid_at + axis))[:, None] * line[None, :]
    values = _normalise_rows(values, inside, weight_at, bias_at, channel, channels, eps)
    values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    places = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out_at + places, values.to(out_at.dtype.element_ty), mask=inside)


def embed_positions(
    coords: Tensor, grid: Tensor, linear: nn.Linear, norm: nn.LayerNorm, voxel_size: float, dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """ReLU(LayerNorm(linear(coords / grid))) and corners in metres.

    Args:
        coords: int64 [B, Q, 3], voxel indices of lower corners.
        grid: float32 [3], voxels along each axis.
        linear, norm: 3 -> C, over C.
        voxel_size: edge of a voxel, metres.
        dtype: of the result.

    Returns:
        [B, Q, C]; float32 [B, Q, 3] metres from the corner of the grid.
    """
    coords = coords.contiguous()
    channels = norm.weight.numel()
    rows = coords.numel() // 3
    out = torch.empty(coords.shape[:2] + (channels,), dtype=dtype, device=coords.device)
    corners = torch.empty(coords.shape, dtype=torch.float32, device=coords.device)
    with torch.cuda.device_of(coords):
        _embed[(triton.cdiv(rows, _ROWS),)](
            coords,
            grid,
            linear.weight,
            linear.bias,
            norm.weight,
            norm.bias,
            out,
            corners,
            rows,
            channels,
            norm.eps,
            voxel_size,
            block=triton.next_power_of_2(channels),
            each=_ROWS,
        )
    return out, corners


@triton.jit
def _place(
    corners_at, first_at, asked_at, points_at, levels_at, size, count, offsets, width, block: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    query, number = place // width, place % width
    value = tl.load(asked_at + place, mask=inside, other=0.0).to(tl.float32)
    is_offset = number < offsets
    axis = tl.where(is_offset, number % 3, 0)
    corner = tl.load(corners_at + query * 3 + axis, mask=inside, other=0.0)
    centre = corner + tl.load(first_at + axis) + size / 2
    tl.store(points_at + query * offsets + number, centre + size * value, mask=inside & is_offset)
    tl.store(levels_at + query * (width - offsets) + number - offsets, value, mask=inside & (is_offset == 0))


def place_points(corners: Tensor, first: Tensor, asked: Tensor, size: float, offsets: int) -> Tuple[Tensor, Tensor]:
    """Points around the centres of blocks, and the rest of what queries ask for, in float32.

    Args:
        corners: float32 [B, Q, 3] metres from the corner of the grid.
        first: float32 [3], that corner in the ego frame, metres.
        asked: [B, Q, G*P*3 + n], the first in edges of a block.
        size: edge of a block, metres.
        offsets: G*P*3.

    Returns:
        float32 [B, Q, G*P*3] metres, ego frame; float32 [B, Q, n].
    """
    asked = asked.contiguous()
    width, kind = asked.shape[-1], dict(dtype=torch.float32, device=asked.device)
    points = torch.empty(asked.shape[:2] + (offsets,), **kind)
    levels = torch.empty(asked.shape[:2] + (width - offsets,), **kind)
    with torch.cuda.device_of(asked):
        _place[(triton.cdiv(asked.numel(), 512),)](
            corners.contiguous(), first, asked, points, levels, size, asked.numel(), offsets, width, block=512
        )
    return points, levels


# -- choice of the best children


@triton.jit
def _ordered(score):
    """uint32 keys in the order of float32 scores."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _find_digit(counts_at, wanted, bins: tl.constexpr):
    """The digit at which the counts from the largest down reach what is wanted, and how many are still wanted of it."""
    digit = tl.arange(0, bins)
    counts = tl.load(counts_at + digit)
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts  # with this digit or a larger one
    found = tl.sum((at_least >= wanted).to(tl.int32)) - 1
    above = tl.sum(tl.where(digit > found, counts, 0))
    return found, wanted - above


@triton.jit
def _histogram(digit, inside, bins: tl.constexpr):
    """How often each digit is; earlier releases of Triton count without a mask."""
    counts = tl.histogram(tl.where(inside, digit, 0), bins)
    outside = tl.sum((inside == 0).to(tl.int32))
    return counts - tl.where(tl.arange(0, bins) == 0, outside, 0)


@triton.jit
def _score(
    logits_at, keys_at, candidates, classes, softmaxes: tl.constexpr, width: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < candidates
    if softmaxes:  # 1 - probability of the last class
        column = tl.arange(0, width)
        places = (batch * candidates + row)[:, None] * classes + column[None, :]
        seen = inside[:, None] & (column < classes)[None, :]
        logits = tl.load(logits_at + places, mask=seen, other=float('-inf')).to(tl.float32)
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        free = tl.sum(tl.where(column[None, :] == classes - 1, powers, 0.0), 1)
        score = 1.0 - tl.div_rn(free, tl.sum(powers, 1))
    else:
        score = tl.load(logits_at + batch * candidates + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(keys_at + batch * candidates + row, _ordered(score).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _refine(
    keys_at, counts_at, state_at, candidates, k, step: tl.constexpr, block: tl.constexpr, bins: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < candidates
    key = tl.load(keys_at + batch * candidates + row, mask=inside, other=0).to(tl.uint32, bitcast=True)
    matches = inside
    if step > 0:  # only what has the digits that were found before
        state_at += batch * 8
        prefix, wanted = 0, k
        if step > 1:
            prefix = tl.load(state_at + 2 * step - 4)
            wanted = tl.load(state_at + 2 * step - 3)
        found, wanted = _find_digit(counts_at + (batch * 4 + step - 1) * bins, wanted, bins)
        prefix = prefix * bins + found
        if tl.program_id(0) == 0:
            tl.store(state_at + 2 * step - 2, prefix)
            tl.store(state_at + 2 * step - 1, wanted)
        matches = inside & ((key >> (32 - 8 * step)).to(tl.int32, bitcast=True) == prefix)
    counts = _histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), matches, bins)
    tl.atomic_add(counts_at + (batch * 4 + step) * bins + tl.arange(0, bins), counts, mask=counts > 0, sem='relaxed')


@triton.jit
def _count(
    keys_at, counts_at, state_at, sums_at, candidates, blocks, block: tl.constexpr, bins: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    batch = tl.program_id(1).to(tl.int64)
    state_at += batch * 8
    prefix, wanted = tl.load(state_at + 4), tl.load(state_at + 5)
    found, wanted = _find_digit(counts_at + (batch * 4 + 3) * bins, wanted, bins)
    least = (prefix * bins + found).to(tl.uint32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(state_at + 6, least.to(tl.int32, bitcast=True))
        tl.store(state_at + 7, wanted)
    inside = row < candidates
    key = tl.load(keys_at + batch * candidates + row, mask=inside, other=0).to(tl.uint32, bitcast=True)
    sums = sums_at + (batch * blocks + tl.program_id(0)) * 2
    tl.store(sums, tl.sum((inside & (key > least)).to(tl.int32)))
    tl.store(sums + 1, tl.sum((inside & (key == least)).to(tl.int32)))


@triton.jit
def _list(
    keys_at, state_at, sums_at, index_at, candidates, blocks, k, many: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    batch = tl.program_id(1).to(tl.int64)
    least = tl.load(state_at + batch * 8 + 6).to(tl.uint32, bitcast=True)
    ties = tl.load(state_at + batch * 8 + 7)  # of those that equal the least, the first so many are kept
    earlier = tl.arange(0, many)
    before = earlier < tl.program_id(0)
    sums = sums_at + (batch * blocks + earlier) * 2
    larger_before = tl.sum(tl.load(sums, mask=before, other=0))
    equal_before = tl.sum(tl.load(sums + 1, mask=before, other=0))
    inside = row < candidates
    key = tl.load(keys_at + batch * candidates + row, mask=inside, other=0).to(tl.uint32, bitcast=True)
    larger, equal = (inside & (key > least)).to(tl.int32), (inside & (key == least)).to(tl.int32)
    rank = equal_before + tl.cumsum(equal)  # from 1
    kept = (larger > 0) | ((equal > 0) & (rank <= ties))
    place = larger_before + tl.cumsum(larger) + tl.minimum(rank, ties) - 1
    tl.store(index_at + batch * k + place, row, mask=kept)


def best_in_order(logits: Tensor, k: int, softmaxes: bool) -> Tensor:
    """Indices int32 [B, k] of the k candidates with the largest scores, in index order; of equal ones the first.

    Args:
        logits: [B, n, classes] if softmaxes: the score is 1 - softmax probability of the last class; otherwise
            [B, n, 1], the score itself.
        k: less than n.
    """
    batch, candidates, classes = logits.shape
    logits = logits.contiguous()
    device = logits.device
    blocks = triton.cdiv(candidates, _KEYS)
    keys = torch.empty(batch, candidates, dtype=torch.int32, device=device)
    counts = torch.zeros(batch, 4, _BINS, dtype=torch.int32, device=device)
    state = torch.empty(batch, 4, 2, dtype=torch.int32, device=device)
    sums = torch.empty(batch, blocks, 2, dtype=torch.int32, device=device)
    index = torch.empty(batch, k, dtype=torch.int32, device=device)
    grid, sizes = (blocks, batch), dict(block=_KEYS, bins=_BINS)
    with torch.cuda.device_of(logits):
        width = triton.next_power_of_2(classes)
        each = max(16, 2048 // width) if softmaxes else _KEYS
        scoring = dict(softmaxes=softmaxes, width=width, block=each)
        _score[(triton.cdiv(candidates, each), batch)](logits, keys, candidates, classes, **scoring)
        for step in range(4):
            _refine[grid](keys, counts, state, candidates, k, step=step, **sizes)
        _count[grid](keys, counts, state, sums, candidates, blocks, **sizes)
        many = triton.next_power_of_2(blocks)
        _list[grid](keys, state, sums, index, candidates, blocks, k, many=many, block=_KEYS)
    return index


class Kept(NamedTuple):
    """What is kept of the children of blocks: int64 [B, K, 3], float32 [B, K, classes], [B, K, C]."""

    coords: Tensor
    logits: Tensor
    features: Tensor


@triton.jit
def _take(
    index_at, coords_at, logits_at, features_at, out_coords_at, out_logits_at, out_features_at,
    k, candidates, scale, classes, channels, width: tl.constexpr, block: tl.constexpr, each: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * each + tl.arange(0, each)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < k
    child = tl.load(index_at + batch * k + row, mask=inside, other=0)
    source, target = batch * candidates + child, batch * k + row
    which = child % 8  # the corner, then x, y, z, xy, xz, yz, xyz
    parent = (batch * (candidates // 8) + child // 8) * 3
    for axis in tl.static_range(3):
        moved = (which == axis + 1) | ((which > 3) & (which != 6 - axis))
        place = tl.load(coords_at + parent + axis, mask=inside, other=0) // scale + moved.to(tl.int64)
        tl.store(out_coords_at + target * 3 + axis, place, mask=inside)
    column = tl.arange(0, width)
    seen = inside[:, None] & (column < classes)[None, :]
    logits = tl.load(logits_at + source[:, None] * classes + column[None, :], mask=seen, other=0.0)
    tl.store(out_logits_at + target[:, None] * classes + column[None, :], logits.to(tl.float32), mask=seen)
    channel = tl.arange(0, block)
    seen = inside[:, None] & (channel < channels)[None, :]
    features = tl.load(features_at + source[:, None] * channels + channel[None, :], mask=seen, other=0.0)
    tl.store(out_features_at + target[:, None] * channels + channel[None, :], features, mask=seen)


def take_children(index: Tensor, coords: Tensor, scale: int, logits: Tensor, features: Tensor) -> Kept:
    """The chosen children of blocks.

    Args:
        index: int32 [B, K], child 8 * parent + its number.
        coords: int64 [B, Q, 3], full-resolution lower corners of the parents.
        scale: edge of a child, voxels.
        logits: [B, 8 Q, classes].
        features: [B, 8 Q, C].
    """
    batch, k = index.shape
    candidates, channels, classes = features.shape[1], features.shape[2], logits.shape[2]
    kept = Kept(
        torch.empty(batch, k, 3, dtype=torch.int64, device=index.device),
        torch.empty(batch, k, classes, dtype=torch.float32, device=index.device),
        torch.empty(batch, k, channels, dtype=features.dtype, device=index.device),
    )
    with torch.cuda.device_of(index):
        _take[(triton.cdiv(k, _TAKEN), batch)](
            index,
            coords.contiguous(),
            logits.contiguous(),
            features.contiguous(),
            *kept,
            k,
            candidates,
            scale,
            classes,
            channels,
            width=triton.next_power_of_2(classes),
            block=triton.next_power_of_2(channels),
            each=_TAKEN,
        )
    return kept


# -- drawing of voxels


@triton.jit
def _count_pieces(
    logits_at, counts_at, voxels, pieces, piece: tl.constexpr, each: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0) * each + tl.arange(0, each)
    row = tl.program_id(1).to(tl.int64)
    voxel = number[:, None] * piece + tl.arange(0, piece)[None, :]
    logits = tl.load(logits_at + row * voxels + voxel, mask=voxel < voxels, other=0.0)
    tl.store(counts_at + row * pieces + number, tl.sum((logits > 0.0).to(tl.int32), 1), mask=number < pieces)


@triton.jit
def _draw(
    logits_at, counts_at, fractions_at, anywhere_at, coords_at, asked_at, grid_at, first_at, span_at, points_at,
    levels_at, queries, voxels, pieces, draws, draws_row, rest,
    piece: tl.constexpr, many: tl.constexpr, block: tl.constexpr, others: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // queries
    draw = tl.arange(0, block)
    wanted = draw < draws
    asked_at += row * (3 * draws + rest)
    other = tl.arange(0, others)
    levels = tl.load(asked_at + 3 * draws + other, mask=other < rest, other=0.0).to(tl.float32)
    tl.store(levels_at + row * rest + other, levels, mask=other < rest)
    earlier = tl.arange(0, many)
    counts = tl.load(counts_at + row * pieces + earlier, mask=earlier < pieces, other=0)
    ends, total = tl.cumsum(counts), tl.sum(counts)
    fraction = tl.load(fractions_at + row * draws_row + draw, mask=wanted, other=0.0)
    number = tl.floor(fraction * total.to(tl.float32)).to(tl.int32)
    number = tl.minimum(number, tl.maximum(total - 1, 0)) + 1
    which = tl.sum((ends[None, :] < number[:, None]).to(tl.int32), 1)
    which = tl.minimum(which, pieces - 1)
    before = tl.sum(tl.where(earlier[None, :] < which[:, None], counts[None, :], 0), 1)
    voxel = which[:, None] * piece + tl.arange(0, piece)[None, :]
    logits = tl.load(logits_at + row * voxels + voxel, mask=voxel < voxels, other=0.0)
    inner = tl.cumsum((logits > 0.0).to(tl.int32), 1)
    within = tl.sum((inner < (number - before)[:, None]).to(tl.int32), 1)
    index = tl.minimum(which * piece + within, voxels - 1)
    for axis in tl.static_range(3):
        chosen = tl.load(coords_at + (batch * voxels + index) * 3 + axis, mask=wanted, other=0)
        place = (row * draws + draw) * 3 + axis
        anywhere = tl.load(anywhere_at + (row * draws_row + draw) * 3 + axis, mask=wanted, other=0.0)
        anywhere *= tl.load(grid_at + axis)
        point = tl.where(total == 0, anywhere, chosen.to(tl.float32))
        point += tl.load(asked_at + draw * 3 + axis, mask=wanted, other=0.0).to(tl.float32)
        point = point / tl.load(grid_at + axis) * tl.load(span_at + axis) + tl.load(first_at + axis)
        tl.store(points_at + place, point, mask=wanted)


class Volume(NamedTuple):
    """float32 [3] each: voxels along the axes, the first corner and the span in metres, ego frame."""

    grid: Tensor
    first: Tensor
    span: Tensor


def draw_points(
    mask_logits: Tensor, fractions: Tensor, anywhere: Tensor, voxels: Tensor, asked: Tensor, volume: Volume
) -> Tuple[Tensor, Tensor]:
    """Points of each query at voxels of its mask for ``MaskGuidedSampling``, and the rest of what is asked for.

    Args:
        mask_logits: [B, Q, K]; positive is inside.
        fractions: float32 [B, Q, count] in [0, 1): u takes the floor(u * n)-th of a query's n voxels.
        anywhere: float32 [B, Q, count, 3] in [0, 1), places in the volume for a query without any voxel.
        voxels: int64 [B, K, 3], full-resolution voxel indices.
        asked: [B, Q, count * 3 + n], the first offsets in voxels.

    Returns:
        float32 [B, Q, count, 3] metres, ego frame; float32 [B, Q, n].
    """
    batch, queries, count = mask_logits.shape
    draws, pieces = fractions.shape[-1], triton.cdiv(count, _PIECE)
    if fractions.stride()[:2] == (0, 0) == anywhere.stride()[:2]:  # the same for all queries
        fractions, anywhere, draws_row = fractions[0, 0], anywhere[0, 0], 0
    else:
        draws_row = draws
    logits, device = mask_logits.contiguous(), mask_logits.device
    counts = torch.empty(batch * queries, pieces, dtype=torch.int32, device=device)
    points = torch.empty(batch, queries, draws, 3, dtype=torch.float32, device=device)
    rest = asked.shape[-1] - 3 * draws
    levels = torch.empty(batch, queries, rest, dtype=torch.float32, device=device)
    with torch.cuda.device_of(logits):
        _count_pieces[(triton.cdiv(pieces, _PIECES), batch * queries)](
            logits, counts, count, pieces, piece=_PIECE, each=_PIECES
        )
        _draw[(batch * queries,)](
            logits,
            counts,
            fractions.contiguous(),
            anywhere.contiguous(),
            voxels.contiguous(),
            asked.contiguous(),
            *volume,
            points,
            levels,
            queries,
            count,
            pieces,
            draws,
            draws_row,
            rest,
            piece=_PIECE,
            many=triton.next_power_of_2(pieces),
            block=max(2, triton.next_power_of_2(draws)),
            others=max(2, triton.next_power_of_2(rest)),
        )
    return points, levels


# -- merging


@triton.jit
def _merge(
    classes_at, masks_at, labels_at, queries, classes, voxels, least_query, least_voxel,
    width: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * block + tl.arange(0, block)
    column, query = tl.arange(0, width), tl.arange(0, many)
    seen = (query < queries)[:, None] & (column < classes)[None, :]
    logits = tl.load(classes_at + query[:, None] * classes + column[None, :], mask=seen, other=float('-inf'))
    scores = tl.sigmoid(logits.to(tl.float32))
    counts = tl.max(scores, 1) > least_query
    scores = tl.where(counts[:, None] & seen, scores, 0.0)
    seen = (query < queries)[:, None] & (voxel < voxels)[None, :]
    masks = tl.load(masks_at + query.to(tl.int64)[:, None] * voxels + voxel[None, :], mask=seen, other=0.0)
    masks = tl.sigmoid(masks.to(tl.float32))
    total = tl.dot(tl.trans(scores), masks, input_precision='ieee')  # [classes, voxels]
    total = tl.where((column < classes)[:, None], total, -1.0)
    best, label = tl.max(total, 0), tl.argmax(total, 0)
    tl.store(labels_at + voxel, tl.where(best < least_voxel, classes, label).to(tl.uint8), mask=voxel < voxels)


def merges(class_logits: Tensor) -> bool:
    """Whether :func:`merge_labels` has room for these queries and classes, [Q, C]."""
    return class_logits.shape[0] <= _MOST_QUERIES and class_logits.shape[1] <= _MOST_CLASSES


def merge_labels(class_logits: Tensor, mask_logits: Tensor, least_query: float, least_voxel: float) -> Tensor:
    """``merge_semantic`` in one pass over the masks.

    Args:
        class_logits: [Q, C].
        mask_logits: [Q, K].
        least_query: queries whose best class score is not above this do not count.
        least_voxel: voxels whose best class has less are free.

    Returns:
        uint8 [K].
    """
    queries, classes = class_logits.shape
    voxels = mask_logits.shape[1]
    labels = torch.empty(voxels, dtype=torch.uint8, device=mask_logits.device)
    with torch.cuda.device_of(mask_logits):
        _merge[(triton.cdiv(voxels, _MERGED),)](
            class_logits.contiguous(),
            mask_logits.contiguous(),
            labels,
            queries,
            classes,
            voxels,
            least_query,
            least_voxel,
            width=max(16, triton.next_power_of_2(classes)),
            many=max(16, triton.next_power_of_2(queries)),
            block=_MERGED,
            num_warps=8,
        )
    return labels
