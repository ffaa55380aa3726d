"""Losses of one stage of the voxel decoder, for both releases (SPEC: voxel losses).

Shapes: B batch, K kept blocks, C classes with free last; counts as in ``count_labels``.
"""

from typing import Dict, Mapping

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import build_loss
from torch import Tensor

from lib.classes import LabelSet
from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from models.decoders import VoxelStage
from models.losses.lovasz import lovasz_softmax
from models.losses.targets import count_labels

_AFFINITY = ('loss_geo_scal', 'loss_sem_scal')


class VoxelLosses(BaseModule):
    """The terms that a way of scoring brings along.

    Args:
        label_set: classes and their weights.
        scoring: 'occupancy' (release 1.0: loss_occ, loss_sem) or 'semantic' (release 1.1: loss_sem_lovasz,
            loss_geo_scal, loss_sem_scal, loss_sem_ce).
        loss_cfgs: with 'semantic' the configs of ``loss_geo_scal`` and ``loss_sem_scal``; otherwise empty.
    """

    def __init__(self, label_set: LabelSet, scoring: str, loss_cfgs: Mapping):
        super().__init__()
        self.num_classes, self.scoring = label_set.num_classes, scoring
        expected = set(_AFFINITY) if scoring == 'semantic' else set()
        if set(loss_cfgs) != expected:
            raise ConfigError(
                f"model.pts_bbox_head.loss_cfgs: with scoring='{scoring}' the keys besides "
                f'loss_mask2former are {sorted(expected)}, got {sorted(loss_cfgs)}'
            )
        self.affinity = torch.nn.ModuleDict({name: build_loss(cfg) for name, cfg in loss_cfgs.items()})
        self.register_buffer('class_weights', torch.tensor(label_set.class_weights()), persistent=False)

    def forward(self, stage: VoxelStage, targets: OccupancyTargets) -> Dict[str, Tensor]:
        """Each term by its name without the stage number."""
        counts = count_labels(targets, stage.coords, stage.scale, self.num_classes)
        if self.scoring == 'occupancy':
            return dict(
                loss_occ=balanced_occupancy(stage.occ_logits, counts),
                loss_sem=weighted_cross_entropy(stage.seg_logits, counts[..., :-1]),
            )
        probabilities = stage.seg_logits.softmax(-1)
        losses = dict(loss_sem_lovasz=lovasz_softmax(probabilities, counts, stage.scale))
        losses.update({name: loss(probabilities, counts) for name, loss in self.affinity.items()})
        losses['loss_sem_ce'] = weighted_cross_entropy(stage.seg_logits, counts, self.class_weights)
        return losses


def weighted_cross_entropy(logits: Tensor, counts: Tensor, weights: Tensor = None) -> Tensor:
    """Cross-entropy per voxel, weighted mean over the voxels of a sample, mean over the batch.

    Args:
        logits: [B, K, C].
        counts: float32 [B, K, C].
        weights: [C], or None for ones.
    """
    weighted = counts if weights is None else counts * weights
    total = weighted.sum((1, 2))
    summed = -(weighted * logits.log_softmax(-1)).sum((1, 2))
    return (summed / torch.where(total > 0, total, torch.ones_like(total))).mean()


def balanced_occupancy(logits: Tensor, counts: Tensor) -> Tensor:
    """Binary cross-entropy on occupied / free where every semantic class has the same total weight.

    Each of the n voxels of a sample weighs n / (voxels of its class), and the mean over the n is taken; so
    this is the sum over classes of the mean over their voxels.

    Args:
        logits: [B, K].
        counts: float32 [B, K, C], free last.
    """
    per_class = counts.sum(1, keepdim=True)
    share = counts / per_class.clamp(min=1)
    occupied, free = share[..., :-1].sum(-1), share[..., -1]
    per_sample = (occupied * F.softplus(-logits) + free * F.softplus(logits)).sum(1)
    return per_sample.mean()
