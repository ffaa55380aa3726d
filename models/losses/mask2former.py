"""Mask and class losses of the mask decoder, after Hungarian matching (paper section 3.5).

Shapes: B batch, Q queries, K kept voxels, n instances of a sample that have kept voxels, m matched pairs.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib.dist import count_share, reduce_mean, shares_are_counted
from lib.targets import OccupancyTargets
from lib.task import Task
from models.decoders import MaskPrediction, VoxelStage
from models.losses.points import PointChoice
from models.losses.voxel import take_blocks

_ALPHA, _GAMMA = 0.25, 2.0
_COST_EPS = 1e-12


class MaskTargets(NamedTuple):
    """Instances of one sample among its kept voxels.

    masks      float32 [n, K], 1 inside
    class_ids  int64 [n]
    counted    float32 [K], 1 where the voxel counts, or None if all do
    cumulated  float64 [K], for the choice of points (``PointChoice.cumulate``); None where all voxels are compared
    """

    masks: Tensor
    class_ids: Tensor
    counted: Optional[Tensor]
    cumulated: Optional[Tensor] = None


class Matching(NamedTuple):
    """Matched pairs of one sample, by query index.

    queries    int64 [m]
    instances  int64 [m]
    """

    queries: Tensor
    instances: Tensor


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
        samples = self.samples(targets, stage)
        matchings = self._match(layers, samples)
        losses = self.assigned(layers, samples, matchings, sum(len(sample.class_ids) for sample in samples))
        if shares_are_counted():
            self._count(layers[-1], samples, matchings[-1])
        return losses

    def samples(self, targets: OccupancyTargets, stage: VoxelStage) -> List[MaskTargets]:
        """Instances of every sample."""
        return [self._sample(targets, stage, b) for b in range(len(targets.instance_class_ids))]

    def assigned(
        self,
        layers: Sequence[MaskPrediction],
        samples: Sequence[MaskTargets],
        matchings: Sequence[Sequence[Matching]],
        number: int,
    ) -> Dict[str, Tensor]:
        """Terms of every prediction where it is known which query is to find which instance.

        Args:
            matchings: [layer][sample].
            number: of instances that sums are divided by (its mean over the processes).
        """
        normalizer = reduce_mean(torch.tensor(float(number), device=layers[0].mask_logits.device)).clamp(min=1)
        losses = {}
        for i, layer in enumerate(layers):
            for name, value in self._layer_losses(layer, samples, matchings[i]).items():
                losses[f'{name}_{i}'] = value / normalizer
        return losses

    def _sample(self, targets: OccupancyTargets, stage: VoxelStage, b: int) -> MaskTargets:
        sample = instances_among_kept(targets, stage, b)
        if self.points is None:
            return sample
        labels = take_blocks(targets.voxel_semantics[b : b + 1], stage.coords[b : b + 1], stage.scale)[0, :, 0]
        return sample._replace(cumulated=self.points.cumulate(labels, sample.counted))

    def _count(self, layer: MaskPrediction, samples: Sequence[MaskTargets], matchings: Sequence[Matching]) -> None:
        """Shares of the last prediction: masks without a voxel; instances whose query scores their class highest."""
        empty = (layer.mask_logits.detach() <= 0).all(-1)
        count_share('empty_masks', empty.sum(), empty.numel())
        true, right = [], []
        for b, (sample, matching) in enumerate(zip(samples, matchings)):
            queries, instances = matching.queries.to(empty.device), matching.instances.to(empty.device)
            of_class = sample.class_ids[instances]
            true.append(of_class)
            right.append(of_class[layer.class_logits[b][queries].argmax(-1) == of_class])
        count_share('right_class', sum(map(len, right)), sum(map(len, true)))
        every = [torch.cat(ids) for ids in (right, true)]
        for c, name in enumerate(self.class_names):
            count_share(f'right_class/{name}', *((ids == c).sum() for ids in every))

    def _match(self, layers: Sequence[MaskPrediction], samples: Sequence[MaskTargets]) -> List[List[Matching]]:
        """Matchings [layer][sample]; all costs leave the device together."""
        with torch.no_grad():
            costs = [
                [self.cost(layer.class_logits[b], layer.mask_logits[b], sample) for b, sample in enumerate(samples)]
                for layer in layers
            ]
        flat = torch.cat([cost.flatten() for row in costs for cost in row]).cpu()
        pieces = iter(flat.split([cost.numel() for row in costs for cost in row]))
        return [[match(next(pieces).view(cost.shape)) for cost in row] for row in costs]

    def cost(self, class_logits: Tensor, mask_logits: Tensor, sample: MaskTargets) -> Tensor:
        """Cost of giving each instance to each query.

        Args:
            class_logits: [Q, C].
            mask_logits: [Q, K].

        Returns:
            [Q, n].
        """
        return (
            self.loss_cls_weight * focal_cost(class_logits)[:, sample.class_ids]
            + self.loss_mask_weight * cross_entropy_cost(mask_logits, sample)
            + self.loss_dice_weight * dice_cost(mask_logits, sample)
        )

    def _layer_losses(
        self, layer: MaskPrediction, samples: Sequence[MaskTargets], matchings: Sequence[Matching]
    ) -> Dict[str, Tensor]:
        """Sums over the instances of the batch, not yet divided by their number."""
        numbers = None if self.points is None else self.points.draw(len(samples), layer.mask_logits.device)
        zero = layer.mask_logits.sum() * 0 + layer.class_logits.sum() * 0
        losses = dict(loss_mask=zero, loss_dice_mask=zero, loss_class=zero)
        for b, (sample, matching) in enumerate(zip(samples, matchings)):
            device = layer.mask_logits.device
            queries, instances = matching.queries.to(device), matching.instances.to(device)
            logits, masks = layer.mask_logits[b][queries], sample.masks[instances]
            counted = sample.counted
            if numbers is not None:
                chosen = self.points.choose(logits, sample.cumulated, numbers[b])
                logits, masks, counted = logits.gather(1, chosen), masks.gather(1, chosen), None
            mask, dice = mask_losses(logits, masks, counted)
            onehot = torch.zeros_like(layer.class_logits[b])
            onehot[queries, sample.class_ids[instances]] = 1
            losses['loss_mask'] = losses['loss_mask'] + self.loss_mask_weight * mask
            losses['loss_dice_mask'] = losses['loss_dice_mask'] + self.loss_dice_weight * dice
            losses['loss_class'] = losses['loss_class'] + self.loss_cls_weight * focal_loss(
                layer.class_logits[b], onehot
            )
        return losses


def match(cost: Tensor) -> Matching:
    """Hungarian matching.

    Args:
        cost: [Q, n] float, on any device; NaN and infinities count as very expensive.

    Returns:
        min(Q, n) pairs, on the CPU; none if there is no instance.
    """
    cost = torch.nan_to_num(cost.detach().float().cpu(), nan=1e8, posinf=1e8, neginf=-1e8)
    rows, columns = linear_sum_assignment(cost.numpy())
    return Matching(torch.from_numpy(rows), torch.from_numpy(columns))


def instances_among_kept(targets: OccupancyTargets, stage: VoxelStage, b: int) -> MaskTargets:
    """Instances of sample b that have kept (and counted) voxels, with ids compacted, in id order."""
    coords, class_ids = stage.coords[b : b + 1], targets.instance_class_ids[b]
    voxels = take_blocks(targets.voxel_instances[b : b + 1], coords, stage.scale)[0, :, 0]
    ids = torch.arange(len(class_ids), device=voxels.device)
    masks = voxels.unsqueeze(0).long() == ids.unsqueeze(1)
    counted = None
    if targets.mask_camera is not None:
        visible = take_blocks(targets.mask_camera[b : b + 1], coords, stage.scale)[0, :, 0]
        masks, counted = masks & visible, visible.float()
    kept = masks.any(1)
    return MaskTargets(masks[kept].float(), class_ids.to(voxels.device)[kept], counted)


def focal_cost(class_logits: Tensor) -> Tensor:
    """Focal loss of saying yes minus that of saying no, per class: [Q, C] -> [Q, C]."""
    p = class_logits.sigmoid()
    yes = -(p + _COST_EPS).log() * _ALPHA * (1 - p) ** _GAMMA
    no = -(1 - p + _COST_EPS).log() * (1 - _ALPHA) * p**_GAMMA
    return yes - no


def cross_entropy_cost(mask_logits: Tensor, sample: MaskTargets) -> Tensor:
    """Binary cross-entropy of every mask with every instance, mean over counted voxels: [Q, K] -> [Q, n]."""
    positive, negative = F.softplus(-mask_logits), F.softplus(mask_logits)
    if sample.counted is None:
        return (positive @ sample.masks.t() + negative @ (1 - sample.masks).t()) / mask_logits.shape[1]
    others = (sample.counted - sample.masks).t()
    return (positive @ sample.masks.t() + negative @ others) / sample.counted.sum().clamp(min=1)


def dice_cost(mask_logits: Tensor, sample: MaskTargets) -> Tensor:
    """1 - dice of every mask with every instance over counted voxels: [Q, K] -> [Q, n]."""
    p = mask_logits.sigmoid()
    if sample.counted is not None:
        p = p * sample.counted
    overlap = p @ sample.masks.t()
    return 1 - (2 * overlap + 1) / (p.sum(1, keepdim=True) + sample.masks.sum(1) + 1)


def mask_losses(logits: Tensor, masks: Tensor, counted: Optional[Tensor]):
    """Summed over the pairs: cross-entropy (mean over counted voxels) and 1 - dice; logits, masks [m, K]."""
    entropy, p = F.binary_cross_entropy_with_logits(logits, masks, reduction='none'), logits.sigmoid()
    total = logits.shape[1]
    if counted is not None:
        entropy, p, total = entropy * counted, p * counted, counted.sum().clamp(min=1)
    dice = 1 - (2 * (p * masks).sum(1) + 1) / (p.sum(1) + masks.sum(1) + 1)
    return entropy.sum() / total, dice.sum()


def focal_loss(logits: Tensor, onehot: Tensor) -> Tensor:
    """Sigmoid focal loss, summed; logits, onehot [Q, C]."""
    p = logits.sigmoid()
    miss = (1 - p) * onehot + p * (1 - onehot)
    weight = (_ALPHA * onehot + (1 - _ALPHA) * (1 - onehot)) * miss**_GAMMA
    return (F.binary_cross_entropy_with_logits(logits, onehot, reduction='none') * weight).sum()
