"""Toy benchmark v1, release 1.1 at full size with what helped: r50_nuimg_704x256_8f_plus.py's changes."""

_base_ = './v1.1.py'

data = dict(
    train=dict(
        pipeline=[  # as in release 1.0: images are not mirrored, the volume stays as it is
            dict(type='LoadMultiViewImageFromMultiSweeps'),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.38, 0.55), rand_flip=False),
        ]
    )
)
model = dict(
    pts_bbox_head=dict(
        loss_cfgs=dict(
            loss_mask2former=dict(num_points=8192, class_power=0.25),
            loss_ray=dict(type='RayConsistencyLoss', loss_weight=1.0),
        )
    )
)
train = dict(ema_decay=0.999)
