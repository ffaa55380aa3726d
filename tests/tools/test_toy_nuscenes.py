"""The toy nuScenes: read by the devkit, and true to its own geometry in images, scans and labels."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.classes import OCC3D, OPENOCC_V2
from lib.errors import UserError
from lib.geometry import Grid
from lib.openmmlab import prepare_openmmlab
from tools.toy import pool
from tools.toy import shapes as sh
from tools.toy.generate import generate
from tools.toy.jobs import Options, run_job
from tools.toy.labels import OCC3D_GRID, Labeller, RangeImage, openocc_labels
from tools.toy.lidar import gather, scan
from tools.toy.names import MINI_TRAIN, MINI_VAL, plan_scenes
from tools.toy.objects import OBJECT_TYPES
from tools.toy.pool import Crew, plan_crew
from tools.toy.render import Renderer
from tools.toy.rig import make_rig
from tools.toy.road import Waves
from tools.toy.tables import instance_token
from tools.toy.trace import GROUND, pack_scene
from tools.toy.trace_cpu import trace_fan, trace_image, trace_rays
from tools.toy.work import WorkFolder
from tools.toy.world import ToyWorld

pytestmark = pytest.mark.usefixtures('one_thread')
GRID_LOW, GRID_SHAPE, VOXEL = np.array(OCC3D_GRID.point_cloud_range[:3]), OCC3D_GRID.shape, OCC3D_GRID.voxel_size

ROOT = Path(__file__).resolve().parents[2]
SEED, SIZE, KEYFRAMES = 3, (192, 108), 3
FROZEN_COUNTS = [106, 285, 87, 334, 708, 514, 98, 196, 88, 358, 296, 6000, 2111, 2605, 7256, 2588, 5605]
CLASS_OF = {t.category: t.occ_class for t in OBJECT_TYPES.values()}


def make(out, scenes=2, keyframes=KEYFRAMES, size=SIZE, seed=SEED, workers=2):
    """Make a data set in this process and its workers."""
    options = Options(
        out=out,
        plan=plan_scenes(scenes),
        keyframes=keyframes,
        size=size,
        sweeps=True,
        seed=seed,
        label_sets=('occ3d', 'openocc_v2'),
    )
    generate(options, Crew((), workers), progress=lambda results, total: results)
    return out


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp('toy') / 'data')


@pytest.fixture(scope='module')
def nusc(root):
    prepare_openmmlab()
    from nuscenes import NuScenes

    return NuScenes('v1.0-mini', str(root), verbose=False)


@pytest.fixture(scope='module')
def worlds():
    return [ToyWorld(SEED, k, KEYFRAMES) for k in range(2)]


def scene_of(nusc, sample):
    """Index of the scene of a sample record."""
    name = nusc.get('scene', sample['scene_token'])['name']
    return plan_scenes(2).names.index(name)


def seconds(nusc, sample, record):
    """Time of a sample_data record since its scene's first keyframe."""
    first = nusc.get('sample', nusc.get('scene', sample['scene_token'])['first_sample_token'])
    return (record['timestamp'] - first['timestamp']) * 1e-6


def all_records(nusc, channel):
    """(sample, sample_data) of a channel over all scenes."""
    for record in nusc.sample_data:
        if record['channel'] == channel:
            yield nusc.get('sample', record['sample_token']), record


def pose_matrix(record):
    from pyquaternion import Quaternion

    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Quaternion(record['rotation']).rotation_matrix, record['translation']
    return matrix


def label_file(nusc, root, sample, folder):
    name = nusc.get('scene', sample['scene_token'])['name']
    return np.load(str(root / folder / name / sample['token'] / 'labels.npz'))


def truth_file(nusc, root, sample):
    name = nusc.get('scene', sample['scene_token'])['name']
    return np.load(str(root / 'toy_truth' / name / ('{}.npz'.format(sample['token']))))


def ego_boxes(nusc, sample):
    """(annotation, ego-frame centre, float64 [3, 3] box-to-ego rotation) of a keyframe."""
    lidar = nusc.get('sample_data', sample['data']['LIDAR_TOP'])
    to_ego = np.linalg.inv(pose_matrix(nusc.get('ego_pose', lidar['ego_pose_token'])))
    for token in sample['anns']:
        annotation = nusc.get('sample_annotation', token)
        placed = to_ego @ pose_matrix(annotation)
        yield annotation, placed[:3, 3], placed[:3, :3]


def voxel_centres(mask):
    """float64 [n, 3]: centres of the voxels where ``mask`` is set, in the order of boolean indexing."""
    return GRID_LOW + (np.argwhere(mask) + 0.5) * VOXEL


def within(points, centre, rotation, annotation, margin=0.0):
    """bool: which points lie in a box enlarged by ``margin`` metres in width, length and height."""
    width, length, height = annotation['size']
    local = (points - centre) @ rotation
    return (np.abs(local) <= (np.array([length, width, height]) + margin) / 2).all(axis=-1)


# ---- what the devkit sees ----


def test_devkit_reads_tables_files_and_splits(nusc, root):
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.splits import create_splits_scenes

    names = [scene['name'] for scene in nusc.scene]
    splits = create_splits_scenes()
    assert [n for n in names if n in splits['mini_train']] and [n for n in names if n in splits['mini_val']]
    assert len(nusc.sample) == 2 * KEYFRAMES and len(nusc.sensor) == 7 and len(nusc.calibrated_sensor) == 14
    for record in nusc.sample_data:
        assert (root / record['filename']).is_file()
        if record['sensor_modality'] == 'camera':
            assert Image.open(str(root / record['filename'])).size == SIZE
            assert (record['width'], record['height']) == SIZE
    for sample in nusc.sample:
        assert len(sample['data']) == 7 and sample['anns']
        nusc.get_sample_data(sample['data']['CAM_FRONT'])
    cloud = LidarPointCloud.from_file(nusc.get_sample_data_path(nusc.sample[0]['data']['LIDAR_TOP']))
    assert cloud.points.shape[0] == 4 and cloud.points.shape[1] > 5000
    ego = nusc.get('ego_pose', nusc.get('sample_data', nusc.sample[0]['data']['LIDAR_TOP'])['ego_pose_token'])
    assert nusc.map[0]['mask'].is_on_mask(*ego['translation'][:2])


def test_records_are_chained_and_timed_like_nuscenes(nusc):
    for scene in nusc.scene:
        sample = nusc.get('sample', scene['first_sample_token'])
        for channel, sweeps, period in (('CAM_FRONT', 5, 83333), ('LIDAR_TOP', 9, 50000)):
            record = nusc.get('sample_data', sample['data'][channel])
            assert record['prev'] == ''
            keys, stamps = [], []
            while True:
                keys.append(record['is_key_frame'])
                stamps.append(record['timestamp'])
                if not record['next']:
                    break
                following = nusc.get('sample_data', record['next'])
                assert following['prev'] == record['token']
                record = following
            assert keys == ([True] + [False] * sweeps) * (KEYFRAMES - 1) + [True]
            assert np.abs(np.diff(stamps) - period).max() <= 5  # whole microseconds
        assert nusc.get('sample', sample['next'])['timestamp'] - sample['timestamp'] == 500000


def test_instances_chain_their_annotations(nusc):
    for instance in nusc.instance:
        token, count = instance['first_annotation_token'], 0
        while token:
            annotation = nusc.get('sample_annotation', token)
            assert annotation['instance_token'] == instance['token']
            last, token, count = token, annotation['next'], count + 1
        assert last == instance['last_annotation_token'] and count == instance['nbr_annotations']
    assert any(a['num_lidar_pts'] > 50 for a in nusc.sample_annotation)


# ---- images ----


def check_projection(nusc, worlds, channel, record, sample):
    """Project an image's boxes; how much of its box's bounds every object in full view fills."""
    scene = scene_of(nusc, sample)
    world, camera = worlds[scene], make_rig(SEED, scene, SIZE).cameras[channel]
    view = Renderer(world, torch.device('cpu')).view(camera, seconds(nusc, sample, record))
    calibration = nusc.get('calibrated_sensor', record['calibrated_sensor_token'])
    to_map = pose_matrix(nusc.get('ego_pose', record['ego_pose_token'])) @ pose_matrix(calibration)
    to_camera = np.linalg.inv(to_map)
    name = plan_scenes(2).names[scene]
    items = {instance_token(SEED, name, item.index): item for item in world.annotated}
    overlaps = []
    for box in nusc.get_boxes(record['token']):
        annotation = nusc.get('sample_annotation', box.token)
        pixels = np.argwhere(view.owner == items[annotation['instance_token']].index)
        if len(pixels) < 20:
            continue
        corners = to_camera[:3, :3] @ box.corners() + to_camera[:3, 3:]
        if corners[2].min() < 0.1:
            continue
        uv = (np.array(calibration['camera_intrinsic']) @ corners)[:2] / corners[2]
        low, high = uv.min(axis=1), uv.max(axis=1)
        first, last = pixels.min(axis=0)[::-1], pixels.max(axis=0)[::-1] + 1
        # Half a pixel because a pixel is drawn when its middle is hit; one more because the devkit moves the
        # boxes of sweeps on straight lines between keyframes. At keyframes it leaves boxes where they are at
        # the sample's time, and images are up to 43 ms older.
        slack = 1.5
        if record['is_key_frame'] and items[annotation['instance_token']].moving:
            slack += 10.0 * 0.043 * calibration['camera_intrinsic'][0][0] / corners[2].min()
        assert (first >= low - slack).all(), (channel, annotation['category_name'])
        assert (last <= high + slack).all(), (channel, annotation['category_name'])
        if (low > 0).all() and (high < SIZE).all() and len(pixels) > 120:
            overlaps.append(np.prod(last - first) / np.prod(high - low))
    return overlaps


@pytest.mark.parametrize('key_frame', [True, False])
def test_boxes_project_onto_their_objects(nusc, worlds, key_frame):
    overlaps = []
    for channel in ('CAM_FRONT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_RIGHT'):
        records = [(s, r) for s, r in all_records(nusc, channel) if r['is_key_frame'] == key_frame]
        for sample, record in records[::4]:
            overlaps += check_projection(nusc, worlds, channel, record, sample)
    # Of objects that nothing hides, the box is filled; many are hidden in part, so look at the better half.
    assert len(overlaps) >= 5 and np.median(overlaps) > 0.7


def test_images_on_disk_show_that_view(nusc, root, worlds):
    checked = 0
    for sample, record in list(all_records(nusc, 'CAM_BACK_LEFT'))[::5]:
        scene, t = scene_of(nusc, sample), seconds(nusc, sample, record)
        renderer = Renderer(worlds[scene], torch.device('cpu'))
        image = np.asarray(Image.open(str(root / record['filename']))).astype(int)
        camera = make_rig(SEED, scene, SIZE).cameras['CAM_BACK_LEFT']
        view = renderer.view(camera, t).image.astype(int)
        later = renderer.view(camera, t + 0.5).image.astype(int)
        # JPEG and the shadows, which are left out here, move colours by a few levels; half a second moves
        # more.
        assert np.median(np.abs(view - image)) < 4
        assert np.abs(view - image).mean() < np.abs(later - image).mean()
        checked += 1
    assert checked >= 4


def test_classes_differ_in_colour(worlds):
    """A model can only learn what it can tell apart: no two common classes share their mean colour."""
    colours = {}
    for world, index in zip(worlds, range(2)):
        renderer, rig = Renderer(world, torch.device('cpu')), make_rig(SEED, index, SIZE)
        for camera in rig.cameras.values():
            view = renderer.view(camera, 0.5)
            classes = np.array([o.occ_class for o in world.objects] + [OCC3D.free_id])[view.owner]
            for name in ('construction_vehicle', 'traffic_cone', 'vegetation', 'manmade'):
                hit = (classes == OCC3D.class_names.index(name)) & (view.owner >= 0)
                colours.setdefault(name, []).append(view.image[hit])
    pixels = [np.concatenate(parts) for parts in colours.values()]
    means = np.array([colour.mean(axis=0) for colour in pixels if len(colour)])
    gaps = np.abs(means[:, None] - means[None]).max(axis=2) + 255 * np.eye(len(means))
    assert len(means) >= 3 and gaps.min() > 15


def test_another_image_size_scales_the_intrinsics():
    small, large = make_rig(1, 0, (320, 180)), make_rig(1, 0, (1600, 900))
    for name, camera in large.cameras.items():
        scaled = np.diag([0.2, 0.2, 1.0]) @ camera.intrinsic
        assert np.allclose(small.cameras[name].intrinsic, scaled)
        assert np.array_equal(small.cameras[name].to_ego, camera.to_ego)
        assert 700 < camera.intrinsic[0, 0] < 1400


# ---- labels ----


def test_labels_agree_with_boxes(nusc, root):
    seen = set()
    for sample in nusc.sample:
        semantics = label_file(nusc, root, sample, 'occ3d')['semantics']
        truth = truth_file(nusc, root, sample)
        numbers = {token: k for k, token in enumerate(truth['instance_tokens'], start=1)}
        boxed = np.isin(semantics, boxed_classes())
        centres, classes, instances = voxel_centres(boxed), semantics[boxed], truth['instances'][boxed]
        assert (instances > 0).all() and (truth['instances'][~boxed] == 0).all()
        for annotation, centre, rotation in ego_boxes(nusc, sample):
            mine = instances == numbers[annotation['instance_token']]
            same = classes == OCC3D.class_names.index(CLASS_OF[annotation['category_name']])
            assert same[mine].all()
            # A surface sample in the box is at most half a voxel from its voxel's centre along each axis.
            assert within(centres[mine], centre, rotation, annotation, margin=0.8).all()
            assert mine[same & within(centres, centre, rotation, annotation)].all()
            # What no scan of the scene reached has no voxels.
            if np.abs(centre[:2]).max() < 38 and abs(centre[2]) < 3 and annotation['num_lidar_pts'] >= 5:
                assert mine.sum() >= 2, annotation['category_name']
                seen.add(CLASS_OF[annotation['category_name']])
    assert len(seen) >= 9


def test_no_voxel_is_within_reach_of_two_boxes_of_its_class(nusc, root):
    for sample in nusc.sample:
        semantics = label_file(nusc, root, sample, 'occ3d')['semantics']
        for class_id in boxed_classes():
            centres = voxel_centres(semantics == class_id)
            reached = np.zeros(len(centres), dtype=int)
            for annotation, centre, rotation in ego_boxes(nusc, sample):
                if CLASS_OF[annotation['category_name']] == OCC3D.class_names[class_id]:
                    reached += within(centres, centre, rotation, annotation, margin=0.8)
            assert (reached == 1).all(), OCC3D.class_names[class_id]


def boxed_classes():
    """Ids of the classes that have boxes."""
    return [OCC3D.class_names.index(name) for name in sorted(set(CLASS_OF.values()))]


def test_labels_agree_with_lidar_points(nusc, root, worlds):
    for sample in nusc.sample:
        record = nusc.get('sample_data', sample['data']['LIDAR_TOP'])
        points = np.fromfile(str(root / record['filename']), dtype=np.float32).reshape(-1, 5)
        assert set(np.unique(points[:, 4])) <= set(range(32))
        to_ego = pose_matrix(nusc.get('calibrated_sensor', record['calibrated_sensor_token']))
        cells = np.floor((points[:, :3] @ to_ego[:3, :3].T + to_ego[:3, 3] - GRID_LOW) / VOXEL).astype(int)
        known = ((cells >= 0) & (cells < GRID_SHAPE)).all(axis=1)
        at = tuple(cells[known].T)
        labels = label_file(nusc, root, sample, 'occ3d')
        occupied = labels['semantics'][at] != OCC3D.free_id
        # Range noise of 1 cm and voxels that a surface only grazes leave a few points in free voxels.
        assert known.sum() > 3000 and occupied.mean() > 0.95
        assert labels['mask_lidar'][at].mean() > 0.95
        scene = scene_of(nusc, sample)
        fresh = scan(
            worlds[scene],
            make_rig(SEED, scene, SIZE),
            seconds(nusc, sample, record),
            np.random.default_rng([SEED, scene, 3, record['timestamp'] - first_stamp(nusc, sample)]),
        )
        assert np.array_equal(fresh.points, points)
        classes = np.array([o.occ_class for o in worlds[scene].objects])
        on_object = fresh.owner[known] != GROUND
        found, true = labels['semantics'][at][on_object], classes[fresh.owner[known][on_object]]
        assert (found == true).mean() > 0.9  # where things touch, a voxel holds points of two classes


def first_stamp(nusc, sample):
    return nusc.get('sample', nusc.get('scene', sample['scene_token'])['first_sample_token'])['timestamp']


def test_masks_are_what_cameras_and_lidar_see(nusc, root):
    for sample in nusc.sample[::2]:
        labels = label_file(nusc, root, sample, 'occ3d')
        assert set(np.unique(labels['mask_camera'])) == set(np.unique(labels['mask_lidar'])) == {0, 1}
        seen = voxel_centres(labels['mask_camera'] == 1)
        inside = np.zeros(len(seen), dtype=bool)
        for channel in [c for c in sample['data'] if c.startswith('CAM')]:
            record = nusc.get('sample_data', sample['data'][channel])
            calibration = nusc.get('calibrated_sensor', record['calibrated_sensor_token'])
            local = (seen - calibration['translation']) @ pose_matrix(calibration)[:3, :3]
            depth = np.maximum(local[:, 2], 1e-3)
            uv = local[:, :2] / depth[:, None] * np.diag(calibration['camera_intrinsic'])[:2]
            uv += np.array(calibration['camera_intrinsic'])[:2, 2]
            # A voxel is seen when any part of it is: its centre may be 0.35 m outside the picture.
            slack = 0.36 * calibration['camera_intrinsic'][0][0] / depth[:, None]
            inside |= ((uv > -slack) & (uv < np.array(SIZE) + slack)).all(axis=1) & (local[:, 2] > -0.36)
        assert inside.mean() > 0.999
        free, hidden = labels['semantics'] == OCC3D.free_id, labels['mask_camera'] == 0
        # They see far, but not through things.
        assert (free & ~hidden).sum() > 50000 and (~free & hidden).sum() > 1000


def test_openocc_labels_are_the_same_world(nusc, root, worlds):
    moved = 0
    for sample in nusc.sample:
        occ, openocc = (label_file(nusc, root, sample, f) for f in ('occ3d', 'openocc_v2'))
        assert openocc['semantics'].dtype == np.int32 and openocc['flow'].shape == GRID_SHAPE + (2,)
        names, other = np.array(OCC3D.class_names), np.array(OPENOCC_V2.class_names)
        expected = np.where(names[occ['semantics']] == 'others', 'manmade', names[occ['semantics']])
        assert (other[openocc['semantics']] == expected).all()
        free = openocc['semantics'] == OPENOCC_V2.free_id
        assert (openocc['instances'][free] == 0).all() and (openocc['instances'][~free] > 0).all()
        pairs = np.unique(np.stack([openocc['instances'][~free], openocc['semantics'][~free]]), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1]  # one class per instance
        truth = truth_file(nusc, root, sample)
        instances = np.where(expected == 'manmade', 0, truth['instances'])
        occupied = np.nonzero(instances)
        flow, instances = openocc['flow'][occupied], instances[occupied]
        numbers = {token: k for k, token in enumerate(truth['instance_tokens'], start=1)}
        for annotation, _, _ in ego_boxes(nusc, sample):
            mine = instances == numbers[annotation['instance_token']]
            if mine.any():
                speed = np.linalg.norm(flow[mine], axis=1)
                expected_speed = np.linalg.norm(nusc.box_velocity(annotation['token']))
                # The devkit's velocity is a mean over up to a second, and wobbling drivers change theirs by
                # 0.3 m/s.
                assert np.isnan(expected_speed) or np.abs(speed - expected_speed).max() < 0.4
                moved += speed.max() > 0.5
    assert moved > 5


def labels_at(world, rig, times, every=0.5, grid=OCC3D_GRID):
    """Labels at some times of a scene scanned a few times a second from 4 s before it to 4 s after it."""
    moments = np.arange(-4.0, world.duration + 4.0, every)
    labeller = Labeller(world, rig, gather([scan(world, rig, t).surface for t in moments]), grid)
    return [labeller.labels(t, [RangeImage(t, scan(world, rig, t).distance)]) for t in times]


def test_all_classes_occur_in_ten_scenes():
    found = set()
    for scene in range(10):
        world = ToyWorld(0, scene, 4)
        for labels in labels_at(world, make_rig(0, scene, SIZE), (0.0, world.duration)):
            found |= set(np.unique(labels.semantics))
        if len(found) == OCC3D.num_classes:
            return
    assert found == set(range(OCC3D.num_classes))


def test_labels_of_any_grid():
    """A voxel twice as large is occupied where any of its eight parts is; a part of the volume is cut out of it."""
    world, rig = ToyWorld(0, 0, 2), make_rig(0, 0, SIZE)
    (whole,) = labels_at(world, rig, (0.0,))
    (coarse,) = labels_at(world, rig, (0.0,), grid=Grid('ego', OCC3D_GRID.point_cloud_range, 0.8))
    (part,) = labels_at(world, rig, (0.0,), grid=Grid('ego', (-20.0, -12.0, -1.0, 20.0, 12.0, 2.2), 0.4))
    occupied = whole.semantics != OCC3D.free_id
    eight = occupied.reshape(100, 2, 100, 2, 8, 2).any(axis=(1, 3, 5))
    assert coarse.semantics.shape == (100, 100, 8) and ((coarse.semantics != OCC3D.free_id) == eight).mean() > 0.9999
    inside = whole.semantics[50:150, 70:130, :8]
    assert part.semantics.shape == inside.shape and (part.semantics == inside).mean() > 0.9999
    assert openocc_labels(part, np.zeros((len(world.annotated), 2)))['flow'].shape == (100, 60, 8, 2)


def test_ground_stays_within_the_grid():
    for scene in range(2):
        world = ToyWorld(5, scene, 6)
        (labels,) = labels_at(world, make_rig(5, scene, SIZE), (1.0,), every=0.1)
        semantics = labels.semantics
        ground = np.isin(
            semantics, [OCC3D.class_names.index(n) for n in ('driveable_surface', 'other_flat', 'sidewalk', 'terrain')]
        )
        occupied = semantics != OCC3D.free_id
        assert ground.any(axis=2).mean() > 0.4 and occupied.any(axis=2).mean() > 0.5
        assert ground.sum(axis=2).max() <= 2  # one voxel thick, two where it climbs across a border
        heading = world.road.at(world.road.s, 0.0)[2]
        bends = np.abs(np.diff(heading)).sum()
        assert bends > 0.2  # radians: the road turns


# ---- repeatability, arguments ----


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob('*'))
        if p.is_file()
    }


def test_same_seed_same_bytes(tmp_path):
    options = dict(scenes=1, keyframes=2, size=(64, 36))
    one, two = make(tmp_path / 'one', workers=1, **options), make(tmp_path / 'two', workers=2, **options)
    other = make(tmp_path / 'other', seed=SEED + 1, workers=1, **options)
    assert digest(one) == digest(two) and len(digest(one)) > 70
    assert not set(digest(one).values()) & {v for k, v in digest(other).items() if k.endswith('.jpg')}


class Killed(Exception):
    """Stands for whatever ends a run."""


def options_of(out, **changes):
    options = Options(out, plan_scenes(2), 2, (64, 36), False, SEED, ('occ3d',))
    return options._replace(**changes)


def test_a_stopped_run_goes_on_and_gives_the_same_files(tmp_path, monkeypatch):
    from tools.toy import generate as module

    def stop_after_two(results, total):
        for count, result in enumerate(results, start=1):
            if count == 2:
                raise Killed
            yield result

    whole, stopped = options_of(tmp_path / 'whole'), options_of(tmp_path / 'stopped')
    crew, plain = Crew((), 1), lambda results, total: results
    generate(whole, crew, plain)
    with pytest.raises(Killed):
        generate(stopped, crew, stop_after_two)
    with pytest.raises(UserError, match='unfinished run with seed 3, not 4'):
        generate(stopped._replace(seed=4), crew, plain)
    done = []
    monkeypatch.setattr(module, 'run_job', lambda job: done.append(job) or run_job(job))
    generate(stopped, crew, plain)
    assert [job.kind for job in done] == ['images', 'images']  # of four; scans, labels and rows are there
    assert digest(stopped.out) == digest(whole.out) and not (stopped.out / 'toy_work').exists()


def test_half_a_file_of_a_killed_process_is_removed(tmp_path):
    work = WorkFolder(tmp_path)
    work.begin({})
    half, other = tmp_path / 'samples' / '.a.jpg.17.tmp', tmp_path / 'samples' / '.of-the-user.tmp'
    half.parent.mkdir()
    for path in half, other:
        path.touch()
    work.begin({})
    assert other.exists() and not half.exists()


def test_processes_end_with_the_one_that_started_them():
    """What they print to ends when they do; reading it would take for ever otherwise."""
    code = """
import os, signal
from tools.toy.pool import Crew, run_tasks
for _ in run_tasks(range(8), abs, lambda task: (), Crew((), 2), lambda: None):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, '-c', code], cwd=str(ROOT), stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == -signal.SIGKILL


def test_long_runs_of_keyframes_come_first_and_single_ones_last(tmp_path, monkeypatch):
    from tools.toy import generate as module

    handed_out = []
    monkeypatch.setattr(module, 'run_tasks', lambda jobs, *_: handed_out.extend(jobs) or iter(()))
    options = options_of(tmp_path, plan=plan_scenes(4), keyframes=20)
    list(module._Flow(options, module.WorkFolder(tmp_path)).run(Crew(('cuda:0',) * 8, 20), lambda: None))
    for kind, expected in (('images', [5] * 8 + [2] * 10 + [1] * 20), ('scans', [3] * 6 + [2] + [2] * 10 + [1] * 40)):
        jobs = [job for job in handed_out if job.kind == kind]
        made = [(job.scene, k) for job in jobs for k in range(job.first, job.last)]
        assert made == [(scene, k) for scene in range(4) for k in range(20)]
        assert [job.last - job.first for job in jobs] == expected


def test_processes_that_only_render_make_the_same_files(tmp_path):
    """Images are made in processes of their own; tables and what needs them are made beside them."""
    one, two = options_of(tmp_path / 'one'), options_of(tmp_path / 'two')
    generate(one, Crew((), 1), lambda results, total: results)
    tables = two.out / 'v1.0-mini' / 'scene.json'
    seconds = generate(
        two,
        Crew(('cpu', 'cpu'), 1),
        lambda results, total: results,
        lambda: (tmp_path / 'prepared').write_text(f'{os.getpid()} {tables.is_file()}'),
    )
    assert digest(one.out) == digest(two.out)
    process, after_tables = (tmp_path / 'prepared').read_text().split()
    assert int(process) != os.getpid() and after_tables == 'True'
    assert set(seconds.used) == {'images', 'scans', 'labels', 'rows'}
    assert 0 < seconds.first <= seconds.keyframes <= seconds.whole and 0 < seconds.tables <= seconds.whole


def test_what_is_prepared_aside_tells_its_errors_and_ends():
    def fail():
        raise UserError('no room')

    with pool.Aside(lambda: None, fail) as aside:
        aside.begin()
        with pytest.raises(UserError, match='no room'):
            aside.finish()
    with pool.Aside(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None) as aside:
        with pytest.raises(UserError, match='was killed'):
            aside.finish()
    with pool.Aside(lambda: None, lambda: None) as aside:
        process = aside._process
    assert process.exitcode == -signal.SIGTERM  # nobody told it to begin


def die_of(task):
    """What a process does that is killed when it renders."""
    if task == 'image':
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_renderer_ends_the_run():
    tasks, crew = ['image', 'scan'], Crew(('cpu',), 1)
    with pytest.raises(UserError, match='a worker process was killed'):
        list(pool.run_tasks(tasks, die_of, lambda task: [], crew, lambda: None, lambda task: task == 'image'))


def test_no_more_processes_than_fit(monkeypatch):
    monkeypatch.setattr(pool, 'count_cores', lambda: 44)
    monkeypatch.setattr(pool, '_ask_aside', lambda *_: [9 << 30, 1 << 30, 6 << 30])
    monkeypatch.setattr(pool, '_free_memory', lambda: 99 << 30)
    assert plan_crew('cuda', 44) == Crew(('cuda:0', 'cuda:2', 'cuda:0', 'cuda:2', 'cuda:0'), 39)
    assert plan_crew('cuda', 4) == Crew(('cuda:0', 'cuda:2'), 2)
    assert plan_crew('cuda', 1) == Crew(('cuda:0',), 0)
    monkeypatch.setattr(pool, '_free_memory', lambda: 3 << 30)
    assert plan_crew('cuda').processes == plan_crew('auto').processes == 4
    monkeypatch.setattr(pool, '_ask_aside', lambda *_: [80 << 30] * 2)
    monkeypatch.setattr(pool, '_free_memory', lambda: 99 << 30)
    assert plan_crew('auto').devices == ('cuda:0', 'cuda:1') * pool.RENDERERS_PER_GPU
    monkeypatch.setattr(pool, '_ask_aside', lambda *_: [1 << 30])
    with pytest.raises(UserError, match='no GPU has room'):
        plan_crew('cuda')
    monkeypatch.setattr(pool, '_ask_aside', lambda *_: [])
    with pytest.raises(UserError, match='finds no GPU'):
        plan_crew('cuda')
    monkeypatch.setattr(pool, '_free_memory', lambda: 3 << 30)
    assert plan_crew('auto', 44) == plan_crew('cpu', 44) == Crew((), 4)


def test_gpus_are_asked_in_another_process(tmp_path, monkeypatch):
    """CUDA does not survive that a process which has used it is copied, as this one will be."""

    def is_available():
        (tmp_path / 'asked_by').write_text(str(os.getpid()))
        return False

    monkeypatch.setattr(torch.cuda, 'is_available', is_available)
    assert plan_crew('auto', 2).devices == ()
    assert int((tmp_path / 'asked_by').read_text()) != os.getpid()


def test_a_full_gpu_is_told_in_a_sentence():
    def work(task):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')

    with pytest.raises(UserError, match='cuda:0 is full; run again with fewer --workers'):
        list(pool.run_tasks([1], work, lambda task: [], Crew(('cuda:0',), 1), lambda: None))


def test_the_frozen_benchmark_is_what_it_was():
    """Counts of one keyframe of the preset's first scene; whoever changes the world needs another preset."""
    from tools.make_toy_nuscenes import PRESETS

    preset = PRESETS['toybench-v1']
    world, rig = ToyWorld(preset['seed'], 0, preset['keyframes']), make_rig(preset['seed'], 0, (800, 450))
    surface = gather([scan(world, rig, t).surface for t in np.arange(0.0, world.duration + 0.01, 0.25)])
    labels = Labeller(world, rig, surface).labels(4.5, [])
    counts = np.bincount(labels.semantics.ravel(), minlength=OCC3D.num_classes)[: OCC3D.free_id]
    assert np.allclose(counts, FROZEN_COUNTS, rtol=0.01, atol=3), counts.tolist()
    seen = (labels.mask_camera > 0) & (labels.semantics != OCC3D.free_id)
    assert 0.4 < seen.sum() / counts.sum() < 0.8


def test_scene_names_are_those_of_the_splits():
    prepare_openmmlab()
    from nuscenes.utils import splits

    assert list(MINI_TRAIN) == splits.mini_train and list(MINI_VAL) == splits.mini_val
    for count, train, val in ((1, 1, 0), (2, 1, 1), (3, 2, 1), (10, 8, 2)):
        plan = plan_scenes(count)
        assert (plan.version, len(plan.train), len(plan.val)) == ('v1.0-mini', train, val)
        assert sorted(plan.names) == sorted(plan.train + plan.val)
    large = plan_scenes(25)
    assert large.version == 'v1.0-trainval' and set(large.train) <= set(splits.train) and len(large.val) == 5
    assert set(plan_scenes(4, 'test').names) <= set(splits.test)
    assert set(plan_scenes(2, 'val').names) == set(MINI_VAL)


@pytest.mark.parametrize(
    'count, split, version',
    [(11, 'both', 'v1.0-mini'), (3, 'val', 'v1.0-mini'), (2, 'train', 'v1.0-test'), (2000, 'both', None)],
)
def test_too_many_scenes_are_refused(count, split, version):
    with pytest.raises(UserError, match=f'--scenes {count}'):
        plan_scenes(count, split, version)


def test_test_split_has_no_boxes_and_no_labels(tmp_path):
    options = Options(
        out=tmp_path,
        plan=plan_scenes(1, 'test'),
        keyframes=2,
        size=(64, 36),
        sweeps=False,
        seed=0,
        label_sets=('occ3d',),
    )
    generate(options, Crew((), 1), progress=lambda results, total: results)
    assert (tmp_path / 'v1.0-test' / 'sample_annotation.json').read_text().strip() == '[]'
    assert not (tmp_path / 'occ3d').exists() and not (tmp_path / 'sweeps').exists()
    assert len(list((tmp_path / 'samples').rglob('*.jpg'))) == 12


def run_cli(*args):
    return subprocess.run(
        [sys.executable, 'tools/make_toy_nuscenes.py', *args],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_bad_arguments_end_in_one_sentence(tmp_path):
    (tmp_path / 'mine.txt').write_text('keep me')
    for args, words in (
        (['--out', str(tmp_path)], 'not empty'),
        (['--out', str(tmp_path / 'new'), '--image-size', '800'], '--image-size'),
        (['--out', str(tmp_path / 'new'), '--label-sets', 'occ4d'], 'occ4d'),
    ):
        result = run_cli(*args)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert len(result.stderr.strip().split('\n')) == 1
    assert (tmp_path / 'mine.txt').read_text() == 'keep me' and not (tmp_path / 'new').exists()


# ---- ray tracing ----


def random_shapes(rng, count, distance):
    shapes = []
    for _ in range(count):
        kind = int(rng.integers(4))
        half = rng.uniform(0.3, 2.0, 3)
        if kind in (sh.CONE, sh.WHEEL):
            half[1 if kind == sh.CONE else 2] = half[0]
        direction = rng.normal(size=3)
        centre = distance * direction / np.linalg.norm(direction)
        shapes.append(
            sh.Shape(
                kind,
                tuple(centre),
                tuple(half),
                (0.5, 0.5, 0.5),
                sh.PLAIN,
                tuple(rng.uniform(0.3, 1.0, 2)),
                float(rng.uniform(0, 6)),
            )
        )
    return sh.make_table(shapes, owner=0)


def no_hills():
    return Waves(np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3))


def test_rays_end_on_the_surface_of_shapes():
    """Each kind of shape: just before the hit a ray is outside, just after it inside; a miss never enters."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        table = random_shapes(rng, 1, 8.0)
        rays = table.centre[0] + rng.uniform(-1, 1, (200, 3)) * table.radius[0]
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        scene = pack_scene(table, no_hills(), np.zeros(3))
        scene.waves[4] = 1e6, 0, 0  # the ground is far below
        distance, hit = trace_rays(scene, rays)
        met = hit == 0
        assert met.any()
        for step, expected in ((-2e-3, False), (2e-3, True)):
            points = rays[met] * (distance[met] + step)[:, None]
            # Rays that graze an edge are inside for less than the step.
            assert (sh.inside(points, table, 0) == expected).mean() > 0.97
        along = np.linspace(0, 16, 400)[:, None]
        for ray in rays[~met][:20]:
            assert not sh.inside(along * ray, table, 0, margin=1e-3).any()


def test_ground_hits_lie_on_the_ground(worlds):
    world = worlds[0]
    eye = world.ego_to_map(0.0)[:3, 3] + [0, 0, 1.7]
    rng = np.random.default_rng(0)
    rays = rng.normal(size=(3000, 3)) * [1, 1, 0.1]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    table = world.shapes_at(0.0, eye).select(slice(0, 1))
    distance, hit = trace_rays(pack_scene(table, world.waves, eye), rays, 200.0)
    ends = eye + rays * distance[:, None]
    found = hit == GROUND
    assert found.sum() > 500
    above = ends[found, 2] - world.waves.height(ends[found, 0], ends[found, 1])
    assert np.abs(above).max() < 0.025  # the search stops 1 mm + 0.1 mm per metre above it
    middle = eye + rays[~found] * (0.9 * distance[~found])[:, None]
    assert (middle[:, 2] > world.waves.height(middle[:, 0], middle[:, 1])).all()


def test_fan_and_image_agree_with_single_rays(worlds):
    world, rig = worlds[1], make_rig(SEED, 1, (160, 90))
    to_map = world.ego_to_map(0.5) @ rig.lidar_to_ego
    scene = pack_scene(world.shapes_at(0.5, to_map[:3, 3]), world.waves, to_map[:3, 3])
    azimuth = 2 * np.pi * np.arange(60) / 60
    rays = np.stack([np.cos(azimuth), np.sin(azimuth), np.full(60, -0.1)], axis=1)
    rays = np.repeat((rays / np.linalg.norm(rays, axis=1, keepdims=True)) @ to_map[:3, :3].T, 2, axis=0)
    distance, hit = trace_fan(scene, to_map[:3, :3], rays.reshape(60, 2, 3), 100.0)
    single, hit_single = trace_rays(scene, rays, 100.0)
    assert np.array_equal(hit.ravel(), hit_single) and np.allclose(distance.ravel(), single)
    camera = rig.cameras['CAM_FRONT']
    to_map = world.ego_to_map(0.5) @ camera.to_ego
    scene = pack_scene(world.shapes_at(0.5, to_map[:3, 3]), world.waves, to_map[:3, 3])
    depth, hit = trace_image(scene, to_map[:3, :3], camera.intrinsic, camera.size)
    rows, columns = (g.ravel() for g in np.mgrid[0:90:7, 0:160:7])
    rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], axis=1)
    rays = rays @ np.linalg.inv(camera.intrinsic).T
    length = np.linalg.norm(rays, axis=1)
    single, hit_single = trace_rays(scene, rays / length[:, None] @ to_map[:3, :3].T)
    same = hit[rows, columns] == hit_single
    assert same.mean() > 0.99  # float32 depths decide between surfaces that touch
    near = same & (hit_single >= 0)
    assert np.allclose((depth[rows, columns] * length)[near], single[near], rtol=1e-4)


@pytest.mark.parametrize(
    'device',
    ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))],
)
def test_tensor_tracer_sees_the_same(worlds, device):
    from tools.toy.trace_torch import trace_images

    for world, index in zip(worlds, range(2)):
        cameras = list(make_rig(SEED, index, (200, 112)).cameras.values())
        poses = [world.ego_to_map(0.5) @ camera.to_ego for camera in cameras]
        scenes = [pack_scene(world.shapes_at(0.5, p[:3, 3]), world.waves, p[:3, 3]) for p in poses]
        together = trace_images(
            scenes, [p[:3, :3] for p in poses], [c.intrinsic for c in cameras], (200, 112), torch.device(device)
        )
        first = 0
        for k, (camera, pose, scene) in enumerate(zip(cameras, poses, scenes)):
            depth, hit = trace_image(scene, pose[:3, :3], camera.intrinsic, camera.size)
            depth2, hit2 = (a[k].cpu().numpy() for a in together)
            hit2 = np.where(hit2 >= 0, hit2 - first, hit2)
            first += len(scene.kind)
            # float32 throughout, so edges and the horizon fall differently in a few pixels; ground hits stop
            # 1 mm early or not.
            assert (hit == hit2).mean() > 0.995, camera.name
            near = (hit == hit2) & (depth < 100)
            assert np.quantile(np.abs(depth - depth2)[near] / depth[near], 0.99) < 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_paints_the_same_pictures(worlds):
    rig = make_rig(SEED, 0, SIZE)
    cameras = list(rig.cameras.values())
    pictures = []
    for device in ('cpu', 'cuda'):
        renderer = Renderer(worlds[0], torch.device(device))
        views = renderer.views(cameras, [0.5] * 6, renderer.shadows(0.5))
        pictures.append(np.stack([view.image for view in views]))
    # Single pixels on edges and noise cells differ.
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() < 2.0


def test_each_image_takes_the_shadow_map_of_its_moment(worlds):
    camera = make_rig(SEED, 0, SIZE).cameras['CAM_FRONT']
    renderer = Renderer(worlds[0], torch.device('cpu'))
    together = renderer.images([camera] * 2, [0.5, 1.0], renderer.shadows(0.5, 1.0), [0, 1])
    apart = [renderer.view(camera, t, renderer.shadows(t)).image for t in (0.5, 1.0)]
    wrong = renderer.view(camera, 1.0, renderer.shadows(0.5)).image
    for one, other in zip(together, apart):
        assert np.array_equal(one, other)
    assert not np.array_equal(wrong, apart[1])


def test_several_cameras_at_once_are_those_one_by_one(worlds):
    """The path of GPUs, taken on the CPU: batches of cameras through the tensor tracer."""

    class Batched(Renderer):
        def _groups(self, cameras, times, moments):
            return [[self._shot(*which) for which in zip(cameras, times, moments)]]

        def _trace(self, scenes, rotations, intrinsics, size, ground=True):
            from tools.toy.trace_torch import trace_images

            return trace_images(scenes, rotations, intrinsics, size, self.device, ground)

    cameras, times = list(make_rig(SEED, 1, SIZE).cameras.values()), [0.5, 0.51, 0.52, 0.53, 0.54, 0.55]
    plain, batched = (kind(worlds[1], torch.device('cpu')) for kind in (Renderer, Batched))
    shadows, moments = [renderer.shadows(0.5, 2.5, 0.6) for renderer in (plain, batched)], [0, 2] * 3
    for one, other in zip(
        plain.views(cameras, times, shadows[0], moments), batched.views(cameras, times, shadows[1], moments)
    ):
        assert (one.owner == other.owner).mean() > 0.995
        assert np.abs(one.image.astype(int) - other.image).mean() < 2.0  # edges, noise cells
