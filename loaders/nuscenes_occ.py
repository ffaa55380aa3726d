"""NuSceneOcc: keyframes of nuScenes with occupancy labels, as samples of the network's input."""

import os
import sys
from pathlib import Path
from typing import Dict, List, Literal, Mapping, Optional, Sequence

import numpy as np
import torch
from mmdet.datasets.builder import DATASETS

from lib.errors import ConfigError, DataError
from lib.geometry import transform_points
from lib.infos import CameraUse, box_array, load_infos, split_scenes, volume_from_lidar
from lib.io import expand_path, find_under
from lib.labels import OPTIONAL, LabelFolder, read_labels
from lib.metrics.origins import scene_ray_origins
from lib.registry import build_checked, check_whole
from lib.settings import TrainSettings
from lib.task import Task

from .history import History, history_limit
from .pipelines import (
    LoadMultiViewImageFromMultiSweeps,
    LoadOccGTFromFile,
    RandomTransformImage,
    build_pipeline,
    format_sample,
)

_MAX_WORKERS = 1024
_STEPS = LoadMultiViewImageFromMultiSweeps, LoadOccGTFromFile, RandomTransformImage  # know images that are left out


def build_dataset(cfg: Mapping, task: Task):
    """Data set from one of ``data.train``, ``data.val``, ``data.test`` of a config.

    Raises:
        ConfigError: unknown type or argument.
        DataError: the info file cannot be used.
    """
    return build_checked(cfg, DATASETS, dict(task=task), 'data')


@DATASETS.register_module()
class NuSceneOcc(torch.utils.data.Dataset):
    """Samples of an info file.

    Opening it reads the info file and nothing else; files are looked for when a sample is asked for. A
    sample's random draws depend on (seed, epoch, index) alone, so neither on workers nor on processes.

    Args:
        task: what is predicted, from which images.
        data_root: nuScenes folder; it wins over whatever root the info file recorded. In this and the next two
            ``~`` and ``$VARIABLES`` are replaced.
        ann_file: info pickle, absolute, relative to ``data_root``, or with the data root in front.
        pipeline: configs of the steps, e.g. ``[dict(type='LoadMultiViewImageFromMultiSweeps'), ...]``.
        occ_gt_root: label folder, given like ``ann_file``; None = no labels (evaluation only).
        test_mode: evaluation: fixed frames and transforms, no draws.
        load_interval: every so many-th keyframe is a sample; histories still use all keyframes.
        max_samples: at most so many samples (the first); histories still use all keyframes.
        seed: seed of all draws.
        on_error: training with unreadable images or labels: ``stop`` raises, ``skip`` takes the next readable
            sample instead and counts.
        max_skipped: with ``skip``, how many samples (of all workers of a process) may be replaced.
        allow_any_pickle: trust the info file and let it build any object.
        allow_missing_cameras: keyframes that lack a camera are used without it instead of refused; leave it off
            for figures to be compared with published ones.

    Attributes:
        infos: all keyframes of the info file, in time order (``load_interval`` and the like do not thin it).
        positions: indices into ``infos`` of the samples' keyframes.
    """

    def __init__(
        self,
        task: Task,
        data_root: str,
        ann_file: str,
        pipeline: Sequence[Dict],
        occ_gt_root: Optional[str] = None,
        test_mode: bool = False,
        load_interval: int = 1,
        max_samples: Optional[int] = None,
        seed: int = 0,
        on_error: Literal['stop', 'skip'] = 'stop',
        max_skipped: int = TrainSettings.max_skipped,
        allow_any_pickle: bool = False,
        allow_missing_cameras: bool = False,
    ):
        if test_mode and on_error == 'skip':
            raise ConfigError(
                "on_error='skip' replaces samples, which would falsify an evaluation; use 'stop' with test_mode=True"
            )
        check_whole(load_interval, 1, 'load_interval')
        check_whole(1 if max_samples is None else max_samples, 1, 'max_samples')
        self.task = task
        self.data_root = Path(expand_path(data_root))
        self.ann_file = find_under(data_root, ann_file)
        self.test_mode = test_mode
        self.seed = seed
        use = CameraUse(task.cameras, task.num_frames > 1, allow_missing_cameras)
        self.infos, self.version = load_infos(self.ann_file, allow_any_pickle, use)
        self.positions: List[int] = list(range(0, len(self.infos), load_interval))[:max_samples]
        self._history = History(self.infos, task.cameras)
        self._labels: Optional[LabelFolder] = None
        if occ_gt_root is not None:
            root = find_under(data_root, occ_gt_root)
            self._labels = LabelFolder(root, self.data_root, self.version, task.label_files)
        self._pipeline = build_pipeline(pipeline, task)
        self._skips = SkipCounter(max_skipped) if on_error == 'skip' else None
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by persistent workers too
        self._origins: Dict[str, np.ndarray] = {}
        self._scene_members: Optional[Dict[int, List[int]]] = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Dict:
        """Sample ``index``: what ``collate`` makes a batch of (see ``format_sample``)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f'sample {index} of {len(self)}')
        index %= len(self)
        if self._skips is None:
            return self._load(index, index)
        for step in range(len(self)):
            try:
                return self._load((index + step) % len(self), index)
            except ConfigError:
                raise
            except Exception as error:  # whatever a damaged file brings about
                self._skips.count(error)
        raise DataError(f'not one of {len(self)} samples could be read; check data_root ({self.data_root})')

    def following(self, index: int, before: int) -> Dict:
        """Sample ``index`` for a model that holds the features of sample ``before``: without images of frames of both.

        See ``format_sample``. The whole sample in training, and where steps of one's own may look at the images.
        """
        leaves_out = self.test_mode and all(type(step) in _STEPS for step in self._pipeline)
        return self._load(index, index, before if leaves_out else None)

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch. Call before the epoch's first batch is fetched."""
        self._epoch[0] = epoch

    @property
    def num_skipped(self) -> int:
        """Unreadable samples replaced so far, by all workers of this process."""
        return 0 if self._skips is None else self._skips.total

    @property
    def skips_unreadable(self) -> bool:
        """Unreadable samples are replaced (``on_error='skip'``)."""
        return self._skips is not None

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @property
    def reads_lidar(self) -> bool:
        """Samples come with the points of the keyframe's LiDAR scan."""
        return any(getattr(step, 'lidar_points', False) for step in self._pipeline)

    def info(self, index: int) -> Dict:
        """The info of sample ``index``."""
        return self.infos[self.positions[index]]

    def sample_token(self, index: int) -> str:
        return self.info(index)['token']

    def scene_name(self, index: int) -> str:
        """Name of the sample's scene; '' where the info file does not say."""
        return self.info(index).get('scene_name') or ''

    def object_classes(self, index: int) -> List[str]:
        """Occupied classes with a box in the volume that LiDAR or radar points lie in (``valid_flag``)."""
        info = self.info(index)
        centres = transform_points(volume_from_lidar(info, self.task.frame), box_array(info, self.ann_file)[:, :3])
        low, high = np.split(np.asarray(self.task.point_cloud_range), 2)
        counts = ((centres >= low) & (centres < high)).all(1)
        valid = np.asarray(info.get('valid_flag', ()), dtype=bool)
        if valid.shape == counts.shape:
            counts &= valid
        names = np.asarray(info.get('gt_names', ()), dtype=str)[counts]
        labels = self.task.label_set
        return sorted({labels.class_names[labels.boxes[name]] for name in names.tolist() if name in labels.boxes})

    def label_path(self, index: int) -> Path:
        """Path of the sample's label file.

        Raises:
            ConfigError: the data set has no ``occ_gt_root``.
        """
        if self._labels is None:
            raise ConfigError('this data set has no labels; set occ_gt_root to the label folder')
        return self._labels.path(self.info(index))

    def ground_truth(self, index: int, names: Sequence[str] = OPTIONAL) -> Dict[str, np.ndarray]:
        """Labels of sample ``index``, from its file: ``semantics`` and those named, see ``lib.labels.read_labels``."""
        return read_labels(self.label_path(index), self.task, names, self.info(index))

    def ray_origins(self, index: int) -> np.ndarray:
        """Origins of the evaluation's rays, float64 [O, 3], metres, the task's frame at the sample's keyframe."""
        position = self.positions[index]
        token = self.infos[position]['token']
        if token not in self._origins:
            if self._scene_members is None:
                scenes = split_scenes(self.infos)
                self._scene_members = {member: scene for scene in scenes for member in scene}
            scene = [self.infos[member] for member in self._scene_members[position]]
            self._origins.update(scene_ray_origins(scene, self.task.point_cloud_range, frame=self.task.frame))
        return self._origins[token]

    def history(self, index: int) -> List[Dict]:
        """Entries ``{CAM: camera entry}`` before sample ``index`` in its scene, newest first."""
        return self._history.entries(self.positions[index], history_limit(self.task.num_frames - 1))

    def previous(self, position: int) -> Optional[int]:
        """Index into ``infos`` of the keyframe before ``infos[position]`` in its scene; None at the start."""
        return self._history.previous(position)

    def used_positions(self) -> List[int]:
        """Indices into ``infos`` of the samples' keyframes and of those their histories reach, ascending."""
        used = set()
        for sample in self.positions:
            position: Optional[int] = sample
            for _ in range(self.task.num_frames):
                if position is None:
                    break
                used.add(position)
                position = self.previous(position)
        return sorted(used)

    def _load(self, index, seed_index, before=None):
        info = self.info(index)
        sample = dict(
            info=info,
            index=index,
            data_root=os.fspath(self.data_root),
            test_mode=self.test_mode,
            history=self.history(index),
            label_folder=self._labels,
            rng=np.random.default_rng([self.seed, int(self._epoch[0]), seed_index]),
        )
        if before is not None:
            sample['before'] = dict(history=self.history(before), info=self.info(before), test_mode=True)
        try:
            for step in self._pipeline:
                sample = step(sample)
            return format_sample(sample)
        except DataError as error:
            raise DataError(f'keyframe {info["token"]}: {error}') from error
        except KeyError as error:
            if not error.args or error.args[0] not in LoadMultiViewImageFromMultiSweeps.makes:
                raise
            raise ConfigError(
                f'the pipeline needs {error.args[0]!r}, which no step of it makes; begin with '
                'LoadMultiViewImageFromMultiSweeps'
            ) from error


class SkipCounter:
    """Replaced samples of one process and its workers, with a limit.

    Each worker counts in a slot of its own in shared memory, so no count is lost.

    Args:
        limit: how many samples may be replaced.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._slots = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def total(self) -> int:
        return int(self._slots.sum())

    def count(self, error: Exception) -> None:
        """Count one more and say so.

        Raises:
            DataError: that was one too many.
        """
        worker = torch.utils.data.get_worker_info()
        said = str(error) if isinstance(error, DataError) else f'{type(error).__name__}: {error}'
        self._slots[0 if worker is None else 1 + worker.id % (_MAX_WORKERS - 1)] += 1
        print(f'warning: sample replaced by the next one ({self.total} so far): {said}', file=sys.stderr)
        if self.total > self.limit:
            raise DataError(
                f'{self.total} samples could not be read, more than max_skipped={self.limit} allows; the last '
                f'one: {said}'
            ) from error
