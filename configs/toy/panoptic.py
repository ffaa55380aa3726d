"""Toy nuScenes, panoptic: things told apart."""

_base_ = './semantic.py'

task = dict(panoptic=True)
model = dict(pts_bbox_head=dict(transformer=dict(num_queries=60)))
data = dict(train=dict(occ_gt_root='occ3d_panoptic'), val=dict(occ_gt_root='occ3d_panoptic'))
