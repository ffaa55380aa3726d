"""What goes in: calibrated cameras and the images of moments, and how both become the network's input.

N cameras, H x W the network's image. Frames: *camera* (x right, y down, z forward), *ego* (x forward, y left, z up, on
the ground), *global* (any that does not move), metres; *image* (pixels of the file, u right, v down).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
import torch

from lib.errors import ConfigError, DataError
from lib.geometry import intrinsics_to_matrix, invert_rigid
from lib.infos import NOWHERE
from lib.io import read_json
from lib.raycast import count_cores
from lib.registry import did_you_mean
from loaders.decode import NVJPEG, DecodedImage, read_image
from loaders.own_data import read_camera, read_pose
from loaders.pipelines import build_pipeline
from loaders.pipelines.augmentation import RandomTransformImage
from loaders.pipelines.loading import LoadMultiViewImageFromMultiSweeps, new_frames

Pose = Union[np.ndarray, Mapping]  # 4x4, or dict(rotation=quaternion w x y z or 3x3, translation=3 metres)
Image = Union[str, os.PathLike, np.ndarray, Mapping, None]
Cameras = Union[Mapping[str, Any], str, os.PathLike]
Calibration = Dict[str, Dict[str, np.ndarray]]  # by camera: intrinsic [3, 3], camera2ego [4, 4]


@dataclass(frozen=True)
class Frame:
    """The images of one moment.

    Attributes:
        images: by camera name a file, an array uint8 [height, width, 3], or ``dict(image=file or array,
            ego2global=pose)`` for an image not taken at the frame's moment. A camera that is None or not there
            (a dropped image) is done without.
        seconds: of the moment, on any clock.
        ego2global: pose of the ego frame at that moment.
    """

    images: Mapping[str, Image]
    seconds: float = 0.0
    ego2global: Pose = field(default_factory=lambda: np.eye(4))


def read_cameras(cameras: Cameras) -> Calibration:
    """Calibration by camera name, in the order given.

    Args:
        cameras: ``dict(intrinsic=[3, 3], camera2ego=pose)`` by name, or a JSON file that holds such under "cameras"
            (docs/own_data.md). Intrinsics are those of the images as they are given; these must be undistorted.

    Raises:
        DataError: something is missing, or is no calibration.
    """
    where: str = 'cameras'
    found: Any = cameras
    if isinstance(cameras, (str, os.PathLike)):
        content = read_json(cameras)
        where, found = f'{os.fspath(cameras)}: cameras', content.get('cameras') if isinstance(content, dict) else {}
    if not isinstance(found, Mapping) or not found:
        raise DataError(f'{where} must be a dict of calibrated cameras by name, at least one; see docs/own_data.md')
    return {str(name): read_camera(camera, f'{where}.{name}') for name, camera in found.items()}


class Moment(NamedTuple):
    """A frame as the network takes it.

    Attributes:
        key: identity of its images.
        seconds: as given.
        global_from_ego: float64 [4, 4].
        img: uint8 [N, 3, H, W] BGR.
        img_from_global: float64 [N, 4, 4], global (metres) to pixels of ``img``; of a dropped camera, nowhere.
    """

    key: str
    seconds: float
    global_from_ego: np.ndarray
    img: np.ndarray
    img_from_global: np.ndarray


Timed = TypeVar('Timed', Frame, Moment)


class FrameReader:
    """From images as given to the network's, by the steps of a config's evaluation pipeline.

    Args:
        pipeline: ``data.test.pipeline`` of the config.
        task: size of the network's images.
        rgb: arrays are RGB instead of BGR (OpenCV's order); files are known to be what they are.
    """

    def __init__(self, pipeline: Sequence[Mapping], task, rgb: bool = False):
        steps = build_pipeline(pipeline, task)
        self._transform = _step_of(steps, RandomTransformImage)
        loading = _step_of(steps, LoadMultiViewImageFromMultiSweeps)
        self._decoder = 'cv2' if loading.decoder == NVJPEG else loading.decoder
        self._half_covers = task.image_size if loading.fast_decode else None
        self._rgb, self._size = rgb, task.image_size
        self._threads = ThreadPoolExecutor(max(1, min(task.num_cameras, count_cores())))  # decoding waits for no Python

    def read(self, frame: Frame, cameras: Calibration, key: str) -> Moment:
        """Read, resize and crop the images of a frame.

        Raises:
            DataError: an image cannot be read or is of no known camera, no camera has one, or a pose is none.
        """
        if not isinstance(frame.images, Mapping):
            raise DataError(f'the images of a frame must be given by camera name, got {type(frame.images).__name__}')
        unknown = [name for name in frame.images if name not in cameras]
        if unknown:
            raise DataError(f'camera {unknown[0]!r} has an image but no calibration{did_you_mean(unknown[0], cameras)}')
        if all(frame.images.get(name) is None for name in cameras):
            raise DataError(f'no camera has an image at {frame.seconds} s; leave such a frame out')
        if not isinstance(frame.seconds, Real) or not np.isfinite(frame.seconds):
            raise DataError(f'the time of a frame must be a finite number of seconds, got {frame.seconds!r}')
        global_from_ego = read_pose(frame.ego2global, 'ego2global of a frame')
        img = np.zeros((len(cameras), 3) + tuple(self._size), dtype=np.uint8)
        matrices = np.repeat(NOWHERE[None], len(cameras), axis=0)
        there = {name: n for n, name in enumerate(cameras) if frame.images.get(name) is not None}
        seen = self._threads.map(
            lambda name: self._see(frame.images[name], cameras[name], global_from_ego, name), there
        )
        for n, (pixels, matrix) in zip(there.values(), seen):
            img[n], matrices[n] = pixels.transpose(2, 0, 1), matrix
        return Moment(key, float(frame.seconds), global_from_ego, img, matrices)

    def _see(self, image, camera, global_from_ego, name) -> Tuple[np.ndarray, np.ndarray]:
        """The network's image uint8 [H, W, 3] BGR, and global to its pixels float64 [4, 4]."""
        if isinstance(image, Mapping):
            if 'ego2global' in image:
                global_from_ego = read_pose(image['ego2global'], f'ego2global of the image of {name}')
            image = image['image'] if 'image' in image else image.get('path')
        decoded = self._pixels(image, name)
        transform = self._transform.test_transform(decoded.pixels.shape[:2])
        intrinsics = intrinsics_to_matrix(camera['intrinsic'])
        intrinsics[:2] *= decoded.factor
        matrix = transform.matrix() @ intrinsics @ invert_rigid(global_from_ego @ camera['camera2ego'])
        return transform.apply(decoded.pixels), matrix

    def _pixels(self, image, name) -> DecodedImage:
        if isinstance(image, (str, os.PathLike)):
            return read_image(image, self._decoder, self._half_covers)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            said = f'{image.dtype} {list(image.shape)}' if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f'the image of {name} must be a file or an array uint8 [height, width, 3], got {said}')
        return DecodedImage(np.ascontiguousarray(image[..., ::-1] if self._rgb else image), 1.0)


def _step_of(steps, kind):
    for step in steps:
        if isinstance(step, kind):
            return step
    raise ConfigError(f"data.test.pipeline has no {kind.__name__}, which images of one's own need; add it")


def make_sample(
    moments: Sequence[Moment], cameras: Sequence[str], held: Optional[Sequence[Tuple[str, ...]]] = None
) -> Dict:
    """A sample of T moments, newest first, as ``loaders.collate`` takes it; the ego frame stands for LIDAR_TOP.

    Args:
        held: names of the images of frames that the model knows already, and whose images are left out; None: it gets
            all.
    """
    now = moments[0].global_from_ego
    matrices = np.concatenate([moment.img_from_global @ now for moment in moments])
    keys = [tuple(f'{moment.key}/{name}' for name in cameras) for moment in moments]
    metas: Dict[str, Any] = dict(frame_keys=[name for key in keys for name in key])
    if held is not None:
        metas['given'] = new_frames(keys, held)
    given = metas.get('given', range(len(moments)))
    return dict(
        img=torch.from_numpy(np.concatenate([moments[t].img for t in given])),
        lidar2img=torch.from_numpy(matrices.astype(np.float32)),
        ego2lidar=torch.eye(4, dtype=torch.float64).repeat(len(matrices), 1, 1),
        img_metas=metas,
    )


def choose_history(earlier: Sequence[Timed], now: Timed, count: int, interval: float) -> List[Timed]:
    """The frames that a prediction looks back at: each about one interval before the last one.

    Args:
        earlier: frames before ``now``, in time order.
        count: how many, T - 1.
        interval: seconds between the frames that the model learned from.

    Returns:
        ``count`` frames, newest first; past the end the last one again, ``now`` itself where there is none.
    """
    chosen: List[Timed] = []
    left, last = list(earlier), now
    while len(chosen) < count and left:
        wanted = last.seconds - interval
        last = min(reversed(left), key=lambda frame: abs(wanted - frame.seconds))
        chosen.append(last)
        left = [frame for frame in left if frame.seconds < last.seconds]
    return chosen + [last] * (count - len(chosen))
