"""Mixing with its backward pass in two Triton kernels, for training on NVIDIA GPUs; import it only where Triton is.

Shapes: n items (query and group), W channels of a group, p_in sampled points, p_out mixed points.

An item is one program. Forward reads x, M and S and writes the result; backward makes the rest again from x, M and
S, which costs less than reading it would, and writes the gradients of all three. No sum crosses items, so results
repeat to the bit. ``MixInPieces`` makes M and S as well, of some items at a time.

Sums are in float32; products are of the tensors' own type, in float32 of three TF32 products.
"""

from typing import Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_LEAST = 16  # of each side of a product on tensor cores


@triton.jit
def _normalise(values, inside, count, eps):
    """Mean 0 and deviation 1 over a whole slab, whose padding is left 0; and 1 / deviation."""
    centred = tl.where(inside, values - tl.sum(values) / count, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + eps)
    return centred * scale, scale


@triton.jit
def _normalise_backward(grad, normalised, scale, inside, count):
    """Through ReLU and normalisation."""
    grad = tl.where(normalised > 0.0, grad, 0.0)
    grad = grad - tl.sum(grad) / count - normalised * (tl.sum(grad * normalised) / count)
    return tl.where(inside, grad * scale, 0.0)


@triton.jit
def _load_item(
    x_at, generated_at, item, p_in: tl.constexpr, p_out: tl.constexpr, width: tl.constexpr,
    block_in: tl.constexpr, block_out: tl.constexpr,
):  # fmt: skip
    channel, point, mixed = tl.arange(0, width), tl.arange(0, block_in), tl.arange(0, block_out)
    start = generated_at + item * (width * width + p_out * p_in)
    x_places = point[:, None] * width + channel[None, :]
    s_places = mixed[:, None] * p_in + point[None, :]
    x = tl.load(x_at + item * (p_in * width) + x_places, mask=point[:, None] < p_in, other=0.0)
    m = tl.load(start + channel[:, None] * width + channel[None, :])
    inside = (mixed[:, None] < p_out) & (point[None, :] < p_in)
    s = tl.load(start + width * width + s_places, mask=inside, other=0.0)
    return x, m, s


@triton.jit
def _forward(
    x_at, generated_at, out_at, eps, p_in: tl.constexpr, p_out: tl.constexpr, width: tl.constexpr,
    block_in: tl.constexpr, block_out: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    x, m, s = _load_item(x_at, generated_at, item, p_in, p_out, width, block_in, block_out)
    channel, point, mixed = tl.arange(0, width), tl.arange(0, block_in), tl.arange(0, block_out)
    y, _ = _normalise(tl.dot(x, m, input_precision=precision), point[:, None] < p_in, p_in * width, eps)
    hidden = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
    inside = mixed[:, None] < p_out
    z, _ = _normalise(tl.dot(s, hidden, input_precision=precision), inside, p_out * width, eps)
    places = item * (p_out * width) + mixed[:, None] * width + channel[None, :]
    tl.store(out_at + places, tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype), mask=inside)


@triton.jit
def _backward(
    x_at, generated_at, grad_at, grad_x_at, grad_generated_at, eps,
    p_in: tl.constexpr, p_out: tl.constexpr, width: tl.constexpr,
    block_in: tl.constexpr, block_out: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    x, m, s = _load_item(x_at, generated_at, item, p_in, p_out, width, block_in, block_out)
    channel, point, mixed = tl.arange(0, width), tl.arange(0, block_in), tl.arange(0, block_out)
    in_rows, out_rows = point[:, None] < p_in, mixed[:, None] < p_out
    y, y_scale = _normalise(tl.dot(x, m, input_precision=precision), in_rows, p_in * width, eps)
    hidden = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
    z, z_scale = _normalise(tl.dot(s, hidden, input_precision=precision), out_rows, p_out * width, eps)

    places = item * (p_out * width) + mixed[:, None] * width + channel[None, :]
    grad = tl.load(grad_at + places, mask=out_rows, other=0.0).to(tl.float32)
    grad_z = _normalise_backward(grad, z, z_scale, out_rows, p_out * width).to(x.dtype)
    start = grad_generated_at + item * (width * width + p_out * p_in)
    grad_s = tl.dot(grad_z, tl.trans(hidden), input_precision=precision)
    s_places = mixed[:, None] * p_in + point[None, :]
    s_inside = out_rows & (point[None, :] < p_in)
    tl.store(start + width * width + s_places, grad_s.to(x.dtype), mask=s_inside)

    grad_hidden = tl.dot(tl.trans(s), grad_z, input_precision=precision)
    grad_y = _normalise_backward(grad_hidden, y, y_scale, in_rows, p_in * width).to(x.dtype)
    grad_m = tl.dot(tl.trans(x), grad_y, input_precision=precision)
    tl.store(start + channel[:, None] * width + channel[None, :], grad_m.to(x.dtype))
    grad_x = tl.dot(grad_y, tl.trans(m), input_precision=precision)
    x_places = item * (p_in * width) + point[:, None] * width + channel[None, :]
    tl.store(grad_x_at + x_places, grad_x.to(x.dtype), mask=in_rows)


def _sizes(x: Tensor, out_points: int) -> dict:
    in_points, width = x.shape[-2:]
    return dict(
        p_in=in_points,
        p_out=out_points,
        width=width,
        block_in=max(_LEAST, triton.next_power_of_2(in_points)),
        block_out=max(_LEAST, triton.next_power_of_2(out_points)),
        precision='tf32' if torch.backends.cuda.matmul.allow_tf32 else 'tf32x3',
        num_warps=8 if in_points > 32 or out_points > 128 else 4,  # so that no register spills on an H100
    )


def _mix(x: Tensor, generated: Tensor, out_points: int, eps: float) -> Tensor:
    out = x.new_empty(x.shape[0], out_points, x.shape[2])
    with torch.cuda.device_of(x):
        _forward[(x.shape[0],)](x, generated, out, eps, **_sizes(x, out_points))
    return out


def _mix_backward(x: Tensor, generated: Tensor, grad: Tensor, eps: float, grad_x: Tensor) -> Tensor:
    """The gradient of what was generated; that of x is written to ``grad_x``."""
    grad_generated = torch.empty_like(generated)
    with torch.cuda.device_of(x):
        _backward[(x.shape[0],)](x, generated, grad, grad_x, grad_generated, eps, **_sizes(x, grad.shape[1]))
    return grad_generated


class FusedMixing(Function):
    """x [n, p_in, W], generated [n, W*W + p_out*p_in], both contiguous and of one type -> [n, p_out, W]."""

    @staticmethod
    def forward(ctx, x: Tensor, generated: Tensor, out_points: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, generated)
        ctx.eps = eps
        return _mix(x, generated, out_points, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, generated = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        return grad_x, _mix_backward(x, generated, grad.contiguous(), ctx.eps, grad_x), None, None


class MixInPieces(Function):
    """Matrices made from the queries, mixing with them, and the projection of what comes out, some queries at a time.

    The backward pass makes the matrices of a piece again. Gradients of the weights are added up in float32.
    """

    @staticmethod
    def forward(
        ctx, kind: torch.dtype, piece: int, out_points: int, eps: float, sampled: Tensor, query: Tensor,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        """sampled [n, G, p_in, W], query [n, C], weight and bias of generator and projection -> [n, C] of ``kind``."""
        ctx.types = [tensor.dtype for tensor in (sampled, query, *weights)]
        ctx.piece, ctx.out_points, ctx.eps = piece, out_points, eps
        tensors = [tensor.to(kind).contiguous() for tensor in (sampled, query, *weights)]
        ctx.save_for_backward(*tensors[:5])
        sampled, query, make, shift, project, offset = tensors
        out = torch.empty(len(query), len(project), dtype=kind, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for rows in _pieces(len(query), piece):
                _, _, mixed = _make_and_mix(sampled[rows], query[rows], make, shift, out_points, eps)
                torch.addmm(offset, mixed, project.t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        sampled, query, make, shift, project = ctx.saved_tensors
        grad, of_sampled, of_query = grad.contiguous(), torch.empty_like(sampled), torch.empty_like(query)
        sums: List[Optional[Tensor]] = [None, None, None]
        with torch.autocast(query.device.type, enabled=False):
            for rows in _pieces(len(query), ctx.piece):
                own = query[rows]
                x, generated, mixed = _make_and_mix(sampled[rows], own, make, shift, ctx.out_points, ctx.eps)
                of_mixed = (grad[rows] @ project).view(len(x), ctx.out_points, -1)
                of_generated = _mix_backward(x, generated, of_mixed, ctx.eps, of_sampled[rows]).view(len(own), -1)
                parts = of_generated.t() @ own, of_generated.sum(0), grad[rows].t() @ mixed
                sums = [part.float() if total is None else total.add_(part) for total, part in zip(sums, parts)]
                torch.mm(of_generated, make, out=of_query[rows])
        grads = of_sampled, of_query, *sums, grad.sum(0, dtype=torch.float32)
        return (None,) * 4 + tuple(value.to(kind) for value, kind in zip(grads, ctx.types))


def _pieces(count: int, piece: int) -> Iterator[slice]:
    return (slice(start, min(start + piece, count)) for start in range(0, count, piece))


def _make_and_mix(
    sampled: Tensor, query: Tensor, make: Tensor, shift: Tensor, out_points: int, eps: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """x [n * G, p_in, W], what is generated for it [n * G, ...], and what is mixed [n, G * p_out * W]."""
    x = sampled.flatten(0, 1)
    generated = F.linear(query, make, shift).view(len(x), -1)
    return x, generated, _mix(x, generated, out_points, eps).view(len(query), -1)
