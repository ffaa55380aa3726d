"""Occupancy labels of a keyframe: the surfaces of the world as voxels, and which voxels the sensors see.

Like Occ3D's, labels mark surfaces, not the inside of things. A voxel of which the surfaces of several things
pass takes the one with a box before scenery before ground, and among equals the one with more surface in it.
The grid is Occ3D's (``lib.task.Task``'s defaults), in the ego frame of the keyframe.
"""

from typing import Dict, List, NamedTuple

import numpy as np

from lib.classes import OCC3D, OPENOCC_V2
from lib.task import Task

from . import shapes as sh
from .rig import LIDAR_RANGE, Rig, lidar_directions
from .road import NO_GROUND, lookup
from .trace import pack_scene
from .trace_cpu import trace_fan
from .trace_voxels import mark_seen
from .world import GROUND_CLASS_IDS, ToyObject, ToyWorld

_TASK = Task(label_set='occ3d')
GRID_SHAPE, VOXEL = _TASK.grid_shape, _TASK.voxel_size
GRID_LOW, GRID_HIGH = np.array(_TASK.point_cloud_range[:3]), np.array(_TASK.point_cloud_range[3:])
SPACING, WIDE_SPACING = 0.1, 0.13  # metres between surface samples, of objects and of buildings
MIN_SAMPLES = 3  # surface samples that make a voxel occupied
_SUBCELLS = 4  # ground samples per voxel edge
_MASK_IMAGE = (400, 225)  # rays per camera for mask_camera
_MASK_AZIMUTHS, _MASK_MOMENTS = 1080, (-1.0, -0.5, 0.0, 0.5, 1.0)  # seconds, for mask_lidar


class Labels(NamedTuple):
    """Labels of one keyframe, all [X, Y, Z].

    Attributes:
        semantics: uint8 Occ3D class ids.
        instances: int16, 1 + position of the object in ``world.annotated``; 0 where no such object is.
        mask_lidar: uint8, 1 where a LiDAR ray passes or ends, on scans from a second before to a second
            after.
        mask_camera: uint8, 1 where a camera ray passes or meets the first occupied voxel.
    """

    semantics: np.ndarray
    instances: np.ndarray
    mask_lidar: np.ndarray
    mask_camera: np.ndarray


# ---- surface samples ----


def _steps(length, spacing):
    return np.linspace(0.0, 1.0, max(int(np.ceil(length / spacing)) + 1, 2))


def _disc(radius, spacing):
    """Points [m, 2] spread evenly over a disc."""
    count = max(int(np.pi * radius**2 / spacing**2), 4)
    k = np.arange(count) + 0.5
    r, angle = radius * np.sqrt(k / count), k * 2.399963
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)


def _box_surface(half, slope, spacing):
    hx, hy, hz = half
    a, b, up = (2 * _steps(2 * h, spacing) - 1 for h in half)
    lean_x, lean_y = 1 - slope[0] * hz * (up + 1) / hx, 1 - slope[1] * hz * (up + 1) / hy
    faces = []
    for sign in (-1.0, 1.0):
        faces.append((hx * a * lean_x[:, None], sign * hy * lean_y[:, None], hz * up[:, None]))
        faces.append((sign * hx * lean_x[:, None], hy * b * lean_y[:, None], hz * up[:, None]))
        end = 0 if sign < 0 else -1
        faces.append((hx * a * lean_x[end], hy * b[:, None] * lean_y[end], np.float64(sign * hz)))
    return np.concatenate([np.stack(np.broadcast_arrays(*f), axis=-1).reshape(-1, 3) for f in faces])


def _ellipsoid_surface(half, spacing):
    area = 4 * np.pi * (np.prod(half) ** (2.0 / 3.0))
    count = max(int(1.3 * area / spacing**2), 16)
    k = np.arange(count) + 0.5
    z, angle = 1 - 2 * k / count, k * 2.399963
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1) * half


def _cone_surface(radius, half_height, lean, spacing):
    up = 2 * _steps(2 * half_height, spacing) - 1
    r = (radius - lean * half_height * (up + 1))[:, None]
    angle = np.linspace(0, 2 * np.pi, max(int(2 * np.pi * radius / spacing), 6), endpoint=False)
    side = np.broadcast_arrays(r * np.cos(angle), r * np.sin(angle), half_height * up[:, None])
    points = [np.stack(side, axis=-1).reshape(-1, 3)]
    for sign in (-1, 1):
        disc = _disc(radius - lean * half_height * (1 + sign), spacing)
        points.append(np.column_stack([disc, np.full(len(disc), sign * half_height)]))
    return np.concatenate(points)


def _shape_surface(table, i, spacing):
    """Surface samples of shape i in its local frame."""
    half, slope = table.half[i], table.slope[i]
    if table.kind[i] == sh.BOX:
        return _box_surface(half, slope, spacing)
    if table.kind[i] == sh.ELLIPSOID:
        return _ellipsoid_surface(half, spacing)
    if table.kind[i] == sh.CONE:
        return _cone_surface(half[0], half[2], slope[0], spacing)
    return _cone_surface(half[0], half[1], 0.0, spacing)[:, [0, 2, 1]]


def object_surface(item: ToyObject) -> np.ndarray:
    """Samples float64 [m, 3] of an object's outer surface, in its own frame, up to the top of the grid."""
    spacing = WIDE_SPACING if max(item.size) > 8 and item.type is None else SPACING
    parts = []
    radius = item.shapes.radius
    for i in range(len(item.shapes)):
        points = sh.from_local(_shape_surface(item.shapes, i, spacing), item.shapes, i)
        points = points[points[:, 2] < GRID_HIGH[2] + 3.0]
        apart = np.linalg.norm(item.shapes.centre - item.shapes.centre[i], axis=1)
        for k in np.flatnonzero(apart < radius + radius[i]):
            if k != i and len(points):
                points = points[~sh.inside(points, item.shapes, k, margin=0.02)]
        parts.append(points)
    return np.concatenate(parts)


# ---- labels ----


def _between(rows, count):
    """Linear interpolation of rows [n + 1, m] at the middles of ``count`` equal parts of every interval."""
    share = ((np.arange(count) + 0.5) / count)[:, None]
    parts = rows[:-1, None] * (1 - share) + rows[1:, None] * share
    return parts.reshape(-1, rows.shape[1])


class Labeller:
    """Makes the labels of a world's keyframes."""

    def __init__(self, world: ToyWorld, rig: Rig):
        self.world, self.rig = world, rig
        self._surface = {o.index: object_surface(o) for o in world.objects}
        self._instance = np.zeros(len(world.objects), dtype=np.int16)
        for number, item in enumerate(world.annotated, start=1):
            self._instance[item.index] = number
        self._classes = np.array([o.occ_class for o in world.objects], dtype=np.uint8)

    def labels(self, t: float) -> Labels:
        """Labels of the keyframe at time t (seconds from the scene's first keyframe)."""
        ego_to_map = self.world.ego_to_map(t)
        semantics = self._ground_voxels(ego_to_map)
        instances = np.zeros(GRID_SHAPE, dtype=np.int16)
        voxels, owners = self._object_voxels(t, ego_to_map)
        semantics.reshape(-1)[voxels] = self._classes[owners]
        instances.reshape(-1)[voxels] = self._instance[owners]
        occupied = semantics != OCC3D.free_id
        return Labels(semantics, instances, self._seen_by_lidar(t, ego_to_map), self._seen_by_cameras(occupied))

    def _ground_voxels(self, ego_to_map):
        """Semantics with the ground alone."""
        fine = VOXEL / _SUBCELLS
        x, y = (GRID_LOW[a] + (np.arange(_SUBCELLS * GRID_SHAPE[a]) + 0.5) * fine for a in (0, 1))
        x, y = x[:, None], y[None, :]
        z = self._ground_height(ego_to_map)
        r, t = ego_to_map[:3, :3], ego_to_map[:3, 3]
        codes = lookup(
            self.world.ground,
            r[0, 0] * x + (r[0, 1] * y + t[0]) + r[0, 2] * z,
            r[1, 0] * x + (r[1, 1] * y + t[1]) + r[1, 2] * z,
        )
        level = np.floor((z - GRID_LOW[2]) / VOXEL).astype(np.int32)
        known = (level >= 0) & (level < GRID_SHAPE[2]) & (codes != NO_GROUND)
        i, j = (np.arange(len(a)) // _SUBCELLS for a in (x[:, 0], y[0]))
        voxel = (i[:, None] * GRID_SHAPE[1] + j[None, :])[known] * GRID_SHAPE[2] + level[known]
        classes, code = np.unique(GROUND_CLASS_IDS, return_inverse=True)
        votes = np.bincount(voxel * len(classes) + code[codes[known]], minlength=np.prod(GRID_SHAPE) * len(classes))
        votes = votes.reshape(GRID_SHAPE + (len(classes),))
        semantics = classes[votes.argmax(axis=3)]
        semantics[votes.sum(axis=3) < MIN_SAMPLES] = OCC3D.free_id
        return semantics

    def _ground_height(self, ego_to_map):
        """Height of the ground in the ego frame at every ground sample, float64 [n, m].

        It is worked out on a net of voxel corners, 2 m apart, and interpolated: the ground is that smooth.
        """
        stride = 5
        x, y = np.meshgrid(
            *(GRID_LOW[a] + VOXEL * np.arange(0, GRID_SHAPE[a] + 1, stride) for a in (0, 1)), indexing='ij'
        )
        r, t = ego_to_map[:3, :3], ego_to_map[:3, 3]
        z = np.zeros_like(x)
        for _ in range(2):
            mx = r[0, 0] * x + r[0, 1] * y + r[0, 2] * z + t[0]
            my = r[1, 0] * x + r[1, 1] * y + r[1, 2] * z + t[1]
            mz = r[2, 0] * x + r[2, 1] * y + r[2, 2] * z + t[2]
            z = z + (self.world.waves.height(mx, my) - mz) / r[2, 2]
        return _between(_between(z, stride * _SUBCELLS).T, stride * _SUBCELLS).T

    def _object_voxels(self, t, ego_to_map):
        """Voxels (flat indices) with an object's surface, and the index of that object."""
        inverse = np.linalg.inv(ego_to_map)
        voxels = []
        for item in self.world.objects:
            pose = item.pose(t)
            if np.hypot(pose.x - ego_to_map[0, 3], pose.y - ego_to_map[1, 3]) > 58.0 + max(item.size):
                continue
            c, s = np.cos(pose.yaw), np.sin(pose.yaw)
            to_map = np.array([[c, -s, 0, pose.x], [s, c, 0, pose.y], [0, 0, 1, pose.z], [0, 0, 0, 1]])
            to_ego = inverse @ to_map
            points = self._surface[item.index] @ to_ego[:3, :3].T + to_ego[:3, 3]
            cell = np.floor((points - GRID_LOW) / VOXEL).astype(np.int64)
            cell = cell[((cell >= 0) & (cell < GRID_SHAPE)).all(axis=1)]
            flat, count = np.unique(np.ravel_multi_index(cell.T, GRID_SHAPE), return_counts=True)
            found = np.stack([flat, count, np.full_like(flat, item.index)], axis=1)
            voxels.append(found[count >= MIN_SAMPLES])
        found = np.concatenate(voxels) if voxels else np.zeros((0, 3), dtype=np.int64)
        boxed = self._instance[found[:, 2]] > 0
        order = np.lexsort((found[:, 1], boxed, found[:, 0]))
        found = found[order]
        last = np.ones(len(found), dtype=bool)
        last[:-1] = found[1:, 0] != found[:-1, 0]
        return found[last, 0], found[last, 2]

    def _seen_by_lidar(self, t, ego_to_map):
        """Voxels that LiDAR rays pass or end in: the scene as it is at time t, scanned along the drive."""
        moments = sorted({min(max(t + offset, 0.0), self.world.duration) for offset in _MASK_MOMENTS})
        seen = np.zeros(GRID_SHAPE, dtype=np.uint8)
        nothing, (rays, _) = np.zeros(GRID_SHAPE, dtype=bool), lidar_directions(_MASK_AZIMUTHS)
        for moment in moments:
            to_map = self.world.ego_to_map(moment) @ self.rig.lidar_to_ego
            to_ego = np.linalg.inv(ego_to_map) @ to_map
            eye = to_map[:3, 3]
            scene = pack_scene(self.world.shapes_at(t, eye, LIDAR_RANGE), self.world.waves, eye)
            directions = (rays @ to_map[:3, :3].T).reshape(_MASK_AZIMUTHS, -1, 3)
            distance, _ = trace_fan(scene, to_map[:3, :3], directions, LIDAR_RANGE)
            mark_seen(
                nothing, (to_ego[:3, 3] - GRID_LOW) / VOXEL, rays @ to_ego[:3, :3].T, distance.reshape(-1) / VOXEL, seen
            )
        return seen

    def _seen_by_cameras(self, occupied):
        """Voxels that camera rays enter before they have passed an occupied one."""
        seen = np.zeros(GRID_SHAPE, dtype=np.uint8)
        for camera in self.rig.cameras.values():
            u, v = ((np.arange(rays) + 0.5) * size / rays for rays, size in zip(_MASK_IMAGE, camera.size))
            u, v = (g.ravel() for g in np.meshgrid(u, v))
            rays = np.stack([u, v, np.ones_like(u)], axis=1) @ np.linalg.inv(camera.intrinsic).T
            rays = rays / np.linalg.norm(rays, axis=1, keepdims=True) @ camera.to_ego[:3, :3].T
            origin = (camera.to_ego[:3, 3] - GRID_LOW) / VOXEL
            mark_seen(occupied, origin, rays, np.full(len(rays), np.inf), seen)
        return seen


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
    instances = np.zeros(GRID_SHAPE, dtype=np.int64)
    others = OCC3D.class_names.index('others')
    boxed = (labels.instances > 0) & (labels.semantics != others)
    ids: List[int] = list(np.unique(labels.instances[boxed]))
    for number, instance in enumerate(ids, start=1):
        instances[boxed & (labels.instances == instance)] = number
    stuff = ~boxed & (semantics != OPENOCC_V2.free_id)
    for number, class_id in enumerate(np.unique(semantics[stuff]), start=len(ids) + 1):
        instances[stuff & (semantics == class_id)] = number
    flow = np.zeros(GRID_SHAPE + (2,), dtype=np.float32)
    flow[boxed] = velocities[labels.instances[boxed] - 1]
    return dict(semantics=semantics, instances=instances.astype(np.uint8), flow=flow)
