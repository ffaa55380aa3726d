"""Toy nuScenes, semantic: what tools/demo.py trains."""

_base_ = [
    '../_base_/datasets/toy.py',
    '../_base_/models/sparseocc_toy.py',
    '../_base_/schedules/toy.py',
    '../_base_/runtime/default.py',
]

train = dict(log_interval=10)
