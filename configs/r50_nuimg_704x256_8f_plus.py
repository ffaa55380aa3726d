"""Release 1.1 with what helped on the toy benchmark (docs/benchmark.md): averaged weights and a loss on rays.

Both act in training alone: the model, its weights' names and its speed are those of release 1.1.
"""

_base_ = './r50_nuimg_704x256_8f_v1.1.py'

model = dict(pts_bbox_head=dict(loss_cfgs=dict(loss_ray=dict(type='RayConsistencyLoss', loss_weight=1.0))))
train = dict(ema_decay=0.999)
published = dict(_delete_=True)  # nothing is: it has not been trained on nuScenes
