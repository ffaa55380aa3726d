"""Run set-up shared by all configs: what is logged, saved and evaluated, and how often."""

train = dict(
    amp=None,  # None: fp32; 'fp16' or 'bf16'
    log_interval=50,  # iterations between lines of the log
    checkpoint_interval=1,  # epochs
    max_keep_ckpts=1,
    picture_interval=1000,  # iterations between two pictures of two validation samples
    on_data_error='stop',
)  # or 'skip': unreadable samples are counted and left out, up to max_skipped
evaluation = dict(
    interval=0,  # epochs; 0: after the last one only
    metrics=None,
)  # what suits the task: ray_iou, miou, and ray_pq for panoptic ones
seed = 0
resume_from = None
