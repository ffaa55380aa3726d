"""Toy nuScenes, panoptic: things told apart."""
_base_ = './semantic.py'

task = dict(panoptic=True)
data = dict(train=dict(occ_gt_root='occ3d_panoptic'), val=dict(occ_gt_root='occ3d_panoptic'))
