"""Self-attention with a learned reach: logits fall with the distance between queries (paper section 3.2)."""
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.runner import BaseModule
from torch import Tensor, nn

from models.layers.recompute import recompute


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


class DistanceAttention(BaseModule):
    """Multi-head self-attention with bias -tau * distance; tau per head is read from the query.

    Computed in float32 also under autocast.

    Args:
        embed_dims: C.
        num_heads: a divisor of C.
        dropout: of the attention weights.
        save_memory: in training, make the bias and the weights (heads x Q x Q numbers each) again in the
            backward pass.
    """

    keeps_float32 = True  # for lib.run.precision.convert_weights

    def __init__(self, embed_dims: int, num_heads: int = 8, dropout: float = 0.1, save_memory: bool = False):
        super().__init__()
        self.num_heads, self.save_memory = num_heads, save_memory
        self.attention = MultiheadAttention(embed_dims, num_heads, attn_drop=dropout, batch_first=True)
        self.gen_tau = nn.Linear(embed_dims, num_heads)

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.gen_tau.weight)
        nn.init.uniform_(self.gen_tau.bias, 0.0, 2.0)

    def forward(self, query: Tensor, distance: Tensor) -> Tensor:
        """query [B, Q, C], distance [B or 1, Q, Q] metres -> [B, Q, C]: the query plus what it attends to."""
        with torch.autocast(query.device.type, enabled=False):
            if self.save_memory and torch.is_grad_enabled() and query.requires_grad:
                return recompute(self._attend, query.float(), distance)
            return self._attend(query.float(), distance)

    def _attend(self, query: Tensor, distance: Tensor) -> Tensor:
        batch, count, channels = query.shape
        weights = self.attention.attn
        parts = F.linear(query, weights.in_proj_weight, weights.in_proj_bias)
        parts = parts.view(batch, count, 3, self.num_heads, channels // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        tau = self.gen_tau(query).transpose(1, 2)
        distance = F.pad(distance, (0, -count % 8))  # rows that start where the GPU kernel wants them
        bias = (tau.neg().unsqueeze(-1) * distance.unsqueeze(1))[..., :count]
        dropout = weights.dropout if self.training else 0.0
        attended = biased_attention(q, k, v, bias, dropout)
        return query + weights.out_proj(attended.transpose(1, 2).reshape(batch, count, channels))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v; q, k, v [B, heads, Q, d], bias [B, heads, Q, Q]."""
    if hasattr(F, 'scaled_dot_product_attention') and q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).add_(bias)
    return torch.matmul(F.dropout(logits.softmax(-1), dropout), v)
