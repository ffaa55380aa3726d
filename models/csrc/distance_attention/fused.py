"""Attention that falls with distance, with its backward pass, in Triton kernels for NVIDIA GPUs.

Import it only where Triton is. Shapes: B batch, Q queries, H heads, D channels of a head.

Neither weights nor distances are stored: a program takes some queries (in the pass that makes the gradients of keys
and values, some keys) of a head and goes over all others in blocks (FlashAttention-2, arXiv 2307.08691). No sum is
made by atomic additions, so results repeat to the bit. Sums are in float32; products are of TF32 or three of them, in
inference also of float16.

A weight is dropped where a hash of the query's random number and the key's index is below a threshold, so that all
passes drop the same ones and nothing is stored for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_BLOCK = 64


@triton.jit
def _keeps(key, column, threshold):
    """Whether the weight of a key is kept, by the query's uint32 and the key's index, broadcast against each other."""
    x = key ^ (column.to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) >> 8).to(tl.int32) >= threshold


@triton.jit
def _distance(x, y, other_x, other_y):
    dx, dy = x - other_x, y - other_y
    return tl.sqrt(dx * dx + dy * dy)


@triton.jit
def _load_rows(at, start, rows, count, stride, width: tl.constexpr):
    """[rows, D] of one head; rows past the end are 0."""
    places = start + rows[:, None] * stride + tl.arange(0, width)[None, :]
    return tl.load(at + places, mask=rows[:, None] < count, other=0.0)


@triton.jit
def _load_places(at, start, rows, count, stride):
    x = tl.load(at + start + rows * stride, mask=rows < count, other=0.0)
    return x, tl.load(at + start + rows * stride + 1, mask=rows < count, other=0.0)


@triton.jit
def _forward(
    parts_at, reach_at, places_at, keys_at, out_at, lse_at, scale, kept_scale, threshold, count,
    places_batch, places_row, heads: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    drops: tl.constexpr, precision: tl.constexpr, narrow: tl.constexpr = False, keeps: tl.constexpr = True,
):  # fmt: skip
    rows = tl.program_id(0) * block + tl.arange(0, block)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    stride: tl.constexpr = 3 * heads * width
    start = batch * count * stride + head * width
    per_row = batch * count * heads + rows * heads + head  # into [B, Q, H]
    valid = rows < count
    q = _load_rows(parts_at, start, rows, count, stride, width)
    if not narrow:
        q = q * (scale * 1.4426950408889634)
    x, y = _load_places(places_at, batch * places_batch, rows, count, places_row)
    reach = tl.load(reach_at + per_row, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
    if drops:
        keys = tl.load(keys_at + per_row, mask=valid, other=0).to(tl.uint32, bitcast=True)
    largest = tl.full([block], float('-inf'), tl.float32)
    total = tl.zeros([block], tl.float32)
    summed = tl.zeros([block, width], tl.float32)
    for first in range(0, count, block):
        columns = first + tl.arange(0, block)
        k = _load_rows(parts_at, start + heads * width, columns, count, stride, width)
        v = _load_rows(parts_at, start + 2 * heads * width, columns, count, stride, width)
        other_x, other_y = _load_places(places_at, batch * places_batch, columns, count, places_row)
        distance = _distance(x[:, None], y[:, None], other_x[None, :], other_y[None, :])
        logits = tl.dot(q, tl.trans(k), input_precision=precision)
        if narrow:  # scaled in float32: a scaled query would be rounded once more
            logits = logits * (scale * 1.4426950408889634)
        logits = logits - reach[:, None] * distance
        logits = tl.where(columns[None, :] < count, logits, float('-inf'))
        now = tl.maximum(largest, tl.max(logits, 1))
        weights, shrink = tl.exp2(logits - now[:, None]), tl.exp2(largest - now)
        total = total * shrink + tl.sum(weights, 1)
        if drops:
            weights = tl.where(_keeps(keys[:, None], columns[None, :], threshold), weights, 0.0)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
        largest = now
    out = summed * (kept_scale / total)[:, None]
    places = (batch * count + rows[:, None]) * (heads * width) + head * width + tl.arange(0, width)[None, :]
    tl.store(out_at + places, out.to(out_at.dtype.element_ty), mask=valid[:, None])
    if keeps:
        tl.store(lse_at + per_row, largest + tl.log2(total), mask=valid)


@triton.jit
def _backward_queries(
    parts_at, reach_at, places_at, keys_at, lse_at, delta_at, grad_at, grad_parts_at, grad_reach_at,
    scale, kept_scale, threshold, count, places_batch, places_row,
    heads: tl.constexpr, width: tl.constexpr, block: tl.constexpr, drops: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block + tl.arange(0, block)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    stride: tl.constexpr = 3 * heads * width
    start = batch * count * stride + head * width
    per_row = batch * count * heads + rows * heads + head
    valid = rows < count
    q = _load_rows(parts_at, start, rows, count, stride, width) * (scale * 1.4426950408889634)
    x, y = _load_places(places_at, batch * places_batch, rows, count, places_row)
    reach = tl.load(reach_at + per_row, mask=valid, other=0.0) * 1.4426950408889634
    lse = tl.load(lse_at + per_row, mask=valid, other=0.0)
    delta = tl.load(delta_at + per_row, mask=valid, other=0.0)
    grad = _load_rows(grad_at, batch * count * heads * width + head * width, rows, count, heads * width, width)
    if drops:
        keys = tl.load(keys_at + per_row, mask=valid, other=0).to(tl.uint32, bitcast=True)
    grad_q = tl.zeros([block, width], tl.float32)
    grad_reach = tl.zeros([block], tl.float32)
    for first in range(0, count, block):
        columns = first + tl.arange(0, block)
        k = _load_rows(parts_at, start + heads * width, columns, count, stride, width)
        v = _load_rows(parts_at, start + 2 * heads * width, columns, count, stride, width)
        other_x, other_y = _load_places(places_at, batch * places_batch, columns, count, places_row)
        distance = _distance(x[:, None], y[:, None], other_x[None, :], other_y[None, :])
        logits = tl.dot(q, tl.trans(k), input_precision=precision) - reach[:, None] * distance
        weights = tl.where(columns[None, :] < count, tl.exp2(logits - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=precision)
        if drops:
            kept = _keeps(keys[:, None], columns[None, :], threshold)
            grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
        grad_logits = weights * (grad_weights - delta[:, None])
        grad_reach -= tl.sum(grad_logits * distance, 1)
        grad_q += tl.dot(grad_logits, k, input_precision=precision)
    places = start + rows[:, None] * stride + tl.arange(0, width)[None, :]
    tl.store(grad_parts_at + places, grad_q * scale, mask=valid[:, None])
    tl.store(grad_reach_at + per_row, grad_reach, mask=valid)


@triton.jit
def _backward_keys(
    parts_at, reach_at, places_at, keys_at, lse_at, delta_at, grad_at, grad_parts_at,
    scale, kept_scale, threshold, count, places_batch, places_row,
    heads: tl.constexpr, width: tl.constexpr, block: tl.constexpr, drops: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * block + tl.arange(0, block)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    stride: tl.constexpr = 3 * heads * width
    start = batch * count * stride + head * width
    k = _load_rows(parts_at, start + heads * width, columns, count, stride, width) * (scale * 1.4426950408889634)
    v = _load_rows(parts_at, start + 2 * heads * width, columns, count, stride, width)
    other_x, other_y = _load_places(places_at, batch * places_batch, columns, count, places_row)
    grad_k = tl.zeros([block, width], tl.float32)
    grad_v = tl.zeros([block, width], tl.float32)
    for first in range(0, count, block):
        rows = first + tl.arange(0, block)
        per_row = batch * count * heads + rows * heads + head
        valid = rows < count
        q = _load_rows(parts_at, start, rows, count, stride, width)
        x, y = _load_places(places_at, batch * places_batch, rows, count, places_row)
        reach = tl.load(reach_at + per_row, mask=valid, other=0.0) * 1.4426950408889634
        lse = tl.load(lse_at + per_row, mask=valid, other=float('inf'))  # weighs nothing past the end
        delta = tl.load(delta_at + per_row, mask=valid, other=0.0)
        grad = _load_rows(grad_at, batch * count * heads * width + head * width, rows, count, heads * width, width)
        distance = _distance(other_x[:, None], other_y[:, None], x[None, :], y[None, :])
        logits = tl.dot(k, tl.trans(q), input_precision=precision) - reach[None, :] * distance  # keys down
        weights = tl.exp2(logits - lse[None, :])
        grad_weights = tl.dot(v, tl.trans(grad), input_precision=precision)
        kept_weights = weights
        if drops:
            keys = tl.load(keys_at + per_row, mask=valid, other=0).to(tl.uint32, bitcast=True)
            kept = _keeps(keys[None, :], columns[:, None], threshold)
            grad_weights = tl.where(kept, grad_weights * kept_scale, 0.0)
            kept_weights = tl.where(kept, weights * kept_scale, 0.0)
        grad_v += tl.dot(kept_weights, grad, input_precision=precision)
        grad_k += tl.dot(weights * (grad_weights - delta[None, :]), q, input_precision=precision)
    inside = columns[:, None] < count
    places = start + columns[:, None] * stride + tl.arange(0, width)[None, :]
    tl.store(grad_parts_at + places + heads * width, grad_k * scale, mask=inside)
    tl.store(grad_parts_at + places + 2 * heads * width, grad_v, mask=inside)


class FusedAttention(Function):
    """parts [B, Q, 3, H, D], reach [B, Q, H], positions [B or 1, Q, 2 or more], contiguous float32 -> [B, Q, H*D].

    ``keys``, int32 [B, Q, H], are the random numbers of the dropout; None drops nothing. ``precision`` is of the
    products: 'tf32', or 'tf32x3', nearly float32's.
    """

    @staticmethod
    def forward(ctx, parts: Tensor, reach: Tensor, positions: Tensor, keys, dropout: float, precision: str) -> Tensor:
        batch, count, _, heads, width = parts.shape
        out, lse = parts.new_empty(batch, count, heads * width), torch.empty_like(reach)
        ctx.numbers = (width**-0.5, 1 / (1 - dropout), _threshold(dropout), count)
        ctx.numbers += (positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1))
        ctx.sizes = dict(heads=heads, width=width, block=_BLOCK, drops=keys is not None, precision=precision)
        inputs = (parts, reach, positions, reach if keys is None else keys)
        ctx.save_for_backward(*inputs, out, lse)
        with torch.cuda.device_of(parts):
            _forward[_grid(parts)](*inputs, out, lse, *ctx.numbers, **ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        parts, reach, positions, keys, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad * out).view(reach.shape + (-1,)).sum(-1)
        grad_parts, grad_reach = torch.empty_like(parts), torch.empty_like(reach)
        inputs = (parts, reach, positions, keys, lse, delta, grad, grad_parts)
        with torch.cuda.device_of(parts):
            _backward_queries[_grid(parts)](*inputs, grad_reach, *ctx.numbers, **ctx.sizes)
            _backward_keys[_grid(parts)](*inputs, *ctx.numbers, **ctx.sizes)
        return grad_parts, grad_reach, None, None, None, None


def attend(parts: Tensor, reach: Tensor, positions: Tensor) -> Tensor:
    """The forward pass alone, with products of TF32, or of float16 where that is the type of parts and reach."""
    batch, count, _, heads, width = parts.shape
    out = parts.new_empty(batch, count, heads * width)
    places_batch = positions.stride(0) if positions.shape[0] > 1 else 0
    numbers = (width**-0.5, 1.0, 0, count, places_batch, positions.stride(1))
    sizes = dict(heads=heads, width=width, block=_BLOCK, drops=False, precision='tf32', keeps=False)
    with torch.cuda.device_of(parts):
        _forward[_grid(parts)](
            parts, reach, positions, reach, out, out, *numbers, narrow=parts.dtype == torch.float16, **sizes
        )
    return out


def _grid(parts: Tensor):
    return triton.cdiv(parts.shape[1], _BLOCK), parts.shape[0] * parts.shape[3]


def _threshold(dropout: float) -> int:
    """Of the upper 24 bits of a hash."""
    return int(dropout * 2**24)
