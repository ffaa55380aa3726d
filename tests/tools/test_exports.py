"""Point clouds, meshes and recordings for other viewers, read back by what the formats say."""

import json
import struct
import sys

import cv2
import numpy as np
import pytest

from lib.errors import UserError
from lib.geometry import make_transform
from lib.task import Task
from tools.drawing.export import surface, write_gltf, write_ply
from tools.drawing.frames import CameraView, Frame, Volume
from tools.drawing.recording import write_recording

TASK = Task('occ3d', panoptic=True, point_cloud_range=(-4, -4, -1, 4, 4, 1), voxel_size=0.5)
FREE, CAR, ROAD = 17, 4, 11


def _volume():
    """Sixteen voxels of road under a car of four."""
    semantics = np.full(TASK.grid_shape, FREE, np.uint8)
    instances = np.zeros(TASK.grid_shape, np.int32)
    semantics[4:8, 4:8, 0] = ROAD
    semantics[4:6, 4:6, 1], instances[4:6, 4:6, 1] = CAR, 7
    semantics[0, 0, 0] = 255  # ignored: belongs to no class
    return Volume('truth', semantics, instances)


def test_ply_holds_centres_colours_labels_and_instances(tmp_path):
    assert write_ply(tmp_path / 'a.ply', TASK, _volume()) == 20
    header, body = (tmp_path / 'a.ply').read_bytes().split(b'end_header\n')
    assert b'element vertex 20\n' in header and b'format binary_little_endian 1.0\n' in header
    points = np.frombuffer(body, [('xyz', '<f4', 3), ('rgb', 'u1', 3), ('label', 'u1'), ('instance', '<i4')])
    car = points[points['label'] == CAR]
    assert len(points) == 20 and len(car) == 4 and (car['instance'] == 7).all()
    assert car['rgb'].tolist() == [list(TASK.label_set.palette()[CAR])] * 4
    assert car['xyz'].min(axis=0).tolist() == [-1.75, -1.75, -0.25] and car['xyz'].max(axis=0)[0] == -1.25


def _read_glb(path):
    """(document, binary part) of a .glb file, its lengths checked."""
    content = path.read_bytes()
    magic, version, length = struct.unpack('<4sII', content[:12])
    assert (magic, version, length) == (b'glTF', 2, len(content))
    size, kind = struct.unpack('<I4s', content[12:20])
    assert kind == b'JSON' and size % 4 == 0
    rest = content[20 + size :]
    if not rest:
        return json.loads(content[20 : 20 + size]), b''
    binary_size, binary_kind = struct.unpack('<I4s', rest[:8])
    assert binary_kind == b'BIN\0' and len(rest) == 8 + binary_size
    return json.loads(content[20 : 20 + size]), rest[8:]


def _array(document, binary, number):
    accessor = document['accessors'][number]
    view = document['bufferViews'][accessor['bufferView']]
    dtype, width = {5126: '<f4', 5125: '<u4'}[accessor['componentType']], {'VEC3': 3, 'SCALAR': 1}[accessor['type']]
    values = np.frombuffer(binary, dtype, accessor['count'] * width, view['byteOffset'])
    return values.reshape(-1, width)


def test_gltf_is_the_closed_surface_in_one_mesh_a_class(tmp_path):
    assert write_gltf(tmp_path / 'a.glb', TASK, _volume()) == 2 * 16 + 16 + 8  # up and down; sides of road and car
    document, binary = _read_glb(tmp_path / 'a.glb')
    assert [mesh['name'] for mesh in document['meshes']] == ['car', 'driveable_surface']
    volume = 0
    for mesh in document['meshes']:
        (primitive,) = mesh['primitives']
        positions = _array(document, binary, primitive['attributes']['POSITION']).astype(np.float64)
        normals = _array(document, binary, primitive['attributes']['NORMAL'])
        triangles = _array(document, binary, primitive['indices']).reshape(-1, 3)
        a, b, c = (positions[triangles[:, i]] for i in range(3))
        across = np.cross(b - a, c - a)
        assert np.allclose(across / 0.25, normals[triangles[:, 0]])  # anticlockwise seen from outside
        volume += (a * across).sum() / 6
        limits = document['accessors'][primitive['attributes']['POSITION']]
        assert limits['min'] == positions.min(axis=0).tolist()
    assert volume == pytest.approx(20 * 0.5**3)  # the surface encloses the voxels, no face missing or turned
    matrix = np.array(document['nodes'][0]['matrix']).reshape(4, 4).T
    assert (matrix @ [1, 0, 0, 1])[:3].tolist() == [0, 0, 1]  # ahead: glTF's +z
    assert (matrix @ [0, 0, 1, 1])[:3].tolist() == [0, 1, 0]  # up: glTF's +y


def test_gltf_and_ply_of_nothing(tmp_path):
    empty = Volume('truth', np.full(TASK.grid_shape, FREE, np.uint8))
    assert write_ply(tmp_path / 'a.ply', TASK, empty) == 0 and write_gltf(tmp_path / 'a.glb', TASK, empty) == 0
    document, binary = _read_glb(tmp_path / 'a.glb')
    assert 'meshes' not in document and binary == b''


def test_surface_counts_faces_of_a_single_voxel_at_the_rim():
    occupied = np.zeros((2, 2, 2), bool)
    occupied[1, 1, 1] = True
    corners, normals = surface(occupied, occupied)
    assert corners.shape == (6, 4, 3) and corners.max() == 2 and normals.sum(axis=0).tolist() == [0, 0, 0]


def _frames(folder):
    cv2.imwrite(str(folder / 'image.png'), np.full((90, 160, 3), 120, np.uint8))
    camera = CameraView('CAM_FRONT', str(folder / 'image.png'), np.diag([100.0, 100, 1]), np.eye(4))
    for i in range(3):
        pose = make_transform(np.eye(3), (100.0 + 2 * i, 50, 0))
        volume = _volume()
        if i == 1:
            volume.semantics[volume.semantics == CAR] = FREE
        yield Frame(f'token{i}', 'drive', 10.0 + 0.5 * i, pose, volume, volume, (camera,))


def test_recording_holds_cameras_voxels_boxes_and_the_way(tmp_path):
    pytest.importorskip('rerun', reason='rerun-sdk is not installed')
    chunk = pytest.importorskip('rerun.chunk', reason='this rerun-sdk cannot read recordings back')
    assert write_recording(tmp_path / 'a.rrd', TASK, _frames(tmp_path), 'toy') == 3
    rows = {}
    for part in chunk.RrdReader(str(tmp_path / 'a.rrd')).stream():
        if not part.entity_path.startswith('/__'):
            rows.setdefault(part.entity_path, []).extend(part.to_record_batch().to_pylist())
    for of_entity in rows.values():  # chunks come in any order
        of_entity.sort(key=lambda row: -1 if row.get('sample') is None else row['sample'])
    voxels = rows['/world/ego/truth/driveable_surface']
    assert [len(row['Boxes3D:centers']) for row in voxels] == [16, 16, 16]
    assert [row['sample'] for row in voxels] == [0, 1, 2] and voxels[0]['Boxes3D:half_sizes'] == [[0.25] * 3]
    cars = rows['/world/ego/prediction/car']
    assert [bool(row.get('Boxes3D:centers')) for row in cars] == [True, False, True]  # gone in the second sample
    assert rows['/world/ego/truth/instances'][0]['Boxes3D:labels'] == ['car 7']
    assert len(rows['/world/path'][-1]['LineStrips3D:strips'][0]) == 3
    assert rows['/world/path'][-1]['LineStrips3D:strips'][0][2] == [4.0, 0.0, 0.0]
    images = rows['/world/ego/cameras/CAM_FRONT/image']
    assert len(images) == 3 and bytes(images[0]['EncodedImage:blob'][0][:2]) == b'\xff\xd8'


def test_recording_without_rerun_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'rerun', None)
    with pytest.raises(UserError, match='which is not installed; pip install rerun-sdk'):
        write_recording(tmp_path / 'a.rrd', TASK, [], 'toy')
    assert not (tmp_path / 'a.rrd').exists()


def test_a_rerun_that_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    """As where pip brought a pyarrow for another NumPy."""
    (tmp_path / 'rerun.py').write_text("raise ImportError('pyarrow requires NumPy 2.0 or newer')")
    monkeypatch.delitem(sys.modules, 'rerun', raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r'which cannot be used here \(pyarrow requires NumPy 2.0 or newer\)'):
        write_recording(tmp_path / 'a.rrd', TASK, [], 'toy')
