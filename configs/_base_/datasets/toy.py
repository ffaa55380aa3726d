"""Toy nuScenes (tools/make_toy_nuscenes.py): few scenes, small images, the same grid and classes as Occ3D."""
_base_ = './occ3d_bev_aug.py'

task = dict(num_frames=1, image_size=(96, 256))
data = dict(
    workers_per_gpu=1,
    train=dict(data_root='data/toy/'),
    val=dict(data_root='data/toy/'),
    test=dict(data_root='data/toy/'))
