"""Whose weights these are: releases and classes, told by the names and shapes in a checkpoint."""

from typing import Mapping, Optional

from torch import Tensor

from lib.checkpoint import WeightsKind

# Another detector's names for the parts: mmdet calls the pyramid 'neck'. Its weights fit where the widths agree.
PRETRAINED_NAMES = ((r'^neck\.', 'img_neck.'),)

_CONFIGS = {
    ('1.0', 17): 'configs/r50_nuimg_704x256_8f.py (or _pano.py)',
    ('1.1', 17): 'configs/r50_nuimg_704x256_8f_v1.1.py (or _v1.1_pano.py)',
    ('1.1', 16): 'configs/r50_nuimg_704x256_8f_openocc.py',
}


def describe_weights(weights: Mapping[str, Tensor]) -> Optional[WeightsKind]:
    """Release (1.0 scores children by occupancy) and class count, without free; None for another network's weights.

    Semantic and panoptic models have the same weights, so nothing tells these apart.
    """
    classifier = [v for k, v in weights.items() if k.endswith('decoder_layer.classifier.weight')]
    if not classifier:
        return None
    release, classes = '1.0' if any('.occ_pred_heads.' in k for k in weights) else '1.1', int(classifier[0].shape[0])
    return WeightsKind(f'a release {release} model with {classes} classes', _CONFIGS.get((release, classes)))
