"""Release 1.1, semantic, 60 epochs."""

_base_ = './r50_nuimg_704x256_8f_v1.1.py'

lr_config = dict(step=[48, 60])
runner = dict(max_epochs=60)

# Occ3D-nuScenes validation, as published (percent; frames per second on an A100, fp32, batch 1).
published = dict(release='1.1', ray_iou=37.7, fps_a100=17.3)
