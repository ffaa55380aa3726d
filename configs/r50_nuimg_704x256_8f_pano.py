"""Release 1.0, panoptic: as r50_nuimg_704x256_8f.py, things told apart."""

_base_ = './r50_nuimg_704x256_8f.py'

task = dict(panoptic=True)
data = dict(train=dict(occ_gt_root='occ3d_panoptic'), val=dict(occ_gt_root='occ3d_panoptic'))

# Occ3D-nuScenes validation, as published (percent).
published = dict(_delete_=True, release='1.0', ray_iou=34.5, ray_pq=14.0)
