"""Toy benchmark v1: 3,000 steps of 4 samples (12 passes over the training set) on one GPU, in bf16.

What differs from the releases: nothing is pretrained, so all parts learn at one rate (``sampling_offset`` at a
tenth, as there); cosine to a thousandth for both releases; half the total batch.
"""

_base_ = './cosine_48e.py'

optimizer = dict(lr=4e-4, paramwise_cfg=dict(_delete_=True, custom_keys={'sampling_offset': dict(lr_mult=0.1)}))
lr_config = dict(by_epoch=False, warmup_iters=200)
runner = dict(_delete_=True, max_iters=3000)
total_batch_size = 4
load_from = None
revise_keys = []
