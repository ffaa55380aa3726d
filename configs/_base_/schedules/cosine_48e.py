"""Release 1.0: AdamW at 2e-4, cosine, 48 epochs, total batch 8."""

optimizer = dict(
    type='AdamW',
    lr=2e-4,
    weight_decay=0.01,
    paramwise_cfg=dict(custom_keys={'img_backbone': dict(lr_mult=0.1), 'sampling_offset': dict(lr_mult=0.1)}),
)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
lr_config = dict(policy='CosineAnnealing', warmup='linear', warmup_iters=500, warmup_ratio=1.0 / 3, min_lr_ratio=1e-3)
runner = dict(max_epochs=48)
total_batch_size = 8  # over all GPUs and accumulation steps

# ImageNet, COCO and nuImages trained; backbone and neck are taken from it (docs/nuscenes.md says where it is)
load_from = 'pretrain/cascade_mask_rcnn_r50_fpn_coco-20e_20e_nuim_20201009_124951-40963960.pth'
revise_keys = [('backbone', 'img_backbone')]
