"""The steps that make a sample of a keyframe, registered with mmdet's ``PIPELINES``.

A step takes and returns one dict. It finds there what the data set put in (``info``, ``history``, ``rng``,
``data_root``, ``label_folder``, ``test_mode``) and what the steps before it added.
"""

from .bev_aug import BEVAug
from .image_aug import RandomTransformImage
from .load_images import LoadMultiViewImageFromMultiSweeps
from .load_occ import LoadOccGTFromFile

__all__ = ['BEVAug', 'LoadMultiViewImageFromMultiSweeps', 'LoadOccGTFromFile', 'RandomTransformImage']
