"""Toy benchmark v1 with release 1.1's pipelines: images may be mirrored, the volume is rotated and flipped."""

_base_ = ['./occ3d_bev_aug.py']

data = dict(
    workers_per_gpu=14,
    train=dict(data_root='data/toybench/'),
    val=dict(data_root='data/toybench/'),
    test=dict(data_root='data/toybench/', ann_file='nuscenes_infos_val_sweep.pkl'),
)
