"""The terms on voxels of both releases (SPEC: losses); ``VoxelLosses`` says what a term is.

Shapes: B batch, K kept blocks, C classes with free last; counts as in ``count_labels``. All voxels of a block share
their prediction, so a loss summed over them equals its value per class times the counts.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor

from lib.task import Task
from models.decoders import VoxelStage
from models.losses.voxel import StageLabels

_LOG_FLOOR = -100.0


class Term(BaseModule):
    """A term with a weight.

    Args:
        loss_weight: factor of the result.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        """Scalar, mean over the batch, times the weight."""
        return self.loss_weight * self.value(stage, labels)


@LOSSES.register_module()
class BalancedOccupancyLoss(Term):
    """Binary cross-entropy on occupied / free with equal weight for every class: ``loss_occ`` of release 1.0."""

    scoring = 'occupancy'

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        return balanced_occupancy(stage.occ_logits, labels.counts)


@LOSSES.register_module()
class VoxelCrossEntropyLoss(Term):
    """Cross-entropy over the classes that the stage scores: ``loss_sem`` of release 1.0, ``loss_sem_ce`` of 1.1.

    Args:
        task: classes and their weights.
        loss_weight: factor of the result.
        class_weighted: weigh classes as the label set says; by default all alike.
    """

    def __init__(self, task: Task, loss_weight: float = 1.0, class_weighted: bool = False):
        super().__init__(loss_weight)
        weights = torch.tensor(task.label_set.class_weights()) if class_weighted else None
        self.register_buffer('class_weights', weights, persistent=False)

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        scored = stage.seg_logits.shape[-1]  # without free in release 1.0
        weights = None if self.class_weights is None else self.class_weights[:scored]
        return weighted_cross_entropy(stage.seg_logits, labels.counts[..., :scored], weights)


@LOSSES.register_module()
class LovaszSoftmaxLoss(Term):
    """Lovász-Softmax (arXiv 1705.08790) over the classes present in a sample: ``loss_sem_lovasz`` of release 1.1."""

    scoring = 'semantic'

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        return lovasz_softmax(stage.seg_logits.softmax(-1), labels.counts, stage.scale)


@LOSSES.register_module()
class GeoScalLoss(Term):
    """Scene-class affinity of MonoScene (arXiv 2112.00726, section 3.4), occupied against free."""

    scoring = 'semantic'

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        return geometric_affinity(stage.seg_logits.softmax(-1), labels.counts)


@LOSSES.register_module()
class SemScalLoss(Term):
    """Scene-class affinity of MonoScene, each class against the rest, averaged over the classes in a sample."""

    scoring = 'semantic'

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        return semantic_affinity(stage.seg_logits.softmax(-1), labels.counts)


def weighted_cross_entropy(logits: Tensor, counts: Tensor, weights: Optional[Tensor] = None) -> Tensor:
    """Cross-entropy per voxel, weighted mean over the voxels of a sample, mean over the batch.

    Args:
        logits: [B, K, C].
        counts: float32 [B, K, C].
        weights: [C], or None for ones.
    """
    weighted = counts if weights is None else counts * weights
    total = weighted.sum((1, 2))
    summed = -(weighted * logits.log_softmax(-1)).sum((1, 2))
    return (summed / torch.where(total > 0, total, torch.ones_like(total))).mean()


def balanced_occupancy(logits: Tensor, counts: Tensor) -> Tensor:
    """Binary cross-entropy on occupied / free where every semantic class has the same total weight.

    Each of the n voxels of a sample weighs n / (voxels of its class), and the mean over the n is taken; so
    this is the sum over classes of the mean over their voxels.

    Args:
        logits: [B, K].
        counts: float32 [B, K, C], free last.
    """
    per_class = counts.sum(1, keepdim=True)
    share = counts / per_class.clamp(min=1)
    occupied, free = share[..., :-1].sum(-1), share[..., -1]
    per_sample = (occupied * F.softplus(-logits) + free * F.softplus(logits)).sum(1)
    return per_sample.mean()


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
    numerators = torch.stack([inside, inside, present])
    denominators = torch.stack([total_probability, hits, others])
    exists = denominators > 0
    ratios = numerators / torch.where(exists, denominators, torch.ones_like(denominators))
    return torch.where(exists, negative_log(ratios), torch.zeros_like(ratios)).sum(0)


def geometric_affinity(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Of occupied against free; probabilities and counts [B, K, C], free last -> scalar, mean over the batch."""
    free = probabilities[..., -1]
    occupied, empty = counts[..., :-1].sum(-1), counts[..., -1]
    inside = ((1 - free) * occupied).sum(1)
    total = inside + ((1 - free) * empty).sum(1)
    return affinity(inside, occupied.sum(1), empty.sum(1), total, (free * empty).sum(1)).mean()


def semantic_affinity(probabilities: Tensor, counts: Tensor) -> Tensor:
    """Of each class against the rest; probabilities and counts [B, K, C] -> scalar, mean over the batch."""
    others = counts.sum(-1, keepdim=True) - counts
    inside, hits = (probabilities * counts).sum(1), counts.sum(1)
    total = inside + (probabilities * others).sum(1)
    loss = affinity(inside, hits, others.sum(1), total, ((1 - probabilities) * others).sum(1))
    is_present = (hits > 0).float()
    per_sample = (loss * is_present).sum(1) / is_present.sum(1).clamp(min=1)
    return per_sample.mean()


def lovasz_softmax(probabilities: Tensor, counts: Tensor, scale: int) -> Tensor:
    """Mean over the classes present in a sample, then over the batch.

    A block contributes one error for its voxels of a class and one for its others, each with a multiplicity; the sum
    telescopes over equal errors, so the value is that of the upsampled voxels.

    Args:
        probabilities: [B, K, C], softmax.
        counts: float32 [B, K, C].
        scale: edge of a block in voxels; blocks of one voxel hold one label, which halves the work.

    Returns:
        scalar.
    """
    probabilities, own = probabilities.transpose(1, 2), counts.transpose(1, 2)
    others = own.sum(1, keepdim=True) - own
    if scale == 1:
        errors = torch.where(own > 0, 1 - probabilities, probabilities)
    else:
        errors = torch.cat([1 - probabilities, probabilities], dim=-1)
        none = torch.zeros_like(own)
        own, others = torch.cat([own, none], dim=-1), torch.cat([none, others], dim=-1)
    per_class = _lovasz_extension(errors, own, others)
    present = (own.sum(-1) > 0).float()
    per_sample = (per_class * present).sum(1) / present.sum(1).clamp(min=1)
    return per_sample.mean()


def _lovasz_extension(errors: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """errors and the number of own / other voxels that have them, [..., n] -> [...]."""
    errors, order = errors.sort(dim=-1, descending=True)
    with torch.no_grad():
        own, others = own.gather(-1, order).cumsum(-1), others.gather(-1, order).cumsum(-1)
        total = own[..., -1:]
        jaccard = 1 - (total - own) / (total + others).clamp(min=1)
        steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], dim=-1)
    return (errors * steps).sum(-1)
