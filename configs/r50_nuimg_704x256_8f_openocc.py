"""OpenOcc v2 labels (17 classes with free), release 1.1's recipe. No published number."""

_base_ = './r50_nuimg_704x256_8f_v1.1.py'

task = dict(label_set='openocc_v2')
data = dict(train=dict(occ_gt_root='openocc_v2'), val=dict(occ_gt_root='openocc_v2'))
evaluation = dict(metrics=['ray_iou'])  # the labels carry no camera mask, so no mIoU
published = dict(_delete_=True)
