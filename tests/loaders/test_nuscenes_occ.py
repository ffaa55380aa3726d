"""NuSceneOcc: samples and batches of the agreed form, repeatable draws, subsets, relocation, faults."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from fake_nuscenes import FakeNuScenes
from PIL import Image
from projection import project_points

from lib.errors import ConfigError, DataError
from lib.io import load_pickle_safe, save_pickle
from lib.run.loading import make_loader, read_batches, read_in_order
from lib.task import NUSCENES_CAMERAS, Task
from loaders import build_dataset, collate
from loaders import nuscenes_occ as module
from loaders.pipelines import loading
from loaders.prepare.sweep_infos import write_sweep_infos

TASK = Task('occ3d', point_cloud_range=(-8, -8, -1, 8, 8, 5.4), image_size=(32, 64), num_frames=3)
TRAIN = [
    dict(type='LoadMultiViewImageFromMultiSweeps'),
    dict(type='LoadOccGTFromFile'),
    dict(type='BEVAug'),
    dict(type='RandomTransformImage', rand_flip=True),
]
TEST = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='RandomTransformImage')]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A prepared fake nuScenes; not to be changed."""
    fake = FakeNuScenes(tmp_path_factory.mktemp('source'), keyframes=4)
    fake.write()
    fake.write_labels(TASK)
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    return fake.root


def _train(root, task=TASK, **options):
    cfg = dict(
        type='NuSceneOcc',
        data_root=str(root),
        ann_file='nuscenes_infos_train_sweep.pkl',
        occ_gt_root='occ3d',
        pipeline=TRAIN,
    )
    return build_dataset(dict(cfg, **options), task)


def _test(root, task=TASK, **options):
    return _train(root, task, **dict(dict(pipeline=TEST, test_mode=True), **options))


def _image_path(root, key):
    return os.path.join(str(root), key)


def _loader(dataset, size, workers, persistent=False):
    batches = [list(range(start, start + size)) for start in range(0, len(dataset), size)]
    return make_loader(dataset, batches, collate, workers, torch.device('cpu'), persistent)


# ---- form ------------------------------------------------------------------------------------------------


def test_a_batch_has_the_agreed_form(source):
    batch = collate([_train(source)[i] for i in (1, 4)])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items() if hasattr(value, 'shape')}
    grid = (2,) + TASK.grid_shape
    assert shapes == dict(
        img=((2, 18, 3, 32, 64), torch.uint8),
        lidar2img=((2, 18, 4, 4), torch.float32),
        ego2lidar=((2, 18, 4, 4), torch.float64),
    )
    targets = batch['targets']
    for volume, dtype in (
        (targets.voxel_semantics, torch.uint8),
        (targets.voxel_instances, torch.uint8),
        (targets.mask_camera, torch.bool),
    ):
        assert (tuple(volume.shape), volume.dtype) == (grid, dtype)
    assert [ids.dtype for ids in targets.instance_class_ids] == [torch.int64] * 2
    meta = batch['img_metas'][1]
    assert set(meta) == {'sample_token', 'scene_token', 'scene_name', 'index', 'frame_keys'}
    assert meta['index'] == 4 and meta['sample_token'] == 'sample-4' and meta['scene_name'] == 'scene-0553'
    assert len(meta['frame_keys']) == 18 and len(set(meta['frame_keys'])) == 6  # first keyframe: no history
    assert set(batch) == set(shapes) | {'targets', 'img_metas'}


def test_images_are_frame_major_newest_first_in_camera_order(source):
    dataset = _test(source)
    keys = dataset[2]['img_metas']['frame_keys']
    assert [key.split('/')[1] for key in keys] == list(NUSCENES_CAMERAS) * 3
    times = [int(key.rsplit('__', 1)[1][:-4]) for key in keys[::6]]
    assert [times[0] - t for t in times] == [0, 6 * 83_333, 12 * 83_333]  # the keyframes before, at 2 Hz
    assert all(key.startswith('samples/') for key in keys)


def test_each_image_is_the_one_its_key_names_and_blue_comes_first(root):
    key = _test(root)[1]['img_metas']['frame_keys'][8]
    Image.new('RGB', (160, 90), (250, 120, 10)).save(_image_path(root, key))
    image = _test(root)[1]['img'][8]
    colour = image.float().mean(dim=(1, 2))
    np.testing.assert_allclose(colour, [10, 120, 250], atol=3)  # JPEG keeps flat colours


def test_projections_take_lidar_points_into_every_image_through_global(source):
    """lidar2img against a chain of transforms by pyquaternion from the tables' own numbers."""
    dataset = _test(source)
    sample, info = dataset[2], dataset.info(2)
    from pyquaternion import Quaternion

    point = np.array([3.0, -2.0, 1.0])
    ego = Quaternion(info['lidar2ego_rotation']).rotate(point) + info['lidar2ego_translation']
    world = Quaternion(info['ego2global_rotation']).rotate(ego) + info['ego2global_translation']
    entries = [info['cams'], dataset.history(2)[5], dataset.history(2)[11]]
    for index in range(18):
        entry = entries[index // 6][NUSCENES_CAMERAS[index % 6]]
        rotation = np.asarray(entry['sensor2global_rotation']).T
        camera = rotation.T @ (world - entry['sensor2global_translation'])
        pixel = np.asarray(entry['cam_intrinsic']) @ camera
        expected = pixel[:2] / pixel[2] * 0.4 - [0, 36 - 32]  # 160x90 to 64x36, lower 32 rows
        found, depth = project_points(sample['lidar2img'][index].double().numpy(), point)
        # float32 matrices, points hundreds of metres away in units of pixels: 1e-4 relative.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=0.02)
        np.testing.assert_allclose(depth, camera[2], rtol=1e-4, atol=1e-3)


def test_labels_in_a_batch_are_those_of_the_file(source):
    dataset = _train(source, pipeline=[s for s in TRAIN if s['type'] != 'BEVAug'])
    sample, truth = dataset[3], dataset.ground_truth(3)
    np.testing.assert_array_equal(sample['targets'].voxel_semantics, truth['semantics'])
    np.testing.assert_array_equal(sample['targets'].mask_camera, truth['mask_camera'])
    assert truth['mask_camera'].any() and not truth['mask_camera'].all()


def test_label_files_without_masks_give_batches_without(root):
    dataset = _train(root)
    for index in range(len(dataset)):
        path = dataset.label_path(index)
        np.savez_compressed(str(path), semantics=np.load(str(path))['semantics'])
    assert collate([dataset[0], dataset[1]])['targets'].mask_camera is None


@pytest.mark.parametrize(
    'cameras, frames', [(('CAM_FRONT', 'CAM_BACK'), 1), (('CAM_BACK_LEFT',), 5), (('CAM_FRONT',), 16)]
)
def test_other_cameras_and_frame_counts(source, cameras, frames):
    task = Task(
        'occ3d', point_cloud_range=TASK.point_cloud_range, image_size=(32, 64), cameras=cameras, num_frames=frames
    )
    sample = _train(source, task)[3]
    assert sample['img'].shape[0] == len(cameras) * frames == len(sample['img_metas']['frame_keys'])
    assert [key.split('/')[1] for key in sample['img_metas']['frame_keys'][: len(cameras)]] == list(cameras)


def test_ray_origins_start_at_the_scene_and_belong_to_the_keyframe(source):
    dataset = _test(source, load_interval=2)
    from lib.metrics.origins import scene_ray_origins

    everything = scene_ray_origins(dataset.infos, TASK.point_cloud_range)
    for index in range(len(dataset)):
        np.testing.assert_array_equal(dataset.ray_origins(index), everything[dataset.sample_token(index)])


# ---- draws -----------------------------------------------------------------------------------------------


def _same(a, b):
    semantics = [np.asarray(sample['targets'].voxel_semantics) for sample in (a, b)]
    matrices = all(torch.equal(a[key], b[key]) for key in ('img', 'lidar2img', 'ego2lidar'))
    return matrices and np.array_equal(*semantics)


def test_draws_depend_on_seed_epoch_and_index_alone(source):
    first, again = _train(source, seed=5), _train(source, seed=5)
    again[0], again[7]  # other samples fetched before change nothing
    assert _same(first[2], again[2])
    assert not _same(first[2], _train(source, seed=6)[2])
    again.set_epoch(1)
    assert not _same(first[2], again[2])
    again.set_epoch(0)
    assert _same(first[2], again[2])


@pytest.mark.parametrize('workers, persistent', [(0, False), (1, False), (2, True)])
def test_workers_do_not_change_the_draws(source, workers, persistent):
    dataset = _train(source)
    loader = _loader(dataset, 1, workers, persistent)
    for epoch in (0, 1):
        loader.dataset.set_epoch(epoch)
        batches = list(read_batches(loader))
        dataset.set_epoch(epoch)
        for index in (1, 6):
            assert _same(collate([dataset[index]]), batches[index])


def test_evaluation_draws_nothing(source):
    dataset = _test(source)
    first = dataset[3]
    dataset.set_epoch(4)
    assert torch.equal(first['img'], dataset[3]['img'])


# ---- subsets ---------------------------------------------------------------------------------------------


def test_thinned_samples_keep_their_history(source):
    full, thin = _test(source), _test(source, load_interval=3)
    assert [thin.sample_token(i) for i in range(len(thin))] == ['sample-0', 'sample-3', 'sample-6']
    assert len(thin.infos) == 8 and len(_test(source, max_samples=5)) == 5
    for index in range(3):
        assert torch.equal(thin[index]['img'], full[3 * index]['img'])
        assert thin[index]['img_metas']['frame_keys'] == full[3 * index]['img_metas']['frame_keys']


def test_a_shuffled_info_file_changes_nothing(root):
    path = root / 'nuscenes_infos_train_sweep.pkl'
    before = _test(root)
    content = load_pickle_safe(path)
    np.random.default_rng(0).shuffle(content['infos'])
    save_pickle(path, content)
    after = _test(root)
    for index in range(8):
        assert before[index]['img_metas'] == after[index]['img_metas']
        np.testing.assert_array_equal(before.ray_origins(index), after.ray_origins(index))


def test_pickles_without_scenes_give_the_same_histories(root):
    """As published for SparseBEV and SparseOcc: no scene token or name, './data/nuscenes/' in paths."""
    path = root / 'nuscenes_infos_train_sweep.pkl'
    before = _train(root)
    content = load_pickle_safe(path)
    for info in content['infos']:
        del info['scene_token'], info['scene_name']
        for cams in [info['cams']] + info['sweeps']:
            for entry in cams.values():
                entry['data_path'] = './' + entry['data_path']
    save_pickle(path, content)
    after = _train(root)
    for index in range(8):
        assert before[index]['img_metas']['frame_keys'] == after[index]['img_metas']['frame_keys']
        np.testing.assert_array_equal(before[index]['targets'].voxel_semantics, after[index]['targets'].voxel_semantics)


def test_the_real_mini_pickle_opens_as_it_is(real_dir, tmp_path):
    task = Task('occ3d')
    dataset = build_dataset(
        dict(
            type='NuSceneOcc',
            data_root=str(tmp_path),
            test_mode=True,
            pipeline=TEST,
            ann_file=str(real_dir / 'nuscenes_mini_infos_val.pkl'),
        ),
        task,
    )
    assert len(dataset) == 81 and not dataset.has_labels
    starts = [index for index in range(81) if not dataset.history(index)]
    assert len(starts) == 2 and starts[0] == 0
    assert len(dataset.history(starts[1] - 1)) == 56  # as many as can matter
    origins = dataset.ray_origins(40)
    assert origins.shape[1] == 3 and 1 <= len(origins) <= 8


# ---- where files are -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'recorded_root', ['/somewhere/else/nuscenes/', './data/nuscenes/', '', '/data/samples/sweeps/old/', 'C:\\data\\']
)
def test_the_configured_root_wins(root, tmp_path, recorded_root):
    path = root / 'nuscenes_infos_train_sweep.pkl'
    content = load_pickle_safe(path)
    for info in content['infos']:
        for cams in [info['cams']] + info['sweeps']:
            for entry in cams.values():
                entry['data_path'] = entry['data_path'].replace('data/nuscenes/', recorded_root)
    save_pickle(path, content)
    before = _train(root)[5]
    moved = tmp_path / 'samples' / 'moved'
    moved.parent.mkdir()
    shutil.move(str(root), str(moved))
    after = _train(moved)[5]
    assert _same(before, after) and before['img_metas'] == after['img_metas']
    assert all(key.startswith(('samples/CAM', 'sweeps/CAM')) for key in after['img_metas']['frame_keys'])


def test_info_and_label_folders_may_be_elsewhere(root, tmp_path):
    shutil.move(str(root / 'occ3d'), str(tmp_path / 'labels'))
    shutil.move(str(root / 'nuscenes_infos_train_sweep.pkl'), str(tmp_path / 'infos.pkl'))
    dataset = _train(root, ann_file=str(tmp_path / 'infos.pkl'), occ_gt_root=str(tmp_path / 'labels'))
    assert dataset[0]['targets'].voxel_semantics is not None


@pytest.mark.parametrize(
    'data_root, ann_file, labels',
    [
        ('data/nuscenes/', 'INFOS', 'occ3d'),
        ('data/nuscenes/', 'data/nuscenes/INFOS', 'data/nuscenes/occ3d'),
        ('./data/nuscenes', './data/nuscenes/INFOS', './data/nuscenes/occ3d/'),
        ('$WORK/data/nuscenes', '${WORK}/data/nuscenes/INFOS', '~/data/nuscenes/occ3d'),
        ('~/data/nuscenes', 'INFOS', 'data/nuscenes/occ3d'),
    ],
)
def test_paths_as_users_write_them(root, tmp_path, monkeypatch, data_root, ann_file, labels):
    (tmp_path / 'data').mkdir()
    shutil.move(str(root), str(tmp_path / 'data' / 'nuscenes'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WORK', str(tmp_path))
    monkeypatch.setenv('HOME', str(tmp_path))
    infos = ann_file.replace('INFOS', 'nuscenes_infos_train_sweep.pkl')
    dataset = _train('x', data_root=data_root, ann_file=infos, occ_gt_root=labels)
    assert dataset[0]['targets'] is not None


def test_a_label_folder_that_is_nowhere_is_named_as_it_was_meant(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    dataset = _train('x', data_root='nuscenes/', occ_gt_root='nuscenes/occ3d_other')
    with pytest.raises(
        DataError, match='keyframe sample-0: nuscenes/occ3d_other/scene-0061/sample-0/labels.npz does not'
    ):
        dataset[0]


def test_evaluation_needs_no_labels(root):
    shutil.rmtree(str(root / 'occ3d'))
    for options in (dict(occ_gt_root=None), dict(occ_gt_root=None, pipeline=TRAIN[:2] + TEST[1:]), dict()):
        sample = _test(root, **options)[4]
        assert set(sample) == {'img', 'lidar2img', 'ego2lidar', 'img_metas'}


def test_opening_looks_at_the_info_file_only(root, monkeypatch):
    for name in ('samples', 'sweeps', 'occ3d', 'v1.0-mini', 'maps'):
        shutil.rmtree(str(root / name))
    for name in ('listdir', 'scandir', 'walk'):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail('a folder was listed'))
    assert len(_train(root)) == 8


# ---- what is wrong is named ------------------------------------------------------------------------------


def _spoil(root, index=2, kind='image'):
    """Truncate the front image or the label of one training keyframe; returns its path."""
    dataset = _train(root)
    image = dataset.info(index)['cams']['CAM_FRONT']['data_path'].replace('data/nuscenes/', '')
    path = str(dataset.label_path(index)) if kind == 'label' else _image_path(root, image)
    with open(path, 'rb+') as stream:
        stream.truncate(50)
    return path


@pytest.mark.parametrize('kind', ['image', 'label'])
def test_a_damaged_file_is_named_with_its_keyframe(root, kind):
    path = _spoil(root, kind=kind)
    with pytest.raises(DataError, match='^keyframe sample-2: .*{}'.format(os.path.basename(path).replace('.', r'\.'))):
        _train(root)[2]


@pytest.mark.parametrize('workers', [0, 2])
def test_damage_found_by_a_worker_is_the_same_error(root, workers):
    _spoil(root)
    with pytest.raises(DataError, match='keyframe sample-2'):
        list(read_batches(_loader(_train(root), 2, workers)))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['image', 'label'])
def test_skipping_takes_the_next_readable_sample_and_counts(root, kind, workers, capfd):
    _spoil(root, 3, kind)
    _spoil(root, 4, kind)
    one_frame = Task('occ3d', point_cloud_range=TASK.point_cloud_range, image_size=(32, 64), num_frames=1)
    dataset = _train(root, one_frame, on_error='skip', max_skipped=10)
    tokens = [batch['img_metas'][0]['sample_token'] for batch in read_batches(_loader(dataset, 1, workers))]
    assert tokens == [f'sample-{n}' for n in (0, 1, 2, 5, 5, 5, 6, 7)]
    assert dataset.num_skipped == 3  # 3, 4 in its place, and 4 itself
    assert 'sample-3' in capfd.readouterr().err


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_skipped_samples_stop(root, workers):
    _spoil(root, 3, 'label')
    _spoil(root, 4, 'label')
    with pytest.raises(DataError, match='more than max_skipped=2 allows; the last one: keyframe sample-4'):
        list(read_batches(_loader(_train(root, on_error='skip', max_skipped=2), 1, workers)))


def test_a_data_set_without_one_readable_sample_stops(root):
    shutil.rmtree(str(root / 'samples'))
    with pytest.raises(DataError, match='not one of 8 samples could be read'):
        _train(root, on_error='skip')[0]


def test_evaluation_never_skips(source):
    with pytest.raises(ConfigError, match='falsify'):
        _test(source, on_error='skip')


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(on_error='ignore'), "on_error' must be 'stop' or 'skip', got 'ignore'"),
        (dict(load_interval=0), 'load_interval must be an integer of at least 1, got 0'),
        (dict(max_samples=0), 'max_samples must be an integer of at least 1, got 0'),
        (dict(type='NuScenesOcc'), "unknown type 'NuScenesOcc'; did you mean 'NuSceneOcc'"),
        (dict(pipelin=[]), 'pipelin'),
        (dict(pipeline=[dict(type='LoadOccGtFromFile')]), "'LoadOccGtFromFile'; did you mean 'LoadOccGTFromFile'"),
        (dict(pipeline=[dict(type='BEVAug', rot_limit=1)]), "BEVAug: unknown key 'rot_limit'; did you mean 'rot_lim'"),
        (
            dict(pipeline=[dict(type='LoadMultiViewImageFromMultiSweeps', threads=0)]),
            'threads must be an integer of at least 1, got 0',
        ),
    ],
)
def test_wrong_options_are_named(source, options, message):
    with pytest.raises(ConfigError, match=message):
        _train(source, **options)


def test_a_mistake_inside_a_constructor_stays_what_it_is(source, monkeypatch):
    """It is no wrong argument, and its traceback is needed."""

    def broken(*_):
        raise TypeError("unsupported operand type(s) for +: 'int' and 'str'")

    monkeypatch.setattr(module, 'load_infos', broken)
    with pytest.raises(TypeError, match='unsupported operand'):
        _train(source)
    monkeypatch.undo()
    monkeypatch.setattr(loading, 'check_decoder', broken)
    with pytest.raises(TypeError, match='unsupported operand'):
        _train(source)


def test_training_without_labels_says_what_to_set(source):
    with pytest.raises(ConfigError, match='set occ_gt_root'):
        _train(source, occ_gt_root=None)[0]
    with pytest.raises(ConfigError, match='set occ_gt_root'):
        _train(source, occ_gt_root=None).ground_truth(0)


@pytest.mark.parametrize(
    'content, message',
    [
        (dict(data_list=[], metainfo={}), 'format of MMDetection3D 1.1'),
        ([1, 2], 'holds no infos'),
        (dict(infos=[]), 'holds zero keyframes'),
        (dict(infos=[dict(token='t', timestamp=1)]), r"entry 0 \(keyframe t\): 'lidar2ego_translation' is missing"),
    ],
)
def test_wrong_info_files_are_named(source, tmp_path, content, message):
    save_pickle(tmp_path / 'infos.pkl', content)
    with pytest.raises(DataError, match=r'infos\.pkl.*' + message):
        _train(source, ann_file=str(tmp_path / 'infos.pkl'))


def test_a_camera_that_the_data_lacks_is_named(source):
    task = Task('occ3d', cameras=('CAM_FRONT', 'CAM_ROOF'))
    with pytest.raises(DataError, match="has no camera 'CAM_ROOF'.*task.cameras"):
        _train(source, task)


@pytest.mark.parametrize('lost', [('CAM_BACK',), ('CAM_FRONT', 'CAM_BACK_LEFT'), NUSCENES_CAMERAS[1:]])
def test_keyframes_that_lack_cameras_are_used_without_them(root, lost):
    """Lost in the third keyframe: the current frame of sample 2, an earlier one of sample 3."""
    path = root / 'nuscenes_infos_train_sweep.pkl'
    whole = _test(root)
    content = load_pickle_safe(path)
    for name in lost:
        del content['infos'][2]['cams'][name]
    save_pickle(path, content)
    with pytest.raises(DataError, match=f'keyframe sample-2 has no camera {lost[0]!r}.*allow_missing_cameras'):
        _test(root)
    partial = _test(root, allow_missing_cameras=True)
    _train(root, allow_missing_cameras=True)[2]
    points = np.append(np.random.default_rng(0).uniform(-40, 40, (100, 3)), np.ones((100, 1)), axis=1)
    for index, frame in ((2, 0), (3, 1)):
        expected, found = whole[index], partial[index]
        for position in range(18):
            key = found['img_metas']['frame_keys'][position]
            if position // 6 == frame and NUSCENES_CAMERAS[position % 6] in lost:
                assert not found['img'][position].any() and key.startswith('missing/')
                pixels = found['lidar2img'][position].double().numpy() @ points.T
                assert (pixels[2] == 0).all()  # depth: no point is before the camera
                assert (np.abs(pixels[:2]) / 1e-5 > 1000).all()  # and with the smallest depth far outside
                continue
            assert key == expected['img_metas']['frame_keys'][position]
            assert torch.equal(found['img'][position], expected['img'][position])
            assert torch.equal(found['lidar2img'][position], expected['lidar2img'][position])


@pytest.mark.parametrize(
    'error', [MemoryError('no room'), ValueError('odd'), RuntimeError('decoder'), OSError(5, 'disk')]
)
def test_skipping_survives_whatever_is_raised_and_stopping_does_not(source, monkeypatch, error, capsys):
    right = loading.read_image

    def broken(path, *args):
        if 'scene-0553' in path:
            raise error
        return right(path, *args)

    monkeypatch.setattr(loading, 'read_image', broken)
    dataset = _train(source, on_error='skip')
    assert dataset[4]['img_metas']['sample_token'] == 'sample-0' and dataset.num_skipped == 4
    assert type(error).__name__ in capsys.readouterr().err
    with pytest.raises(type(error)):
        _train(source)[4]
    with pytest.raises(ConfigError):
        _train(source, on_error='skip', occ_gt_root=None)[0]


def test_indices_outside_are_refused_and_negative_ones_count_from_the_end(source):
    dataset = _test(source)
    assert dataset[-1]['img_metas']['sample_token'] == 'sample-7'
    with pytest.raises(IndexError):
        dataset[8]


def test_classes_of_a_sample_are_those_of_its_visible_boxes_in_the_volume(source):
    dataset = _train(source)
    info = dict(
        dataset.infos[0], lidar2ego_rotation=[np.sqrt(0.5), 0, 0, np.sqrt(0.5)], lidar2ego_translation=[1, 0, 0]
    )
    # A quarter turn: (x, y) of the LiDAR is (1 - y, x) of the vehicle, whose volume reaches to 8 m.
    places = dict(car=(0, -6.9), bus=(0, -7.1), truck=(0, 8.9), trailer=(0, 9.1), barrier=(0, 0), unheard_of=(1, 1))
    info['gt_names'] = np.array([*places, 'pedestrian'])
    info['gt_boxes'] = np.array([[x, y, 0, 1, 1, 1, 0] for x, y in [*places.values(), (0, 0)]])
    info['valid_flag'] = np.array([True] * 6 + [False])
    dataset.infos[0] = info
    assert dataset.object_classes(0) == ['barrier', 'car', 'truck']
    del info['valid_flag']
    assert dataset.object_classes(0) == ['barrier', 'car', 'pedestrian', 'truck']
    dataset.infos[0] = {key: value for key, value in info.items() if not key.startswith('gt_')}
    assert dataset.object_classes(0) == []


# ---- samples that follow each other ---------------------------------------------------------------------------


@pytest.mark.parametrize('options', [{}, dict(fast_decode=True), dict(threads=2)])
def test_a_following_sample_is_the_whole_one_without_frames_of_the_one_before(source, options):
    dataset = _test(source, pipeline=[dict(TEST[0], **options)] + TEST[1:])
    for index in range(1, len(dataset)):
        whole, left = dataset[index], dataset.following(index, index - 1)
        before = set(dataset[index - 1]['img_metas']['frame_keys'])
        given = left['img_metas'].pop('given')
        assert given == [0]  # the new keyframe; later ones of its scene were in the sample before
        assert whole['img_metas']['frame_keys'][0] not in before
        assert set(whole['img_metas']['frame_keys'][6:]) <= before or index == 4  # where the second scene begins
        assert left['img_metas'] == whole['img_metas']
        assert torch.equal(left['img'], whole['img'][:6])
        assert torch.equal(left['lidar2img'], whole['lidar2img'])
        assert torch.equal(left['ego2lidar'], whole['ego2lidar'])


def test_in_a_drive_each_image_is_decoded_once(source, monkeypatch):
    right, read = loading.read_image, []
    monkeypatch.setattr(loading, 'read_image', lambda path, *args: read.append(path) or right(path, *args))
    dataset = _test(source)
    batches = list(read_in_order(dataset, range(len(dataset)), collate, 0, torch.device('cpu'), keeps_frames=True))
    assert len(read) == len(set(read)) == 6 * len(dataset) == 48
    assert [batch['img'].shape[1] for batch in batches] == [18] + [6] * 7  # the first is whole
    read.clear()
    list(read_in_order(dataset, range(len(dataset)), collate, 0, torch.device('cpu'), keeps_frames=False))
    assert len(read) == 2 * 6 * (1 + 2 + 3 + 3)


def test_samples_that_do_not_follow_get_every_frame_that_is_new(source):
    dataset = _test(source)
    assert dataset.following(3, 0)['img_metas']['given'] == [0, 1, 2]
    assert dataset.following(2, 2)['img_metas']['given'] == [0]  # never without an image


def test_training_and_steps_of_one_s_own_get_whole_samples(source):
    class OwnStep:
        def __call__(self, sample):
            return dict(sample, img=[255 - image for image in sample['img']])

    dataset = _train(source)
    assert _same(dataset.following(2, 1), dataset[2])
    dataset = _test(source)
    dataset._pipeline.append(OwnStep())
    assert dataset.following(2, 1)['img'].shape[0] == 18 and 'given' not in dataset.following(2, 1)['img_metas']


def test_a_missing_camera_of_a_held_frame_is_held_and_of_a_new_one_black(root):
    path = root / 'nuscenes_infos_train_sweep.pkl'
    content = load_pickle_safe(path)
    del content['infos'][2]['cams']['CAM_BACK']
    save_pickle(path, content)
    dataset = _test(root, allow_missing_cameras=True)
    for index, new in ((2, dataset[2]['img'][:6]), (3, dataset[3]['img'][:6])):
        following = dataset.following(index, index - 1)
        assert torch.equal(following['img'], new)
        assert torch.equal(following['lidar2img'], dataset[index]['lidar2img'])
    assert not dataset.following(2, 1)['img'][NUSCENES_CAMERAS.index('CAM_BACK')].any()


# ---- options of the image loader -------------------------------------------------------------------------


@pytest.mark.parametrize('options', [dict(threads=3), dict(decoder='pillow')])
def test_loading_options_that_change_no_pixel(source, options):
    pipeline = [dict(TEST[0], **options)] + TEST[1:]
    assert torch.equal(_test(source)[3]['img'], _test(source, pipeline=pipeline)[3]['img'])


def test_fast_decoding_keeps_the_projection_and_nearly_the_pixels(source):
    exact = _test(source)[3]
    fast = _test(source, pipeline=[dict(TEST[0], fast_decode=True)] + TEST[1:])[3]
    # The product of the factors 0.5 and 0.8 is 0.4 up to rounding.
    np.testing.assert_allclose(fast['lidar2img'], exact['lidar2img'], rtol=1e-6, atol=1e-4)
    difference = (fast['img'].float() - exact['img'].float()).abs()
    assert 0 < difference.mean() < 4  # flat areas agree, edges of 8-pixel blocks do not


# ---- size ------------------------------------------------------------------------------------------------


def test_a_data_set_of_trainval_size_opens_in_three_seconds(source, tmp_path, monkeypatch):
    """28,130 keyframes in 700 scenes. Measured apart from reading the pickle, which depends on the disk."""
    from loaders import nuscenes_occ

    some = load_pickle_safe(source / 'nuscenes_infos_train_sweep.pkl')['infos']
    infos = [
        dict(
            some[1 if n % 40 else 0],
            token=f't{n}',
            timestamp=n * 500_000,
            scene_token=f's{n // 40}',
            scene_name=f'scene-{n // 40:04d}',
        )
        for n in range(28_130)
    ]
    from lib import infos as infos_module

    monkeypatch.setattr(infos_module, 'load_pickle_safe', lambda *_, **__: dict(infos=infos[::-1], metadata={}))
    start = time.process_time()
    dataset = nuscenes_occ.NuSceneOcc(TASK, str(source), 'x.pkl', TRAIN, occ_gt_root='occ3d')
    seconds = time.process_time() - start
    assert len(dataset) == 28_130 and len(dataset.history(39)) == 16
    assert seconds < 3, f'opening took {seconds:.1f} s'


# ---- OpenOcc v2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('panoptic', [False, True])
def test_real_openocc_labels_become_batches_of_17_classes(source, real_dir, panoptic):
    task = Task('openocc_v2', panoptic=panoptic, image_size=(32, 64), num_frames=2)
    dataset = _train(
        source, task, occ_gt_root='openocc_v2', pipeline=[step for step in TRAIN if step['type'] != 'BEVAug']
    )
    path = dataset.label_path(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(real_dir / 'openocc_unknown_sample_labels.npz'), str(path))
    batch = collate([dataset[1]])
    raw = np.load(str(path))
    targets = batch['targets']
    np.testing.assert_array_equal(targets.voxel_semantics[0], raw['semantics'])
    assert targets.mask_camera is None
    (class_ids,) = targets.instance_class_ids
    assert class_ids.max() < 16 and (targets.voxel_instances[0][raw['semantics'] == 16] == 255).all()
    for target, class_id in enumerate(class_ids.tolist()):
        where = (targets.voxel_instances[0] == target).numpy()
        assert (raw['semantics'][where] == class_id).all() and where.any()
    cars = len(np.unique(raw['instances'][raw['semantics'] == 0]))
    assert (class_ids == 0).sum() == (cars if panoptic else 1) and cars > 1


def test_labels_of_the_other_set_are_named_by_the_data_set(source, real_dir):
    dataset = _train(source, Task('occ3d', image_size=(32, 64)), occ_gt_root='misplaced')
    path = dataset.label_path(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(real_dir / 'openocc_unknown_sample_labels.npz'), str(path))
    with pytest.raises(DataError, match='keyframe sample-0: .*misplaced.*set task.label_set'):
        dataset[0]


def test_images_of_different_sizes_need_the_transform(root):
    key = _test(root)[1]['img_metas']['frame_keys'][3]
    Image.new('RGB', (80, 50)).save(_image_path(root, key))
    with pytest.raises(ConfigError, match='different sizes, e.g. 80x50 and 160x90; .*RandomTransformImage'):
        _test(root, pipeline=TEST[:1])[1]
    assert _test(root)[1]['img'].shape == (18, 3, 32, 64)


def test_evaluation_without_the_label_folder_needs_neither_scene_nor_tables(root):
    """A published pickle names no scene; a pipeline that loads no labels must not ask for it."""
    path = root / 'nuscenes_infos_train_sweep.pkl'
    content = load_pickle_safe(path)
    for info in content['infos']:
        del info['scene_token'], info['scene_name']
    save_pickle(path, content)
    shutil.rmtree(str(root / 'occ3d'))
    shutil.rmtree(str(root / 'v1.0-mini'))
    assert 'img' in _test(root)[3]


@pytest.mark.parametrize(
    'steps, message',
    [
        ([], "the pipeline needs 'img', which no step of it makes; begin with LoadMultiViewImageFromMultiSweeps"),
        (TRAIN[1:], "needs '(ego2lidar|img)', which no step of it makes"),
        (TRAIN[1:] + TRAIN[:1], "BEVAug stands before LoadMultiViewImageFromMultiSweeps, whose 'ego2lidar'"),
        ([TRAIN[0], TRAIN[2], TRAIN[1]], "BEVAug stands before LoadOccGTFromFile, whose 'targets' it is to change"),
        (TRAIN[3:] + TRAIN[:3], "RandomTransformImage stands before LoadMultiViewImageFromMultiSweeps, whose 'img'"),
    ],
)
def test_steps_that_are_missing_or_in_the_wrong_order_are_refused(source, steps, message):
    with pytest.raises(ConfigError, match=message):
        _train(source, pipeline=steps)[1]
