"""Occupancy for other programs: voxels as a point cloud (PLY), or as a mesh with a part per class (glTF, .glb).

K occupied voxels, F faces; coordinates are metres in the ego frame (x forward, y left, z up).
"""

import json
import struct
from typing import Dict, List

import numpy as np

from lib.geometry import voxel_centers
from lib.io import atomic_write
from lib.task import Task

from .frames import Volume

# glTF has y up and looks along +z: its x, y, z are ego's y, z, x. Column-major, as glTF wants it.
_GLTF_FROM_EGO = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
_PLY_FIELDS = (('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('red', 'u1'), ('green', 'u1'), ('blue', 'u1'))
_PLY_LABELS = (('label', 'u1'), ('instance', '<i4'))
_PLY_TYPES = {'<f4': 'float', 'u1': 'uchar', '<i4': 'int'}
_FLOAT, _UINT = 5126, 5125  # glTF component types


def write_ply(path, task: Task, volume: Volume) -> int:
    """Write the centres of the occupied voxels as binary PLY.

    A vertex has ``x y z`` (float), ``red green blue`` (uchar, the class's colour), ``label`` (uchar, class id) and
    ``instance`` (int, 0 = none).

    Returns:
        Number of points, K.
    """
    where = np.argwhere(volume.occupied(task))
    labels = volume.semantics[tuple(where.T)]
    points = np.zeros(len(where), dtype=list(_PLY_FIELDS + _PLY_LABELS))
    centres = voxel_centers(task.point_cloud_range, task.voxel_size, task.grid_shape, where)
    colours = np.asarray(task.label_set.palette(), dtype=np.uint8)[labels]
    for axis, name in enumerate(('x', 'y', 'z')):
        points[name] = centres[:, axis]
    for channel, name in enumerate(('red', 'green', 'blue')):
        points[name] = colours[:, channel]
    points['label'] = labels
    if volume.instances is not None:
        points['instance'] = volume.instances[tuple(where.T)]
    with atomic_write(path) as temporary, open(str(temporary), 'wb') as file:
        file.write(_ply_header(task, volume, len(points)).encode('ascii'))
        file.write(points.tobytes())
    return len(points)


def _ply_header(task, volume, count) -> str:
    names = ', '.join(f'{i} {name}' for i, name in enumerate(task.label_set.occupied_names))
    lines = [
        'ply',
        'format binary_little_endian 1.0',
        f'comment occupancy, {volume.title}; voxels of {task.voxel_size} m',
    ]
    lines += [
        'comment ego frame, metres: x forward, y left, z up',
        f'comment labels: {names}',
        f'element vertex {count}',
    ]
    lines += [f'property {_PLY_TYPES[kind]} {name}' for name, kind in _PLY_FIELDS + _PLY_LABELS]
    return '\n'.join(lines + ['end_header', ''])


def write_gltf(path, task: Task, volume: Volume) -> int:
    """Write the surface of the occupied voxels as binary glTF 2.0, one mesh and one material per class.

    Returns:
        Number of faces (squares) of all meshes.
    """
    content = _GltfContent()
    occupied = volume.occupied(task)
    faces = 0
    for class_id, (name, colour) in enumerate(zip(task.label_set.occupied_names, task.label_set.palette())):
        corners, normals = surface(occupied, volume.semantics == class_id)
        if len(corners):
            metres = corners * task.voxel_size + np.asarray(task.point_cloud_range[:3])
            content.add_mesh(name, colour, metres.astype(np.float32), normals)
            faces += len(corners)
    with atomic_write(path) as temporary, open(str(temporary), 'wb') as file:
        file.write(content.to_glb(volume.title))
    return faces


def surface(occupied: np.ndarray, chosen: np.ndarray):
    """Faces of the chosen voxels that no occupied voxel covers.

    Args:
        occupied: bool [X, Y, Z]; chosen: bool [X, Y, Z].
    Returns:
        corners float64 [F, 4, 3] in voxels, anticlockwise seen from outside, and normals float32 [F, 3].
    """
    padded = np.pad(occupied, 1)
    voxels = np.argwhere(chosen & occupied)
    corners, normals = [], []
    for axis in range(3):
        for sign in (-1, 1):
            normal = np.zeros(3, dtype=int)
            normal[axis] = sign
            bare = voxels[~padded[tuple((voxels + 1 + normal).T)]]
            u, v = (axis + 1) % 3, (axis + 2) % 3
            square = np.zeros((4, 3))
            square[:, axis] = sign > 0
            square[:, u], square[:, v] = (0, 1, 1, 0), (0, 0, 1, 1)
            corners.append(bare[:, None] + square[::sign])
            normals.append(np.broadcast_to(normal.astype(np.float32), (len(bare), 3)))
    return np.concatenate(corners), np.concatenate(normals)


class _GltfContent:
    """Collects meshes and lays them out as one .glb file."""

    def __init__(self):
        self._binary: List[bytes] = []
        self._size = 0
        self._views: List[Dict] = []
        self._accessors: List[Dict] = []
        self._meshes: List[Dict] = []
        self._materials: List[Dict] = []

    def add_mesh(self, name: str, colour, corners: np.ndarray, normals: np.ndarray) -> None:
        """Squares float32 [F, 4, 3] with normals [F, 3], in one colour (RGB 0..255)."""
        linear = [round(((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92, 5) for c in colour]
        surface_look = dict(baseColorFactor=linear + [1.0], metallicFactor=0.0, roughnessFactor=0.9)
        self._materials.append(dict(name=name, pbrMetallicRoughness=surface_look))
        first = 4 * np.arange(len(corners), dtype=np.uint32)[:, None]
        attributes = dict(
            POSITION=self._add(corners.reshape(-1, 3), 'VEC3', _FLOAT, 34962),
            NORMAL=self._add(np.repeat(normals, 4, axis=0), 'VEC3', _FLOAT, 34962),
        )
        indices = self._add((first + np.array([0, 1, 2, 0, 2, 3], dtype=np.uint32)).reshape(-1), 'SCALAR', _UINT, 34963)
        primitive = dict(attributes=attributes, indices=indices, material=len(self._materials) - 1)
        self._meshes.append(dict(name=name, primitives=[primitive]))

    def _add(self, array, kind, component, target) -> int:
        """Number of the accessor of an array that joins the binary part."""
        data = np.ascontiguousarray(array).tobytes()
        self._views.append(dict(buffer=0, byteOffset=self._size, byteLength=len(data), target=target))
        accessor = dict(bufferView=len(self._views) - 1, componentType=component, count=len(array), type=kind)
        if kind == 'VEC3':
            accessor.update(min=array.min(axis=0).tolist(), max=array.max(axis=0).tolist())
        self._accessors.append(accessor)
        self._binary.append(data)
        self._size += len(data)
        return len(self._accessors) - 1

    def to_glb(self, title: str) -> bytes:
        """The file: a header, a JSON chunk and a binary chunk, each a multiple of four bytes long."""
        parts = [dict(name=mesh['name'], mesh=i) for i, mesh in enumerate(self._meshes)]
        root = dict(name=title, matrix=_GLTF_FROM_EGO, children=list(range(1, len(parts) + 1)))
        if not parts:
            del root['children']
        document = dict(
            asset=dict(version='2.0', generator='SparseOcc'), scene=0, scenes=[dict(nodes=[0])], nodes=[root] + parts
        )
        if parts:
            document.update(meshes=self._meshes, materials=self._materials, accessors=self._accessors)
            document.update(bufferViews=self._views, buffers=[dict(byteLength=self._size)])
        text = json.dumps(document, separators=(',', ':')).encode('utf-8')
        chunks = _chunk(b'JSON', text + b' ' * (-len(text) % 4))
        if parts:
            chunks += _chunk(b'BIN\0', b''.join(self._binary))
        return struct.pack('<4sII', b'glTF', 2, 12 + len(chunks)) + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('<I4s', len(content), kind) + content
