"""FPN at inference with fewer passes over its largest maps.

mmdet's FPN, step by step, adds a bias, enlarges the level above and adds it: three passes over each level, in
float32 also under autocast. Here the bias is added to the level above while that is small, and one pass adds
every value of it to the four below it.
"""

from typing import List, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.necks import FPN
from torch import Tensor, nn


def can_fuse_neck(neck: nn.Module) -> bool:
    """Whether this is an mmdet FPN of plain convolutions with biases, nearest upsampling, no extra levels, no hooks."""
    if (
        type(neck) is not FPN
        or neck.num_outs != len(neck.lateral_convs)
        or dict(neck.upsample_cfg) != {'mode': 'nearest'}
    ):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in neck.modules()):
        return False
    return all(
        type(module) is ConvModule
        and type(module.conv) is nn.Conv2d
        and module.conv.bias is not None
        and not module.with_norm
        and not module.with_activation
        for module in list(neck.lateral_convs) + list(neck.fpn_convs)
    )


def run_neck(neck: FPN, stages: Sequence[Tensor]) -> List[Tensor]:
    """What ``neck(stages)`` gives but for rounding, without gradients.

    Args:
        neck: for which ``can_fuse_neck`` holds.
        stages: of the backbone, [n, C_l, H_l, W_l], channels last.
    """
    merged: List[Tensor] = []  # from the coarsest level down
    for stage, module in reversed(list(zip(stages[neck.start_level :], neck.lateral_convs))):
        level = F.conv2d(stage, module.conv.weight)
        bias = module.conv.bias.to(level.dtype).view(1, -1, 1, 1)
        merged.append(add_enlarged(level, merged[-1] + bias) if merged else level.add_(bias))
    return [module(level) for module, level in zip(neck.fpn_convs, reversed(merged))]


def add_enlarged(level: Tensor, coarse: Tensor) -> Tensor:
    """level [n, C, H, W] plus coarse [n, C, h, w] enlarged to H x W by its nearest values; overwrites level."""
    count, channels, height, width = level.shape
    doubles = (height, width) == (2 * coarse.shape[2], 2 * coarse.shape[3])
    if not doubles or not level.is_contiguous(memory_format=torch.channels_last):
        return level.add_(F.interpolate(coarse, size=(height, width), mode='nearest'))
    blocks = level.permute(0, 2, 3, 1).view(count, height // 2, 2, width // 2, 2, channels)
    blocks.add_(coarse.permute(0, 2, 3, 1)[:, :, None, :, None])
    return level
