"""The losses of one stage of the voxel decoder: terms that the config names, on labels counted per kept block.

``VoxelLosses`` says what a term is; those of both releases follow. All voxels of a block share their prediction, so a
loss summed over them equals its value per class times the counts.

Shapes: B batch, K kept blocks, C classes with free last, X Y Z the grid; s edge of a block in voxels.
"""

from dataclasses import replace
from typing import Dict, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor

from lib.classes import IGNORE_LABEL
from lib.dist import count_share, shares_are_counted
from lib.errors import ConfigError, DataError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.builder import build_part
from models.decoders import VoxelStage

_LOG_FLOOR = -100.0

# What configs said before they named every term, and what that meant: the published releases.
_ONCE_NAMED: Dict[str, Sequence[str]] = dict(occupancy=(), semantic=('loss_geo_scal', 'loss_sem_scal'))
_ONCE_IMPLIED: Dict[str, Dict[str, Mapping]] = dict(
    occupancy=dict(loss_occ=dict(type='BalancedOccupancyLoss'), loss_sem=dict(type='VoxelCrossEntropyLoss')),
    semantic=dict(
        loss_sem_lovasz=dict(type='LovaszSoftmaxLoss'),
        loss_sem_ce=dict(type='VoxelCrossEntropyLoss', class_weighted=True),
    ),
)


def check_targets(targets: Optional[OccupancyTargets], task: Task, use_mask_camera: bool) -> OccupancyTargets:
    """The labels as the losses want them: complete, of the task's grid, with a mask only if it is to be used.

    Raises:
        DataError: something is missing or does not fit; it says what to do.
    """
    if targets is None or any(
        value is None for value in (targets.voxel_semantics, targets.voxel_instances, targets.instance_class_ids)
    ):
        raise DataError(
            'the batch has no labels, which training needs; put LoadOccGTFromFile into the pipeline of data.train'
        )
    shape = tuple(targets.voxel_semantics.shape[1:])
    if shape != task.grid_shape:
        raise DataError(
            f'the labels have {shape} voxels, the task has {task.grid_shape}; give labels made for '
            'task.point_cloud_range and task.voxel_size'
        )
    if use_mask_camera and targets.mask_camera is None:
        raise DataError(
            'model.use_mask_camera is set, but the label files have no mask_camera; use '
            'labels that have it or set model.use_mask_camera=False'
        )
    return targets if use_mask_camera else replace(targets, mask_camera=None)


class StageLabels(NamedTuple):
    """What the kept blocks of a stage stand for.

    counts   float32 [B, K, C], how many voxels of each class a block covers, see ``count_labels``
    targets  labels of the batch, for terms that need more than classes
    """

    counts: Tensor
    targets: OccupancyTargets


class VoxelLosses(BaseModule):
    """Every term of a stage, by its name in the config.

    A term is a module registered in mmdet's ``LOSSES``. It is called as ``term(stage, labels)`` with a
    ``VoxelStage`` and its ``StageLabels``, and gives a scalar, already multiplied by its ``loss_weight``. If its
    constructor has an argument ``task``, it gets the ``Task``. A term whose attribute ``scoring`` is 'occupancy'
    or 'semantic' needs logits that only this way of scoring has. A term with an attribute ``scales`` is asked of the
    stages whose blocks have one of these edges only.

    Args:
        task: classes and their weights.
        scoring: of the voxel decoder: 'occupancy' (release 1.0) or 'semantic' (release 1.1).
        loss_cfgs: configs of the terms.
        where: key of ``loss_cfgs`` in the config, for messages.
    """

    def __init__(self, task: Task, scoring: str, loss_cfgs: Mapping, where: str = 'loss_cfgs'):
        super().__init__()
        self.num_classes = task.label_set.num_classes
        self.terms = torch.nn.ModuleDict()
        for name, cfg in _all_terms(loss_cfgs, scoring, where).items():
            if not name.startswith('loss_'):
                raise ConfigError(f"{where}: the name {name!r} must begin with 'loss_'")
            term = self.terms[name] = build_part(cfg, LOSSES, f'{where}.{name}', task)
            if getattr(term, 'scoring', scoring) != scoring:
                raise ConfigError(
                    f'{where}.{name}: {type(term).__name__} needs transformer.scoring={term.scoring!r}, not '
                    f'{scoring!r}; remove it (in a config that builds on another: {name}=None does so)'
                )

    def forward(
        self, stage: VoxelStage, targets: OccupancyTargets, number: int = 0, of_graphs: Optional[bool] = None
    ) -> Dict[str, Tensor]:
        """Each term by its name without the stage's number, which counts from 0.

        Args:
            of_graphs: ask only the terms that a CUDA graph can hold, or only the others; None: all.
        """
        asked = {
            name: term
            for name, term in self.terms.items()
            if stage.scale in getattr(term, 'scales', [stage.scale]) and of_graphs in (None, _fits_graphs(term))
        }
        if not (asked or shares_are_counted()):
            return {}
        counts = count_labels(targets, stage.coords, stage.scale, self.num_classes)
        if shares_are_counted():
            count_share(f'recall_{number}', counts[..., :-1].sum(), self._occupied(targets))
        labels = StageLabels(counts, targets)
        return {name: term(stage, labels) for name, term in asked.items()}

    def _occupied(self, targets: OccupancyTargets) -> Tensor:
        """Number of occupied voxels that count."""
        occupied = targets.voxel_semantics < self.num_classes - 1
        return (occupied if targets.mask_camera is None else occupied & targets.mask_camera).sum()


def _fits_graphs(term: torch.nn.Module) -> bool:
    """Whether a term reads counts alone, draws nothing and waits for nothing, as all of this module do."""
    return type(term).__module__ == __name__


def _all_terms(loss_cfgs: Mapping, scoring: str, where: str) -> Dict[str, Mapping]:
    """The terms to build: those of the config, and what a config of old implied; None takes a term out."""
    named, implied = _ONCE_NAMED[scoring], _ONCE_IMPLIED[scoring]
    terms = {name: cfg for name, cfg in loss_cfgs.items() if cfg is not None}
    if not set(named) <= set(terms) or any(name in loss_cfgs for name in implied):
        return terms
    if set(terms) == set(named):
        return dict(implied, **terms)
    lines = ', '.join(f'{name}={cfg!r}' for name, cfg in implied.items())
    raise ConfigError(
        f'{where}: every term has to be named; add those of the release, {lines}, or say {next(iter(implied))}=None '
        'to do without them'
    )


def take_blocks(volume: Tensor, coords: Tensor, scale: int) -> Tensor:
    """The voxels of each block.

    Args:
        volume: [B, X, Y, Z].
        coords: int64 [B, K, 3] in blocks.
        scale: s.

    Returns:
        [B, K, s**3].
    """
    batch, sx, sy, sz = volume.shape
    nx, ny, nz = sx // scale, sy // scale, sz // scale
    blocks = volume.reshape(batch, nx, scale, ny, scale, nz, scale).permute(0, 1, 3, 5, 2, 4, 6)
    blocks = blocks.reshape(batch, nx * ny * nz, scale**3)
    index = (coords[..., 0] * ny + coords[..., 1]) * nz + coords[..., 2]
    return blocks.gather(1, index.unsqueeze(-1).expand(-1, -1, scale**3))


def count_labels(targets: OccupancyTargets, coords: Tensor, scale: int, num_classes: int) -> Tensor:
    """How many voxels of each class each kept block covers; nearest upsampling without making the voxels.

    A loss summed over the upsampled voxels of a block equals its value per class times these counts.
    Voxels labelled 255, and voxels outside ``mask_camera`` where there is one, are not counted.

    Args:
        targets: labels of the batch.
        coords: int64 [B, K, 3] in blocks of edge ``scale`` voxels.

    Returns:
        float32 [B, K, C], sums to at most s**3.
    """
    labels = targets.voxel_semantics
    if targets.mask_camera is not None:
        labels = labels.masked_fill(~targets.mask_camera, IGNORE_LABEL)
    labels = take_blocks(labels, coords, scale)
    classes = torch.arange(num_classes, dtype=labels.dtype, device=labels.device)
    return (labels.unsqueeze(-1) == classes).sum(2, dtype=torch.float32)


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
