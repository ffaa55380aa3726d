"""A term on rays: along each the first occupied voxel should be where the labels have it. Training only.

How likely a ray ends where is that of volume rendering, as in 4D-Occ (arXiv 2302.13130) and RenderOcc (arXiv
2309.09502), on the kept blocks alone: what was not kept lets rays pass. Rays are those of the evaluation (paper section
4.1) in their pitches, from several places around the car.

Shapes: B batch, K kept blocks, C occupied classes, X Y Z the grid, R rays, O origins, S steps of a ray, W steps near
its end. Positions along rays are in voxels, from the grid's lower corner.
"""

import math
from typing import NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmdet.models.builder import LOSSES
from torch import Tensor

from lib.classes import IGNORE_LABEL
from lib.dist import batch_rand
from lib.errors import ConfigError
from lib.metrics.origins import ray_pitches
from lib.targets import OccupancyTargets
from lib.task import Task
from models.decoders import VoxelStage
from models.losses.voxel import StageLabels, Term, take_blocks

_NUSCENES_LIDAR = (0.94, 0.0, 1.84)  # metres, ego frame
_LEAST_HIT = 1e-3  # of the probability that a ray ends where it should; keeps the logarithm finite


class Rays(NamedTuple):
    """Straight lines through the volume, one voxel further along their steepest axis with every step.

    origins  float32 [B, R, 3]
    steps    float32 [B, R, 3], the largest component is 1
    """

    origins: Tensor
    steps: Tensor

    def cells(self, numbers: Tensor) -> Tensor:
        """int64 [B, R, n, 3], the voxels of steps [B, R, n] or [n] (also outside the volume)."""
        places = self.origins.unsqueeze(2) + self.steps.unsqueeze(2) * numbers.unsqueeze(-1)
        return places.floor().long()


class TrueEnds(NamedTuple):
    """What rays through the labels say of a prediction; no gradient.

    passes   float32 [B, X, Y, Z], total weight of the rays that pass a voxel on their way
    cells    int64 [B, R, W, 3], voxels around the end of a ray, in its order
    counted  bool [B, R, W], of these the ones that are near enough, labelled, and in the volume
    classes  int64 [B, R], class of the voxel in which a ray ends; any where it meets nothing
    weights  float32 [B, R], sum 1 in a sample; 0 for rays that meet nothing
    """

    passes: Tensor
    cells: Tensor
    counted: Tensor
    classes: Tensor
    weights: Tensor


@LOSSES.register_module()
class RayConsistencyLoss(Term):
    """-log of the probability that a ray passes what is free and then ends near its true end, in the true class.

    Let q be the probability of free of the voxels on the way. The first part, the sum of -log q up to ``tolerance``
    before the true end, is what surfaces too thick or too near cost; the second is -log of the sum, over the voxels
    within ``tolerance`` of the end, of (product of q within these before it) x (probability of the class). Mean over
    the rays that meet something. Voxels that do not count (255, outside ``mask_camera``) let rays pass.

    Args:
        task: classes and their weights, range, grid.
        loss_weight: factor of the result.
        num_rays: R, of a sample.
        num_origins: O; the first is ``origin``, the others lie on horizontal lines of free sight from it.
        origin: of the LiDAR, metres, ego frame (by default that of nuScenes).
        tolerance: metres; RayIoU's strictest threshold is 1.
        class_weighted: weigh rays by their class as the label set says; otherwise all alike.
        scales: stages it is asked of, by the edge of their blocks in voxels; [1] is the last one.
    """

    def __init__(
        self,
        task: Task,
        loss_weight: float = 1.0,
        num_rays: int = 2048,
        num_origins: int = 8,
        origin: Sequence[float] = _NUSCENES_LIDAR,
        tolerance: float = 0.8,
        class_weighted: bool = True,
        scales: Sequence[int] = (1,),
    ):
        super().__init__(loss_weight)
        if num_origins < 1 or num_rays < num_origins or tolerance < 0 or len(origin) != 3:
            raise ConfigError(
                'RayConsistencyLoss: num_rays >= num_origins >= 1, tolerance >= 0 and an origin of 3 numbers are '
                f'needed, got {num_rays!r}, {num_origins!r}, {tolerance!r} and {origin!r}'
            )
        self.num_origins, self.per_origin, self.scales = num_origins, num_rays // num_origins, tuple(scales)
        self.tolerance, self.num_steps = tolerance / task.voxel_size, max(task.grid_shape)  # the former in voxels
        self.num_classes = task.label_set.num_occupied
        start = [(o - low) / task.voxel_size for o, low in zip(origin, task.point_cloud_range)]
        pitches = [(math.cos(pitch), math.sin(pitch)) for pitch in ray_pitches()]
        weights = task.label_set.class_weights() if class_weighted else [1.0] * task.label_set.num_classes
        buffers = dict(start=start, pitches=pitches, level=[(1.0, 0.0)], class_weights=weights)
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def value(self, stage: VoxelStage, labels: StageLabels) -> Tensor:
        with torch.no_grad():
            ends = self.true_ends(labels.targets, self.draw(labels.targets))
            passes = take_blocks(ends.passes, stage.coords, stage.scale).sum(-1)
            kept = _kept_index(stage, ends.cells, labels.targets.voxel_semantics.shape[1:])
        log_free, log_classes = log_probabilities(stage)
        on_the_way = -(passes * log_free).sum(1)
        hit = self._hit(log_free, log_classes, kept, ends)
        at_the_end = -(_LEAST_HIT + (1 - _LEAST_HIT) * hit).log()
        return (on_the_way + (ends.weights * at_the_end).sum(1)).mean()

    def _hit(self, log_free: Tensor, log_classes: Tensor, kept: Tensor, ends: TrueEnds) -> Tensor:
        """[B, R]: probability of ending near the true end in the true class, once a ray came that far."""
        free = _look_up(log_free.unsqueeze(-1), kept, torch.zeros_like(ends.classes), 0.0)
        of_class = _look_up(log_classes.exp(), kept, ends.classes, 0.0) * ends.counted
        free = free * ends.counted
        return ((free.cumsum(-1) - free).exp() * of_class).sum(-1)

    def draw(self, targets: OccupancyTargets) -> Rays:
        """The rays of a step, by the draws of the step."""
        volume, shape = _labels_of(targets)
        batch = len(volume)
        start = self.start.expand(batch, 1, 3)
        numbers = batch_rand(batch, self.num_origins - 1, 2, device=volume.device)
        level = Rays(start, _steps(numbers[..., 0], self.level))
        way = _flat(level.cells(torch.arange(self.num_steps, device=volume.device)), shape)
        blocked = (_take(volume, way) < self.num_classes) | (way == math.prod(shape))
        sight = torch.where(blocked.any(-1), _first(blocked), self.num_steps)
        far = numbers[..., 1] * (sight - 1).clamp(min=0)
        origins = torch.cat([start, start + level.steps * far.unsqueeze(-1)], dim=1)
        numbers = batch_rand(batch, self.num_origins * self.per_origin, 2, device=volume.device)
        pitches = self.pitches[(numbers[..., 1] * len(self.pitches)).long().clamp(max=len(self.pitches) - 1)]
        return Rays(origins.repeat_interleave(self.per_origin, dim=1), _steps(numbers[..., 0], pitches))

    def true_ends(self, targets: OccupancyTargets, rays: Rays) -> TrueEnds:
        """Where rays end in the labels of a batch, and what they pass."""
        volume, shape = _labels_of(targets)
        numbers = torch.arange(self.num_steps, device=volume.device)
        way = _flat(rays.cells(numbers), shape)
        labels = _take(volume, way)
        occupied = labels < self.num_classes
        last = _first(occupied)
        ends = occupied.any(-1)
        classes = labels.gather(2, last.unsqueeze(-1)).squeeze(-1).long().masked_fill(~ends, 0)
        weights = self.class_weights[classes] * ends
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        near = torch.floor(self.tolerance / rays.steps.norm(dim=-1)).long()
        before = (numbers < (last - near).unsqueeze(-1)) & (labels != IGNORE_LABEL)
        passes = torch.zeros_like(volume, dtype=weights.dtype)
        passes = _add_up(passes, way, before * weights.unsqueeze(-1))
        reach = int(self.tolerance)
        around = last.unsqueeze(-1) + torch.arange(-reach, reach + 1, device=volume.device)
        cells = rays.cells(around)
        counted = (around - last.unsqueeze(-1)).abs() <= near.unsqueeze(-1)
        counted &= (around >= 0) & (_take(volume, _flat(cells, shape)) != IGNORE_LABEL)
        return TrueEnds(passes[:, :-1].view((-1,) + shape), cells, counted, classes, weights)


def log_probabilities(stage: VoxelStage) -> Tuple[Tensor, Tensor]:
    """log of the probabilities of free [B, K] and of each occupied class [B, K, C], in either way of scoring."""
    logs = stage.seg_logits.log_softmax(-1)
    if stage.occ_logits is None:
        return logs[..., -1], logs[..., :-1]
    return F.logsigmoid(-stage.occ_logits), F.logsigmoid(stage.occ_logits).unsqueeze(-1) + logs


def _labels_of(targets: OccupancyTargets) -> Tuple[Tensor, Tuple[int, ...]]:
    """Labels uint8 [B, X*Y*Z + 1], the last one standing for all that is outside; and (X, Y, Z)."""
    labels = targets.voxel_semantics
    if targets.mask_camera is not None:
        labels = labels.masked_fill(~targets.mask_camera, IGNORE_LABEL)
    return F.pad(labels.flatten(1), (0, 1), value=IGNORE_LABEL), tuple(labels.shape[1:])


def _steps(turns: Tensor, pitches: Tensor) -> Tensor:
    """Steps of rays [B, R, 3] from azimuths [B, R] in turns and (cosine, sine) [..., 2] of their pitches."""
    angles = 2 * math.pi * turns
    directions = torch.stack(
        [pitches[..., 0] * angles.cos(), pitches[..., 0] * angles.sin(), pitches[..., 1].expand_as(angles)], dim=-1
    )
    return directions / directions.abs().amax(-1, keepdim=True)


def _flat(cells: Tensor, shape: Sequence[int]) -> Tensor:
    """Row-major index int64 [...] of cells [..., 3]; X*Y*Z for those outside."""
    x, y, z = cells.unbind(-1)
    inside = (x >= 0) & (x < shape[0]) & (y >= 0) & (y < shape[1]) & (z >= 0) & (z < shape[2])
    return torch.where(inside, (x * shape[1] + y) * shape[2] + z, math.prod(shape))


def _take(volume: Tensor, index: Tensor) -> Tensor:
    """volume [B, n], index int64 [B, R, S] -> [B, R, S]."""
    return volume.gather(1, index.flatten(1)).view(index.shape)


def _first(valid: Tensor) -> Tensor:
    """int64 [B, R]: the first true entry of bool [B, R, S]; 0 where there is none."""
    return valid.to(torch.uint8).argmax(-1)


def _add_up(volume: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """volume [B, n] with the values added at index int64 [B, R, S]."""
    offsets = torch.arange(len(volume), device=volume.device).view(-1, 1, 1) * volume.shape[1]
    return volume.flatten().index_add(0, (index + offsets).flatten(), values.flatten()).view(volume.shape)


def _kept_index(stage: VoxelStage, cells: Tensor, shape: Sequence[int]) -> Tensor:
    """int64 [B, R, W]: which kept block holds a voxel of cells [B, R, W, 3]; K where none does."""
    blocks = tuple(size // stage.scale for size in shape)
    batch, kept, _ = stage.coords.shape
    slots = torch.full((batch, math.prod(blocks) + 1), kept, device=cells.device)
    numbers = torch.arange(kept, device=cells.device).expand(batch, -1)
    slots = slots.scatter(1, _flat(stage.coords, blocks), numbers)
    return _take(slots, _flat(torch.div(cells, stage.scale, rounding_mode='floor'), blocks))


def _look_up(values: Tensor, kept: Tensor, columns: Tensor, missing: float) -> Tensor:
    """[B, R, W] of values [B, K, n]: row kept [B, R, W], column columns [B, R]; ``missing`` for row K."""
    padded = F.pad(values, (0, 0, 0, 1), value=missing).flatten(1)
    return _take(padded, kept * values.shape[-1] + columns.unsqueeze(-1))
