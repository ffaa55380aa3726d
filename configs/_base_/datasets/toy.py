"""Toy nuScenes (tools/make_toy_nuscenes.py): few scenes, small images, the same grid and classes as Occ3D.

Hardly any augmentation: in the few hundred steps of a demo every sample is seen only a few times.
"""

_base_ = './occ3d.py'

task = dict(num_frames=1, image_size=(96, 256))
data = dict(
    workers_per_gpu=1,
    train=dict(
        data_root='data/toy/',
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps'),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.44, 0.45), rand_flip=False),
        ],
    ),
    val=dict(data_root='data/toy/'),
    test=dict(data_root='data/toy/'),
)
