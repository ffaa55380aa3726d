"""SparseOcc, ResNet-50, as of release 1.0: children scored by occupancy, four passes of the mask layer."""

_dim = 256

model = dict(
    type='SparseOcc',
    data_aug=dict(
        img_color_aug=True,
        img_norm_cfg=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        img_pad_cfg=dict(size_divisor=32),
    ),
    img_backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        with_cp=True,
    ),
    img_neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=_dim, num_outs=4),
    pts_bbox_head=dict(
        type='SparseOccHead',
        embed_dims=_dim,
        transformer=dict(
            type='SparseOccTransformer',
            num_layers=4,
            num_groups=4,
            num_points=4,
            num_queries=100,
            num_levels=4,
            topk_training=[2000, 8000, 32000],
            topk_testing=[2000, 8000, 32000],
            scoring='occupancy',
        ),
        loss_cfgs=dict(
            loss_mask2former=dict(type='Mask2FormerLoss'),
            loss_occ=dict(type='BalancedOccupancyLoss'),
            loss_sem=dict(type='VoxelCrossEntropyLoss'),
        ),
    ),
    use_mask_camera=False,
    test_cfg=dict(history='cached', draws='even', merge_stuff='published', overlap_threshold=0.8, score_threshold=0.3),
)
