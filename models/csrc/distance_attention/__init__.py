"""Self-attention whose logits fall with distance (SPEC: "Attention between blocks")."""

from models.csrc.distance_attention.ops import distance_attention, distance_attention_reference, plane_distance

__all__ = ['distance_attention', 'distance_attention_reference', 'plane_distance']
