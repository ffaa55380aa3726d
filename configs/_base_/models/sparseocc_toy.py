"""A SparseOcc that trains in minutes on two CPU cores: ResNet-18 from scratch, 64 channels, no block attention.

Toy labels hold some 58,000 occupied voxels; the numbers kept here are the best of those tried at 220 steps
(1500/5000/12000 to 5000/18000/56000).
"""

_base_ = './sparseocc_v11.py'
_dim = 64

model = dict(
    data_aug=dict(img_color_aug=False),
    img_backbone=dict(depth=18, frozen_stages=-1, norm_eval=False, with_cp=False),
    img_neck=dict(in_channels=[64, 128, 256, 512], out_channels=_dim),
    pts_bbox_head=dict(
        embed_dims=_dim,
        transformer=dict(
            num_queries=20,
            num_heads=0,
            dropout=0.0,
            mixing_chunk=0,
            topk_training=[3000, 10000, 30000],
            topk_testing=[3000, 10000, 28000],
        ),
    ),
)
