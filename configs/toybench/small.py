"""Toy benchmark v1, small: release 1.1's parts at a sixteenth of the size, for everything that needs many runs.

ResNet-18 of half the width from random weights, 352x128, 4 frames, 64 channels.
"""

_base_ = './v1.1.py'
_dim = 64

task = dict(num_frames=4, image_size=(128, 352))
data = dict(
    train=dict(
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps', fast_decode=True),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.38, 0.55), rand_flip=True),
            dict(type='BEVAug', rot_lim=(-22.5, 22.5), flip_dx_ratio=0.5, flip_dy_ratio=0.5),
        ]
    )
)
model = dict(
    img_backbone=dict(depth=18, base_channels=28, with_cp=False),
    img_neck=dict(in_channels=[28, 56, 112, 224], out_channels=_dim),
    pts_bbox_head=dict(
        embed_dims=_dim,
        transformer=dict(
            num_queries=40,
            num_heads=2,
            mixing_chunk=0,
            topk_training=[2000, 8000, 32000],
            topk_testing=[2000, 8000, 32000],
        ),
    ),
)
optimizer = dict(lr=1e-3)
runner = dict(max_iters=2400)  # 19 passes over the training set
total_batch_size = 8
