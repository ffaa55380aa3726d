"""Public mixing operator, and its definition in plain PyTorch, which CPU tensors run.

Shapes: n any leading dimensions, G groups, W channels of a group, p_in sampled points, p_out mixed points.
"""

from types import ModuleType
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.csrc import autocast_dtype, find_kernels, has_triton

# What the kernel is compiled for. Other sizes and types take the reference.
KERNEL_WIDTH, KERNEL_MAX_IN, KERNEL_MAX_OUT = 64, 32, 128
HALF_MAX_IN, HALF_MAX_OUT = 64, 256  # of Triton's in 16 bits: as much as 99 KiB of shared memory hold
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
NORM_EPS = 1e-5


def adaptive_mix(sampled: Tensor, generated: Tensor, out_points: int) -> Tensor:
    """Filter the samples of every query and group with the matrices made for them.

    x·M -> LayerNorm over the whole [p_in, W] slab -> ReLU -> S·x -> LayerNorm over [p_out, W] -> ReLU
    (paper section 3.2). Both LayerNorms are without affine, with eps 1e-5.

    Args:
        sampled: x, [n, G, p_in, W], n any number of dimensions.
        generated: [n, G*(W*W + p_out*p_in)], per group M [W, W] then S [p_out, p_in]; dtype as ``sampled``.
        out_points: p_out.

    Returns:
        [n, G, p_out, W] in the same dtype.

    On a GPU one kernel does all of it: it reads x, M and S once and writes only the result. In half precision, where
    TF32 is allowed in products, and with gradients it is one of Triton's, whose products are on tensor cores and
    added up in float32. Otherwise, and without Triton, it is the CUDA kernel when that is built and no gradient is
    wanted; in float16 that takes tensor cores as well. On the CPU, without either and for other sizes it is a chain of
    PyTorch operations. Autocast is off inside.
    """
    _check(sampled, generated, out_points)
    kernels = _kernels_for(sampled, generated, out_points)
    if (kernels is None or _is_for_tensor_cores(sampled.dtype)) and _runs_fused(sampled, out_points):
        return _mix_fused(sampled, generated, out_points)
    if kernels is None:
        return adaptive_mix_reference(sampled, generated, out_points)
    in_points, width = sampled.shape[-2:]
    result = kernels.adaptive_mix(
        sampled.reshape(-1, in_points, width).contiguous(),
        generated.reshape(-1, width * width + out_points * in_points).contiguous(),
        out_points,
    )
    return result.view(sampled.shape[:-2] + (out_points, width))


def mix_in_pieces(
    sampled: Tensor, query: Tensor, generator: nn.Linear, projection: nn.Linear, out_points: int, piece: int
) -> Optional[Tensor]:
    """``projection(adaptive_mix(sampled, generator(query)))``, keeping none of the three for the backward pass.

    Args:
        sampled: [n, G, p_in, W].
        query: [n, C].
        out_points: p_out.
        piece: queries whose intermediates are held at a time.

    Returns:
        [n, C] in the type that autocast computes in; None where there are no kernels for it.
    """
    kind = autocast_dtype(query.device.type) or query.dtype
    if not len(query) or kind not in KERNEL_TYPES or not _fits(sampled, out_points, kind):
        return None
    if not has_triton(query.device):
        return None
    from models.csrc.adaptive_mixing.fused import MixInPieces  # needs Triton

    weights = generator.weight, generator.bias, projection.weight, projection.bias
    return MixInPieces.apply(kind, piece, out_points, NORM_EPS, sampled, query, *weights)


def adaptive_mix_reference(sampled: Tensor, generated: Tensor, out_points: int) -> Tensor:
    """x·M -> LayerNorm [p_in, W] -> ReLU -> S·x -> LayerNorm [p_out, W] -> ReLU; see ``adaptive_mix``."""
    in_points, width = sampled.shape[-2:]
    items = sampled.numel() // max(1, in_points * width)
    with torch.autocast(sampled.device.type, enabled=False):
        matrices = generated.reshape(items, width * width + out_points * in_points)
        channel_mix, point_mix = matrices.split([width * width, out_points * in_points], dim=1)
        mixed = torch.bmm(sampled.reshape(items, in_points, width), channel_mix.view(items, width, width))
        mixed = F.relu(F.layer_norm(mixed, [in_points, width]), inplace=True)
        mixed = torch.bmm(point_mix.view(items, out_points, in_points), mixed)
        mixed = F.relu(F.layer_norm(mixed, [out_points, width]), inplace=True)
    return mixed.reshape(sampled.shape[:-2] + (out_points, width))


def _check(sampled: Tensor, generated: Tensor, out_points: int) -> None:
    if sampled.dim() < 3:
        raise ValueError(f'sampled must be [..., G, p_in, W] but is {list(sampled.shape)}')
    groups, in_points, width = sampled.shape[-3:]
    expected = tuple(sampled.shape[:-3]) + (groups * (width * width + out_points * in_points),)
    if tuple(generated.shape) != expected:
        raise ValueError(
            f'generated must be {list(expected)} (for p_out = {out_points}) but is {list(generated.shape)}'
        )
    if generated.dtype != sampled.dtype or not sampled.dtype.is_floating_point:
        raise TypeError(
            f'sampled and generated must have one float dtype but are {sampled.dtype} and {generated.dtype}'
        )
    if generated.device != sampled.device:
        raise ValueError(f'generated must be on the device of sampled, {sampled.device}, but is on {generated.device}')


def _needs_grad(sampled: Tensor, generated: Tensor) -> bool:
    return torch.is_grad_enabled() and (sampled.requires_grad or generated.requires_grad)


def _is_for_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether Triton's kernels are the faster ones; in float16 they take a fifth to a quarter less time on an H100."""
    return dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32


def _runs_fused(sampled: Tensor, out_points: int) -> bool:
    wanted = _fits(sampled, out_points, sampled.dtype) and sampled.dtype in KERNEL_TYPES and sampled.numel()
    return bool(wanted) and has_triton(sampled.device)


def _fits(sampled: Tensor, out_points: int, kind: torch.dtype) -> bool:
    """Whether Triton's kernels take these sizes in that type."""
    in_points, width = sampled.shape[-2:]
    most = (KERNEL_MAX_IN, KERNEL_MAX_OUT) if kind == torch.float32 else (HALF_MAX_IN, HALF_MAX_OUT)
    return width in (16, 32, 64) and 0 < in_points <= most[0] and 0 < out_points <= most[1]


def _mix_fused(sampled: Tensor, generated: Tensor, out_points: int) -> Tensor:
    from models.csrc.adaptive_mixing.fused import FusedMixing  # needs Triton

    in_points, width = sampled.shape[-2:]
    mixed = FusedMixing.apply(
        sampled.reshape(-1, in_points, width).contiguous(),
        generated.reshape(-1, width * width + out_points * in_points).contiguous(),
        out_points,
        NORM_EPS,
    )
    return mixed.view(sampled.shape[:-2] + (out_points, width))


def _kernels_for(sampled: Tensor, generated: Tensor, out_points: int) -> Optional[ModuleType]:
    """The compiled kernel if it can serve this call."""
    if not sampled.is_cuda or _needs_grad(sampled, generated) or sampled.dtype not in KERNEL_TYPES:
        return None
    in_points, width = sampled.shape[-2:]
    row_bytes = (width * width + out_points * in_points) * sampled.element_size()
    aligned = (row_bytes | sampled.data_ptr() | generated.data_ptr()) % 16 == 0
    fits = width == KERNEL_WIDTH and 0 < in_points <= KERNEL_MAX_IN and 0 < out_points <= KERNEL_MAX_OUT
    if not fits or not aligned:
        return None
    return find_kernels('_adaptive_mixing', sampled.device)
