"""From queries to sampled features: where each decoder looks.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels,
K kept voxels. Points are in metres, ego frame of the current keyframe; the same points serve all frames.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from lib.task import Task
from models.csrc.msmv_sampling import sample_multi_view
from models.draws import select_valid


class ImageFeatures(NamedTuple):
    """What a decoder can look at.

    maps         L tensors [B, T*N, H_l, W_l, C], channels last, image index t*N + n; S*N images of stored frames
                 where there is a frame_index
    ego2img      [B, T*N, 4, 4] float32, ego (metres) to pixels of the padded image
    image_size   (height, width) of the padded image, pixels
    frame_index  int64 [T], where frame t is among the stored frames; None: S = T, in order
    """

    maps: Sequence[Tensor]
    ego2img: Tensor
    image_size: Tuple[int, int]
    frame_index: Optional[Tensor] = None


class _Sampling(BaseModule):
    """What both kinds share: offsets and level weights from the query, then the sampling op."""

    def __init__(
        self,
        embed_dims: int,
        num_groups: int,
        num_points: int,
        num_levels: int,
        num_cameras: int,
        published_weight_order: bool,
    ):
        super().__init__()
        self.num_groups, self.num_points, self.num_cameras = num_groups, num_points, num_cameras
        self.published_weight_order = published_weight_order
        self.scale_weights = nn.Linear(embed_dims, num_groups * num_points * num_levels)

    def sample(self, query: Tensor, points: Tensor, features: ImageFeatures) -> Tensor:
        """query [B, Q, C], points [B, Q, G, P, 3] metres -> [B, Q, G, T*P, C/G]."""
        level_logits = self.scale_weights(query).view(points.shape[:4] + (-1,))
        return sample_multi_view(
            features.maps,
            points,
            features.ego2img,
            level_logits,
            features.image_size,
            self.num_cameras,
            published_weight_order=self.published_weight_order,
            frame_index=features.frame_index,
        )


class BlockSampling(_Sampling):
    """Points around the centre of each query's block (paper section 3.2).

    Args:
        embed_dims: C.
        num_groups: G.
        num_points: P.
        num_levels: L.
        num_cameras: N.
        published_weight_order: keep the level-weight order that released weights were trained with.
    """

    def __init__(
        self,
        embed_dims: int,
        num_groups: int,
        num_points: int,
        num_levels: int,
        num_cameras: int,
        published_weight_order: bool = True,
    ):
        super().__init__(embed_dims, num_groups, num_points, num_levels, num_cameras, published_weight_order)
        self.sampling_offset = nn.Linear(embed_dims, num_groups * num_points * 3)

    def init_weights(self):
        nn.init.zeros_(self.sampling_offset.weight)
        nn.init.uniform_(self.sampling_offset.bias, -0.5, 0.5)

    def forward(self, query: Tensor, centres: Tensor, block_size: float, features: ImageFeatures) -> Tensor:
        """query [B, Q, C], centres [B, Q, 3] metres, block_size metres -> [B, Q, G, T*P, C/G]."""
        offsets = self.sampling_offset(query).float()
        offsets = offsets.view(query.shape[:2] + (self.num_groups, self.num_points, 3))
        points = centres[:, :, None, None, :] + block_size * offsets
        return self.sample(query, points, features)


class MaskGuidedSampling(_Sampling):
    """Points at voxels drawn from each query's own mask (paper section 3.3).

    Args:
        embed_dims: C.
        num_groups: G.
        num_points: P.
        num_levels: L.
        task: grid and range.
        published_weight_order: keep the level-weight order that released weights were trained with.
    """

    def __init__(
        self,
        embed_dims: int,
        num_groups: int,
        num_points: int,
        num_levels: int,
        task: Task,
        published_weight_order: bool = True,
    ):
        super().__init__(embed_dims, num_groups, num_points, num_levels, task.num_cameras, published_weight_order)
        self.offset = nn.Linear(embed_dims, num_groups * num_points * 3)
        span = torch.tensor(task.point_cloud_range[3:]) - torch.tensor(task.point_cloud_range[:3])
        self.register_buffer('grid_shape', torch.tensor(task.grid_shape).float(), persistent=False)
        self.register_buffer('range_min', torch.tensor(task.point_cloud_range[:3]), persistent=False)
        self.register_buffer('range_span', span, persistent=False)

    def init_weights(self):
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, query: Tensor, valid: Tensor, voxels: Tensor, draws, features: ImageFeatures) -> Tensor:
        """Sampled features of each query's mask.

        Args:
            query: [B, Q, C].
            valid: bool [B, Q, K], voxels of each query's mask.
            voxels: int64 [B, K, 3], full-resolution voxel indices.
            draws: strategy of ``models.draws``.

        Returns:
            [B, Q, G, T*P, C/G].
        """
        batch, queries, _ = query.shape
        drawn = self.draw_voxels(valid, voxels, draws)
        offsets = self.offset(query).float().view(batch, queries, -1, 3)
        points = (drawn + offsets) / self.grid_shape * self.range_span + self.range_min
        points = points.view(batch, queries, self.num_groups, self.num_points, 3)
        return self.sample(query, points, features)

    def draw_voxels(self, valid: Tensor, voxels: Tensor, draws) -> Tensor:
        """Voxel positions [B, Q, G*P, 3] float32: drawn from the mask, or from the volume if it is empty."""
        batch, queries, _ = valid.shape
        count = self.num_groups * self.num_points
        fractions = draws.fractions(batch, queries, count, valid.device)
        index, empty = select_valid(valid, fractions)
        chosen = voxels.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, 3))
        chosen = chosen.view(batch, queries, count, 3).float()
        anywhere = draws.positions(batch, queries, count, valid.device) * self.grid_shape
        return torch.where(empty[:, :, None, None], anywhere, chosen)
