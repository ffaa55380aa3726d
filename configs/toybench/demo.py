"""What tools/demo.py fine-tunes on two CPU cores: the small model, one sample a step, hardly any augmentation."""

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
model = dict(data_aug=dict(img_color_aug=False), img_backbone=dict(norm_eval=True))
optimizer = dict(lr=2e-4)
lr_config = dict(warmup_iters=5)
runner = dict(max_iters=36)
total_batch_size = 1
train = dict(amp=None, log_interval=4, tensorboard=False)
evaluation = dict(metrics=['ray_iou'])
