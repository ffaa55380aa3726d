"""Depth as a second task of the image features (BEVDepth, arXiv 2206.10092): a small head that only training has.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n; C channels, D depth bins, h w size of a feature
map, M points of a sample (the longest scan of the batch).
"""

import math
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lib.errors import ConfigError, DataError
from models.decoders.layers import DecoderSizes
from models.losses.auxiliary import TrainingPass

_WHERE = 'model.auxiliary_losses.loss_depth'


@LOSSES.register_module()
class LidarDepthLoss(BaseModule):
    """Cross-entropy over bins of depth, in the cells of a feature map into which LiDAR points of the keyframe fall.

    Of several points in a cell the nearest counts. Bins are equally wide in the logarithm of the depth. Mean over the
    cells of a sample that have a point, then over the batch.

    Args:
        sizes: cameras, levels of the pyramid, C of the maps.
        loss_weight: factor of the result.
        level: which map; 1 has a stride of 8 pixels.
        num_bins: D.
        depth_range: (nearest, farthest) depth along the optical axis, metres; other points do not count.
        hidden_channels: of the head's inner layer; None: C.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        loss_weight: float = 1.0,
        level: int = 1,
        num_bins: int = 48,
        depth_range: Sequence[float] = (1.0, 60.0),
        hidden_channels: Optional[int] = None,
    ):
        super().__init__()
        if not 0 <= level < sizes.num_levels or num_bins < 2:
            raise ConfigError(
                f'{_WHERE}: level must be one of 0..{sizes.num_levels - 1} and num_bins at least 2, got {level!r} '
                f'and {num_bins!r}'
            )
        if len(depth_range) != 2 or not 0 < depth_range[0] < depth_range[1]:
            raise ConfigError(f'{_WHERE}.depth_range must be (nearest, farthest) metres above 0, got {depth_range!r}')
        self.num_cameras, self.level, self.num_bins = sizes.task.num_cameras, level, num_bins
        self.loss_weight, self.depth_range = loss_weight, tuple(depth_range)
        channels, hidden = sizes.embed_dims, hidden_channels or sizes.embed_dims
        self.head = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, num_bins, 1)
        )

    def forward(self, step: TrainingPass) -> Dict[str, Tensor]:
        """``loss_depth``, a scalar, of the current frame's maps.

        Raises:
            DataError: the targets have no ``lidar_points``.
        """
        features, points = step.features, step.targets.lidar_points
        if points is None:
            raise DataError(
                f'{_WHERE} needs LiDAR points, which the batch has not; set lidar_points=True of '
                'LoadOccGTFromFile in the pipeline of data.train'
            )
        maps = features.maps[self.level][:, : self.num_cameras]
        logits = self.head(maps.flatten(0, 1).permute(0, 3, 1, 2)).float()  # [B*N, D, h, w]
        lidar2img = step.lidar2img[:, : self.num_cameras].float()
        bins = self.true_bins(points, lidar2img, step.image_size, features.image_size, maps.shape[2:4])
        there = bins < self.num_bins
        entropy = F.cross_entropy(
            logits.permute(0, 2, 3, 1).reshape(-1, self.num_bins),
            bins.flatten().clamp(max=self.num_bins - 1),
            reduction='none',
        ).view_as(bins)
        per_sample = (entropy * there).flatten(1).sum(1) / there.flatten(1).sum(1).clamp(min=1)
        return dict(loss_depth=self.loss_weight * per_sample.mean())

    @torch.no_grad()
    def true_bins(
        self,
        points: Sequence[Tensor],
        lidar2img: Tensor,
        image_size: Tuple[int, int],
        padded_size: Tuple[int, int],
        map_size: Sequence[int],
    ) -> Tensor:
        """int64 [B, N, h, w], the bin of the nearest point in each cell; D where there is none.

        Args:
            points: B tensors float32 [n, 3], metres, LIDAR_TOP.
            lidar2img: float32 [B, N, 4, 4].
            image_size, padded_size: (height, width) of the images without and with padding below and right, pixels.
            map_size: (h, w), which cover the padded image.
        """
        padded = pad_sequence(list(points), batch_first=True, padding_value=float('nan'))  # which lies nowhere
        # no matrix product, which would be rounded
        turned = (lidar2img[:, :, None, :3, :3] * padded[:, None, :, None]).sum(-1)
        seen = turned + lidar2img[:, :, None, :3, 3]
        depth = seen[..., 2]
        x, y = seen[..., 0] / depth, seen[..., 1] / depth
        nearest, farthest = self.depth_range
        valid = (depth >= nearest) & (depth < farthest) & (x >= 0) & (x < image_size[1]) & (y >= 0)
        valid &= y < image_size[0]
        bins = (depth / nearest).log() * (self.num_bins / math.log(farthest / nearest))
        row, column = y * (map_size[0] / padded_size[0]), x * (map_size[1] / padded_size[1])
        row, column, bins = (torch.where(valid, value, torch.zeros_like(value)).long() for value in (row, column, bins))
        index = (row * map_size[1] + column) * self.num_bins + bins.clamp(max=self.num_bins - 1)
        size = math.prod(map_size) * self.num_bins
        present = torch.zeros(depth.shape[:2] + (size + 1,), dtype=torch.bool, device=depth.device)
        present = present.scatter(2, torch.where(valid, index, size), True)[..., :-1]
        present = present.view(depth.shape[:2] + (*map_size, self.num_bins))
        none = torch.full(present.shape[:-1], self.num_bins, device=depth.device)
        return torch.where(present.any(-1), present.to(torch.uint8).argmax(-1), none)
