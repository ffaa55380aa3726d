"""Adaptive mixing in plain PyTorch: the definition of the operator, and what training and CPU tensors run.

Shapes: n any leading dimensions, G groups, W channels of a group, p_in sampled points, p_out mixed points.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
