"""Attention with distances in plain PyTorch: the definition of the operator, and what training and CPU tensors run.

Shapes: B batch, Q queries, H heads, D channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
