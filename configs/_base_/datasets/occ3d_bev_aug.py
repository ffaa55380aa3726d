"""Occ3D-nuScenes, release 1.1's pipelines: images may be mirrored, the volume is rotated and flipped."""

_base_ = './occ3d.py'

data = dict(
    train=dict(
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps'),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.38, 0.55), rand_flip=True),
            dict(type='BEVAug', rot_lim=(-22.5, 22.5), flip_dx_ratio=0.5, flip_dy_ratio=0.5),
        ]
    )
)
