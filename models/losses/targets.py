"""How many voxels of each class a kept block stands for.

Shapes: B batch, K kept blocks, C classes, X Y Z the grid; s edge of a block in voxels.
"""

import torch
from torch import Tensor

from lib.classes import IGNORE_LABEL
from lib.targets import OccupancyTargets


def take_blocks(volume: Tensor, coords: Tensor, scale: int) -> Tensor:
    """The voxels of each block.

    Args:
        volume: [B, X, Y, Z].
        coords: int64 [B, K, 3] in blocks.
        scale: s.

    Returns:
        [B, K, s**3].
    """
    batch, sx, sy, sz = volume.shape
    nx, ny, nz = sx // scale, sy // scale, sz // scale
    blocks = volume.reshape(batch, nx, scale, ny, scale, nz, scale).permute(0, 1, 3, 5, 2, 4, 6)
    blocks = blocks.reshape(batch, nx * ny * nz, scale**3)
    index = (coords[..., 0] * ny + coords[..., 1]) * nz + coords[..., 2]
    return blocks.gather(1, index.unsqueeze(-1).expand(-1, -1, scale**3))


def count_labels(targets: OccupancyTargets, coords: Tensor, scale: int, num_classes: int) -> Tensor:
    """How many voxels of each class each kept block covers; nearest upsampling without making the voxels.

    A loss summed over the upsampled voxels of a block equals its value per class times these counts.
    Voxels labelled 255, and voxels outside ``mask_camera`` where there is one, are not counted.

    Args:
        targets: labels of the batch.
        coords: int64 [B, K, 3] in blocks of edge ``scale`` voxels.

    Returns:
        float32 [B, K, C], sums to at most s**3.
    """
    labels = targets.voxel_semantics
    if targets.mask_camera is not None:
        labels = labels.masked_fill(~targets.mask_camera, IGNORE_LABEL)
    labels = take_blocks(labels, coords, scale)
    return torch.stack([(labels == c).sum(-1) for c in range(num_classes)], dim=-1).float()
