"""The losses of one stage of the voxel decoder: terms that the config names, on labels counted per kept block.

Shapes: B batch, K kept blocks, C classes with free last, X Y Z the grid; s edge of a block in voxels.
"""

from dataclasses import replace
from typing import Dict, Mapping, NamedTuple, Optional, Sequence

import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor

from lib.classes import IGNORE_LABEL
from lib.dist import count_share, shares_are_counted
from lib.errors import ConfigError, DataError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.builder import build_part
from models.decoders import VoxelStage

# What configs said before they named every term, and what that meant: the published releases.
_ONCE_NAMED: Dict[str, Sequence[str]] = dict(occupancy=(), semantic=('loss_geo_scal', 'loss_sem_scal'))
_ONCE_IMPLIED: Dict[str, Dict[str, Mapping]] = dict(
    occupancy=dict(loss_occ=dict(type='BalancedOccupancyLoss'), loss_sem=dict(type='VoxelCrossEntropyLoss')),
    semantic=dict(
        loss_sem_lovasz=dict(type='LovaszSoftmaxLoss'),
        loss_sem_ce=dict(type='VoxelCrossEntropyLoss', class_weighted=True),
    ),
)


def check_targets(targets: Optional[OccupancyTargets], task: Task, use_mask_camera: bool) -> OccupancyTargets:
    """The labels as the losses want them: complete, of the task's grid, with a mask only if it is to be used.

    Raises:
        DataError: something is missing or does not fit; it says what to do.
    """
    if targets is None or any(
        value is None for value in (targets.voxel_semantics, targets.voxel_instances, targets.instance_class_ids)
    ):
        raise DataError(
            'the batch has no labels, which training needs; put LoadOccGTFromFile into the pipeline of data.train'
        )
    shape = tuple(targets.voxel_semantics.shape[1:])
    if shape != task.grid_shape:
        raise DataError(
            f'the labels have {shape} voxels, the task has {task.grid_shape}; give labels made for '
            'task.point_cloud_range and task.voxel_size'
        )
    if use_mask_camera and targets.mask_camera is None:
        raise DataError(
            'model.use_mask_camera is set, but the label files have no mask_camera; use '
            'labels that have it or set model.use_mask_camera=False'
        )
    return targets if use_mask_camera else replace(targets, mask_camera=None)


class StageLabels(NamedTuple):
    """What the kept blocks of a stage stand for.

    counts   float32 [B, K, C], how many voxels of each class a block covers, see ``count_labels``
    targets  labels of the batch, for terms that need more than classes
    """

    counts: Tensor
    targets: OccupancyTargets


class VoxelLosses(BaseModule):
    """Every term of a stage, by its name in the config.

    A term is a module registered in mmdet's ``LOSSES``. It is called as ``term(stage, labels)`` with a
    ``VoxelStage`` and its ``StageLabels``, and gives a scalar, already multiplied by its ``loss_weight``. If its
    constructor has an argument ``task``, it gets the ``Task``. A term whose attribute ``scoring`` is 'occupancy'
    or 'semantic' needs logits that only this way of scoring has. A term with an attribute ``scales`` is asked of the
    stages whose blocks have one of these edges only.

    Args:
        task: classes and their weights.
        scoring: of the voxel decoder: 'occupancy' (release 1.0) or 'semantic' (release 1.1).
        loss_cfgs: configs of the terms.
        where: key of ``loss_cfgs`` in the config, for messages.
    """

    def __init__(self, task: Task, scoring: str, loss_cfgs: Mapping, where: str = 'loss_cfgs'):
        super().__init__()
        self.num_classes = task.label_set.num_classes
        self.terms = torch.nn.ModuleDict()
        for name, cfg in _all_terms(loss_cfgs, scoring, where).items():
            if not name.startswith('loss_'):
                raise ConfigError(f"{where}: the name {name!r} must begin with 'loss_'")
            term = self.terms[name] = build_part(cfg, LOSSES, f'{where}.{name}', task)
            if getattr(term, 'scoring', scoring) != scoring:
                raise ConfigError(
                    f'{where}.{name}: {type(term).__name__} needs transformer.scoring={term.scoring!r}, not '
                    f'{scoring!r}; remove it (in a config that builds on another: {name}=None does so)'
                )

    def forward(self, stage: VoxelStage, targets: OccupancyTargets, number: int = 0) -> Dict[str, Tensor]:
        """Each term by its name without the stage's number, which counts from 0."""
        counts = count_labels(targets, stage.coords, stage.scale, self.num_classes)
        if shares_are_counted():
            count_share(f'recall_{number}', counts[..., :-1].sum(), self._occupied(targets))
        labels = StageLabels(counts, targets)
        asked = {
            name: term for name, term in self.terms.items() if stage.scale in getattr(term, 'scales', [stage.scale])
        }
        return {name: term(stage, labels) for name, term in asked.items()}

    def _occupied(self, targets: OccupancyTargets) -> Tensor:
        """Number of occupied voxels that count."""
        occupied = targets.voxel_semantics < self.num_classes - 1
        return (occupied if targets.mask_camera is None else occupied & targets.mask_camera).sum()


def _all_terms(loss_cfgs: Mapping, scoring: str, where: str) -> Dict[str, Mapping]:
    """The terms to build: those of the config, and what a config of old implied; None takes a term out."""
    named, implied = _ONCE_NAMED[scoring], _ONCE_IMPLIED[scoring]
    terms = {name: cfg for name, cfg in loss_cfgs.items() if cfg is not None}
    if not set(named) <= set(terms) or any(name in loss_cfgs for name in implied):
        return terms
    if set(terms) == set(named):
        return dict(implied, **terms)
    lines = ', '.join(f'{name}={cfg!r}' for name, cfg in implied.items())
    raise ConfigError(
        f'{where}: every term has to be named; add those of the release, {lines}, or say {next(iter(implied))}=None '
        'to do without them'
    )


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
    classes = torch.arange(num_classes, dtype=labels.dtype, device=labels.device)
    return (labels.unsqueeze(-1) == classes).sum(2, dtype=torch.float32)
