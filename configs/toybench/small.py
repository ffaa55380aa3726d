"""Toy benchmark v1, small: 352x128, 4 frames, a model that trains in minutes; for everything that needs many runs."""

_base_ = [
    '../_base_/datasets/toybench_bev_aug.py',
    '../_base_/models/sparseocc_small.py',
    '../_base_/schedules/toybench.py',
    '../_base_/runtime/default.py',
]

task = dict(num_frames=4, image_size=(128, 352))
data = dict(
    train=dict(
        pipeline=[
            dict(type='LoadMultiViewImageFromMultiSweeps', fast_decode=True),
            dict(type='LoadOccGTFromFile'),
            dict(type='RandomTransformImage', resize_lim=(0.38, 0.55), rand_flip=True),
            dict(type='BEVAug', rot_lim=(-22.5, 22.5), flip_dx_ratio=0.5, flip_dy_ratio=0.5),
        ]
    )
)
train = dict(amp='bf16', cudnn_benchmark=True)
evaluation = dict(metrics=['ray_iou', 'miou'])
optimizer = dict(lr=1e-3)
runner = dict(max_iters=2400)  # 19 passes over the training set
total_batch_size = 8
