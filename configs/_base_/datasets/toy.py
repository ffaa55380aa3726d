"""Toy nuScenes (tools/make_toy_nuscenes.py): few scenes, small images, the same grid and classes as Occ3D."""
_base_ = './occ3d_bev_aug.py'

task = dict(num_frames=1, image_size=(96, 256))

data = dict(
    workers_per_gpu=1,
    train=dict(
        data_root='data/toy/',
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps'),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', training=True, resize_lim=(0.62, 0.70), rand_flip=True),
            dict(type='BEVAug', rot_lim=(-22.5, 22.5), flip_dx_ratio=0.5, flip_dy_ratio=0.5),
        ]),
    val=dict(data_root='data/toy/'),
    test=dict(data_root='data/toy/'))
