"""LiDAR scans of nuScenes: files of float32, five a point (x, y, z in metres, intensity, ring), frame of LIDAR_TOP."""

from pathlib import Path
from typing import Mapping

import numpy as np

from lib.errors import DataError
from lib.infos import relocate

_VALUES = 5  # a point


def read_scan(info: Mapping, data_root) -> np.ndarray:
    """Points of a keyframe's own scan, float32 [n, 3], metres, LIDAR_TOP.

    Args:
        info: keyframe, see ``lib.infos``.
        data_root: nuScenes folder.

    Raises:
        DataError: the keyframe names no scan, or its file is missing or damaged.
    """
    if not info.get('lidar_path'):
        raise DataError(f'keyframe {info["token"]} names no LiDAR scan (lidar_path); train without lidar_points')
    path = relocate(info['lidar_path'], data_root)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f'LiDAR scan {path} does not exist; unpack samples/LIDAR_TOP into data_root, or train without lidar_points'
        ) from error
    except OSError as error:
        raise DataError(f'LiDAR scan {path} cannot be read ({error.strerror})') from error
    if not content or len(content) % (4 * _VALUES):
        raise DataError(f'LiDAR scan {path} is empty or cut off ({len(content)} bytes); fetch it again')
    points = np.frombuffer(content, dtype='<f4').reshape(-1, _VALUES)[:, :3]
    if not np.isfinite(points).all():
        raise DataError(f'LiDAR scan {path} holds values that are no numbers; fetch it again')
    return np.ascontiguousarray(points, dtype=np.float32)
