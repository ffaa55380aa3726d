"""Release 1.1's parts at a sixteenth of the size: ResNet-18 of less than half the width, 64 channels, 40 queries.

4.7 million parameters: a checkpoint in half precision takes 9.5 MB.
"""

_base_ = './sparseocc_v11.py'
_dim = 64

model = dict(
    img_backbone=dict(depth=18, base_channels=28, frozen_stages=-1, norm_eval=False, with_cp=False),
    img_neck=dict(in_channels=[28, 56, 112, 224], out_channels=_dim),
    pts_bbox_head=dict(
        embed_dims=_dim,
        transformer=dict(
            num_queries=40,
            num_heads=2,
            mixing_chunk=0,
            topk_training=[4000, 16000, 32000],
            topk_testing=[4000, 16000, 32000],
        ),
    ),
)
