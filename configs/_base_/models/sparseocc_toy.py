"""A SparseOcc that trains in minutes on two CPU cores: ResNet-18 from scratch, 64 channels, fewer voxels."""
_base_ = './sparseocc_v11.py'
_dim = 64

model = dict(
    img_backbone=dict(
        depth=18, frozen_stages=-1, norm_eval=False, with_cp=False),
    img_neck=dict(in_channels=[64, 128, 256, 512], out_channels=_dim),
    pts_bbox_head=dict(
        embed_dims=_dim,
        transformer=dict(
            embed_dims=_dim,
            num_queries=40,
            dropout=0.0,
            mixing_chunk=0,
            topk_training=[800, 3000, 12000],
            topk_testing=[800, 3000, 12000])))
