"""Release 1.1: AdamW at 5e-4, steps at 22 and 24, 24 epochs, total batch 8."""

_base_ = './cosine_48e.py'

optimizer = dict(lr=5e-4)
lr_config = dict(
    _delete_=True,
    policy='step',
    warmup='linear',
    warmup_iters=500,
    warmup_ratio=1.0 / 3,
    by_epoch=True,
    step=[22, 24],
    gamma=0.2,
)
runner = dict(max_epochs=24)
