"""Toy nuScenes, semantic, with release 1.0's scoring, losses and four passes of the mask layer."""

_base_ = './semantic.py'

model = dict(
    pts_bbox_head=dict(
        transformer=dict(num_layers=4, scoring='occupancy'),
        loss_cfgs=dict(
            _delete_=True,
            loss_mask2former=dict(type='Mask2FormerLoss'),
            loss_occ=dict(type='BalancedOccupancyLoss'),
            loss_sem=dict(type='VoxelCrossEntropyLoss'),
        ),
    )
)
