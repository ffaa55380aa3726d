"""Release 1.0, semantic: ResNet-50, 704x256, 8 frames, 48 epochs."""

_base_ = [
    './_base_/datasets/occ3d.py',
    './_base_/models/sparseocc_v10.py',
    './_base_/schedules/cosine_48e.py',
    './_base_/runtime/default.py',
]

# Occ3D-nuScenes validation, as published (percent; frames per second on an A100, fp32, batch 1).
published = dict(release='1.0', ray_iou=35.0, fps_a100=17.3)
