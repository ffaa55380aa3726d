"""Toy: AdamW with one learning rate for all (nothing is pretrained), cosine, minutes on a CPU."""

_base_ = './cosine_48e.py'

optimizer = dict(lr=3e-3, paramwise_cfg=dict(_delete_=True, custom_keys={'sampling_offset': dict(lr_mult=0.1)}))
lr_config = dict(warmup_iters=20, by_epoch=False)
runner = dict(max_epochs=6)
total_batch_size = 1
load_from = None
revise_keys = []
