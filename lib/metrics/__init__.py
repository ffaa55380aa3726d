"""Scores of occupancy: RayIoU, RayPQ and voxel mIoU (paper section 4.1, SPEC section 6). NumPy and Numba alone.

Dense predictions are scored sample by sample:

    evaluator = Evaluator('occ3d', ['ray_iou', 'miou'])
    for token, prediction in predictions:  # semantics [200, 200, 16]
        evaluator.update(prediction, labels[token], origins[token], token=token)
    print(evaluator.compute().as_table())

Counts are integers and the few divisions happen at the end in a fixed order, so samples in any order and any number
of processes give the same bits. X, Y, Z: the task's grid; O origins.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..classes import IGNORE_LABEL, LabelSet, get_label_set
from ..errors import ConfigError, DataError
from ..prediction import MAX_INSTANCE_ID
from ..raycast import choose_device
from ..registry import did_you_mean
from ..task import Task
from .counting import FlowRays, RayCounter, Volumes, cast_flow, count_flow, count_voxels
from .counts import Counts, add_counts, rings_and_sectors, tallies, totals, whole_plan
from .origins import lidar_rays, scene_ray_origins
from .result import MASKS, EvalResult, Scene

__all__ = ['METRICS', 'THRESHOLDS', 'EvalResult', 'Evaluator', 'evaluate', 'lidar_rays', 'scene_ray_origins']

METRICS = ('ray_iou', 'ray_pq', 'miou', 'occ_score')
THRESHOLDS = (1.0, 2.0, 4.0)
_CUDA_BATCH = 16  # samples that a GPU works on together
_MASKS_NEEDED = {
    'camera': ('mask_camera',),
    'lidar': ('mask_lidar',),
    'both': ('mask_camera', 'mask_lidar'),
    'none': (),
}
_NEEDED_BY = {  # and what to do where it is missing
    'instances': 'ray_pq needs; leave that metric out, or give panoptic files',
    'flow': 'occ_score needs; leave that metric out, or give files with flow',
    'mask_camera': 'miou needs; choose another mask, or give labels that have it',
    'mask_lidar': 'miou needs; choose another mask, or give labels that have it',
}


@dataclass
class Prepared:
    """A checked sample on its way into an evaluator: counted, but for rays that a GPU will cast."""

    token: str
    scene: str
    counts: Counts
    mask: Optional[str]
    volumes: Optional[Volumes] = None


@dataclass
class _State:
    """What an evaluator has seen: counts by scene, tokens, and totals of samples where they are kept."""

    scenes: Dict[str, Counts] = field(default_factory=dict)
    tokens: Dict[str, str] = field(default_factory=dict)
    samples: List[Tuple[str, str, Dict[str, float]]] = field(default_factory=list)
    mask: Optional[str] = None


class Evaluator:
    """Scores dense predictions against labels.

    Args:
        task: grid, range and classes of predictions and labels; or a label set or its name, with the grid of Occ3D
            (200 x 200 x 16 voxels of 0.4 m).
        metrics: which of ``'ray_iou'``, ``'ray_pq'`` (needs instances), ``'miou'`` and ``'occ_score'`` (occupancy and
            flow; needs ``flow``).
        device: where rays are cast and counted, ``'cpu'`` or a CUDA device. Without the CUDA extension the
            CPU does it.
        thresholds: tolerances of depth, metres; the occupancy and flow score has its own.
        miou_mask: voxels that mIoU counts: ``'camera'`` (Occ3D's tables), ``'lidar'``, ``'both'`` (seen by cameras and
            LiDAR) or ``'none'`` (all). None takes ``'camera'`` if the first label has ``mask_camera``, else ``'none'``.
            Labels without the mask are an error: figures of masked and other samples are never mixed.
        breakdown: also tell apart distance rings and camera sectors.
        keep_samples: also keep the totals of every sample.
        threads: to cast the rays of one sample on the CPU; None takes all cores.
    """

    def __init__(
        self,
        task: Union[Task, LabelSet, str] = 'occ3d',
        metrics: Sequence[str] = ('ray_iou',),
        device='cpu',
        thresholds: Sequence[float] = THRESHOLDS,
        miou_mask: Optional[str] = None,
        breakdown: bool = False,
        keep_samples: bool = False,
        threads: Optional[int] = None,
    ):
        self.task: Task = task if hasattr(task, 'grid_shape') else Task(get_label_set(task))  # type: ignore[assignment]
        self.metrics, self.thresholds = _check_metrics(metrics), _check_thresholds(thresholds)
        if miou_mask is not None and miou_mask not in MASKS:
            raise ConfigError(f'miou_mask {miou_mask!r} is not known; choose from {", ".join(MASKS)}')
        self.miou_mask, self.keep_samples, self._threads = miou_mask, keep_samples, threads
        self.device = choose_device(device) if self.needs_origins else 'cpu'
        self._regions = (rings_and_sectors if breakdown else whole_plan)(self.task)
        self._counter = RayCounter(
            self.task, self.thresholds, self._regions, 'ray_iou' in self.metrics, 'ray_pq' in self.metrics
        )
        self.reset()

    @property
    def needs_origins(self) -> bool:
        """Rays are cast."""
        return any(name != 'miou' for name in self.metrics)

    @property
    def needed(self) -> Tuple[str, ...]:
        """Volumes that labels should have beside ``semantics``, and predictions as far as they are no masks."""
        masks = _MASKS_NEEDED[self.miou_mask or 'camera'] if 'miou' in self.metrics else ()
        extra = [name for metric, name in (('ray_pq', 'instances'), ('occ_score', 'flow')) if metric in self.metrics]
        return tuple(extra) + masks

    def reset(self) -> None:
        """Forget all samples."""
        self._state, self._waiting = _State(mask=self.miou_mask), []

    def update(self, prediction, labels, origins=None, token: str = '', scene: str = '') -> None:
        """Take in one sample.

        Args:
            prediction: ``semantics`` integer [X, Y, Z]; with ``ray_pq`` also ``instances`` integer [X, Y, Z], with
                ``occ_score`` also ``flow`` [X, Y, Z, 2] (m/s, ego axes); or the semantics alone. Arrays or tensors.
                For ``occ_score`` alone also :class:`lib.metrics.counting.FlowRays` of a submission.
            labels: the same, and the masks [X, Y, Z] that ``miou`` needs. Voxels labelled 255 count nowhere.
            origins: float64 [O, 3] metres, ego frame, as :func:`lib.metrics.scene_ray_origins` gives them; for all
                metrics but ``miou``.
            token: the sample's name.
            scene: its scene; scores get intervals where samples name theirs.

        Raises:
            DataError: a volume is missing, of the wrong shape, or holds ids that the task does not have; the sample
                was there before.
        """
        self.add(self.prepare(prediction, labels, origins, token, scene))

    def prepare(self, prediction, labels, origins=None, token: str = '', scene: str = '') -> Prepared:
        """Check and count one sample without taking it in; threads may do so at the same time. See :meth:`update`."""
        free, name = self.task.label_set.free_id, f' of sample {token}' if token else ''
        if isinstance(prediction, FlowRays):
            return self._prepare_submitted(prediction, labels, origins, token, scene, name)
        prediction, labels = (one if isinstance(one, Mapping) else dict(semantics=one) for one in (prediction, labels))
        truth = self._volume(labels, 'semantics', 'the label' + name, IGNORE_LABEL)
        predicted = self._volume(prediction, 'semantics', 'the prediction' + name, free)
        instances = rays = segments = voxels = mask = volumes = None
        if 'ray_pq' in self.metrics:
            instances = tuple(
                self._volume(side, 'instances', owner + name, MAX_INSTANCE_ID, np.uint16)
                for side, owner in ((labels, 'the label'), (prediction, 'the prediction'))
            )
        if 'ray_iou' in self.metrics or 'ray_pq' in self.metrics:
            volumes = Volumes((truth, predicted), instances, _check_origins(origins, name))
            if self.device == 'cpu':
                (rays, segments), volumes = self._counter.on_cpu(volumes, self._threads), None
        if 'miou' in self.metrics:
            mask = self.miou_mask or ('camera' if labels.get('mask_camera') is not None else 'none')
            masks = [self._volume(labels, key, 'the label' + name, 1, bool) for key in _MASKS_NEEDED[mask]]
            seen = np.logical_and.reduce(masks) if masks else None
            voxels = count_voxels(truth, predicted, seen, self._regions, free + 1)
        flow = None
        if 'occ_score' in self.metrics:
            submitted = self._cast_flow(predicted, prediction, origins, 'the prediction' + name, name)
            flow = count_flow(
                self._cast_flow(truth, labels, origins, 'the label' + name, name), submitted, self.task.label_set
            )
        counts = Counts(1, int(predicted.min() < free), rays, segments, voxels, flow)
        return Prepared(token, scene, counts, mask, volumes)

    def _prepare_submitted(self, rays, labels, origins, token, scene, name) -> Prepared:
        """:meth:`prepare` for the rays of a submission."""
        if self.metrics != ('occ_score',):
            raise DataError(f'the rays of a submission have no score but occ_score, not {", ".join(self.metrics)}')
        label_set = self.task.label_set
        truth = self._volume(labels, 'semantics', 'the label' + name, IGNORE_LABEL)
        true_rays = self._cast_flow(truth, labels, origins, 'the label' + name, name)
        flow, occupied = count_flow(true_rays, rays, label_set), bool((rays.label < label_set.free_id).any())
        return Prepared(token, scene, Counts(1, int(occupied), None, None, None, flow), None)

    def _cast_flow(self, semantics, volumes, origins, owner, name) -> FlowRays:
        flow = volumes.get('flow')
        if flow is None or tuple(flow.shape) != self.task.grid_shape + (2,):
            raise DataError(f"{owner} has no 'flow' {list(self.task.grid_shape + (2,))}, which occ_score needs")
        return cast_flow(semantics, _to_array(flow), _check_origins(origins, name), self.task, self.device)

    def add(self, sample: Prepared) -> None:
        """Take in a sample that :meth:`prepare` gave."""
        self._note_mask(sample.mask, sample.token)
        self._note_token(sample.token, sample.scene)
        if sample.volumes is None:
            self._take_in(sample, sample.counts)
            return
        self._waiting.append(sample)
        if len(self._waiting) >= _CUDA_BATCH:
            self._flush()

    def merge(self, *others: 'Evaluator') -> None:
        """Take in what other evaluators with the same settings have seen, e.g. in other processes.

        Raises:
            DataError: a sample is in two of them, or they count voxels under different masks.
        """
        self._flush()
        for other in others:
            other._flush()
            for token, scene in other._state.tokens.items():
                self._note_token(token, scene)
            self._note_mask(other._state.mask if other._state.scenes else None, 'another process')
            for scene, counts in other._state.scenes.items():
                self._add_to_scene(scene, counts)
            self._state.samples.extend(other._state.samples)

    def compute(self, night: Optional[Mapping[str, bool]] = None) -> EvalResult:
        """Scores of all samples so far.

        Args:
            night: {scene: it is by night}, as far as known.

        Raises:
            DataError: no samples.
        """
        self._flush()
        state, labels = self._state, self.task.label_set
        if not state.scenes:
            raise DataError('there is nothing to score: no samples were evaluated; check the data set and its limits')
        return EvalResult(
            class_names=labels.occupied_names,
            thing_ids=labels.thing_ids,
            thresholds=self.thresholds,
            mask=state.mask if 'miou' in self.metrics else None,
            counts=functools.reduce(add_counts, state.scenes.values()),
            regions=self._regions,
            scenes={
                name: Scene(counts.samples, tallies(counts)) for name, counts in sorted(state.scenes.items()) if name
            },
            night=dict(night or {}),
            samples=tuple(sorted(state.samples)),
        )

    def __getstate__(self):
        self._flush()
        return self.__dict__

    def _flush(self):
        """Count the samples that wait for the GPU."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            counted = self._counter.on_cuda([sample.volumes for sample in waiting], self.device)
            for sample, (rays, segments) in zip(waiting, counted):
                self._take_in(sample, sample.counts._replace(rays=rays, segments=segments))

    def _take_in(self, sample, counts):
        self._add_to_scene(sample.scene, counts)
        if self.keep_samples:
            sums = totals(tallies(counts), self.thresholds, self.task.label_set.thing_ids)
            self._state.samples.append(
                (sample.token, sample.scene, {name: float(value) for name, value in sums.items()})
            )

    def _add_to_scene(self, scene, counts):
        known = self._state.scenes.get(scene)
        self._state.scenes[scene] = counts if known is None else add_counts(known, counts)

    def _note_token(self, token, scene):
        if token and token in self._state.tokens:
            raise DataError(f'sample {token} is counted twice; every sample must be evaluated once')
        if token:
            self._state.tokens[token] = scene

    def _note_mask(self, mask, where):
        if mask is not None and self._state.mask not in (None, mask):
            raise DataError(
                f'labels of sample {where} have another mask ({MASKS[mask]}) than those before '
                f'({MASKS[self._state.mask]}), and mIoU never mixes them; choose one with miou_mask'
            )
        self._state.mask = self._state.mask or mask

    def _volume(self, volumes, name, owner, highest, dtype=np.uint8):
        """One checked volume as a contiguous array of the type."""
        volume = volumes.get(name)
        if volume is None:
            raise DataError(
                f'{owner} has no {name!r}, which {_NEEDED_BY.get(name, "all metrics need; give a file that has it")}'
            )
        volume = volume if isinstance(volume, np.ndarray) else _to_array(volume)
        if volume.shape != self.task.grid_shape:
            raise DataError(
                f'{owner}: {name!r} has shape {list(volume.shape)}, but the task grid is {list(self.task.grid_shape)}; '
                'check task.point_cloud_range and task.voxel_size'
            )
        lowest, top = int(volume.min()), int(volume.max())
        if lowest < 0 or top > highest:
            raise DataError(
                f'{owner}: {name!r} holds id {lowest if lowest < 0 else top}, allowed are 0..{highest}; check '
                'task.label_set'
            )
        return np.ascontiguousarray(volume, dtype=dtype)


def evaluate(
    predictions: Mapping[str, Any],
    labels: Mapping[str, Any],
    origins: Optional[Mapping[str, Any]] = None,
    task: Union[Task, LabelSet, str] = 'occ3d',
    metrics: Sequence[str] = ('ray_iou', 'miou'),
    scenes: Optional[Mapping[str, str]] = None,
    tokens: Optional[Iterable[str]] = None,
    miou_mask: Optional[str] = None,
    device='cpu',
) -> EvalResult:
    """Scores of predictions that are at hand, by sample token.

    Args:
        predictions: {token: semantics [X, Y, Z], or a dict with ``semantics`` and ``instances``}. Mappings that read
            when asked keep memory small.
        labels: {token: the same, with the masks that ``miou`` needs}.
        origins: {token: float64 [O, 3]} metres, ego frame; for ``ray_iou`` and ``ray_pq``.
        scenes: {token: name}, for intervals.
        tokens: samples to score; None scores all that have labels.

    The other arguments are those of :class:`Evaluator`.

    Raises:
        DataError: a sample is missing or does not fit.
    """
    evaluator = Evaluator(task, metrics, device=device, miou_mask=miou_mask)
    for token in labels if tokens is None else tokens:
        for what, where in (('prediction', predictions), ('label', labels), ('ray origins', origins or {})):
            if token not in where and (what != 'ray origins' or evaluator.needs_origins):
                raise DataError(f'sample {token} has no {what}; give it, or leave the sample out with tokens')
        scene = (scenes or {}).get(token, '')
        evaluator.update(predictions[token], labels[token], (origins or {}).get(token), token=token, scene=scene)
    return evaluator.compute()


def _check_metrics(metrics):
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics or isinstance(metrics, str):
        wrong = unknown[0] if unknown and not isinstance(metrics, str) else metrics
        raise ConfigError(
            f'evaluation metrics: {wrong!r} is not known{did_you_mean(wrong, METRICS)}; give a list of '
            f'{", ".join(METRICS)}'
        )
    return tuple(metrics)


def _check_thresholds(thresholds):
    values = tuple(sorted({float(value) for value in thresholds}))
    if not values or not values[0] > 0 or not np.isfinite(values[-1]):
        raise ConfigError(f'thresholds must be positive numbers of metres, got {list(thresholds)}')
    return values


def _check_origins(origins, name):
    """float64 [O, 3] from what is given."""
    if origins is None:
        raise DataError(
            f'the ray origins{name} are missing, which ray_iou and ray_pq need; give them, or score miou alone'
        )
    origins = np.asarray(origins, dtype=np.float64)
    if origins.ndim != 2 or origins.shape[1] != 3 or not np.isfinite(origins).all():
        raise DataError(
            f'the ray origins{name} must be finite numbers [O, 3] in metres, got shape {list(origins.shape)}'
        )
    return origins


def _to_array(volume):
    return np.asarray(volume.detach().cpu() if hasattr(volume, 'detach') else volume)
