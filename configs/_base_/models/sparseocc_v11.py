"""SparseOcc, ResNet-50, as of release 1.1: 18-way scores and losses, twice the voxels in training."""

_base_ = './sparseocc_v10.py'

model = dict(
    pts_bbox_head=dict(
        transformer=dict(num_layers=2, topk_training=[4000, 16000, 64000], scoring='semantic'),
        loss_cfgs=dict(
            _delete_=True,
            loss_mask2former=dict(type='Mask2FormerLoss'),
            loss_sem_lovasz=dict(type='LovaszSoftmaxLoss'),
            loss_geo_scal=dict(type='GeoScalLoss'),
            loss_sem_scal=dict(type='SemScalLoss'),
            loss_sem_ce=dict(type='VoxelCrossEntropyLoss', class_weighted=True),
        ),
    )
)
