"""Toy benchmark v1: 50 training and 10 validation scenes of 20 keyframes, 800x450, with sweeps.

    python tools/make_toy_nuscenes.py --preset toybench-v1 --out data/toybench

makes it. Pipelines as in release 1.0; ``resize_lim`` is adapted to the smaller images by itself.
"""

_base_ = './occ3d.py'

data = dict(
    workers_per_gpu=14,
    train=dict(data_root='data/toybench/'),
    val=dict(data_root='data/toybench/'),
    test=dict(data_root='data/toybench/', ann_file='nuscenes_infos_val_sweep.pkl'),
)
