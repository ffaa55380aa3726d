"""Sampling of 3-D points in multi-view, multi-scale feature maps (SPEC: "Sampling")."""

from models.csrc.msmv_sampling.ops import sample_multi_view, select_frames

__all__ = ['sample_multi_view', 'select_frames']
