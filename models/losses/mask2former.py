"""Mask and class losses of the mask decoder, after Hungarian matching (paper section 3.5).

With ``num_points`` they compare some voxels: unsure ones (arXiv 2112.01527, section 3.3), rare classes more often.

Shapes: B batch, Q queries, K kept voxels, n instances of the sample that has most, m matched pairs, R candidates and
P chosen points of a pair.
"""

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor

from lib.dist import batch_rand, count_share, reduce_mean, shares_are_counted
from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.decoders import MaskPrediction, VoxelStage
from models.losses.voxel import take_blocks

_ALPHA, _GAMMA = 0.25, 2.0
_COST_EPS = 1e-12


@dataclass(frozen=True)
class PointChoice:
    """How points are chosen, with replacement; the draws depend on seed, step and sample alone.

    Attributes:
        num_points: P.
        oversample_ratio: R / P; the candidates that the unsure points are taken from.
        importance_sample_ratio: share of the points that are the candidates whose logit is nearest to 0; the others are
            drawn without looking.
        class_power: a voxel whose class has n voxels is drawn in proportion to n ** -class_power (after arXiv
            2304.05316); 0 draws all alike, 1 all classes alike.
    """

    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float
    class_power: float

    def __post_init__(self):
        if self.num_points < 1 or self.oversample_ratio < 1:
            raise ConfigError(
                'Mask2FormerLoss: num_points (None for all voxels) and oversample_ratio must be at least 1, got '
                f'{self.num_points!r} and {self.oversample_ratio!r}'
            )
        if not 0 <= self.importance_sample_ratio <= 1 or not 0 <= self.class_power <= 1:
            raise ConfigError(
                'Mask2FormerLoss: importance_sample_ratio and class_power must be in 0..1, got '
                f'{self.importance_sample_ratio!r} and {self.class_power!r}'
            )

    @property
    def num_unsure(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    @property
    def num_candidates(self) -> int:
        return int(self.oversample_ratio * self.num_points) if self.num_unsure else 0

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Numbers for ``choose``, float32 [B, R + others] in [0, 1)."""
        return batch_rand(batch, self.num_candidates + self.num_points - self.num_unsure, device=device)

    def cumulate(self, labels: Tensor, counted: Optional[Tensor]) -> Tensor:
        """Cumulative weights of a sample's voxels, float64 [K].

        Args:
            labels: uint8 [K], classes; 255 is one of them.
            counted: float32 [K], 0 where a voxel must not be chosen, or None.
        """
        _, of_voxel, counts = labels.unique(return_inverse=True, return_counts=True)
        weights = (counts.double() ** -self.class_power)[of_voxel]
        return (weights if counted is None else weights * counted).cumsum(0)

    def choose(self, logits: Tensor, cumulated: Tensor, numbers: Tensor) -> Tensor:
        """Points of every mask of a sample.

        Args:
            logits: [m, K].
            cumulated: float64 [K], see ``cumulate``.
            numbers: float32 [R + others].

        Returns:
            int64 [m, P], voxels.
        """
        drawn = torch.searchsorted(cumulated, numbers.double() * cumulated[-1], right=True)
        candidates, others = drawn.clamp(max=len(cumulated) - 1).split(
            [self.num_candidates, len(numbers) - self.num_candidates]
        )
        sureness = logits.detach()[:, candidates].abs()
        unsure = candidates[sureness.topk(self.num_unsure, dim=1, largest=False).indices]
        return torch.cat([unsure, others.expand(len(logits), -1)], dim=1)


class MaskTargets(NamedTuple):
    """Instances among the kept voxels; a sample with fewer than n is padded.

    masks      bool [B, n, K], inside
    class_ids  int64 [B, n]
    present    bool [B, n], whether any kept (and counted) voxel is inside
    counted    float32 [B, K], 1 where the voxel counts, or None if all do
    cumulated  per sample float64 [K], for the choice of points (``PointChoice.cumulate``); none where all voxels are
               compared
    """

    masks: Tensor
    class_ids: Tensor
    present: Tensor
    counted: Optional[Tensor]
    cumulated: Sequence[Tensor] = ()


class Matching(NamedTuple):
    """Matched pairs of one sample, by query index.

    queries    int64 [m]
    instances  int64 [m]
    """

    queries: Tensor
    instances: Tensor


class Pairs(NamedTuple):
    """Matched pairs of a batch, sample after sample; on the device.

    queries    int64 [m], b * Q + query
    instances  int64 [m], b * n + instance
    samples    int64 [m], b
    counts     pairs of each sample
    """

    queries: Tensor
    instances: Tensor
    samples: Tensor
    counts: List[int]


@LOSSES.register_module()
class Mask2FormerLoss(BaseModule):
    """Binary cross-entropy and dice of the matched masks, focal loss of all classes.

    Args:
        task: names of the classes.
        loss_cls_weight: factor of ``loss_class`` (and of its matching cost), besides the focal loss's own.
        loss_mask_weight: factor of ``loss_mask`` and its matching cost.
        loss_dice_weight: factor of ``loss_dice_mask`` and its matching cost.
        focal_weight: the focal loss's own weight, in loss and matching cost.
        num_points: voxels per matched mask that ``loss_mask`` and ``loss_dice_mask`` compare; None takes all.
        oversample_ratio, importance_sample_ratio, class_power: how these are chosen, see ``PointChoice``.
    """

    def __init__(
        self,
        task: Optional[Task] = None,
        loss_cls_weight: float = 2.0,
        loss_mask_weight: float = 5.0,
        loss_dice_weight: float = 5.0,
        focal_weight: float = 2.0,
        num_points: Optional[int] = None,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        class_power: float = 0.0,
    ):
        super().__init__()
        self.class_names = () if task is None else task.label_set.occupied_names
        self.loss_cls_weight = loss_cls_weight * focal_weight
        self.loss_mask_weight, self.loss_dice_weight = loss_mask_weight, loss_dice_weight
        how = oversample_ratio, importance_sample_ratio, class_power
        self.points = None if num_points is None else PointChoice(num_points, *how)

    def forward(
        self, layers: Sequence[MaskPrediction], stage: VoxelStage, targets: OccupancyTargets
    ) -> Dict[str, Tensor]:
        """Terms of every prediction; names end in its number."""
        instances = self.instances(targets, stage)
        matched = self._match(layers, instances)
        losses = self.assigned(layers, instances, matched, instances.present.sum())
        if shares_are_counted():
            self._count(layers[-1], instances, matched[-1])
        return losses

    def instances(self, targets: OccupancyTargets, stage: VoxelStage) -> MaskTargets:
        """Instances of every sample, and what the choice of points needs."""
        instances = instances_among_kept(targets, stage)
        if self.points is None:
            return instances
        return instances._replace(cumulated=self._cumulate(targets, stage, instances.counted))

    def assigned(
        self, layers: Sequence[MaskPrediction], instances: MaskTargets, matched: Sequence[Pairs], number: Tensor
    ) -> Dict[str, Tensor]:
        """Terms of every prediction where it is known which query is to find which instance.

        Args:
            matched: pairs of every layer.
            number: scalar, of instances that sums are divided by (its mean over the processes).
        """
        normalizer = reduce_mean(number.to(layers[0].mask_logits.dtype)).clamp(min=1)
        losses = {}
        for i, (layer, pairs) in enumerate(zip(layers, matched)):
            for name, value in self._layer_losses(layer, instances, pairs).items():
                losses[f'{name}_{i}'] = value / normalizer
        return losses

    def _cumulate(self, targets: OccupancyTargets, stage: VoxelStage, counted: Optional[Tensor]) -> List[Tensor]:
        labels = take_blocks(targets.voxel_semantics, stage.coords, stage.scale)[..., 0]
        each = [None] * len(labels) if counted is None else counted
        return [self.points.cumulate(own, of_sample) for own, of_sample in zip(labels, each)]

    def _count(self, layer: MaskPrediction, instances: MaskTargets, pairs: Pairs) -> None:
        """Shares of the last prediction: masks without a voxel; instances whose query scores their class highest."""
        empty = (layer.mask_logits.detach() <= 0).all(-1)
        count_share('empty_masks', empty.sum(), empty.numel())
        true = instances.class_ids.flatten()[pairs.instances]
        right = layer.class_logits.flatten(0, 1)[pairs.queries].argmax(-1) == true
        count_share('right_class', right.sum(), len(true))
        for c, name in enumerate(self.class_names):
            count_share(f'right_class/{name}', (right & (true == c)).sum(), (true == c).sum())

    def _match(self, layers: Sequence[MaskPrediction], instances: MaskTargets) -> List[Pairs]:
        """Pairs of each layer. All costs leave the device together, and all pairs come back together."""
        with torch.no_grad():
            costs = torch.stack([self.cost(layer.class_logits, layer.mask_logits, instances) for layer in layers])
        on_cpu = torch.cat([costs.flatten(), instances.present.flatten().to(costs.dtype)]).cpu()
        of_all, present = on_cpu.split([costs.numel(), instances.present.numel()])
        columns = [row.nonzero().flatten() for row in present.view(instances.present.shape)]
        found = [_match_samples(of_layer, columns) for of_layer in of_all.view(costs.shape)]
        numbers = torch.cat([torch.stack(pairs[:3]) for pairs in found], dim=1).to(costs.device, non_blocking=True)
        parts = numbers.split([sum(pairs.counts) for pairs in found], dim=1)
        return [Pairs(part[0], part[1], part[2], pairs.counts) for part, pairs in zip(parts, found)]

    def cost(self, class_logits: Tensor, mask_logits: Tensor, instances: MaskTargets) -> Tensor:
        """Cost of giving each instance to each query of its sample.

        Args:
            class_logits: [B, Q, C].
            mask_logits: [B, Q, K].

        Returns:
            [B, Q, n].
        """
        masks = instances.masks.to(mask_logits.dtype).transpose(1, 2)
        classes = instances.class_ids.unsqueeze(1).expand(-1, class_logits.shape[1], -1)
        return (
            self.loss_cls_weight * focal_cost(class_logits).gather(2, classes)
            + self.loss_mask_weight * cross_entropy_cost(mask_logits, masks, instances.counted)
            + self.loss_dice_weight * dice_cost(mask_logits, masks, instances.counted)
        )

    def _layer_losses(self, layer: MaskPrediction, instances: MaskTargets, pairs: Pairs) -> Dict[str, Tensor]:
        """Sums over the instances of the batch, not yet divided by their number."""
        logits = layer.mask_logits.flatten(0, 1).index_select(0, pairs.queries)
        masks = instances.masks.flatten(0, 1).index_select(0, pairs.instances).to(logits.dtype)
        if self.points is None:
            counted = instances.counted
            counted = None if counted is None else counted.index_select(0, pairs.samples)
        else:
            chosen = self._choose(logits, instances, pairs)
            logits, masks, counted = logits.gather(1, chosen), masks.gather(1, chosen), None
        mask, dice = mask_losses(logits, masks, counted)
        class_logits = layer.class_logits.flatten(0, 1)
        true = instances.class_ids.flatten().index_select(0, pairs.instances)
        onehot = torch.zeros_like(class_logits).index_put_((pairs.queries, true), class_logits.new_ones(()))
        return dict(
            loss_mask=self.loss_mask_weight * mask,
            loss_dice_mask=self.loss_dice_weight * dice,
            loss_class=self.loss_cls_weight * focal_loss(class_logits, onehot),
        )

    def _choose(self, logits: Tensor, instances: MaskTargets, pairs: Pairs) -> Tensor:
        """Points of every pair, int64 [m, P]; logits [m, K]."""
        numbers = self.points.draw(len(pairs.counts), logits.device)
        samples = zip(logits.split(pairs.counts), instances.cumulated, numbers)
        return torch.cat([self.points.choose(*sample) for sample in samples])


def _match_samples(costs: Tensor, columns: Sequence[Tensor]) -> Pairs:
    """costs [B, Q, n] on the CPU; columns of each sample that are instances."""
    found = [match(cost[:, own]) for cost, own in zip(costs, columns)]
    chosen = [Matching(one.queries, own[one.instances]) for one, own in zip(found, columns)]
    return pairs_of(chosen, *costs.shape[1:])


def pairs_of(matchings: Sequence[Matching], queries: int, instances: int) -> Pairs:
    """Pairs of a batch from those of its samples, which have so many queries and instances, padding included."""
    rows, columns, samples = [], [], []
    for b, matching in enumerate(matchings):
        rows.append(b * queries + matching.queries)
        columns.append(b * instances + matching.instances)
        samples.append(torch.full_like(matching.queries, b))
    return Pairs(torch.cat(rows), torch.cat(columns), torch.cat(samples), list(map(len, samples)))


def match(cost: Tensor) -> Matching:
    """Hungarian matching.

    Args:
        cost: [Q, n] float, on any device; NaN and infinities count as very expensive.

    Returns:
        min(Q, n) pairs, on the CPU; none if there is no instance.
    """
    from scipy.optimize import linear_sum_assignment  # inference does without its import, which takes long

    cost = torch.nan_to_num(cost.detach().float().cpu(), nan=1e8, posinf=1e8, neginf=-1e8)
    rows, columns = linear_sum_assignment(cost.numpy())
    return Matching(torch.from_numpy(rows), torch.from_numpy(columns))


def instances_among_kept(targets: OccupancyTargets, stage: VoxelStage) -> MaskTargets:
    """Instances of every sample, without waiting for the device."""
    voxels = take_blocks(targets.voxel_instances, stage.coords, stage.scale)[..., 0]
    ids = [of_sample.to(voxels.device) for of_sample in targets.instance_class_ids]
    class_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    numbers = torch.arange(class_ids.shape[1], device=voxels.device).view(1, -1, 1)
    masks = (voxels.unsqueeze(1) == numbers) & (class_ids >= 0).unsqueeze(-1)
    counted = None
    if targets.mask_camera is not None:
        visible = take_blocks(targets.mask_camera, stage.coords, stage.scale)[..., 0]
        masks, counted = masks & visible.unsqueeze(1), visible.float()
    return MaskTargets(masks, class_ids.clamp(min=0), masks.any(-1), counted)


def focal_cost(class_logits: Tensor) -> Tensor:
    """Focal loss of saying yes minus that of saying no, per class: [Q, C] -> [Q, C]."""
    p = class_logits.sigmoid()
    yes = -(p + _COST_EPS).log() * _ALPHA * (1 - p) ** _GAMMA
    no = -(1 - p + _COST_EPS).log() * (1 - _ALPHA) * p**_GAMMA
    return yes - no


def cross_entropy_cost(mask_logits: Tensor, masks: Tensor, counted: Optional[Tensor]) -> Tensor:
    """Binary cross-entropy of every mask with every instance, mean over counted voxels.

    It is softplus(x) outside and softplus(-x) = softplus(x) - x inside, so a sum of the former over all and one
    product.

    Args:
        mask_logits: [B, Q, K].
        masks: [B, K, n], 1 inside.
        counted: [B, K], or None.

    Returns:
        [B, Q, n].
    """
    outside = F.softplus(mask_logits)
    inside = _long_product(mask_logits, masks)
    if counted is None:
        return (outside.sum(2, keepdim=True) - inside) / mask_logits.shape[2]
    total = counted.sum(1).clamp(min=1).view(-1, 1, 1)
    return ((outside * counted.unsqueeze(1)).sum(2, keepdim=True) - inside) / total


def _long_product(rows: Tensor, columns: Tensor) -> Tensor:
    """rows [B, Q, K] times columns [B, K, n], in pieces of K: a GPU gives few blocks to a product of few results, and
    with 64,000 voxels they take milliseconds."""
    batch, queries, voxels = rows.shape
    pieces = next(count for count in (250, 128, 64, 16, 1) if voxels % count == 0)
    left = rows.view(batch, queries, pieces, voxels // pieces).transpose(1, 2)
    return (left @ columns.view(batch, pieces, voxels // pieces, columns.shape[2])).sum(1)


def dice_cost(mask_logits: Tensor, masks: Tensor, counted: Optional[Tensor]) -> Tensor:
    """1 - dice of every mask with every instance over counted voxels; see ``cross_entropy_cost``."""
    p = mask_logits.sigmoid()
    if counted is not None:
        p = p * counted.unsqueeze(1)
    return 1 - (2 * _long_product(p, masks) + 1) / (p.sum(2, keepdim=True) + masks.sum(1, keepdim=True) + 1)


def mask_losses(logits: Tensor, masks: Tensor, counted: Optional[Tensor]):
    """Summed over the pairs: cross-entropy (mean over counted voxels) and 1 - dice; all [m, K]."""
    entropy, p = F.binary_cross_entropy_with_logits(logits, masks, reduction='none'), logits.sigmoid()
    total = logits.shape[1]
    if counted is not None:
        entropy, p, total = entropy * counted, p * counted, counted.sum(1).clamp(min=1)
    dice = 1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return (entropy.sum(1) / total).sum(), dice.sum()


def focal_loss(logits: Tensor, onehot: Tensor) -> Tensor:
    """Sigmoid focal loss, summed; logits, onehot [Q, C]."""
    p = logits.sigmoid()
    miss = (1 - p) * onehot + p * (1 - onehot)
    weight = (_ALPHA * onehot + (1 - _ALPHA) * (1 - onehot)) * miss**_GAMMA
    return (F.binary_cross_entropy_with_logits(logits, onehot, reduction='none') * weight).sum()
