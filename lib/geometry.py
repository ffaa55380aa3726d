"""Rigid transforms and quaternions in NumPy; volumes cut into voxels, and labels of one on the voxels of another.

4x4 matrices act on column vectors from the left: p_b = b_from_a @ [x, y, z, 1]. Metres and radians. Quaternions are
(w, x, y, z), as in nuScenes. X, Y, Z the grid that labels are wanted on, U, V, W that of the label file, S samples
per edge of a wanted voxel.
"""

import math
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from .classes import IGNORE_LABEL

FRAMES = ('ego', 'lidar')  # the vehicle's, or LIDAR_TOP; both of the keyframe
_ROUNDING = 1e-6  # voxels; keeps centres that meet an edge on one side of it


def quaternion_to_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """Rotation matrix float64 [3, 3] of a quaternion (w, x, y, z) of any length but zero."""
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_z(angle: float) -> np.ndarray:
    """Rotation about z by ``angle`` radians, x towards y, float64 [3, 3]."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def make_transform(rotation: np.ndarray, translation: Sequence[float]) -> np.ndarray:
    """4x4 float64 from a rotation [3, 3] and a translation [3]: p' = rotation @ p + translation."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def pose_to_matrix(rotation: Sequence[float], translation: Sequence[float]) -> np.ndarray:
    """4x4 float64 of a nuScenes pose: quaternion (w, x, y, z) and translation [3], metres."""
    return make_transform(quaternion_to_matrix(rotation), translation)


def invert_rigid(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a rigid 4x4 transform, by transposing its rotation."""
    rotation = matrix[:3, :3].T
    return make_transform(rotation, -rotation @ matrix[:3, 3])


def intrinsics_to_matrix(intrinsics: np.ndarray) -> np.ndarray:
    """4x4 float64 that holds a camera matrix [3, 3] in its corner: camera metres to (u·d, v·d, d, 1)."""
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics
    return matrix


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a 4x4 rigid or affine transform to points [..., 3]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def voxel_centers(
    point_cloud_range: Sequence[float], voxel_size: float, grid_shape: Sequence[int], indices: np.ndarray = None
) -> np.ndarray:
    """Centres (metres) of voxels.

    Args:
        point_cloud_range: (x0, y0, z0, x1, y1, z1), metres.
        voxel_size: metres.
        grid_shape: (X, Y, Z).
        indices: integer voxel indices [..., 3]; None means every voxel of the grid, [X, Y, Z, 3].
    Returns:
        float64, the shape of ``indices``.
    """
    if indices is None:
        indices = np.stack(np.meshgrid(*[np.arange(n) for n in grid_shape], indexing='ij'), axis=-1)
    return (indices + 0.5) * voxel_size + np.asarray(point_cloud_range[:3], dtype=np.float64)


class Grid(NamedTuple):
    """A volume and its voxels.

    Attributes:
        frame: one of ``FRAMES``.
        point_cloud_range: (x0, y0, z0, x1, y1, z1), metres.
        voxel_size: edge of a voxel, metres.
    """

    frame: str
    point_cloud_range: Tuple[float, ...]
    voxel_size: float

    @property
    def shape(self) -> Tuple[int, int, int]:
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        x, y, z = (round((b - a) / self.voxel_size) for a, b in zip(low, high))
        return x, y, z

    @property
    def is_whole(self) -> bool:
        """The sides are a whole number of voxels, one at least."""
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        return all(
            n >= 1 and abs(n * self.voxel_size - (b - a)) <= 1e-4 * self.voxel_size * n
            for n, a, b in zip(self.shape, low, high)
        )

    def index_to_metres(self) -> np.ndarray:
        """4x4 float64: a place in voxels (their corners at whole numbers) to metres in the frame."""
        matrix = np.diag([self.voxel_size] * 3 + [1.0])
        matrix[:3, 3] = self.point_cloud_range[:3]
        return matrix

    def describe(self) -> str:
        """For messages: voxels, their size, frame and range."""
        numbers = ', '.join(f'{number:g}' for number in self.point_cloud_range)
        return f'{"x".join(map(str, self.shape))} voxels of {self.voxel_size:g} m over [{numbers}] ({self.frame})'


def find_sources(wanted: Grid, given: Grid, given_from_wanted: np.ndarray, ids: np.ndarray, free: int) -> np.ndarray:
    """Which voxel of the file each wanted voxel takes its label from.

    Wanted voxels no larger than the file's take the one that holds their centre. Larger ones look at S³ places, S so
    many that no voxel of the file along an edge is passed over: occupied goes before ignored, ignored before free; of
    the occupied classes the one met most often counts (of equals the lowest id), at the place where it is met first.

    Args:
        given_from_wanted: 4x4 float64, metres in the frame of ``wanted`` to those of ``given``.
        ids: uint8 [U, V, W], class ids, 255 = ignored.
        free: id of free voxels.

    Returns:
        int64 [X, Y, Z], index into the flat file; -1 outside it.
    """
    matrix = np.linalg.inv(given.index_to_metres()) @ given_from_wanted @ wanted.index_to_metres()
    edge = max(1, math.ceil(wanted.voxel_size / given.voxel_size - 1e-3))
    places = [(np.array(place) + 0.5) / edge for place in np.ndindex(edge, edge, edge)]
    sources = _held_by(places[0], matrix, wanted.shape, given.shape)
    return sources if edge == 1 else _vote(sources, places, matrix, wanted.shape, ids, free)


def _vote(sources, places, matrix, shape, ids, free) -> np.ndarray:
    """The sources of the first place, replaced where a class wins; only what is not free is counted."""
    classes_of = np.append(ids.reshape(-1), np.uint8(IGNORE_LABEL))  # its last entry serves index -1
    voxels, found = [], []
    for place in places:
        source = _held_by(place, matrix, shape, ids.shape).reshape(-1)
        taken = np.flatnonzero(classes_of[source] != free)
        voxels.append(taken)
        found.append(source[taken])
    source = np.concatenate(found)
    keys = np.concatenate(voxels) * 256 + classes_of[source]  # sorts by voxel, then by class
    keys, first, counts = np.unique(keys, return_index=True, return_counts=True)
    rank = np.lexsort((keys % 256, -counts, keys % 256 == IGNORE_LABEL, keys // 256))
    winners, position = np.unique(keys[rank] // 256, return_index=True)
    result = sources.reshape(-1).copy()
    result[winners] = source[first[rank[position]]]
    return result.reshape(shape)


def _held_by(place, matrix, shape: Sequence[int], file_shape: Sequence[int]) -> np.ndarray:
    """int64 [X, Y, Z]: flat index of the file's voxel that holds ``place`` (0..1 along each edge) of every voxel."""
    flat, inside = np.zeros((1, 1, 1), dtype=np.int64), np.ones((1, 1, 1), dtype=bool)
    for axis, count in enumerate(file_shape):
        position = np.full((1, 1, 1), matrix[axis, :3] @ place + matrix[axis, 3] + _ROUNDING)
        for other, length in enumerate(shape):
            if abs(matrix[axis, other]) > 1e-12:  # axes that do not turn stay short
                steps = matrix[axis, other] * np.arange(length)
                position = position + steps.reshape([-1 if i == other else 1 for i in range(3)])
        index = np.floor(position).astype(np.int64)
        inside = inside & (index >= 0) & (index < count)
        flat = flat * count + index
    return np.broadcast_to(np.where(inside, flat, -1), shape)


def take(array: np.ndarray, sources: np.ndarray, outside) -> np.ndarray:
    """The array [U, V, W, ...] on the wanted grid [X, Y, Z, ...]; ``outside`` where there is no source."""
    taken = array.reshape((-1,) + array.shape[3:])[np.maximum(sources, 0)]
    taken[sources < 0] = outside
    return taken


def held_classes(wanted: Grid, given: Grid, given_from_wanted: np.ndarray, places: np.ndarray, labels: np.ndarray):
    """What became of voxels of the file.

    Args:
        places: int [n, 3], voxels of the file.
        labels: uint8 [X, Y, Z], the labels made of it.

    Returns:
        int64 [n], class of the wanted voxel that holds the centre of each; -1 outside the wanted volume.
    """
    matrix = np.linalg.inv(wanted.index_to_metres()) @ np.linalg.inv(given_from_wanted) @ given.index_to_metres()
    index = np.floor((places + 0.5) @ matrix[:3, :3].T + matrix[:3, 3] + _ROUNDING).astype(np.int64)
    inside = ((index >= 0) & (index < wanted.shape)).all(axis=1)
    classes = np.full(len(places), -1, dtype=np.int64)
    classes[inside] = labels[tuple(index[inside].T)]
    return classes
