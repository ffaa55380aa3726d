"""Toy benchmark v1, release 1.1 at full size, panoptic: as v1.1.py, things told apart."""

_base_ = './v1.1.py'

task = dict(panoptic=True)
data = dict(train=dict(occ_gt_root='occ3d_panoptic'), val=dict(occ_gt_root='occ3d_panoptic'))
evaluation = dict(metrics=['ray_iou', 'ray_pq', 'miou'])
