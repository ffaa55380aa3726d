"""Label files: found without listing, checked against the task, turned into targets."""

import json

import numpy as np
import pytest

from lib import labels as module
from lib.classes import OCC3D
from lib.errors import ConfigError, DataError
from lib.io import save_npz
from lib.labels import LabelFolder, read_labels
from lib.task import Task
from loaders.pipelines.loading import make_targets

OCC3D_TASK, PANOPTIC, OPENOCC = Task('occ3d'), Task('occ3d', panoptic=True), Task('openocc_v2', panoptic=True)
GRID = OCC3D_TASK.grid_shape


def _write(path, **arrays):
    save_npz(path, arrays)
    return path


def _free(value=17, dtype=np.uint8):
    return np.full(GRID, value, dtype)


def test_the_scene_of_the_info_names_the_file(tmp_path):
    folder = LabelFolder(tmp_path / 'none', tmp_path)
    assert folder.path(dict(token='t', scene_name='s')) == tmp_path / 'none' / 's' / 't' / 'labels.npz'


def test_without_it_the_tables_do(tmp_path, monkeypatch):
    tables = tmp_path / 'v1.0-mini'
    tables.mkdir()
    (tables / 'scene.json').write_text(json.dumps([dict(token='x', name='scene-9')]))
    (tables / 'sample.json').write_text(json.dumps([dict(token='t', scene_token='x')]))
    folder = LabelFolder(tmp_path / 'occ3d', tmp_path, 'v1.0-mini')
    assert folder.path(dict(token='t')) == tmp_path / 'occ3d' / 'scene-9' / 't' / 'labels.npz'
    monkeypatch.setattr(module, 'read_json', None)  # read once only
    assert folder.path(dict(token='t')).parent.parent.name == 'scene-9'


def test_without_tables_the_label_folder_is_listed_once_and_on_demand(tmp_path, monkeypatch):
    (tmp_path / 'occ3d' / 'scene-1' / 't').mkdir(parents=True)
    calls = []
    listdir = module.os.listdir
    monkeypatch.setattr(module.os, 'listdir', lambda path: calls.append(path) or listdir(path))
    folder = LabelFolder(tmp_path / 'occ3d', tmp_path, 'v1.0-mini')
    assert not calls
    assert folder.path(dict(token='t')).parent.parent.name == 'scene-1' and len(calls) == 2
    folder.path(dict(token='t'))
    assert len(calls) == 2


def test_an_unknown_keyframe_is_named(tmp_path):
    (tmp_path / 'occ3d').mkdir()
    with pytest.raises(DataError, match='no label of keyframe strange .*occ_gt_root'):
        LabelFolder(tmp_path / 'occ3d', tmp_path).path(dict(token='strange'))
    with pytest.raises(DataError, match='label folder .*nowhere does not exist; correct occ_gt_root'):
        LabelFolder(tmp_path / 'nowhere', tmp_path).path(dict(token='strange'))


def test_real_occ3d_labels(real_dir):
    for name in ('occ3d_29796060110c4163b07f06eff4af0753_labels', 'occ3d_unknown_sample_labels'):
        labels = read_labels(real_dir / (name + '.npz'), OCC3D_TASK)
        assert set(labels) == {'semantics', 'mask_camera', 'mask_lidar'}
        assert labels['semantics'].dtype == np.uint8 and labels['mask_camera'].dtype == bool
        raw = np.load(str(real_dir / (name + '.npz')))
        np.testing.assert_array_equal(labels['semantics'], raw['semantics'])
        np.testing.assert_array_equal(labels['mask_camera'], raw['mask_camera'] == 1)


def test_real_openocc_labels(real_dir):
    labels = read_labels(real_dir / 'openocc_unknown_sample_labels.npz', OPENOCC)
    raw = np.load(str(real_dir / 'openocc_unknown_sample_labels.npz'))
    assert set(labels) == {'semantics', 'instances'} and labels['semantics'].dtype == np.uint8
    np.testing.assert_array_equal(labels['semantics'], raw['semantics'])
    np.testing.assert_array_equal(labels['instances'], raw['instances'])
    targets = make_targets(labels['semantics'], labels['instances'], OPENOCC)
    _check_targets(labels['semantics'], labels['instances'], targets, OPENOCC)


def test_labels_of_the_other_set_are_told_apart(real_dir):
    with pytest.raises(DataError, match="openocc_.*no free voxel .*label set 'occ3d'.*task.label_set"):
        read_labels(real_dir / 'openocc_unknown_sample_labels.npz', OCC3D_TASK)
    with pytest.raises(DataError, match=r"occ3d_unknown.*holds id 17, but label set 'openocc_v2' has ids 0\.\.16"):
        read_labels(real_dir / 'occ3d_unknown_sample_labels.npz', Task('openocc_v2'))


def test_a_wrong_shape_names_file_key_and_shapes(tmp_path):
    path = _write(tmp_path / 'labels.npz', semantics=np.full((100, 200, 16), 17, np.uint8))
    with pytest.raises(
        DataError,
        match=r"labels\.npz: 'semantics' has shape \[100, 200, 16\], but the task "
        r'grid is \[200, 200, 16\]',
    ):
        read_labels(path, OCC3D_TASK)
    path = _write(tmp_path / 'labels.npz', semantics=_free(), mask_camera=np.ones((200, 200), bool))
    with pytest.raises(DataError, match="'mask_camera' has shape"):
        read_labels(path, OCC3D_TASK)


@pytest.mark.parametrize('value', [18, 200, -1])
def test_unknown_ids_are_named(tmp_path, value):
    semantics = _free(dtype=np.int16)
    semantics[0, 0, 0] = value
    with pytest.raises(DataError, match=f'holds id {value}'):
        read_labels(_write(tmp_path / 'labels.npz', semantics=semantics), OCC3D_TASK)


def test_ignored_voxels_may_be_in_the_file(tmp_path):
    semantics = _free()
    semantics[0, 0, 0] = 255
    assert read_labels(_write(tmp_path / 'labels.npz', semantics=semantics), OCC3D_TASK)['semantics'][0, 0, 0] == 255


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.int64, np.uint64])
def test_whole_numbers_of_any_type_are_read(tmp_path, dtype):
    semantics = _free()
    semantics[0, 0, :3] = [4, 0, 255]
    mask = np.arange(semantics.size).reshape(GRID) % 2
    path = _write(
        tmp_path / 'labels.npz',
        semantics=semantics.astype(dtype),
        mask_camera=mask.astype(dtype),
        instances=mask.astype(dtype),
    )
    labels = read_labels(path, OCC3D_TASK)
    np.testing.assert_array_equal(labels['semantics'], semantics)
    np.testing.assert_array_equal(labels['mask_camera'], mask == 1)
    np.testing.assert_array_equal(labels['instances'], mask)
    assert (labels['semantics'].dtype, labels['mask_camera'].dtype) == (np.uint8, bool)


@pytest.mark.parametrize('key', ['semantics', 'mask_camera', 'instances'])
@pytest.mark.parametrize('value', [0.5, float('nan'), float('inf'), 'x', 1j])
def test_what_is_no_whole_number_is_refused(tmp_path, key, value):
    arrays = {name: _free() for name in ('semantics', 'mask_camera', 'instances')}
    arrays[key] = arrays[key].astype(type(value))
    arrays[key][0, 0, 0] = value
    with pytest.raises(DataError, match=f"labels.npz: '{key}' holds .* no whole numbers"):
        read_labels(_write(tmp_path / 'labels.npz', **arrays), OCC3D_TASK)


@pytest.mark.parametrize('value', [-1, 2**31, 2**40, 3e9])
def test_instance_ids_beyond_the_type_are_refused(tmp_path, value):
    instances = np.zeros(GRID, type(value))
    instances[0, 0, 0] = value
    with pytest.raises(DataError, match=r"labels\.npz: 'instances' holds ids from"):
        read_labels(_write(tmp_path / 'labels.npz', semantics=_free(), instances=instances), OCC3D_TASK)


@pytest.mark.parametrize('place', ['occ3d/gts', 'gts', 'occ3d'])
def test_the_released_layout_is_found(tmp_path, place):
    path = tmp_path / place / 'scene-0001' / 'token' / 'labels.npz'
    path.parent.mkdir(parents=True)
    _write(path, semantics=_free())
    folder = LabelFolder(tmp_path / 'occ3d', tmp_path)
    assert folder.path(dict(scene_name='scene-0001', token='token')) == path
    assert folder.path(dict(token='token')) == path
    assert LabelFolder(tmp_path / 'openocc_v2', tmp_path).root.name == 'openocc_v2'


def test_panoptic_tasks_say_where_instances_come_from(tmp_path):
    path = _write(tmp_path / 'labels.npz', semantics=_free())
    with pytest.raises(DataError, match='has no instances, which task.panoptic needs.*gen_instance_info.py'):
        read_labels(path, PANOPTIC)


# ---- targets ---------------------------------------------------------------------------------------------


def _check_targets(semantics, instances, targets, task):
    """SPEC's rules on any volume."""
    assert targets.voxel_instances.dtype == np.uint8 and targets.instance_class_ids.dtype == np.int64
    free = semantics == task.label_set.free_id
    assert (targets.voxel_instances[free] == 255).all() and (targets.voxel_instances[~free] < 255).all()
    assert targets.instance_class_ids.tolist() == sorted(targets.instance_class_ids.tolist())
    for target, class_id in enumerate(targets.instance_class_ids):
        where = targets.voxel_instances == target
        assert np.unique(semantics[where]).tolist() == [class_id]
        if task.panoptic and class_id in task.label_set.thing_ids:
            assert len(np.unique(instances[where])) == 1
            assert (where == ((semantics == class_id) & (instances == instances[where][0]))).all()
        else:
            assert (where == (semantics == class_id)).all()


@pytest.mark.parametrize('name', ['v10_semantic', 'v11_panoptic'])
def test_targets_are_the_published_ones(golden_dir, name):
    path = golden_dir / (name + '.npz')
    if not path.is_file():
        pytest.skip(f'{path} is not there')
    with np.load(str(path)) as golden:
        task = PANOPTIC if name.endswith('panoptic') else OCC3D_TASK
        for sample in range(2):
            targets = make_targets(golden['voxel_semantics'][sample], golden['instances'][sample], task)
            np.testing.assert_array_equal(targets.voxel_instances, golden['voxel_instances'][sample])
            np.testing.assert_array_equal(targets.instance_class_ids, golden[f'instance_class_ids_{sample}'])


def test_an_id_that_spans_classes_is_split():
    semantics, instances = _free(), np.zeros(GRID, np.int32)
    semantics[0, 0, :4], instances[0, 0, :4] = [4, 4, 10, 10], [5, 6, 5, 0]  # cars 5 and 6, trucks 5 and none
    semantics[1, 0, :2], instances[1, 0, :2] = [11, 11], [1, 2]  # road: one target whatever its ids
    targets = make_targets(semantics, instances, PANOPTIC)
    assert targets.instance_class_ids.tolist() == [4, 4, 10, 10, 11]
    assert targets.voxel_instances[0, 0, :5].tolist() == [0, 1, 3, 2, 255]
    assert targets.voxel_instances[1, 0, :2].tolist() == [4, 4]
    _check_targets(semantics, instances, targets, PANOPTIC)


def test_semantic_tasks_have_one_target_per_class():
    semantics = _free()
    semantics[0, 0, :4] = [4, 4, 10, 0]
    targets = make_targets(semantics, None, OCC3D_TASK)
    assert targets.instance_class_ids.tolist() == [0, 4, 10]
    assert targets.voxel_instances[0, 0, :4].tolist() == [1, 1, 2, 0]


def test_ignored_and_free_voxels_belong_to_no_target():
    semantics = _free()
    semantics[0, 0, :2] = [255, 4]
    targets = make_targets(semantics, np.zeros(GRID, np.int32), PANOPTIC)
    assert targets.voxel_instances[0, 0, :2].tolist() == [255, 0] and targets.instance_class_ids.tolist() == [4]


def test_an_empty_volume_has_no_targets():
    targets = make_targets(_free(), np.zeros(GRID, np.int32), PANOPTIC)
    assert len(targets.instance_class_ids) == 0 and (targets.voxel_instances == 255).all()


def test_of_more_than_255_the_smallest_are_left_out():
    semantics, instances = _free(), np.zeros(GRID, np.int32)
    semantics[:, 0, 0], instances[:, 0, 0] = 4, np.arange(200) + 1
    semantics[:100, 1, 0], instances[:100, 1, 0] = 10, np.arange(100) + 1
    semantics[100:155, 0, 1] = 4  # a second voxel for 55 cars
    instances[100:155, 0, 1] = np.arange(100, 155) + 1
    semantics[:100, 1, 1], instances[:100, 1, 1] = 10, np.arange(100) + 1  # and for all trucks
    targets = make_targets(semantics, instances, PANOPTIC)
    assert len(targets.instance_class_ids) == 255 and targets.voxel_instances.max() == 255
    assert (targets.voxel_instances[:100, 1] < 255)[:, :2].all() and (targets.instance_class_ids == 10).sum() == 100
    assert (targets.voxel_instances[:, 0, 0] == 255).sum() == 45


@pytest.mark.parametrize('damage, message', [(None, 'does not exist'), (b'no archive', 'is damaged')])
def test_a_file_under_a_folder_named_instances_is_told_as_what_it_is(tmp_path, damage, message):
    path = tmp_path / 'occ3d_instances' / 'labels.npz'
    if damage:
        path.parent.mkdir()
        path.write_bytes(damage)
    with pytest.raises(DataError, match=message) as caught:
        read_labels(path, PANOPTIC)
    assert 'gen_instance_info' not in str(caught.value)


def write_volume(folder, semantics, **arrays):
    path = folder / 'labels.npz'
    np.savez(path, semantics=semantics, **arrays)
    return path


OWN = dict(name='own', class_names=['road', 'vehicle', 'free'], things=['vehicle'])


def own_task(label_set=OWN, **changes):
    fields = dict(label_set=label_set, point_cloud_range=[0, 0, 0, 4, 4, 2], voxel_size=1.0, **changes)
    return Task.from_config(fields)


def test_ids_and_names_are_mapped(tmp_path):
    """Old ids by number or by the names of a registered set; what has the same name keeps it."""
    by_id = dict(OWN, remap={0: 'ignore', 11: 'road', 4: 1, 17: 'free'})
    semantics = np.full((4, 4, 2), 17)
    semantics[0, 0, 0], semantics[1, 1, 1], semantics[2, 2, 0], semantics[3, 3, 1] = 0, 11, 4, 255
    labels = read_labels(write_volume(tmp_path, semantics), own_task(by_id))['semantics']
    assert labels.dtype == np.uint8
    assert [labels[0, 0, 0], labels[1, 1, 1], labels[2, 2, 0], labels[3, 3, 1], labels[0, 1, 0]] == [255, 0, 1, 255, 2]
    names = dict.fromkeys(OCC3D.class_names[:-1], 'ignore')
    by_name = dict(OWN, remap_from='occ3d', remap=dict(names, car='vehicle', driveable_surface='road'))
    (tmp_path / 'b').mkdir()
    again = read_labels(write_volume(tmp_path / 'b', semantics), own_task(by_name))['semantics']
    assert (again == labels).all()


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(remap={4: 'vehicel'}), "did you mean 'vehicle'"),
        (dict(remap={'car': 'vehicle'}), 'remap_from'),
        (dict(remap={'cars': 'vehicle'}, remap_from='occ3d'), "did you mean 'car'"),
        (dict(remap={'car': 'vehicle'}, remap_from='occ3d'), 'become nothing'),
        (dict(remap={-1: 'road'}), '-1'),
        (dict(remap={1: 7}), '7'),
        (dict(remap=[1, 2]), 'must be a dict'),
        (dict(remapp={1: 1}), "did you mean 'remap'"),
    ],
)
def test_a_wrong_remap_is_told(change, words):
    with pytest.raises(ConfigError, match=words):
        own_task(dict(OWN, **change))


def test_an_id_that_is_not_mapped_is_told(tmp_path):
    path = write_volume(tmp_path, np.full((4, 4, 2), 9))
    with pytest.raises(DataError, match=r'labels.npz.*\[9\].*remap'):
        read_labels(path, own_task(dict(OWN, remap={1: 'road', 2: 'free'})))


def test_volumes_are_cropped_and_filled_up(tmp_path):
    """The file begins 1 m before the task's range along x and 1 m inside it along y, and ends beyond it along z."""
    rng = np.random.default_rng(0)
    semantics, mask = rng.integers(0, 3, (3, 4, 3)), np.ones((3, 4, 3), bool)
    task = own_task(label_range=[-1, 1, 0, 2, 5, 3])
    labels = read_labels(write_volume(tmp_path, semantics, mask_camera=mask), task)
    expected = np.full((4, 4, 2), 255)
    for x, y, z in np.ndindex(4, 4, 2):
        i, j = x + 1, y - 1
        if i < 3 and 0 <= j < 4:
            expected[x, y, z] = semantics[i, j, z]
    assert (labels['semantics'] == expected).all() and (labels['mask_camera'] == (expected < 255)).all()


def test_a_volume_that_is_no_whole_number_of_voxels_is_told(tmp_path):
    with pytest.raises(ConfigError, match='whole voxels'):
        own_task(label_range=[0.5, 0, 0, 4, 4, 2])
    path = write_volume(tmp_path, np.full((4, 4, 4), 2))
    with pytest.raises(DataError, match=r'task.label_range .* make \[4, 4, 3\] voxels'):
        read_labels(path, own_task(label_range=[0, 0, 0, 4, 4, 3]))
