"""What a sample is loaded from: the images of the keyframe and of chosen earlier frames, and its label file."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmdet.datasets.builder import PIPELINES

from lib.classes import IGNORE_LABEL
from lib.errors import ConfigError
from lib.geometry import invert_rigid
from lib.infos import NOWHERE, current_lidar2img, frame_key, past_lidar2img, relocate, volume_from_lidar
from lib.labels import read_labels
from lib.registry import check_whole
from lib.targets import NO_INSTANCE, OccupancyTargets
from lib.task import Task

from ..decode import NVJPEG, DecodedImage, HeldImage, check_decoder, look_at_image, read_image, read_scan
from ..history import choose_test_frames, choose_train_frames

MAX_INSTANCES = 255


@PIPELINES.register_module()
class LoadMultiViewImageFromMultiSweeps:
    """Choose the sample's T frames, decode their images, and compute their projections.

    Adds ``img`` (list of T*N arrays, BGR uint8 [H, W, 3]), ``lidar2img`` float64 [T*N, 4, 4] (LIDAR_TOP of
    the keyframe to pixels of the decoded image), ``ego2lidar`` float64 [T*N, 4, 4] (from the frame of
    ``task.frame``), ``frame_keys`` (T*N strings); index = t*N + n, newest frame first. A camera that a frame lacks
    gives a black image in which no point is seen.

    A sample that follows another (``before``) gets the images of new frames only, whose positions are ``given``; a
    ``HeldImage`` stands for each of the others.

    Args:
        task: frames and cameras.
        decoder: ``cv2``, ``pillow`` or ``turbojpeg``; the pixels are the same. ``nvjpeg`` decodes and resizes on a GPU,
            in inference only; see ``loaders.decode`` for what that changes.
        fast_decode: decode JPEGs at half size where that still covers the network's images. Halves the time;
            real images differ by 0.6 grey levels on average and by 15 at most (tools/bench_loading.py).
        threads: threads that decode one sample's images; 1 decodes in the worker itself.
    """

    makes = ('img', 'lidar2img', 'ego2lidar', 'frame_keys')

    def __init__(self, task: Task, decoder: str = 'cv2', fast_decode: bool = False, threads: int = 1):
        check_whole(threads, 1, 'LoadMultiViewImageFromMultiSweeps: threads')
        check_decoder(decoder)
        self.task = task
        self.decoder = decoder
        self.fast_decode = fast_decode
        self.threads = threads

    def __call__(self, sample: Dict) -> Dict:
        if self.decoder == NVJPEG and not sample['test_mode']:
            raise ConfigError(
                f"LoadMultiViewImageFromMultiSweeps: decoder='{NVJPEG}' is for inference; train with 'cv2'"
            )
        info, cameras, frames = sample['info'], self.task.cameras, self._choose(sample)
        keys = [_frame_keys(frame, cameras) for frame in frames]
        if 'before' in sample:
            sample['given'] = new_frames(keys, [_frame_keys(f, cameras) for f in self._choose(sample['before'])])
        given = sample.get('given', range(len(frames)))
        entries = [(frame, name, t in given) for t, frame in enumerate(frames) for name in cameras]
        there = [(frame[name]['data_path'], wanted) for frame, name, wanted in entries if name in frame]
        images = self._read([(relocate(path, sample['data_root']), wanted) for path, wanted in there])
        size, found = images[0].pixels.shape, iter(images)
        black = np.zeros(size, dtype=np.uint8)
        sample['img'], matrices = [], []
        for frame, name, wanted in entries:
            if name in frame:
                image, matrix = next(found), _lidar2img(info, frame, name)
                matrix[:2] *= image.factor
            else:
                image, matrix = DecodedImage(black if wanted else HeldImage(size), 1.0), NOWHERE
            sample['img'].append(image.pixels)
            matrices.append(matrix)
        sample['frame_keys'] = [name for key in keys for name in key]
        sample['lidar2img'] = np.stack(matrices)
        lidar_from_volume = invert_rigid(volume_from_lidar(info, self.task.frame))
        sample['ego2lidar'] = np.repeat(lidar_from_volume[None], len(entries), axis=0)
        return sample

    def _choose(self, sample) -> List[Dict]:
        """T dicts {CAM: entry}, newest first."""
        current, history, count = sample['info']['cams'], sample['history'], self.task.num_frames - 1
        if not history:
            return [current] * (1 + count)
        chosen = (
            choose_test_frames(len(history), count)
            if sample['test_mode']
            else choose_train_frames(len(history), count, sample['rng'])
        )
        return [current] + [history[position] for position in chosen]

    def _read(self, wanted: List[Tuple[str, bool]]) -> List[DecodedImage]:
        """One per (path, whether its pixels are wanted); what occurs again is read once and shared."""
        different = list(dict.fromkeys(wanted))
        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                images = dict(zip(different, pool.map(self._read_one, different)))
        else:
            images = {one: self._read_one(one) for one in different}
        return [images[one] for one in wanted]

    def _read_one(self, wanted: Tuple[str, bool]) -> DecodedImage:
        half_covers = self.task.image_size if self.fast_decode and self.decoder != NVJPEG else None
        return read_image(wanted[0], self.decoder, half_covers) if wanted[1] else look_at_image(wanted[0], half_covers)


def _frame_keys(frame: Dict, cameras: Sequence[str]) -> Tuple[str, ...]:
    """Identities of a frame's images, in the order of the cameras."""
    return tuple(frame_key(frame[name]['data_path']) if name in frame else f'missing/{name}' for name in cameras)


def new_frames(keys: Sequence[Tuple[str, ...]], before: Sequence[Tuple[str, ...]]) -> List[int]:
    """Where each frame that is not among those before stands first; the current frame where there is none."""
    return [t for t, key in enumerate(keys) if key not in before and key not in keys[:t]] or [0]


def _lidar2img(info, frame, name) -> np.ndarray:
    return current_lidar2img(frame[name]) if frame is info['cams'] else past_lidar2img(info, frame[name])


@PIPELINES.register_module()
class LoadOccGTFromFile:
    """Read the label file and make ``targets`` (OccupancyTargets).

    In evaluation without ``occ_gt_root`` it adds nothing.

    Args:
        task: grid and classes.
        lidar_points: read the keyframe's LiDAR scan as well, for a loss on depth. No augmentation moves its points:
            they are in the frame that ``lidar2img`` and ``ego2lidar`` of the augmented sample refer to.
    """

    makes = ('targets',)

    def __init__(self, task: Task, lidar_points: bool = False):
        self.task, self.lidar_points = task, lidar_points

    def __call__(self, sample: Dict) -> Dict:
        if sample['label_folder'] is None:
            if sample['test_mode']:
                return sample
            raise ConfigError('training needs labels: set occ_gt_root of the training data (LoadOccGTFromFile)')
        info = sample['info']
        labels = read_labels(sample['label_folder'].path(info), self.task, info=info)
        targets = make_targets(labels['semantics'], labels.get('instances'), self.task)
        points = read_scan(sample['info'], sample['data_root']) if self.lidar_points else None
        sample['targets'] = replace(targets, mask_camera=labels.get('mask_camera'), lidar_points=points)
        return sample


def make_targets(semantics: np.ndarray, instances: Optional[np.ndarray], task: Task) -> OccupancyTargets:
    """One target per stuff class present and, for panoptic tasks, one per (thing class, instance id).

    An instance id that spans classes is split, so each target holds one class. At most 255 targets fit into
    the volume; of more, those with the fewest voxels are left out.

    Args:
        semantics: uint8 [X, Y, Z]; 255 = ignored.
        instances: integers [X, Y, Z], 0 = none; needed for panoptic tasks only.

    Returns:
        ``voxel_semantics``, ``voxel_instances`` and ``instance_class_ids``.
    """
    counted = (semantics != task.label_set.free_id) & (semantics != IGNORE_LABEL)
    classes = semantics[counted].astype(np.int64)
    # Key of a voxel's segment: sorts by class, then by instance id, which counts for things only.
    segments = classes << 32
    if task.panoptic:
        is_thing = np.isin(classes, task.label_set.thing_ids)
        segments += np.where(is_thing, np.asarray(instances)[counted].astype(np.int64), 0)
    keys, position, sizes = np.unique(segments, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-sizes, kind='stable')[:MAX_INSTANCES])
    target_of = np.full(len(keys), NO_INSTANCE, dtype=np.uint8)
    target_of[kept] = np.arange(len(kept))
    targets = np.full(semantics.shape, NO_INSTANCE, dtype=np.uint8)
    targets[counted] = target_of[position.reshape(-1)]
    return OccupancyTargets(semantics, targets, (keys[kept] >> 32).astype(np.int64))
