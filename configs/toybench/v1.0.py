"""Toy benchmark v1, release 1.0 at full size: ResNet-50 from random weights, 704x256, 8 frames, one GPU."""

_base_ = [
    '../_base_/datasets/toybench.py',
    '../_base_/models/sparseocc_v10.py',
    '../_base_/schedules/toybench.py',
    '../_base_/runtime/default.py',
]

model = dict(  # nothing is pretrained; a batch of 4 leaves room to keep what releases compute twice
    img_backbone=dict(frozen_stages=-1, norm_eval=False, with_cp=False),
    pts_bbox_head=dict(
        transformer=dict(mixing_chunk=0, topk_training=[4000, 16000, 32000], topk_testing=[4000, 16000, 32000])
    ),  # toy ground alone fills 2,000 blocks of the first stage; what stands on it needs room too
)
train = dict(amp='bf16', cudnn_benchmark=True)
evaluation = dict(metrics=['ray_iou', 'miou'])
