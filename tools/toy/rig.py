"""The sensors of the toy car: six cameras and a LiDAR, mounted and timed much as nuScenes' are."""

import functools
from typing import Dict, NamedTuple, Tuple

import numpy as np

from lib.task import NUSCENES_CAMERAS

NATIVE_SIZE = (1600, 900)  # width, height that the intrinsics below are for
CAMERA_PERIOD_US, LIDAR_PERIOD_US, KEYFRAME_US = 83333, 50000, 500000
CAMERA_SWEEPS, LIDAR_SWEEPS = 5, 9  # images / scans between two keyframes
LIDAR = 'LIDAR_TOP'
LIDAR_RINGS, LIDAR_AZIMUTHS = 32, 540
LIDAR_PITCH_DEGREES = (-30.67, 10.67)
LIDAR_RANGE = 85.0  # metres

# Position (ego frame, metres), yaw (degrees, left positive), focal length (pixels), principal point (pixels),
# and when the shutter opens relative to the LiDAR's timestamp (microseconds).
_MOUNTING = {
    'CAM_FRONT': ((1.70, 0.01, 1.50), 0.0, 1262.0, (815.0, 480.0), -35000),
    'CAM_FRONT_RIGHT': ((1.56, -0.50, 1.50), -56.0, 1260.0, (810.0, 475.0), -27000),
    'CAM_FRONT_LEFT': ((1.55, 0.50, 1.50), 56.0, 1266.0, (825.0, 465.0), -43000),
    'CAM_BACK': ((0.04, 0.01, 1.57), 180.0, 802.0, (842.0, 480.0), -10000),
    'CAM_BACK_LEFT': ((1.04, 0.48, 1.58), 108.0, 1256.0, (812.0, 480.0), -200),
    'CAM_BACK_RIGHT': ((1.04, -0.48, 1.56), -110.0, 1255.0, (816.0, 480.0), -19000),
}


class Camera(NamedTuple):
    """A camera.

    Attributes:
        name: e.g. CAM_FRONT.
        to_ego: float64 [4, 4], camera frame (x right, y down, z forward) to ego frame.
        intrinsic: float64 [3, 3] for images of ``size``; pixel (c, r) covers c..c+1, r..r+1.
        size: (width, height), pixels.
        delay_us: microseconds from the LiDAR's timestamp to the image's.
    """

    name: str
    to_ego: np.ndarray
    intrinsic: np.ndarray
    size: Tuple[int, int]
    delay_us: int


class Rig(NamedTuple):
    """All sensors of one drive. ``lidar_to_ego`` float64 [4, 4]: LIDAR_TOP (x right, y forward) to ego."""

    cameras: Dict[str, Camera]
    lidar_to_ego: np.ndarray


def make_rig(seed: int, scene_index: int, size: Tuple[int, int]) -> Rig:
    """The rig of a scene, each mounted a little differently. ``size``: (width, height) of the images."""
    rng = np.random.default_rng([seed, scene_index, 2])
    cameras = {}
    for name in NUSCENES_CAMERAS:
        position, yaw, focal, centre, delay = _MOUNTING[name]
        yaw, pitch, roll = np.deg2rad([yaw, 0.0, 0.0]) + rng.normal(0, 0.005, 3)
        rotation = _turn(yaw, pitch, roll) @ _CAMERA_AXES
        focal = focal + rng.normal(0, 3.0)
        scale_x, scale_y = size[0] / NATIVE_SIZE[0], size[1] / NATIVE_SIZE[1]
        intrinsic = np.array(
            [
                [focal * scale_x, 0.0, (centre[0] + rng.normal(0, 4)) * scale_x],
                [0.0, focal * scale_y, (centre[1] + rng.normal(0, 4)) * scale_y],
                [0.0, 0.0, 1.0],
            ]
        )
        cameras[name] = Camera(
            name, _rigid(rotation, np.array(position) + rng.normal(0, 0.01, 3)), intrinsic, tuple(size), delay
        )
    lidar = _rigid(
        _turn(-np.pi / 2 + rng.normal(0, 0.005), rng.normal(0, 0.01), rng.normal(0, 0.01)),
        np.array([0.95, 0.0, 1.84]) + rng.normal(0, [0.01, 0.001, 0.005]),
    )
    return Rig(cameras, lidar)


# Camera axes of a camera that looks along ego x: columns are camera x, y, z in ego coordinates.
_CAMERA_AXES = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def _turn(yaw, pitch, roll):
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1.0]])
    about_y = np.array([[cp, 0, sp], [0, 1.0, 0], [-sp, 0, cp]])
    about_x = np.array([[1.0, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return about_z @ about_y @ about_x


def _rigid(rotation, translation):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


@functools.lru_cache(maxsize=2)
def lidar_directions(azimuths: int = LIDAR_AZIMUTHS) -> Tuple[np.ndarray, np.ndarray]:
    """Unit vectors float64 [n, 3] in LIDAR_TOP and ring numbers int64 [n] of one turn of the LiDAR.

    The arrays are kept for the next call: do not change them.
    """
    pitch = np.deg2rad(np.linspace(LIDAR_PITCH_DEGREES[0], LIDAR_PITCH_DEGREES[1], LIDAR_RINGS))
    azimuth = np.linspace(0, 2 * np.pi, azimuths, endpoint=False)
    azimuth, pitch = (a.ravel() for a in np.meshgrid(azimuth, pitch, indexing='ij'))
    rays = np.stack([np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), np.sin(pitch)], axis=1)
    return rays, np.tile(np.arange(LIDAR_RINGS), azimuths)
