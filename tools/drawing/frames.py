"""What is drawn of one sample: its volumes, its cameras' images and where they stand.

X, Y, Z the grid. Frames: *ego* of the keyframe (x forward, y left, z up, metres; LIDAR_TOP where ``task.frame`` is
'lidar'), *camera* (x right, y down, z
forward), *global* (the drive's fixed frame), *image* (pixels of the file, u to the right, v down).
"""

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

import numpy as np

from lib.classes import IGNORE_LABEL
from lib.errors import DataError
from lib.geometry import intrinsics_to_matrix, invert_rigid, make_transform
from lib.infos import ego_from_lidar, global_from_ego, volume_from_lidar
from lib.task import Task


@dataclass(frozen=True)
class Volume:
    """Occupancy to be drawn.

    Attributes:
        title: caption, e.g. ``prediction``.
        semantics: uint8 [X, Y, Z], class ids; free and 255 (ignore) are not drawn.
        instances: integer [X, Y, Z], 0 = none; None where things are not told apart.
        mask_camera: bool [X, Y, Z], voxels that the cameras see; None where the labels do not say.
    """

    title: str
    semantics: np.ndarray
    instances: Optional[np.ndarray] = None
    mask_camera: Optional[np.ndarray] = None

    def occupied(self, task: Task) -> np.ndarray:
        """bool [X, Y, Z]: voxels with a class, neither free nor ignored."""
        return (self.semantics != task.label_set.free_id) & (self.semantics != IGNORE_LABEL)


@dataclass(frozen=True)
class CameraView:
    """A camera at a sample.

    Attributes:
        name: e.g. ``CAM_FRONT``.
        path: image file.
        intrinsics: float64 [3, 3], of the image file.
        ego_from_camera: float64 [4, 4], at the time of the image.
    """

    name: str
    path: str
    intrinsics: np.ndarray
    ego_from_camera: np.ndarray

    def read(self) -> np.ndarray:
        """The image, uint8 [height, width, 3] RGB.

        Raises:
            DataError: missing or damaged file.
        """
        from loaders.decode import read_image

        return np.asarray(read_image(self.path).pixels)[..., ::-1]

    def image_from_ego(self) -> np.ndarray:
        """float64 [4, 4]: ego to (u·d, v·d, d, 1), d the depth in metres."""
        return intrinsics_to_matrix(self.intrinsics) @ invert_rigid(self.ego_from_camera)


@dataclass(frozen=True)
class Frame:
    """One sample of a drive.

    Attributes:
        token: of the sample.
        scene: name or token of its drive; '' where unknown.
        seconds: when it was recorded; None where unknown.
        global_from_ego: float64 [4, 4]; None where unknown.
        truth, prediction: volumes; None where there is none.
        cameras: in the order of the task.
    """

    token: str
    scene: str = ''
    seconds: Optional[float] = None
    global_from_ego: Optional[np.ndarray] = None
    truth: Optional[Volume] = None
    prediction: Optional[Volume] = None
    cameras: Tuple[CameraView, ...] = ()

    @property
    def volumes(self) -> Tuple[Volume, ...]:
        return tuple(volume for volume in (self.truth, self.prediction) if volume is not None)

    @property
    def title(self) -> str:
        return f'{self.scene}, sample {self.token}' if self.scene else f'sample {self.token}'


def truth_volume(labels: Dict[str, np.ndarray], task: Task, visible_only: bool = False) -> Volume:
    """Volume of a label file's arrays.

    Args:
        visible_only: leave out voxels that no camera saw.

    Raises:
        DataError: the labels do not say what the cameras saw.
    """
    semantics, mask = labels['semantics'], labels.get('mask_camera')
    if visible_only:
        if mask is None:
            raise DataError('--visible-only needs labels with mask_camera, and these have none; leave it out')
        semantics = np.where(mask, semantics, task.label_set.free_id).astype(np.uint8)
    return Volume('truth', semantics, labels.get('instances'), mask)


def prediction_volume(dense: Dict[str, np.ndarray]) -> Volume:
    """Volume of a dense prediction (``lib.prediction``)."""
    return Volume('prediction', dense['semantics'], dense.get('instances'))


def read_frame(
    dataset,
    index: int,
    dense: Optional[Dict[str, np.ndarray]] = None,
    visible_only: bool = False,
    say: Optional[Callable[[str], None]] = None,
) -> Frame:
    """Everything that can be drawn of a sample of a data set.

    Args:
        dataset: ``NuSceneOcc``; may lack labels, and with a prediction single label files may be missing.
        dense: prediction of the sample.
        visible_only: leave out true voxels that no camera saw.
        say: takes a line about what is left out.

    Raises:
        DataError: there is neither a label nor a prediction, or a file is damaged.
    """
    info, task = dataset.info(index), dataset.task
    if not dataset.has_labels and dense is None:
        raise DataError('nothing to draw: the data set has no labels (occ_gt_root) and no --predictions were given')
    ego_from_volume = ego_from_lidar(info) @ invert_rigid(volume_from_lidar(info, task.frame))
    has_truth = dataset.has_labels and (dense is None or _has_label_file(dataset, index, say))
    return Frame(
        token=info['token'],
        scene=info.get('scene_name') or info.get('scene_token') or '',
        seconds=info['timestamp'] / 1e6,
        global_from_ego=global_from_ego(info) @ ego_from_volume,
        truth=truth_volume(dataset.ground_truth(index), task, visible_only) if has_truth else None,
        prediction=None if dense is None else prediction_volume(dense),
        cameras=tuple(_camera_view(info, name, dataset.data_root, task.frame) for name in task.cameras),
    )


def _has_label_file(dataset, index, say) -> bool:
    try:
        path = dataset.label_path(index)
        if path.is_file():
            return True
        reason = f'there is no label file {path}'
    except DataError as error:
        reason = str(error)
    if say:
        say(f'the prediction is shown alone: {reason}')
    return False


def _camera_view(info, name, data_root, frame) -> CameraView:
    from lib.infos import relocate

    entry = info['cams'][name]
    rotation = np.asarray(entry['sensor2lidar_rotation'], dtype=np.float64)
    lidar_from_camera = make_transform(rotation, entry['sensor2lidar_translation'])
    return CameraView(
        name=name,
        path=relocate(entry['data_path'], data_root),
        intrinsics=np.asarray(entry['cam_intrinsic'], dtype=np.float64),
        ego_from_camera=volume_from_lidar(info, frame) @ lidar_from_camera,
    )
