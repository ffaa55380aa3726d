"""Toy nuScenes with OpenOcc v2 labels (17 classes with free, no camera mask)."""

_base_ = './semantic.py'

task = dict(label_set='openocc_v2')
data = dict(train=dict(occ_gt_root='openocc_v2'), val=dict(occ_gt_root='openocc_v2'))
evaluation = dict(metrics=['ray_iou'])
