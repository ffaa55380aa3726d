"""What tools/demo.py fine-tunes on two CPU cores: the small model, one sample a step, hardly any augmentation.

It keeps as many voxels as the run of the weights that ship did.
"""

_base_ = './small.py'

data = dict(
    workers_per_gpu=1,
    train=dict(
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps', fast_decode=True),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.44, 0.45), rand_flip=False),
        ]
    ),
)
_kept = [2000, 8000, 32000]
model = dict(
    data_aug=dict(img_color_aug=False),
    img_backbone=dict(norm_eval=True),
    pts_bbox_head=dict(transformer=dict(topk_training=_kept, topk_testing=_kept)),
)
optimizer = dict(lr=2e-4)
lr_config = dict(warmup_iters=5)
runner = dict(max_iters=36)
total_batch_size = 1
train = dict(amp=None, log_interval=4, tensorboard=False)
evaluation = dict(metrics=['ray_iou', 'miou'])
