"""SparseOcc, ResNet-50, as of release 1.1: 18-way scores and losses, twice the voxels in training."""

_base_ = './sparseocc_v10.py'

model = dict(
    pts_bbox_head=dict(
        transformer=dict(num_layers=2, topk_training=[4000, 16000, 64000], scoring='semantic'),
        loss_cfgs=dict(loss_geo_scal=dict(type='GeoScalLoss'), loss_sem_scal=dict(type='SemScalLoss')),
    )
)
