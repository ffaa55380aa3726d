"""Public attention operators, and their definition in plain PyTorch, which CPU tensors run.

Shapes: B batch, Q queries, H heads, D channels of a head.
"""

from types import ModuleType
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from models.csrc import find_kernels, has_triton

KERNEL_WIDTH = 32  # what the kernel is compiled for; other widths take the reference
FUSED_WIDTHS = (16, 32)  # of training; wider heads need more shared memory than all GPUs have


def distance_attention(parts: Tensor, reach: Tensor, positions: Tensor, exact: bool = True) -> Tensor:
    """Multi-head attention whose logits fall with the distance between queries (paper section 3.2).

    softmax(q·kᵀ / sqrt(D) - reach * distance)·v, the distance in the ground plane.

    Args:
        parts: [B, Q, 3, H, D] queries, keys and values, any float dtype.
        reach: tau [B, Q, H] per metre, of the query; same dtype.
        positions: [B or 1, Q, 2 or more] metres, x and y first, any float dtype; get no gradient.
        exact: products as precise as float32's; False takes TF32 where that is faster. Those of float16 add up
            in float32 in any case.

    Returns:
        [B, Q, H*D], same dtype.

    Raises:
        TypeError, ValueError: types, shapes or devices that do not fit.

    Without gradients, one CUDA kernel does all of it for float32 and D = 32 when it is built: it stores neither
    logits nor distances. Where Triton is, its kernel does so on tensor cores for float16, and for float32 that need
    not be exact. Otherwise it is a chain of PyTorch operations. Autocast is off inside.
    """
    _check(parts, reach, positions)
    if attends_narrow(parts, exact) and not _needs_grad(parts, reach):
        from models.csrc.distance_attention.fused import attend  # needs Triton

        return attend(parts.contiguous(), reach.contiguous(), positions.detach().float().contiguous())
    kernels = _kernels_for(parts, reach)
    if kernels is None:
        return distance_attention_reference(parts, reach, positions)
    return kernels.distance_attention(parts.contiguous(), reach.contiguous(), positions.detach().float().contiguous())


def distance_attention_in_training(
    parts: Tensor, reach: Tensor, positions: Tensor, dropout: float, exact: bool = True
) -> Tensor:
    """``distance_attention`` with dropout of the weights; where Triton is, neither pass stores logits or distances.

    Args:
        exact: products as precise as float32's; False takes TF32 where that is faster.
    """
    if parts.dtype != torch.float32 or not trains_fused(parts.shape[4], parts.device):
        return distance_attention_reference(parts, reach, positions, dropout)
    from models.csrc.distance_attention.fused import FusedAttention  # needs Triton

    keys = None
    if dropout:
        keys = torch.randint(-(2**31), 2**31, reach.shape, device=reach.device, dtype=torch.int64).to(torch.int32)
    places = positions.detach().float().contiguous()
    return FusedAttention.apply(
        parts.contiguous(), reach.contiguous(), places, keys, dropout, 'tf32x3' if exact else 'tf32'
    )


def attends_narrow(parts: Tensor, exact: bool) -> bool:
    """Whether tensor cores serve this attention without gradients; parts [B, Q, 3, H, D]."""
    wanted = parts.dtype == torch.float16 or parts.dtype == torch.float32 and not exact
    return wanted and trains_fused(parts.shape[4], parts.device)


def _needs_grad(parts: Tensor, reach: Tensor) -> bool:
    return torch.is_grad_enabled() and (parts.requires_grad or reach.requires_grad)


def trains_fused(width: int, device: torch.device) -> bool:
    """Whether heads of D = width have Triton's kernels on the device."""
    return width in FUSED_WIDTHS and has_triton(device)


def distance_attention_reference(parts: Tensor, reach: Tensor, positions: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / sqrt(D) - reach * distance) v; see ``distance_attention``. Autocast is off inside.

    Args:
        dropout: of the weights; for training, which the kernel does not serve.
    """
    batch, count, _, heads, width = parts.shape
    with torch.autocast(parts.device.type, enabled=False):
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        distance = plane_distance(positions.detach())
        distance = F.pad(distance, (0, -count % 8))  # rows that start where the GPU kernel wants them
        bias = (reach.transpose(1, 2).neg().unsqueeze(-1) * distance.unsqueeze(1))[..., :count]
        attended = _biased_attention(q, k, v, bias.to(parts.dtype), dropout)
        return attended.transpose(1, 2).reshape(batch, count, heads * width)


def _biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / sqrt(D) + bias) v; q, k, v [B, H, Q, D], bias [B, H, Q, Q]."""
    if hasattr(F, 'scaled_dot_product_attention') and q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).add_(bias)
    return torch.matmul(F.dropout(logits.softmax(-1), dropout), v)


def plane_distance(positions: Tensor) -> Tensor:
    """Pairwise distances in the ground plane.

    Args:
        positions: [B, Q, 2 or more] metres; x and y come first.

    Returns:
        [B, Q, Q] metres, float32. A direct norm: a matrix-product distance rounds differently, and which
        voxels are kept downstream would change.
    """
    x, y = positions[..., 0].float(), positions[..., 1].float()
    dx = x.unsqueeze(2) - x.unsqueeze(1)
    dy = y.unsqueeze(2) - y.unsqueeze(1)
    return torch.sqrt(dx * dx + dy * dy)


def _check(parts: Tensor, reach: Tensor, positions: Tensor) -> None:
    if parts.dim() != 5 or parts.shape[2] != 3:
        raise ValueError(f'parts must be [B, Q, 3, H, D] but is {list(parts.shape)}')
    batch, count, _, heads, _ = parts.shape
    if tuple(reach.shape) != (batch, count, heads):
        raise ValueError(f'reach must be {[batch, count, heads]} but is {list(reach.shape)}')
    if (
        positions.dim() != 3
        or positions.shape[0] not in (1, batch)
        or positions.shape[1] != count
        or positions.shape[2] < 2
    ):
        raise ValueError(f'positions must be [{batch} or 1, {count}, 2 or more] but is {list(positions.shape)}')
    if reach.dtype != parts.dtype or not (parts.dtype.is_floating_point and positions.dtype.is_floating_point):
        raise TypeError(
            f'parts and reach must have one float dtype, and positions a float dtype, but they are {parts.dtype}, '
            f'{reach.dtype} and {positions.dtype}'
        )
    for name, tensor in (('reach', reach), ('positions', positions)):
        if tensor.device != parts.device:
            raise ValueError(f'{name} must be on the device of parts, {parts.device}, but is on {tensor.device}')


def _kernels_for(parts: Tensor, reach: Tensor) -> Optional[ModuleType]:
    """The compiled kernel if it can serve this call."""
    if not parts.is_cuda or _needs_grad(parts, reach) or parts.dtype != torch.float32:
        return None
    if parts.shape[4] != KERNEL_WIDTH or parts.data_ptr() % 16:
        return None
    return find_kernels('_distance_attention', parts.device)
