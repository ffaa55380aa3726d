"""Denoising queries: instances of the labels, spoilt a little, that the mask decoder has to restore (training only).

As in DN-DETR (arXiv 2203.01305) a query starts from the class of an instance, and as in MP-Former (arXiv 2303.07336)
it looks at the instance's mask in every pass instead of its own prediction. Which instance it is to find is known, so
nothing is matched. The decoder's layer runs once more for these queries alone: the learned ones cannot see them, and
copies of an instance cannot see each other.

Shapes: B batch, K kept voxels, C channels, S slots of a copy, Q = copies * S queries, n instances of a sample.
"""

from typing import Dict, List, NamedTuple

import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor, nn

from lib.dist import batch_rand
from lib.errors import ConfigError
from models.decoders.layers import DecoderSizes
from models.losses.auxiliary import TrainingPass
from models.losses.mask2former import MaskTargets, Matching, pairs_of

_MOST_INSTANCES = 255  # that a label volume can hold


class Slots(NamedTuple):
    """What the slots of a copy hold: instances, then nothing.

    classes    int64 [B, S]; one more than the last class where there is none
    masks      bool [B, S, K], of the instances among the kept voxels
    instances  per sample int64 [m], which of its instances is in slot 0..m-1
    """

    classes: Tensor
    masks: Tensor
    instances: List[Tensor]


@LOSSES.register_module()
class DenoisingLoss(BaseModule):
    """The mask decoder's losses for queries that start from spoilt instances; slots without one are to find nothing.

    Args:
        sizes: classes, C of the decoder.
        loss_weight: factor of every term, besides those of ``loss_mask2former``.
        copies: times that every instance is spoilt.
        slots: S; of more instances some are chosen at random.
        label_noise: share of the queries that start from a class drawn at random.
        mask_noise: share of a mask's voxels that are taken out; as many others are put in.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        loss_weight: float = 1.0,
        copies: int = 2,
        slots: int = 20,
        label_noise: float = 0.2,
        mask_noise: float = 0.2,
    ):
        super().__init__()
        if copies < 1 or not 1 <= slots <= _MOST_INSTANCES or not (0 <= label_noise <= 1 and 0 <= mask_noise <= 1):
            raise ConfigError(
                f'model.auxiliary_losses.loss_denoising: copies must be at least 1, slots in 1..{_MOST_INSTANCES}, '
                f'label_noise and mask_noise in 0..1, got {copies!r}, {slots!r}, {label_noise!r} and {mask_noise!r}'
            )
        self.num_classes, self.loss_weight = sizes.task.label_set.num_occupied, loss_weight
        self.copies, self.slots, self.label_noise, self.mask_noise = copies, slots, label_noise, mask_noise
        self.query_feat = nn.Embedding(self.num_classes + 1, sizes.embed_dims)
        self.query_pos = nn.Embedding(1, sizes.embed_dims)
        copy = torch.arange(copies * slots) // slots
        self.register_buffer('hidden', copy.unsqueeze(0) != copy.unsqueeze(1), persistent=False)

    def forward(self, step: TrainingPass) -> Dict[str, Tensor]:
        """Terms of every pass of the decoder's layer; names end in its number."""
        criterion, stage = step.head.loss_mask2former, step.output.stages[-1]
        instances = criterion.instances(step.targets, stage)
        slots = self.fill(instances)
        layers = self._restore(step.head.transformer, stage, step.features, slots)
        matchings = [self._assign(chosen) for chosen in slots.instances]
        pairs = pairs_of(matchings, self.copies * self.slots, instances.present.shape[1])
        with torch.autocast(stage.coords.device.type, enabled=False):
            number = torch.tensor(self.copies * sum(map(len, slots.instances)), device=stage.coords.device)
            losses = criterion.assigned(layers, instances, [pairs] * len(layers), number)
        return {name.replace('loss_', 'loss_dn_', 1): self.loss_weight * value for name, value in losses.items()}

    def fill(self, instances: MaskTargets) -> Slots:
        """Instances of every sample that have kept voxels, put into slots."""
        batch, _, num_voxels = instances.masks.shape
        classes = torch.full((batch, self.slots), self.num_classes, device=instances.masks.device)
        masks = instances.masks.new_zeros(batch, self.slots, num_voxels)
        numbers, chosen = batch_rand(batch, _MOST_INSTANCES, device=classes.device), []
        for b in range(batch):
            present = instances.present[b].nonzero().flatten()
            chosen.append(present[numbers[b, : len(present)].argsort()[: self.slots]])
            classes[b, : len(chosen[b])] = instances.class_ids[b, chosen[b]]
            masks[b, : len(chosen[b])] = instances.masks[b, chosen[b]]
        return Slots(classes, masks, chosen)

    def spoil_classes(self, classes: Tensor) -> Tensor:
        """int64 [B, Q]: classes [B, S] once per copy, some replaced; what holds nothing stays so."""
        classes = classes.repeat(1, self.copies)
        numbers = batch_rand(*classes.shape, 2, device=classes.device)
        drawn = (numbers[..., 1] * self.num_classes).long().clamp(max=self.num_classes - 1)
        replaced = (numbers[..., 0] < self.label_noise) & (classes < self.num_classes)
        return torch.where(replaced, drawn, classes)

    def spoil_masks(self, masks: Tensor) -> Tensor:
        """bool [B, Q, K]: masks [B, S, K] once per copy, with voxels taken out and about as many put in."""
        share = (masks.float().mean(-1, keepdim=True) * self.mask_noise).repeat(1, self.copies, 1)
        masks = masks.repeat(1, self.copies, 1)
        voxels = batch_rand(len(masks), 1, masks.shape[2], device=masks.device)
        queries = batch_rand(*masks.shape[:2], 1, device=masks.device)
        numbers = (voxels + queries).frac()  # uniform for every query, at the cost of one number a voxel
        return torch.where(masks, numbers >= self.mask_noise, numbers < share)

    def _restore(self, transformer, stage, features, slots):
        """Predictions of the queries after every pass."""
        layer, passes = transformer.decoder.decoder_layer, transformer.decoder.num_layers
        query = self.query_feat(self.spoil_classes(slots.classes))
        position = self.query_pos.weight.unsqueeze(0).expand_as(query)
        guide = self.spoil_masks(slots.masks).float() - 0.5  # positive is inside
        voxels, draws, predictions = stage.coords * stage.scale, transformer.training_draws, []
        for _ in range(passes):
            query = layer(query, position, guide, voxels, draws, features, self.hidden)
            predictions.append(layer.predict(query, stage.features))
        return predictions

    def _assign(self, instances: Tensor) -> Matching:
        """Each copy's slots belong to these instances [m]."""
        slots = torch.arange(len(instances), device=instances.device)
        queries = torch.cat([slots + copy * self.slots for copy in range(self.copies)])
        return Matching(queries, instances.repeat(self.copies))
