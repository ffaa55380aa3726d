"""Self-attention with a learned reach: logits fall with the distance between queries (paper section 3.2)."""

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.runner import BaseModule
from torch import Tensor, nn

from models.csrc.distance_attention import distance_attention
from models.csrc.distance_attention.reference import distance_attention_reference
from models.layers.recompute import recompute


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

    keeps_float32 = True  # for lib.run.numerics.convert_weights

    def __init__(self, embed_dims: int, num_heads: int = 8, dropout: float = 0.1, save_memory: bool = False):
        super().__init__()
        self.num_heads, self.save_memory = num_heads, save_memory
        self.attention = MultiheadAttention(embed_dims, num_heads, attn_drop=dropout, batch_first=True)
        self.gen_tau = nn.Linear(embed_dims, num_heads)

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.gen_tau.weight)
        nn.init.uniform_(self.gen_tau.bias, 0.0, 2.0)

    def forward(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [B, Q, C], positions [B or 1, Q, 2 or more] metres -> [B, Q, C]: the query plus what it attends to."""
        with torch.autocast(query.device.type, enabled=False):
            if self.save_memory and torch.is_grad_enabled() and query.requires_grad:
                return recompute(self._attend, query.float(), positions)
            return self._attend(query.float(), positions)

    def _attend(self, query: Tensor, positions: Tensor) -> Tensor:
        weights = self.attention.attn
        parts = F.linear(query, weights.in_proj_weight, weights.in_proj_bias)
        parts = parts.view(query.shape[:2] + (3, self.num_heads, query.shape[2] // self.num_heads))
        reach = self.gen_tau(query)
        if self.training:  # the kernel has neither dropout nor a backward pass
            attended = distance_attention_reference(parts, reach, positions, weights.dropout)
        else:
            attended = distance_attention(parts, reach, positions)
        return query + weights.out_proj(attended)
