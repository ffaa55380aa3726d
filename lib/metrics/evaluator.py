"""Evaluation of occupancy, sample by sample: each gives small integer counts, and all counts the scores.

Counts are integers and the few divisions happen at the end in a fixed order, so any number of processes
gives the same bits. X, Y, Z: the task's grid; O origins.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from ..errors import ConfigError, DataError
from ..raycast import cast_rays_through, choose_device
from ..task import Task
from .comparison import MAX_INSTANCE_ID, RayEnds, group_segments
from .ray_iou import RayIoUCounts, count_ray_iou, ray_iou
from .ray_pq import RayPQCounts, count_ray_pq, ray_pq
from .rays import lidar_rays
from .result import EvalResult
from .truth_cache import TruthCache, select_true_rays
from .voxel_iou import VoxelCounts, count_voxel_iou, voxel_iou

METRICS = ('ray_iou', 'ray_pq', 'miou')
THRESHOLDS = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class SampleStats:
    """What one sample contributes to the scores; small, may be pickled and sent between processes.

    Attributes:
        key: the sample's token, or '' if it was not given.
        occupied: voxels predicted as something other than free.
        camera_mask: ``voxels`` holds the voxels the cameras see, not all (labels without ``mask_camera``).
        rays, segments, voxels: counts of RayIoU, RayPQ and mIoU; None where the metric was not asked for.
    """

    key: str
    occupied: int
    camera_mask: bool = False
    rays: Optional[RayIoUCounts] = None
    segments: Optional[RayPQCounts] = None
    voxels: Optional[VoxelCounts] = None


class OccEvaluator:
    """Scores dense predictions against labels.

    Args:
        task: grid, range and classes of predictions and labels.
        metrics: which of ``'ray_iou'``, ``'ray_pq'`` (needs instances) and ``'miou'``.
        device: where rays are cast and counted, ``'cpu'`` or a CUDA device. Without the CUDA extension the
            CPU does it.
        thresholds: tolerances of depth, metres.
        truth_cache_mb: memory for true ray ends, which later evaluations with the same evaluator use again
            (about 1 MB per sample); 0 keeps none.
    """

    def __init__(
        self,
        task: Task,
        metrics: Sequence[str] = ('ray_iou',),
        device='cpu',
        thresholds: Sequence[float] = THRESHOLDS,
        truth_cache_mb: int = 256,
    ):
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ConfigError(
                'evaluation metrics {} are not known; choose from {}'.format(
                    unknown or list(metrics), ', '.join(METRICS)
                )
            )
        self.task = task
        self.metrics = tuple(metrics)
        self.device = choose_device(device)
        self.thresholds = tuple(sorted(float(value) for value in thresholds))
        self._cache = TruthCache(truth_cache_mb * 1024 * 1024)

    def process(
        self, prediction: Mapping[str, Any], ground_truth: Mapping[str, Any], origins: np.ndarray, key: str = ''
    ) -> SampleStats:
        """Count one sample.

        Args:
            prediction: ``semantics`` integer [X, Y, Z]; with ``ray_pq`` also ``instances`` integer [X, Y, Z].
            ground_truth: the same, and ``mask_camera`` [X, Y, Z] for ``miou`` where the labels have it.
                Voxels labelled 255 count nowhere.
            origins: float64 [O, 3] metres, ego frame, as ``lib.metrics.origins.scene_ray_origins`` gives them.
            key: the sample's token. With it the true ray ends are kept for later evaluations: the same key
                must mean the same labels.

        Raises:
            DataError: a volume is missing, of the wrong shape, or holds ids that the task does not have.
        """
        truth = self._volume(ground_truth, 'semantics', key, 'the label', 255)
        predicted = self._volume(prediction, 'semantics', key, 'the prediction', self.task.label_set.free_id)
        stats: Dict[str, Any] = dict(key=key, occupied=int((predicted != self.task.label_set.free_id).sum()))
        if 'ray_iou' in self.metrics or 'ray_pq' in self.metrics:
            stats.update(self._count_rays(truth, predicted, prediction, ground_truth, origins, key))
        if 'miou' in self.metrics:
            mask = ground_truth.get('mask_camera')
            mask = None if mask is None else self._volume(ground_truth, 'mask_camera', key, 'the label', 1)
            stats.update(
                camera_mask=mask is not None,
                voxels=count_voxel_iou(truth, predicted, mask, self.task.label_set.num_classes),
            )
        return SampleStats(**stats)

    def summarize(self, stats: Sequence[SampleStats]) -> EvalResult:
        """Scores of all samples.

        Raises:
            DataError: no samples.
            ValueError: a sample is there twice.
        """
        if not stats:
            raise DataError(
                'there is nothing to score: no samples were evaluated; check the data set and --max-samples'
            )
        keys = [part.key for part in stats if part.key]
        if len(set(keys)) < len(keys):
            raise ValueError(
                f'{len(keys) - len(set(keys))} samples are counted twice; every sample must be evaluated once'
            )
        scores: Dict[str, Any] = {}
        if 'ray_iou' in self.metrics:
            scores.update(ray_iou=ray_iou([part.rays for part in stats]))
        if 'ray_pq' in self.metrics:
            scores.update(ray_pq=ray_pq([part.segments for part in stats]))
        if 'miou' in self.metrics:
            scores.update(
                voxel_iou=voxel_iou([part.voxels for part in stats]),
                camera_mask=all(part.camera_mask for part in stats),
            )
        only_free = not any(part.occupied for part in stats)
        return EvalResult(
            num_samples=len(stats),
            class_names=self.task.label_set.occupied_names,
            thresholds=self.thresholds,
            only_free=only_free,
            **scores,
        )

    def _count_rays(self, truth, predicted, prediction, ground_truth, origins, key):
        panoptic = 'ray_pq' in self.metrics
        true_ids, predicted_ids = (
            self._volume(volumes, 'instances', key, owner, MAX_INSTANCE_ID) if panoptic else None
            for volumes, owner in ((ground_truth, 'the label'), (prediction, 'the prediction'))
        )
        true_ends, predicted_ends = self._ray_ends(truth, predicted, true_ids, predicted_ids, origins, key)
        labels, counts = self.task.label_set, {}
        if 'ray_iou' in self.metrics:
            counts['rays'] = count_ray_iou(true_ends, predicted_ends, labels.num_classes, self.thresholds)
        if panoptic:
            pairs = group_segments(true_ends, predicted_ends, labels.num_classes, self.thresholds)
            counts['segments'] = count_ray_pq(pairs, labels.num_classes, labels.thing_ids, len(self.thresholds))
        return counts

    def _ray_ends(self, truth, predicted, true_ids, predicted_ids, origins, key):
        """True and predicted ends of the same rays, those with a true class at least."""
        known = self._cache.find(key, origins) if key else None
        if known is not None and (true_ids is None or known.ends.instance is not None):
            return known.ends, self._cast([predicted], [predicted_ids], origins, known.rays)[0]
        true_ends, predicted_ends = self._cast([truth, predicted], [true_ids, predicted_ids], origins, None)
        if key and self._cache.has_room(len(true_ends.label)):
            self._cache.keep(key, origins, select_true_rays(true_ends, self.task.label_set.free_id))
        return true_ends, predicted_ends

    def _cast(self, semantics, instances, origins, rays):
        task = self.task
        instances = None if instances[0] is None else instances
        hits = cast_rays_through(
            semantics,
            origins,
            lidar_rays(),
            task.point_cloud_range,
            task.voxel_size,
            task.label_set.free_id,
            instances=instances,
            rays=rays,
            device=self.device,
        )
        return [RayEnds(one.label, one.distance_m, one.instance) for one in hits]

    def _volume(self, volumes, name, key, owner, highest):
        """One checked volume, an array or, on CUDA, a tensor; labels and masks as uint8."""
        volume = volumes.get(name)
        where = f'{owner} of sample {key}' if key else owner
        if volume is None:
            raise DataError(
                '{} has no {!r}, which the metrics {} need; evaluate without them, or make it with instances'.format(
                    where, name, ', '.join(self.metrics)
                )
            )
        if tuple(volume.shape) != self.task.grid_shape:
            raise DataError(
                f'{where}: {name!r} has shape {list(volume.shape)}, but the task grid is {list(self.task.grid_shape)}; '
                'check task.point_cloud_range and task.voxel_size'
            )
        lowest, top = int(volume.min()), int(volume.max())
        if lowest < 0 or top > highest:
            raise DataError(
                f'{where}: {name!r} holds id {lowest if lowest < 0 else top}, allowed are 0..{highest}; check '
                'task.label_set'
            )
        return self._convert(volume, keep_type=name == 'instances')

    def _convert(self, volume, keep_type):
        if self.device != 'cpu':
            import torch

            volume = torch.as_tensor(volume, device=self.device)
            return volume if keep_type else volume.to(torch.uint8)
        array = volume if isinstance(volume, np.ndarray) else volume.detach().cpu().numpy()
        return array if keep_type else array.astype(np.uint8, copy=False)
