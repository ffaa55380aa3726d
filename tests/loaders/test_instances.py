"""Panoptic labels: hand-made cases of every rule, the box convention, the toy world's own instances."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyquaternion import Quaternion

from lib.classes import BOX_CLASSES, OCC3D, get_label_set
from lib.cli import run_main
from lib.config import load_config
from lib.errors import ConfigError, DataError
from lib.geometry import voxel_centers
from lib.io import load_npz_checked, save_npz, save_pickle
from lib.labels import read_labels
from lib.task import Task
from loaders.prepare.panoptic_labels import VolumeBox, boxes_in_volume, make_instances, write_panoptic_labels

TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4))
CAR, PEDESTRIAN, CONE, ROAD, TREE, OTHERS, FREE = 4, 7, 8, 11, 16, 0, 17


def _empty():
    return np.full(TASK.grid_shape, FREE, np.uint8)


def _box(center, size, class_id=CAR, yaw=0.0):
    from lib.geometry import rotation_z

    return VolumeBox(np.array(center, float), rotation_z(yaw), np.array(size, float), class_id)


def _voxel(x, y, z):
    return tuple(np.floor((np.array([x, y, z]) - [-8, -8, -1]) / 0.4 + 1e-9).astype(int))


def test_boxes_first_then_stuff_by_class():
    semantics = _empty()
    semantics[_voxel(2.0, 2.0, 0.0)] = CAR
    semantics[_voxel(-2.0, 2.0, 0.0)] = CAR
    semantics[_voxel(4.0, 4.0, 0.0)] = CONE
    semantics[:, :, 0] = ROAD
    semantics[0, 0, 10] = TREE
    semantics[0, 0, 12] = OTHERS
    boxes = [_box([-2, 2, 0.2], [1, 1, 1]), _box([2, 2, 0.2], [1, 1, 1]), _box([4, 4, 0.2], [1, 1, 1], CONE)]
    ids = make_instances(semantics, boxes, TASK)
    assert ids.dtype == np.uint8 and ids[semantics == FREE].max() == 0
    assert ids[_voxel(-2.0, 2.0, 0.0)] == 1 and ids[_voxel(2.0, 2.0, 0.0)] == 2
    assert ids[_voxel(4.0, 4.0, 0.0)] == 3
    assert (ids[0, 0, 12], ids[0, 0, 0], ids[0, 0, 10]) == (4, 5, 6)  # others, road, tree


def test_a_box_without_voxels_gets_no_id():
    semantics = _empty()
    semantics[_voxel(2.0, 2.0, 0.0)] = CAR
    ids = make_instances(semantics, [_box([-5, -5, 0], [1, 1, 1]), _box([2, 2, 0.2], [1, 1, 1])], TASK)
    assert ids[_voxel(2.0, 2.0, 0.0)] == 1


def test_only_voxels_of_the_box_s_class_and_only_once():
    semantics = _empty()
    semantics[_voxel(2.0, 2.0, 0.0)] = CAR
    semantics[_voxel(2.4, 2.0, 0.0)] = PEDESTRIAN
    both = [_box([2.2, 2, 0.2], [2, 2, 2]), _box([2.2, 2, 0.2], [3, 3, 3]), _box([2.2, 2, 0.2], [3, 3, 3], PEDESTRIAN)]
    ids = make_instances(semantics, both, TASK)
    assert ids[_voxel(2.0, 2.0, 0.0)] == 1 and ids[_voxel(2.4, 2.0, 0.0)] == 2


def test_voxels_just_outside_go_to_the_nearest_box_that_reaches_them_once_enlarged():
    semantics = _empty()
    semantics[:, 20, 3] = CAR  # a line of voxels along x at y = 0.2, z = 0.4
    boxes = [_box([-3, 0.2, 0.4], [2, 1, 1]), _box([3, 0.2, 0.4], [2, 1, 1])]
    ids = make_instances(semantics, boxes, TASK)
    x = voxel_centers(TASK.point_cloud_range, 0.4, TASK.grid_shape)[:, 20, 3, 0]
    near_first, near_second = np.abs(x + 3) <= 1.4, np.abs(x - 3) <= 1.4  # (2 + 0.8) / 2
    assert (ids[:, 20, 3] == np.where(near_first, 1, np.where(near_second, 2, 0))).all()
    assert near_first.sum() == 7 and (ids[:, 20, 3] == 0).sum() > 10


def test_of_two_boxes_in_reach_the_nearer_one_takes_the_voxel():
    semantics = _empty()
    semantics[_voxel(0.2, 0.2, 0.2)] = CAR
    semantics[_voxel(-2.0, 0.2, 0.2)] = CAR
    semantics[_voxel(1.2, 0.2, 0.2)] = CAR
    boxes = [_box([-1.9, 0.2, 0.4], [3.6, 1, 1]), _box([1.0, 0.2, 0.4], [1, 1, 1])]
    ids = make_instances(semantics, boxes, TASK)  # 0.2: 2.1 m from the first centre, 0.8 m from the second
    assert ids[_voxel(0.2, 0.2, 0.2)] == 2


def test_the_enlargement_reaches_classes_of_their_own_only():
    semantics = _empty()
    semantics[_voxel(2.0, 2.0, 0.0)] = CAR
    semantics[_voxel(2.4, 2.0, 0.0)] = PEDESTRIAN
    ids = make_instances(semantics, [_box([2.0, 2.2, 0.2], [0.5, 0.5, 0.5])], TASK)
    assert ids[_voxel(2.0, 2.0, 0.0)] == 1 and ids[_voxel(2.4, 2.0, 0.0)] == 0


def test_more_boxes_than_ids_leave_the_stuff_its_ids():
    task = Task('occ3d', point_cloud_range=(-40, -40, -1, 40, 40, 5.4))
    semantics = np.full(task.grid_shape, FREE, np.uint8)
    semantics[:, :, 0] = ROAD
    semantics[::4, ::4, 4][:20, :20] = CONE
    centres = voxel_centers(task.point_cloud_range, 0.4, task.grid_shape, np.argwhere(semantics == CONE))
    ids = make_instances(semantics, [_box(centre, [0.5, 0.5, 0.5], CONE) for centre in centres], task)
    assert ids.max() == 255 and (ids[:, :, 0] == 255).all()
    assert len(np.unique(ids[semantics == CONE])) == 255  # 254 cones and 0


def _info(boxes, names, lidar_rotation=(1, 0, 0, 0), lidar_translation=(0, 0, 0), token='t', scene='scene-a'):
    return dict(
        token=token,
        scene_name=scene,
        scene_token=scene,
        timestamp=0,
        cams={},
        sweeps=[],
        lidar2ego_rotation=list(lidar_rotation),
        lidar2ego_translation=list(lidar_translation),
        ego2global_rotation=[1, 0, 0, 0],
        ego2global_translation=[0, 0, 0],
        gt_boxes=np.array(boxes, float).reshape(-1, 7),
        gt_names=np.array(names),
    )


def test_boxes_move_to_ego_with_length_along_yaw_and_z_at_the_centre():
    lidar = Quaternion(axis=[0, 0, 1], angle=-np.pi / 2) * Quaternion(axis=[1, 0, 0], angle=0.05)
    info = _info([[3, 5, -1, 4, 2, 1.5, 0.3]], ['car'], lidar.elements, (0.9, 0.1, 1.8))
    (box,) = boxes_in_volume(info, TASK.label_set)
    np.testing.assert_allclose(box.center, lidar.rotate(np.array([3.0, 5, -1])) + [0.9, 0.1, 1.8], atol=1e-12)
    front = lidar.rotate(np.array([3 + 1.9 * np.cos(0.3), 5 + 1.9 * np.sin(0.3), -1])) + [0.9, 0.1, 1.8]
    side = lidar.rotate(np.array([3 - 1.9 * np.sin(0.3), 5 + 1.9 * np.cos(0.3), -1])) + [0.9, 0.1, 1.8]
    above = lidar.rotate(np.array([3.0, 5, -1 + 0.7])) + [0.9, 0.1, 1.8]
    below = lidar.rotate(np.array([3.0, 5, -1 - 0.7])) + [0.9, 0.1, 1.8]
    assert box.contains(np.array([front, side, above, below])).tolist() == [True, False, True, True]


def test_boxes_of_other_categories_are_left_out():
    info = _info([[0, 0, 0, 1, 1, 1, 0]] * 3, ['car', 'animal', 'pedestrian'])
    assert [box.class_id for box in boxes_in_volume(info, TASK.label_set)] == [CAR, PEDESTRIAN]


# ---- files -----------------------------------------------------------------------------------------------


def _write_labels(root, infos):
    for number, info in enumerate(infos):
        semantics = _empty()
        semantics[20:23, 20, 3] = CAR
        semantics[:, :, 0] = ROAD
        save_npz(
            root / 'occ3d' / info['scene_name'] / info['token'] / 'labels.npz',
            dict(
                semantics=semantics, mask_lidar=np.full_like(semantics, number % 2), mask_camera=np.ones_like(semantics)
            ),
        )


@pytest.fixture
def prepared(tmp_path):
    """Data root with two keyframes of one car each."""
    infos = [_info([[0.6, 0.2, 0.4, 2, 1, 1, 0]], ['car'], token=f't{n}') for n in range(2)]
    save_pickle(tmp_path / 'nuscenes_infos_train_sweep.pkl', dict(infos=infos, metadata=dict(version='v1.0-mini')))
    _write_labels(tmp_path, infos)
    return tmp_path


def _run(root, **options):
    return write_panoptic_labels(root, 'v1.0-mini', 'occ3d', root / 'occ3d_panoptic', TASK, processes=1, **options)


def test_files_keep_what_was_there_and_add_instances(prepared):
    assert _run(prepared) == (2, 0, [])
    old = load_npz_checked(prepared / 'occ3d' / 'scene-a' / 't1' / 'labels.npz')
    new = load_npz_checked(prepared / 'occ3d_panoptic' / 'scene-a' / 't1' / 'labels.npz')
    assert set(new) == {'semantics', 'mask_lidar', 'mask_camera', 'instances'}
    for key in old:
        np.testing.assert_array_equal(new[key], old[key])
        assert new[key].dtype == np.uint8
    assert new['instances'].dtype == np.uint8
    assert np.unique(new['instances'][old['semantics'] == CAR]).tolist() == [1]
    assert np.unique(new['instances'][old['semantics'] == ROAD]).tolist() == [2]


def test_a_second_run_does_only_what_is_missing(prepared):
    _run(prepared)
    kept = prepared / 'occ3d_panoptic' / 'scene-a' / 't0' / 'labels.npz'
    time = kept.stat().st_mtime_ns
    (prepared / 'occ3d_panoptic' / 'scene-a' / 't1' / 'labels.npz').unlink()
    assert _run(prepared) == (1, 1, []) and kept.stat().st_mtime_ns == time
    assert _run(prepared, overwrite=True).written == 2 and kept.stat().st_mtime_ns > time


def test_one_bad_label_is_named_and_the_others_are_made(prepared):
    bad = prepared / 'occ3d' / 'scene-a' / 't0' / 'labels.npz'
    bad.write_bytes(bad.read_bytes()[:100])
    result = _run(prepared)
    assert result.written == 1 and len(result.failed) == 1 and str(bad) in result.failed[0]


def test_without_any_label_it_stops(prepared):
    with pytest.raises(DataError, match='not one label of 2 keyframes'):
        write_panoptic_labels(prepared, 'v1.0-mini', 'nowhere', prepared / 'out', TASK, processes=1)


def test_info_files_of_another_version_are_refused(prepared):
    with pytest.raises(DataError, match='is of version v1.0-mini, not v1.0-trainval'):
        write_panoptic_labels(prepared, 'v1.0-trainval', 'occ3d', prepared / 'out', TASK)


def test_without_info_files_it_says_how_to_make_them(tmp_path):
    with pytest.raises(DataError, match='holds no info files.*gen_sweep_info.py'):
        _run(tmp_path)


def test_a_scene_name_that_leaves_the_folder_is_refused(prepared):
    infos = [_info([], [], scene='../../escape')]
    save_pickle(prepared / 'nuscenes_infos_train_sweep.pkl', dict(infos=infos, metadata={}))
    from lib.errors import UserError

    with pytest.raises(UserError, match='no plain file or folder name'):
        _run(prepared)


def test_the_script(prepared, monkeypatch, capsys):
    import gen_instance_info

    options = ['--version', 'v1.0-mini', '--processes', '2', '--point-cloud-range', '-8', '-8', '-1', '8', '8', '5.4']
    monkeypatch.setattr(sys, 'argv', ['x', '--data-root', str(prepared)] + options)
    run_main(gen_instance_info.main)
    assert '2 label files written, 0 were there already, 0 failed' in capsys.readouterr().out


@pytest.mark.parametrize('folder', ['occ3d', 'occ3d_panoptic'])
def test_the_script_takes_the_task_of_a_config(prepared, monkeypatch, capsys, tmp_path, folder):
    """Classes of one's own by a remap; what is written keeps the ids of the source, so the same config reads it."""
    import gen_instance_info

    config = tmp_path / 'own.py'
    config.write_text(
        f'data = dict(train=dict(data_root={str(prepared)!r}, occ_gt_root={folder!r}))\n'
        'task = dict(point_cloud_range=[-8, -8, -1, 8, 8, 5.4], label_set=dict(name="own", things=["car"], '
        'class_names=["rest", "car", "free"], remap={**{i: "rest" for i in range(17)}, 4: "car", 17: "free"}))'
    )
    options = ['--config', str(config), '--version', 'v1.0-mini', '--processes', '1', '--overwrite']
    monkeypatch.setattr(sys, 'argv', ['x', *options])
    run_main(gen_instance_info.main)
    assert f'{prepared / "occ3d_panoptic"}: 2 label files written' in capsys.readouterr().out
    task = Task.from_config(dict(load_config(str(config)).task, panoptic=True))
    for path in sorted((prepared / 'occ3d_panoptic').rglob('labels.npz')):
        labels = read_labels(path, task)
        assert labels['semantics'].max() == 2 and labels['instances'].max() > 0
        source = str(path).replace('occ3d_panoptic', 'occ3d')
        assert (np.load(path)['semantics'] == np.load(source)['semantics']).all()


MERGED = dict(
    name='merged',
    class_names=['vehicle', 'rest', 'free'],
    things=['vehicle'],
    remap_from='occ3d',
    remap=dict(dict.fromkeys(OCC3D.class_names[:-1], 'rest'), car='vehicle', truck='vehicle', free='free'),
)


def test_boxes_of_merged_classes(prepared, tmp_path):
    """A box counts for the class that its own became; things without boxes are told, and boxes named by hand serve."""
    merged = get_label_set(MERGED)
    assert merged.boxes == {name: int(name not in ('car', 'truck')) for name in BOX_CLASSES}
    own = dict(name='own', class_names=['vehicle', 'free'], things=['vehicle'])
    assert get_label_set(dict(own, boxes=dict(car='vehicle', tractor='vehicle'))).boxes == dict(car=0, tractor=0)
    with pytest.raises(ConfigError, match="boxes: 'vehicel' is not in class_names; did you mean 'vehicle'"):
        get_label_set(dict(own, boxes=dict(car='vehicel')))
    with pytest.raises(ConfigError, match='boxes must be a dict'):
        get_label_set(dict(own, boxes=['car']))
    volume = dict(point_cloud_range=[-8, -8, -1, 8, 8, 5.4])
    out = str(tmp_path / 'out')
    with pytest.raises(ConfigError, match="no box in the infos is of class 'vehicle', a thing of label set 'own'"):
        write_panoptic_labels(prepared, 'v1.0-mini', 'occ3d', out, Task.from_config(dict(label_set=own, **volume)))
    tasks = [Task.from_config(dict(label_set=labels, **volume)) for labels in (MERGED, 'occ3d')]
    found = []
    for number, task in enumerate(tasks):
        write_panoptic_labels(prepared, 'v1.0-mini', 'occ3d', f'{out}{number}', task, processes=1)
        path = next(iter(sorted(Path(f'{out}{number}').rglob('labels.npz'))))
        found.append(read_labels(path, replace(task, panoptic=True)))
    vehicles = [np.isin(labels['semantics'], ids) for labels, ids in zip(found, ([0], [4, 10]))]
    assert (vehicles[0] == vehicles[1]).all() and vehicles[0].any()
    cars = found[1]['semantics'] == 4  # of the released classes; each keeps to itself, and nothing more is merged
    merged_ids, ids = found[0]['instances'][cars], found[1]['instances'][cars]
    assert len(np.unique(merged_ids[ids > 0])) == len(np.unique(ids[ids > 0])) > 0


def test_ignored_voxels_have_no_instance():
    semantics = np.full(TASK.grid_shape, TASK.label_set.free_id, np.uint8)
    semantics[0, 0, 0], semantics[1, 0, 0] = 255, TASK.label_set.class_names.index('manmade')
    assert make_instances(semantics, [], TASK)[:2, 0, 0].tolist() == [0, 1]


# ---- toy nuScenes ----------------------------------------------------------------------------------------

BOX_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def _toy_agreement(toy_root, folder):
    """(voxels of box classes, those whose id is 0 or holds mostly another true object) over all keyframes."""
    total = wrong = 0
    for truth_path in sorted((toy_root / 'toy_truth').glob('*/*.npz')):
        truth = load_npz_checked(truth_path)['instances'].astype(np.int64)
        labels = load_npz_checked(toy_root / folder / truth_path.parent.name / truth_path.stem / 'labels.npz')
        boxed = np.isin(labels['semantics'], BOX_IDS)
        mine, truth = labels['instances'][boxed].astype(np.int64), truth[boxed]
        total += len(mine)
        for one in np.unique(mine):
            objects, counts = np.unique(truth[mine == one], return_counts=True)
            wrong += counts.sum() - (0 if one == 0 or len(objects) > 1 else counts.max())
        for one in np.unique(truth):
            wrong += len(np.unique(mine[truth == one])) > 1
    return total, wrong


def test_toy_instances_are_the_toy_world_s_own(toy_root):
    total, wrong = _toy_agreement(toy_root, 'occ3d_panoptic')
    assert total > 10000 and wrong == 0


@pytest.mark.parametrize('mutation', ['z at the bottom', 'width and length swapped', 'yaw reversed'])
def test_the_toy_comparison_notices_another_box_convention(toy_root, tmp_path, mutation):
    from lib.io import load_pickle_safe

    content = load_pickle_safe(toy_root / 'nuscenes_infos_val_sweep.pkl')
    for info in content['infos']:
        boxes = info['gt_boxes']
        if mutation == 'z at the bottom':
            boxes[:, 2] += boxes[:, 5] / 2
        elif mutation == 'yaw reversed':
            boxes[:, 6] *= -1
        else:
            boxes[:, [3, 4]] = boxes[:, [4, 3]]
    save_pickle(tmp_path / 'infos.pkl', content)
    write_panoptic_labels(
        toy_root,
        'v1.0-mini',
        'occ3d',
        str(tmp_path / 'out'),
        Task('occ3d'),
        info_files=[str(tmp_path / 'infos.pkl')],
        processes=1,
    )
    unclaimed = boxed = 0
    for path in (tmp_path / 'out').glob('*/*/labels.npz'):
        labels = load_npz_checked(path)
        is_boxed = np.isin(labels['semantics'], BOX_IDS)
        boxed += is_boxed.sum()
        unclaimed += (is_boxed & (labels['instances'] == 0)).sum()
    assert unclaimed > 0.02 * boxed
