"""Release 1.1, semantic: ResNet-50, 704x256, 8 frames, 24 epochs."""

_base_ = [
    './_base_/datasets/occ3d_bev_aug.py',
    './_base_/models/sparseocc_v11.py',
    './_base_/schedules/step_24e.py',
    './_base_/runtime/default.py',
]

# Occ3D-nuScenes validation, as published (percent; frames per second on an A100, fp32, batch 1).
published = dict(release='1.1', ray_iou=36.8, fps_a100=17.3)
