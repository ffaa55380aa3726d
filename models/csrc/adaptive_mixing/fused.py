"""Mixing with its backward pass in two Triton kernels, for training on NVIDIA GPUs; import it only where Triton is.

Shapes: n items (query and group), W channels of a group, p_in sampled points, p_out mixed points.

An item is one program. Forward reads x, M and S and writes the result; backward makes the rest again from x, M and
S, which costs less than reading it would, and writes the gradients of all three. No sum crosses items, so results
repeat to the bit. Sums are in float32; products are of the tensors' own type, in float32 of three TF32 products.
"""

import torch
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
    hidden = tl.maximum(y, 0.0).to(x.dtype)
    inside = mixed[:, None] < p_out
    z, _ = _normalise(tl.dot(s, hidden, input_precision=precision), inside, p_out * width, eps)
    places = item * (p_out * width) + mixed[:, None] * width + channel[None, :]
    tl.store(out_at + places, tl.maximum(z, 0.0).to(x.dtype), mask=inside)


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
    hidden = tl.maximum(y, 0.0).to(x.dtype)
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
        num_warps=4,
    )


class FusedMixing(Function):
    """x [n, p_in, W], generated [n, W*W + p_out*p_in], both contiguous and of one type -> [n, p_out, W]."""

    @staticmethod
    def forward(ctx, x: Tensor, generated: Tensor, out_points: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, generated)
        ctx.sizes, ctx.eps = _sizes(x, out_points), eps
        out = x.new_empty(x.shape[0], out_points, x.shape[2])
        with torch.cuda.device_of(x):
            _forward[(x.shape[0],)](x, generated, out, eps, **ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, generated = ctx.saved_tensors
        grad_x, grad_generated = torch.empty_like(x), torch.empty_like(generated)
        with torch.cuda.device_of(x):
            _backward[(x.shape[0],)](x, generated, grad.contiguous(), grad_x, grad_generated, ctx.eps, **ctx.sizes)
        return grad_x, grad_generated, None, None
