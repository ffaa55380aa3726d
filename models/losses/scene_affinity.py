"""Scene-class affinity losses of MonoScene (arXiv 2112.00726, section 3.4), on counted labels.

Shapes: B batch, K blocks, C classes with free last; counts as in ``count_labels``.
"""

import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor

_LOG_FLOOR = -100.0


def negative_log(ratio: Tensor) -> Tensor:
    """-log of a ratio in 0..1, at most 100, with a finite gradient at 0."""
    tiny = torch.finfo(ratio.dtype).tiny
    log = ratio.clamp(min=tiny, max=1.0).log()
    return -torch.where(ratio > 0, log, torch.full_like(log, _LOG_FLOOR)).clamp(min=_LOG_FLOOR)


def affinity(inside: Tensor, hits: Tensor, others: Tensor, total_probability: Tensor, present: Tensor) -> Tensor:
    """-log precision - log recall - log specificity; a term without a denominator is left out.

    Args (all [...], sums over the voxels of a sample):
        inside: probability of the class summed over its own voxels.
        hits: number of its voxels.
        others: number of the other voxels.
        total_probability: probability of the class summed over all voxels.
        present: 1 - probability summed over the other voxels.
    """
    loss = torch.zeros_like(inside)
    for numerator, denominator in ((inside, total_probability), (inside, hits), (present, others)):
        exists = denominator > 0
        ratio = numerator / torch.where(exists, denominator, torch.ones_like(denominator))
        loss = loss + torch.where(exists, negative_log(ratio), torch.zeros_like(ratio))
    return loss


@LOSSES.register_module()
class GeoScalLoss(BaseModule):
    """Occupied against free.

    Args:
        loss_weight: factor of the result.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, probabilities: Tensor, counts: Tensor) -> Tensor:
        """probabilities and counts [B, K, C], free last -> scalar, mean over the batch."""
        free = probabilities[..., -1]
        occupied, empty = counts[..., :-1].sum(-1), counts[..., -1]
        inside = ((1 - free) * occupied).sum(1)
        loss = affinity(
            inside, occupied.sum(1), empty.sum(1), inside + ((1 - free) * empty).sum(1), (free * empty).sum(1)
        )
        return self.loss_weight * loss.mean()


@LOSSES.register_module()
class SemScalLoss(BaseModule):
    """Each class against the rest, averaged over the classes present in a sample.

    Args:
        loss_weight: factor of the result.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, probabilities: Tensor, counts: Tensor) -> Tensor:
        """probabilities and counts [B, K, C] -> scalar, mean over the batch."""
        others = counts.sum(-1, keepdim=True) - counts
        inside = (probabilities * counts).sum(1)
        hits = counts.sum(1)
        loss = affinity(
            inside, hits, others.sum(1), inside + (probabilities * others).sum(1), ((1 - probabilities) * others).sum(1)
        )
        is_present = (hits > 0).float()
        per_sample = (loss * is_present).sum(1) / is_present.sum(1).clamp(min=1)
        return self.loss_weight * per_sample.mean()
