"""The two matrix products and normalisations of adaptive mixing (SPEC: "Adaptive mixing")."""

from models.csrc.adaptive_mixing.ops import adaptive_mix, adaptive_mix_reference

__all__ = ['adaptive_mix', 'adaptive_mix_reference']
