"""Adaptive mixing: every query filters its own sampled features (paper section 3.2; from AdaMixer).

Shapes: B batch, Q queries, G groups, C channels, p_in sampled points (T*P), p_out mixed points.
"""

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from models.csrc.adaptive_mixing import adaptive_mix
from models.csrc.adaptive_mixing.reference import adaptive_mix_reference
from models.layers.recompute import recompute


class AdaptiveMixing(BaseModule):
    """x·M -> LN -> ReLU -> S·x -> LN -> ReLU -> linear -> add the query; M and S are made from the query.

    The generated matrices dominate the memory of a training step (8,000 queries x 17,408 floats). With
    ``chunk`` set, training works through the queries in pieces of that many and makes the matrices of a
    piece again in its backward pass, so that only one piece is ever held.

    Args:
        channels: C.
        in_points: p_in.
        out_points: p_out.
        num_groups: G.
        chunk: queries per checkpointed piece in training; 0 keeps everything.
    """

    def __init__(self, channels: int, in_points: int, out_points: int, num_groups: int = 4, chunk: int = 0):
        super().__init__()
        self.in_points, self.out_points = in_points, out_points
        self.num_groups, self.chunk = num_groups, chunk
        self.width = channels // num_groups
        per_group = self.width * self.width + out_points * in_points
        self.parameter_generator = nn.Linear(channels, num_groups * per_group)
        self.out_proj = nn.Linear(num_groups * out_points * self.width, channels)

    def init_weights(self):
        """The generator starts from its bias alone: every query mixes alike."""
        nn.init.zeros_(self.parameter_generator.weight)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        """sampled [B, Q, G, p_in, C/G], query [B, Q, C] -> [B, Q, C]."""
        batch, count, channels = query.shape
        sampled, flat = sampled.flatten(0, 1), query.flatten(0, 1)
        if self.chunk and torch.is_grad_enabled() and flat.requires_grad:
            pieces = zip(sampled.split(self.chunk), flat.split(self.chunk))
            mixed = torch.cat([recompute(self._mix, s, q) for s, q in pieces])
        else:
            mixed = self._mix(sampled, flat)
        return query + mixed.view(batch, count, channels)

    def _mix(self, sampled: Tensor, query: Tensor) -> Tensor:
        """sampled [n, G, p_in, C/G], query [n, C] -> [n, C]."""
        generated = self.parameter_generator(query)
        mix = adaptive_mix_reference if self.training else adaptive_mix  # the kernel has no backward pass
        mixed = mix(sampled.to(generated.dtype), generated, self.out_points)
        return self.out_proj(mixed.flatten(1))
