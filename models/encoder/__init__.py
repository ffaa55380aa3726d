"""From the images of all frames to feature maps: input, backbone and neck, history."""

from .image_encoder import ImageEncoder, ImageFeatures

__all__ = ['ImageEncoder', 'ImageFeatures']
