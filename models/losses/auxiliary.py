"""Losses that only training has, beside the head's: one door for all of them, ``model.auxiliary_losses``.

Depth (BEVDepth, arXiv 2206.10092) is a second task of the image features, with a small head of its own.

Denoising queries are instances of the labels, spoilt a little, that the mask decoder has to restore. As in DN-DETR
(arXiv 2203.01305) a query starts from the class of an instance, and as in MP-Former (arXiv 2303.07336) it looks at
the instance's mask in every pass instead of its own prediction. Which instance it is to find is known, so nothing is
matched. The decoder's layer runs once more for these queries alone: the learned ones cannot see them, and copies of
an instance cannot see each other.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n; C channels, D depth bins, h w size of a
feature map, M points of a sample (the longest scan of the batch); K kept voxels, S slots of a copy, Q = copies * S
queries, n instances of a sample.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmdet.models.builder import LOSSES
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lib.dist import batch_rand
from lib.errors import ConfigError, DataError
from lib.targets import OccupancyTargets
from models.builder import build_part
from models.decoders import SparseOccTransformer, TransformerOutput
from models.decoders.layers import DecoderSizes
from models.encoder import ImageFeatures
from models.losses.mask2former import Mask2FormerLoss, MaskTargets, Matching, pairs_of

BEGINNING = 'loss_'  # of their names; in checkpoints it marks what only training uses
_WHERE = 'model.auxiliary_losses'
_MOST_INSTANCES = 255  # that a label volume can hold


class TrainedHead(Protocol):
    """What a loss can use of the head."""

    transformer: SparseOccTransformer
    loss_mask2former: Mask2FormerLoss


class TrainingPass(NamedTuple):
    """What an auxiliary loss can look at.

    features    of all frames
    output      of the decoders
    targets     labels of the batch
    lidar2img   [B, T*N, 4, 4], LIDAR_TOP (metres) to pixels of the augmented images
    image_size  (height, width) of the images before padding, pixels
    head        the layers and losses that there are
    """

    features: ImageFeatures
    output: TransformerOutput
    targets: OccupancyTargets
    lidar2img: Tensor
    image_size: Tuple[int, int]
    head: TrainedHead


def build_auxiliary_losses(cfgs: Optional[Mapping], sizes: DecoderSizes) -> Dict[str, nn.Module]:
    """Modules by name, each of which makes terms by name of a ``TrainingPass``.

    Args:
        cfgs: config of each; None takes one out. ``task`` and ``sizes`` are handed over to constructors that ask.
        sizes: of the decoders, and so of the feature maps.

    Raises:
        ConfigError: a name that would not count, or a config that is wrong.
    """
    losses = {}
    for name, cfg in (cfgs or {}).items():
        where = f'{_WHERE}.{name}'
        if not name.startswith(BEGINNING):
            raise ConfigError(f'{where}: names of losses begin with {BEGINNING!r}; rename it')
        if cfg is not None:
            losses[name] = build_part(cfg, LOSSES, where, sizes.task, sizes)
    return losses


@LOSSES.register_module()
class LidarDepthLoss(BaseModule):
    """Cross-entropy over bins of depth, in the cells of a feature map into which LiDAR points of the keyframe fall.

    Of several points in a cell the nearest counts. Bins are equally wide in the logarithm of the depth. Mean over the
    cells of a sample that have a point, then over the batch.

    Args:
        sizes: cameras, levels of the pyramid, C of the maps.
        loss_weight: factor of the result.
        level: which map; 1 has a stride of 8 pixels.
        num_bins: D.
        depth_range: (nearest, farthest) depth along the optical axis, metres; other points do not count.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        loss_weight: float = 1.0,
        level: int = 1,
        num_bins: int = 48,
        depth_range: Sequence[float] = (1.0, 60.0),
    ):
        super().__init__()
        if not 0 <= level < sizes.num_levels or num_bins < 2:
            raise ConfigError(
                f'{_WHERE}.loss_depth: level must be one of 0..{sizes.num_levels - 1} and num_bins at least 2, got '
                f'{level!r} and {num_bins!r}'
            )
        if len(depth_range) != 2 or not 0 < depth_range[0] < depth_range[1]:
            raise ConfigError(
                f'{_WHERE}.loss_depth.depth_range must be (nearest, farthest) metres above 0, got {depth_range!r}'
            )
        self.num_cameras, self.level, self.num_bins = sizes.task.num_cameras, level, num_bins
        self.loss_weight, self.depth_range = loss_weight, tuple(depth_range)
        channels = sizes.embed_dims
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, num_bins, 1)
        )

    def forward(self, step: TrainingPass) -> Dict[str, Tensor]:
        """``loss_depth``, a scalar, of the current frame's maps.

        Raises:
            DataError: the targets have no ``lidar_points``.
        """
        features, points = step.features, step.targets.lidar_points
        if points is None:
            raise DataError(
                f'{_WHERE}.loss_depth needs LiDAR points, which the batch has not; set lidar_points=True of '
                'LoadOccGTFromFile in the pipeline of data.train'
            )
        maps = features.maps[self.level][:, : self.num_cameras]
        logits = self.head(maps.flatten(0, 1).permute(0, 3, 1, 2)).float()  # [B*N, D, h, w]
        lidar2img = step.lidar2img[:, : self.num_cameras].float()
        bins = self.true_bins(points, lidar2img, step.image_size, features.image_size, maps.shape[2:4])
        there = bins < self.num_bins
        entropy = F.cross_entropy(
            logits.permute(0, 2, 3, 1).reshape(-1, self.num_bins),
            bins.flatten().clamp(max=self.num_bins - 1),
            reduction='none',
        ).view_as(bins)
        per_sample = (entropy * there).flatten(1).sum(1) / there.flatten(1).sum(1).clamp(min=1)
        return dict(loss_depth=self.loss_weight * per_sample.mean())

    @torch.no_grad()
    def true_bins(
        self,
        points: Sequence[Tensor],
        lidar2img: Tensor,
        image_size: Tuple[int, int],
        padded_size: Tuple[int, int],
        map_size: Sequence[int],
    ) -> Tensor:
        """int64 [B, N, h, w], the bin of the nearest point in each cell; D where there is none.

        Args:
            points: B tensors float32 [n, 3], metres, LIDAR_TOP.
            lidar2img: float32 [B, N, 4, 4].
            image_size, padded_size: (height, width) of the images without and with padding below and right, pixels.
            map_size: (h, w), which cover the padded image.
        """
        padded = pad_sequence(list(points), batch_first=True, padding_value=float('nan'))  # which lies nowhere
        # no matrix product, which would be rounded
        turned = (lidar2img[:, :, None, :3, :3] * padded[:, None, :, None]).sum(-1)
        seen = turned + lidar2img[:, :, None, :3, 3]
        depth = seen[..., 2]
        x, y = seen[..., 0] / depth, seen[..., 1] / depth
        nearest, farthest = self.depth_range
        valid = (depth >= nearest) & (depth < farthest) & (x >= 0) & (x < image_size[1]) & (y >= 0)
        valid &= y < image_size[0]
        bins = (depth / nearest).log() * (self.num_bins / math.log(farthest / nearest))
        row, column = y * (map_size[0] / padded_size[0]), x * (map_size[1] / padded_size[1])
        row, column, bins = (torch.where(valid, value, torch.zeros_like(value)).long() for value in (row, column, bins))
        index = (row * map_size[1] + column) * self.num_bins + bins.clamp(max=self.num_bins - 1)
        size = math.prod(map_size) * self.num_bins
        present = torch.zeros(depth.shape[:2] + (size + 1,), dtype=torch.bool, device=depth.device)
        present = present.scatter(2, torch.where(valid, index, size), True)[..., :-1]
        present = present.view(depth.shape[:2] + (*map_size, self.num_bins))
        none = torch.full(present.shape[:-1], self.num_bins, device=depth.device)
        return torch.where(present.any(-1), present.to(torch.uint8).argmax(-1), none)


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
                f'{_WHERE}.loss_denoising: copies must be at least 1, slots in 1..{_MOST_INSTANCES}, '
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
