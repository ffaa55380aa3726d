"""Occupancy labels of a keyframe, made as Occ3D makes its own: from all LiDAR scans of the scene together.

A voxel is occupied when some scan of the scene reached a surface in it. What stands still is gathered in the
map, what moves in its own frame, so that its voxels follow its box. A voxel that several things reach into
takes the one with a box before scenery before ground, and among equals the one with more surface in it. The
grid is Occ3D's (``lib.task.Task``'s defaults) or another, in the ego frame of the keyframe.
"""

from typing import Dict, NamedTuple, Sequence

import numpy as np

from lib.classes import OCC3D, OPENOCC_V2
from lib.geometry import Grid
from lib.task import Task

from .lidar import Surface, ground_classes
from .rig import Rig, lidar_directions
from .trace import pack_scene
from .trace_cpu import trace_image
from .trace_voxels import Votes, mark_in_view, mark_passed, vote
from .world import ToyWorld

OCC3D_GRID = Task(label_set='occ3d').grid
_GROUND, _SCENERY, _BOXED = range(3)
_MASK_IMAGE = (400, 225)  # of the depth images for mask_camera
_MASK_SLACK = (0.1, 0.2)  # metres that a seen surface point, and a seen voxel's centre, may lie behind them


class RangeImage(NamedTuple):
    """A scan as it carves free space: when, seconds, and how far its rays went, float32 [azimuths * rings]."""

    t: float
    distance: np.ndarray


class Labels(NamedTuple):
    """Labels of one keyframe, all [X, Y, Z].

    Attributes:
        semantics: uint8 Occ3D class ids.
        instances: int16, 1 + position of the object in ``world.annotated``; 0 where no such object is.
        mask_lidar: uint8, 1 where a voxel is occupied or a ray of the keyframe's or neighbouring scans passes.
        mask_camera: uint8, 1 where a camera sees a surface point, or the middle of a free voxel.
    """

    semantics: np.ndarray
    instances: np.ndarray
    mask_lidar: np.ndarray
    mask_camera: np.ndarray


class Labeller:
    """Makes the labels of a world's keyframes.

    Args:
        world, rig: the scene and its sensors.
        surface: what its scans reached.
        grid: of the labels, ego frame.
    """

    def __init__(self, world: ToyWorld, rig: Rig, surface: Surface, grid: Grid = OCC3D_GRID):
        self.world, self.rig, self.grid = world, rig, grid
        self._to_grid = _grid_matrix(grid)
        boxed = {item.index: number for number, item in enumerate(world.annotated, start=1)}
        numbers = np.array([boxed.get(o.index, 0) for o in world.objects])
        ground = ground_classes()
        self._instance = np.concatenate([numbers, np.zeros(len(ground))]).astype(np.int16)
        self._classes = np.concatenate([[o.occ_class for o in world.objects], ground]).astype(np.uint8)
        rank = np.where(numbers > 0, _BOXED, _SCENERY)
        self._rank = np.concatenate([rank, np.full(len(ground), _GROUND)]).astype(np.int64)
        order = np.argsort(surface.source, kind='stable')
        self._points = surface.points[order]
        self._first = np.searchsorted(surface.source[order], np.arange(len(self._rank) + 1))

    def labels(self, t: float, scans: Sequence[RangeImage]) -> Labels:
        """Labels of the keyframe at time t (seconds from the scene's first keyframe).

        ``scans`` are those whose rays show what is free, beside the surfaces that all scans reached.
        """
        ego_to_map = self.world.ego_to_map(t)
        to_grid = self._to_grid @ np.linalg.inv(ego_to_map)
        votes = vote(self._points, self._first, self._source_matrices(t, to_grid), self._rank, self.grid.shape)
        occupied = votes.winner >= 0
        semantics = np.where(occupied, self._classes[votes.winner], OCC3D.free_id).astype(np.uint8)
        instances = np.where(occupied, self._instance[votes.winner], 0).astype(np.int16)
        mask_lidar = occupied.astype(np.uint8)
        for image in scans:
            self._carve(image, to_grid, mask_lidar)
        return Labels(semantics, instances, mask_lidar, self._seen_by_cameras(t, ego_to_map, votes))

    def _source_matrices(self, t, to_grid):
        """float64 [S, 3, 4]: from the frame of each source's points to voxels."""
        matrices = np.repeat(to_grid[None, :3], len(self._rank), axis=0)
        for item, (x, y, z, yaw) in zip(self.world.moving, self.world.moving_poses(t)):
            c, s = np.cos(yaw), np.sin(yaw)
            matrices[item.index] = to_grid[:3] @ [[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1]]
        return matrices

    def _carve(self, image, to_grid, mask):
        """Mark the voxels that the rays of a scan enter."""
        pose = to_grid @ self.world.ego_to_map(image.t) @ self.rig.lidar_to_ego
        rays, _ = lidar_directions()
        voxel = self.grid.voxel_size
        mark_passed(pose[:3, 3], rays @ pose[:3, :3].T * voxel, image.distance / voxel, mask)

    def _seen_by_cameras(self, t, ego_to_map, votes: Votes):
        depths, to_image = [], []
        for camera in self.rig.cameras.values():
            to_map = ego_to_map @ camera.to_ego
            intrinsic = np.diag([n / of for n, of in zip(_MASK_IMAGE, camera.size)] + [1.0]) @ camera.intrinsic
            scene = pack_scene(self.world.shapes_at(t, to_map[:3, 3]), self.world.waves, to_map[:3, 3])
            depth, _ = trace_image(scene, to_map[:3, :3], intrinsic, _MASK_IMAGE)
            depths.append(_widened(depth))
            to_image.append(intrinsic @ np.linalg.inv(self._to_grid @ camera.to_ego)[:3])
        return mark_in_view(votes, np.stack(to_image), np.stack(depths), _MASK_SLACK)


def _grid_matrix(grid: Grid) -> np.ndarray:
    """float64 [4, 4]: ego frame to voxels from the grid's lower corner."""
    matrix = np.diag([1 / grid.voxel_size] * 3 + [1.0])
    matrix[:3, 3] = -np.array(grid.point_cloud_range[:3]) / grid.voxel_size
    return matrix


def _widened(depth):
    """The largest depth of each pixel [height, width] and its eight neighbours: slanting ground fills pixels."""
    for axis in (0, 1):
        padded = np.concatenate([depth.take([0], axis), depth, depth.take([-1], axis)], axis)
        size = depth.shape[axis]
        depth = np.maximum.reduce([padded.take(range(k, k + size), axis) for k in range(3)])
    return depth


def openocc_labels(labels: Labels, velocities: np.ndarray) -> Dict[str, np.ndarray]:
    """The same labels in the form of OpenOcc v2 files.

    Args:
        labels: of the keyframe.
        velocities: float64 [n, 2], metres per second along ego x and y, of ``world.annotated``.

    Returns:
        semantics int32 [X, Y, Z] (others become manmade), instances uint8 (objects, then one id per remaining
        class; 0 free), flow float32 [X, Y, Z, 2].
    """
    names = [n if n in OPENOCC_V2.class_names else 'manmade' for n in OCC3D.class_names]
    table = np.array([OPENOCC_V2.class_names.index(n) for n in names], dtype=np.int32)
    semantics = table[labels.semantics]
    instances = np.zeros(semantics.shape, dtype=np.int64)
    others = OCC3D.class_names.index('others')
    boxed = (labels.instances > 0) & (labels.semantics != others)
    ids = np.unique(labels.instances[boxed])
    stuff = ~boxed & (semantics != OPENOCC_V2.free_id)
    classes = np.unique(semantics[stuff])
    numbers = np.zeros(int(labels.instances.max()) + 1, dtype=np.int64)
    numbers[ids] = np.arange(1, len(ids) + 1)
    instances[boxed] = numbers[labels.instances[boxed]]
    numbers = np.zeros(OPENOCC_V2.num_classes, dtype=np.int64)
    numbers[classes] = np.arange(len(ids) + 1, len(ids) + len(classes) + 1)
    instances[stuff] = numbers[semantics[stuff]]
    flow = np.zeros(semantics.shape + (2,), dtype=np.float32)
    flow[boxed] = velocities[labels.instances[boxed] - 1]
    return dict(semantics=semantics, instances=instances.astype(np.uint8), flow=flow)
