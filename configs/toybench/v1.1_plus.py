"""Toy benchmark v1, release 1.1 at full size, with averaged weights and a loss on rays."""

_base_ = './v1.1.py'

model = dict(pts_bbox_head=dict(loss_cfgs=dict(loss_ray=dict(type='RayConsistencyLoss', loss_weight=1.0))))
train = dict(ema_decay=0.999)
