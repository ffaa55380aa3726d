"""Layers that both decoders share."""

from .attention import DistanceAttention
from .mixing import AdaptiveMixing

__all__ = ['AdaptiveMixing', 'DistanceAttention']
