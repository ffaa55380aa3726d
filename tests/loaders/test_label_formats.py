"""Labels of SurroundOcc and OpenOccupancy, made up: found, read, turned, learned from, scored."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_nuscenes import FakeNuScenes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'models'))

from small_model import small_config  # noqa: E402

from lib.checkpoint import other_task
from lib.classes import LIDARSEG, OCC3D
from lib.config import load_config
from lib.errors import ConfigError, DataError
from lib.geometry import transform_points
from lib.infos import ego_from_lidar
from lib.io import load_npz_checked, load_pickle_safe, save_npz
from lib.label_formats import LABEL_FORMATS, read_listed
from lib.labels import measure_loss, read_labels
from lib.metrics.command import command
from lib.prediction import check_record, read_record, write_record
from lib.task import Task
from loaders import build_dataset, collate
from loaders.checks import Look, check_labels
from loaders.prepare.panoptic_labels import write_panoptic_labels
from loaders.prepare.sweep_infos import write_sweep_infos
from models import build_model
from tools import check_data

ROOT = Path(__file__).resolve().parents[2]
CAR, ROAD, WALL = (OCC3D.class_names.index(name) for name in ('car', 'driveable_surface', 'manmade'))
PIPELINE = [
    dict(type='LoadMultiViewImageFromMultiSweeps'),
    dict(type='LoadOccGTFromFile'),
    dict(type='RandomTransformImage'),
]
NAMES = sorted(LABEL_FORMATS)


def task_of(name, **changes):
    """The format's own volume, in which nothing is lost."""
    volume = LABEL_FORMATS[name].grid._asdict()
    fields = dict(label_set='lidarseg', label_files=name, num_frames=1, image_size=(32, 64), **volume)
    return Task.from_config(dict(fields, **changes))


def rows_of(name, points, classes):
    """int32 [N, 4] in the column order of the format, of points [N, 3] in LIDAR_TOP."""
    form = LABEL_FORMATS[name]
    index = np.floor((points - np.array(form.grid.point_cloud_range[:3])) / form.grid.voxel_size).astype(np.int32)
    rows = np.zeros((len(points), 4), np.int32)
    rows[:, form.columns] = np.column_stack([index, classes])
    return rows


def scene_points(seed):
    """(points [N, 3] in LIDAR_TOP, classes): a road, a wall, a car and some that are unknown, one a voxel of 0.5 m."""
    rng = np.random.default_rng(seed)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(-15, 15, 0.5), np.arange(-15, 15, 0.5)))
    road = np.column_stack([x, y, np.full(len(x), -2.0)])
    wall = np.column_stack(
        [np.full(600, 12.0), np.repeat(np.arange(-15, 15, 0.5), 10), np.tile(np.arange(-1, 4, 0.5), 60)]
    )
    car = np.array([[i, j, k] for i in np.arange(4, 8, 0.5) for j in np.arange(2, 4, 0.5) for k in (-1.5, -1.0)])
    unknown = np.array([[-5.0, -5.0, 0.5], [-6.0, 5.0, 0.0]])
    points = np.concatenate([road, wall[wall[:, 2] < 2.5], car, unknown]) + 0.12
    counts = (len(road), (wall[:, 2] < 2.5).sum(), len(car), len(unknown))
    order = rng.permutation(len(points))
    return points[order], np.repeat([ROAD, WALL, CAR, 0], counts)[order]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A prepared fake nuScenes with labels of both kinds, as their projects have them."""
    fake = FakeNuScenes(tmp_path_factory.mktemp('source'), keyframes=2)
    fake.write()
    write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
    for split in ('train', 'val'):
        for number, info in enumerate(infos_of(fake.root, split)):
            points, classes = scene_points(number)
            paths = dict(
                surroundocc=f'samples/{Path(info["lidar_path"]).name}.npy',
                openoccupancy=f'scene_{info["scene_token"]}/occupancy/{info["lidar_token"]}.npy',
            )
            for name, path in paths.items():
                file = fake.root / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(str(file), rows_of(name, points, classes))
    return fake.root


def infos_of(root, split='train'):
    return load_pickle_safe(root / f'nuscenes_infos_{split}_sweep.pkl')['infos']


def open_split(root, name, task, split='train', **options):
    cfg = dict(type='NuSceneOcc', data_root=str(root), ann_file=f'nuscenes_infos_{split}_sweep.pkl')
    cfg.update(occ_gt_root=name, pipeline=PIPELINE, test_mode=True, **options)
    return build_dataset(cfg, task)


def test_rows_are_in_the_order_of_each_project(tmp_path):
    np.save(str(tmp_path / 'a.npy'), np.array([[3, 7, 2, CAR], [0, 0, 0, 0]]))
    np.save(str(tmp_path / 'b.npy'), np.array([[2, 7, 3, CAR], [39, 511, 510, WALL]]))
    surround, open_occupancy = read_listed(tmp_path / 'a.npy', 'surroundocc'), read_listed(tmp_path / 'b.npy', NAMES[0])
    assert surround.shape == (200, 200, 16) and open_occupancy.shape == (512, 512, 40)
    assert surround[3, 7, 2] == CAR and surround[0, 0, 0] == 255 and (surround == OCC3D.free_id).sum() == 639998
    assert open_occupancy[3, 7, 2] == CAR and open_occupancy[510, 511, 39] == WALL


@pytest.mark.parametrize('name', NAMES)
def test_labels_as_they_are(root, name):
    """In the format's own volume every voxel that is listed has its class, of 16; unknown ones are ignored."""
    task = task_of(name)
    dataset = open_split(root, name, task)
    info, (points, classes) = dataset.info(1), scene_points(1)
    found = dataset.ground_truth(1)
    assert set(found) == {'semantics'} and found['semantics'].dtype == np.uint8
    index = np.floor((points - task.point_cloud_range[:3]) / task.voxel_size).astype(int)
    expected = np.full(task.grid_shape, LIDARSEG.free_id, np.uint8)
    expected[tuple(index.T)] = np.where(classes == 0, 255, classes - 1)
    assert (found['semantics'] == expected).all()
    assert measure_loss(dataset.label_path(1), task, info)[1:3] == (0, 0)


@pytest.mark.parametrize('name', NAMES)
def test_the_lidar_frame_is_where_the_cameras_look_from(root, name):
    """A point of the volume meets the pixel that the LiDAR's calibration says, in either frame."""
    sample, other = (
        open_split(root, name, task_of(name))[0],
        open_split(root, name, Task('lidarseg', label_files=name))[0],
    )
    assert np.allclose(sample['ego2lidar'], np.eye(4))
    info = open_split(root, name, task_of(name)).info(0)
    point = np.array([5.0, 3.0, 0.5])
    in_ego = transform_points(ego_from_lidar(info), point)
    assert np.allclose(transform_points(other['ego2lidar'][0].numpy(), in_ego), point)


@pytest.mark.parametrize('name', NAMES)
def test_labels_in_ego(root, name):
    """Each occupied voxel of the ego volume lies over a labelled point of its class, and no point in it is lost."""
    task = Task('occ3d', label_files=name, point_cloud_range=(-20, -20, -20, 20, 20, 20), voxel_size=1.0)
    dataset = open_split(root, name, task)
    info, (points, classes) = dataset.info(0), scene_points(0)
    labels = dataset.ground_truth(0)['semantics']
    places = transform_points(ego_from_lidar(info), points)
    index = np.floor(places - task.point_cloud_range[:3]).astype(int)
    inside = ((index >= 0) & (index < task.grid_shape)).all(axis=1) & (classes > 0)
    met = labels[tuple(index[inside].T)]
    assert inside.sum() > 1000 and (met == classes[inside]).mean() > 0.7 and (met < OCC3D.free_id).mean() > 0.9
    centres = (np.argwhere(labels < OCC3D.free_id) + 0.5) + task.point_cloud_range[:3]
    near = np.sqrt(((centres[:, None] - places[None, classes > 0]) ** 2).sum(-1)).min(1)
    assert near.max() < 1.5  # half the diagonals of a voxel of either grid: 0.87 + 0.43


@pytest.mark.parametrize('name', NAMES)
def test_what_is_lost_is_counted_and_told(root, name):
    """Outside, in a voxel of another class, and kept; the check says it with the rule."""
    task = Task('occ3d', label_files=name, point_cloud_range=(-8, -8, -8, 8, 8, 8), voxel_size=1.0)
    dataset = open_split(root, name, task)
    loss = measure_loss(dataset.label_path(0), task, dataset.info(0))
    points, classes = scene_points(0)
    assert loss.occupied == (classes > 0).sum()
    places = np.floor((points + 0.0) / LABEL_FORMATS[name].grid.voxel_size)  # the voxels' centres are what counts
    centres = (places + 0.5) * LABEL_FORMATS[name].grid.voxel_size
    outside = (np.abs(transform_points(ego_from_lidar(dataset.info(0)), centres)) >= 8).any(axis=1)
    assert abs(loss.dropped - outside[classes > 0].sum()) <= 2 and 0 < loss.merged < loss.occupied / 2
    assert loss.kept == (dataset.ground_truth(0)['semantics'] < OCC3D.free_id).sum()
    said = [finding.text for finding in check_labels(dataset, [0], Look(processes=1)) if 'brought' in finding.text]
    assert (
        len(said) == 1 and f'{loss.dropped} (' in said[0] and 'most frequent class' in said[0] and '(lidar)' in said[0]
    )


@pytest.mark.parametrize('name', NAMES)
def test_what_cannot_be_read_is_told(root, name, tmp_path):
    dataset = open_split(root, name, task_of(name))
    path, task = tmp_path / 'bad.npy', task_of(name)
    for rows, words in (
        (np.zeros((3, 5), int), r'whole numbers \[N, 4\]'),
        (np.full((1, 4), 0.5), 'whole numbers'),
        (np.array([[0, 0, 0, 17]]), 'class from 17 to 17'),
        (np.array([[0, 0, 999, 1]]), 'from 999'),
        (np.array([[-1, 0, 0, 1]]), 'from -1'),
    ):
        np.save(str(path), rows)
        with pytest.raises(DataError, match=words):
            read_labels(path, task)
    path.write_bytes(b'no array')
    with pytest.raises(DataError, match='bad.npy is no array'):
        read_labels(path, task)
    with pytest.raises(DataError, match='does not exist'):
        read_labels(tmp_path / 'none.npy', task)
    info = dict(dataset.info(0), lidar_path='', lidar_token=None)
    with pytest.raises(DataError, match='has no lidar_.*gen_sweep_info'):
        dataset._labels.path(info)
    with pytest.raises(DataError, match='how the LiDAR is mounted'):
        read_labels(dataset.label_path(0), Task('occ3d', label_files=name))


def test_wrong_words_in_the_task_are_told():
    for change, words in (
        (dict(label_files='surroundoc'), 'task.label_files must be one of'),
        (dict(frame='camera'), 'task.frame must be one of'),
        (dict(label_frame='world'), 'task.label_frame'),
        (dict(label_voxel_size=0), 'task.label_voxel_size must be a positive'),
        (dict(label_voxel_size=0.3), 'whole voxels'),
    ):
        with pytest.raises(ConfigError, match=words):
            Task('occ3d', **change)


def test_instances_by_the_boxes_of_the_infos(root, tmp_path):
    """gen_instance_info.py's work on SurroundOcc's volume: written dense, with Occ3D's ids, and read in its place."""
    task = task_of('surroundocc')
    result = write_panoptic_labels(
        root, 'v1.0-mini', 'surroundocc', str(tmp_path / 'panoptic'), task.as_in_files(), processes=1
    )
    assert result.written == 6 and not result.failed
    dataset = open_split(root, str(tmp_path / 'panoptic'), task_of('surroundocc', panoptic=True))
    assert dataset.label_path(0).name == 'labels.npz'
    labels = dataset.ground_truth(0)
    semantic = open_split(root, 'surroundocc', task).ground_truth(0)
    assert (labels['semantics'] == semantic['semantics']).all() and labels['instances'].max() >= 2
    raw = load_npz_checked(dataset.label_path(0), ('semantics', 'instances'))
    assert CAR in raw['semantics'] and OCC3D.free_id in raw['semantics']


@pytest.mark.parametrize('name', NAMES)
def test_the_config_of_the_docs_learns(root, name, tmp_path):
    """The lines as they stand in the docs: a batch of real labels goes through the losses of a small model."""
    page = (ROOT / 'docs' / 'common_changes.md').read_text(encoding='utf-8')
    (block,) = [text.split('```')[0] for text in page.split('```python\n')[1:] if f"label_files='{name}'" in text]
    (tmp_path / 'c.py').write_text(block.replace("_base_ = './", f"_base_ = '{ROOT.as_posix()}/configs/"))
    cfg = load_config(str(tmp_path / 'c.py'), ['task.num_frames=1', 'task.image_size=[32, 64]'])
    assert cfg.data.train.occ_gt_root == cfg.data.val.occ_gt_root == name
    task = Task.from_config(cfg.task)
    section = dict(cfg.data.train, data_root=str(root), test_mode=False)
    batch = collate([build_dataset(section, task)[0]])
    small = small_config()
    small['img_backbone']['frozen_stages'] = -1
    torch.manual_seed(0)
    losses = build_model(small, task)(**batch)
    assert all(torch.isfinite(value) for value in losses.values()) and losses['loss_sem_ce_0'] > 0


@pytest.mark.parametrize('name', NAMES)
def test_scores_of_perfect_predictions(root, name, tmp_path, capsys):
    """sparseocc-eval knows the formats by name: grid, frame, classes."""
    dataset = open_split(root, name, task_of(name), 'val')
    for index in range(len(dataset)):
        truth = dataset.ground_truth(index)['semantics']
        sparse = np.argwhere(truth < LIDARSEG.free_id)
        content = dict(occ_loc=sparse[None].astype(np.int16), sem_pred=truth[tuple(sparse.T)][None])
        save_npz(tmp_path / 'predictions' / f'{dataset.sample_token(index)}.npz', content)
    words = ['--predictions', str(tmp_path / 'predictions'), '--labels', str(root / name), '--label-set', name]
    words += ['--infos', str(root / 'nuscenes_infos_val_sweep.pkl'), '--json', str(tmp_path / 's.json')]
    command([*words, '--workers', '1'])
    scores = json.loads((tmp_path / 's.json').read_text())
    assert scores['RayIoU'] == pytest.approx(1.0) and scores['mIoU'] == pytest.approx(1.0)
    assert scores['mIoU_voxels'] == 'all'


def test_rays_begin_at_the_lidar_in_its_own_frame(root):
    dataset = open_split(root, 'surroundocc', task_of('surroundocc'))
    assert any(np.allclose(origin, 0, atol=1e-4) for origin in dataset.ray_origins(0))


def test_check_data_as_a_user_tries_it_first(root, monkeypatch, capsys):
    """The keys by --override, on the config as it is: labels are turned into ego, and it says what that costs."""
    changes = [
        f'data.{split}.{key}' for split in ('train', 'val') for key in (f'data_root={root}', 'occ_gt_root=surroundocc')
    ]
    words = [
        'check_data',
        '--config',
        str(ROOT / 'configs/r50_nuimg_704x256_8f_v1.1.py'),
        '--processes',
        '1',
        '--override',
    ]
    words += [*changes, 'task.label_files=surroundocc', 'task.label_set=lidarseg', 'task.num_frames=1']
    monkeypatch.setattr(sys, 'argv', words)
    check_data.main()
    said = capsys.readouterr().out
    assert 'labels are brought from 200x200x16 voxels of 0.5 m' in said and 'val: [ok]' in said


def test_predictions_and_checkpoints_say_their_frame(tmp_path):
    write_record(tmp_path, task_of('surroundocc'))
    with pytest.raises(DataError, match="are in frame 'lidar', but the task is in 'ego'"):
        check_record(read_record(tmp_path), task_of('surroundocc', frame='ego'))
    check_record(read_record(tmp_path), task_of('surroundocc'))
    text = "task.label_set = 'lidarseg'\ntask.frame = 'lidar'\ntask.voxel_size = 0.5\n"
    text += 'task.point_cloud_range = [-50, -50, -5, 50, 50, 3]'
    said = other_task(dict(config=text), Task('lidarseg', point_cloud_range=(-50, -50, -5, 50, 50, 3), voxel_size=0.5))
    assert 'm of lidar, not 200x200x16' in said
