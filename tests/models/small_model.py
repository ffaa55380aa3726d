"""A SparseOcc small enough to build and run in a fraction of a second, and batches for it."""

from typing import Dict

import torch

from lib.task import Task
from models import build_model
from tools.synthetic import synthetic_batch

LOSSES = dict(
    occupancy=dict(loss_occ=dict(type='BalancedOccupancyLoss'), loss_sem=dict(type='VoxelCrossEntropyLoss')),
    semantic=dict(
        loss_sem_lovasz=dict(type='LovaszSoftmaxLoss'),
        loss_geo_scal=dict(type='GeoScalLoss'),
        loss_sem_scal=dict(type='SemScalLoss'),
        loss_sem_ce=dict(type='VoxelCrossEntropyLoss', class_weighted=True),
    ),
)
CLASSES = ('car', 'pedestrian', 'road', 'wall', 'free')
WIDTH = 64 if torch.cuda.is_available() else 16  # of the backbone; a GPU's kernels are tried with that of ResNets

SMALL = dict(
    label_set=dict(name='small', class_names=CLASSES, things=CLASSES[:2]),
    panoptic=True,
    point_cloud_range=[-4.0, -6.0, -1.0, 4.0, 6.0, 3.0],
    voxel_size=0.5,
    num_frames=2,
    cameras=['CAM_FRONT', 'CAM_BACK', 'CAM_BACK_LEFT'],
    image_size=(64, 96),
)


def small_task(**changes) -> Task:
    """16 x 24 x 8 voxels of 0.5 m, 4 classes and free, 2 frames of 3 cameras at 64 x 96."""
    return Task.from_config(dict(SMALL, **changes))


def small_config(scoring: str = 'semantic', **transformer) -> Dict:
    """``model`` dict; 32 channels, 8 queries, no dropout, running statistics fixed."""
    losses = dict(LOSSES[scoring], loss_mask2former=dict(type='Mask2FormerLoss'))
    decoders = dict(
        type='SparseOccTransformer',
        num_layers=2,
        num_groups=4,
        num_points=4,
        num_queries=8,
        num_levels=4,
        topk_training=[20, 60, 200],
        topk_testing=[20, 60, 200],
        scoring=scoring,
        dropout=0.0,
    )
    return dict(
        type='SparseOcc',
        data_aug=dict(
            img_color_aug=False,
            img_pad_cfg=dict(size_divisor=32),
            img_norm_cfg=dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True),
        ),
        img_backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=WIDTH,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            frozen_stages=-1,
            norm_cfg=dict(type='BN', requires_grad=True),
            norm_eval=True,
            style='pytorch',
        ),
        img_neck=dict(type='FPN', in_channels=[WIDTH << stage for stage in range(4)], out_channels=32, num_outs=4),
        pts_bbox_head=dict(
            type='SparseOccHead', embed_dims=32, transformer=dict(decoders, **transformer), loss_cfgs=losses
        ),
        test_cfg=dict(history='full'),
    )


def small_model(task: Task = None, scoring: str = 'semantic', **transformer) -> torch.nn.Module:
    """Model with seeded weights that make predictions vary (generators start from zero weights otherwise)."""
    torch.manual_seed(0)
    model = build_model(small_config(scoring, **transformer), task or small_task())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and 'pts_bbox_head' in name:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def small_batch(task: Task, size: int = 1, with_labels: bool = True, **options) -> Dict:
    """A batch of different noise images with labels."""
    return synthetic_batch(task, size, with_labels=with_labels, **options)


def sample_of(batch: Dict, b: int) -> Dict:
    """Sample b of a batch as a batch of one."""
    return {name: value[b : b + 1] for name, value in batch.items()}
