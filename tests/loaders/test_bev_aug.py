"""BEVAug: labels and matrices turn together, shown on a labelled object that is projected twice."""

from dataclasses import fields

import numpy as np
import pytest
from projection import project_points

from lib.errors import ConfigError
from lib.geometry import rotation_z, voxel_centers
from lib.targets import OccupancyTargets
from lib.task import Task
from loaders.pipelines import BEVAug
from loaders.pipelines import augmentation as module
from loaders.pipelines.augmentation import BEVTransform

TASK = Task('occ3d', num_frames=1, cameras=('CAM_FRONT',))
CAR, FREE, IGNORE = 4, 17, 255
OBJECT = (slice(140, 150), slice(110, 114), slice(2, 6))  # ahead of the car and to the left
TRANSFORMS = [
    BEVTransform(angle, fx, fy)
    for angle in np.deg2rad([-22.5, -9.0, 0.0, 17.0, 22.5])
    for fx in (False, True)
    for fy in (False, True)
]


def _sample():
    semantics = np.full(TASK.grid_shape, FREE, np.uint8)
    semantics[OBJECT] = CAR
    instances = np.where(semantics == CAR, 0, 255).astype(np.uint8)
    camera = np.array([[0, -1, 0, 0.1], [0, 0, -1, 1.5], [1, 0, 0, -1.6], [0, 0, 0, 1.0]])
    intrinsics = np.diag([1266.0, 1266.0, 1.0, 1.0])
    intrinsics[:2, 2] = 816, 491
    ego2lidar = np.eye(4)
    ego2lidar[:3, :3] = rotation_z(1.5)
    ego2lidar[:3, 3] = [0.0, 0.9, -1.8]
    return dict(
        targets=OccupancyTargets(semantics, instances, np.array([CAR]), np.ones(TASK.grid_shape, bool)),
        ego2lidar=ego2lidar[None],
        lidar2img=(intrinsics @ camera @ np.linalg.inv(ego2lidar))[None],
    )


def _object_pixel(sample):
    """Where the labelled object's centre lands in the image through the sample's matrices."""
    voxels = np.argwhere(sample['targets'].voxel_semantics == CAR)
    centre = voxel_centers(TASK.point_cloud_range, TASK.voxel_size, TASK.grid_shape, voxels).mean(axis=0)
    return project_points(sample['lidar2img'][0] @ sample['ego2lidar'][0], centre)[0]


def _drift(transform):
    """Pixels between the object before and after the augmentation."""
    before = _object_pixel(_sample())
    return np.linalg.norm(_object_pixel(BEVAug(TASK).apply(_sample(), transform)) - before)


# The object is 18 m away: nearest-neighbour turning moves its mean by under half a voxel (0.2 m), which is
# 1266 / 18 * 0.2 = 14 pixels. A wrong sense moves it by 2 * 9 degrees * 18 m and more: 300 pixels and up.
TOLERANCE = 14


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_the_object_stays_on_its_pixels(transform):
    assert _drift(transform) < TOLERANCE


@pytest.mark.parametrize('mutation', ['rotation', 'flip_x', 'flip_y', 'order'])
def test_the_projection_test_notices_a_wrong_sign(mutation, monkeypatch):
    """One sign or the order changed in what the labels do, not in the matrices: some case must fail."""
    right = module.source_columns

    def wrong(task, transform):
        if mutation == 'rotation':
            transform = transform._replace(angle=-transform.angle)
        elif mutation == 'order':  # rotation after the flips instead of before
            odd = transform.flip_x != transform.flip_y
            transform = transform._replace(angle=-transform.angle if odd else transform.angle)
        else:
            transform = transform._replace(**{mutation: not getattr(transform, mutation)})
        return right(task, transform)

    monkeypatch.setattr(module, 'source_columns', wrong)
    assert max(_drift(transform) for transform in TRANSFORMS) > 10 * TOLERANCE


def test_a_quarter_turn_and_flips_move_every_voxel_exactly():
    semantics = np.random.default_rng(0).integers(0, 18, TASK.grid_shape).astype(np.uint8)
    for flip_x in (False, True):
        for flip_y in (False, True):
            sample = BEVAug(TASK).apply(
                dict(_sample(), targets=OccupancyTargets(semantics.copy())), BEVTransform(np.pi / 2, flip_x, flip_y)
            )
            expected = semantics.transpose(1, 0, 2)[::-1]  # x' = -y, y' = x
            expected = expected[::-1] if flip_x else expected
            expected = expected[:, ::-1] if flip_y else expected
            np.testing.assert_array_equal(sample['targets'].voxel_semantics, expected)


def test_no_turn_changes_nothing():
    sample = BEVAug(TASK).apply(_sample(), BEVTransform(0.0, False, False))
    before = _sample()
    for item in fields(OccupancyTargets):
        np.testing.assert_array_equal(getattr(sample['targets'], item.name), getattr(before['targets'], item.name))
    for key in ('ego2lidar', 'lidar2img'):
        np.testing.assert_array_equal(sample[key], before[key])


def test_voxels_from_outside_are_ignored():
    sample = BEVAug(TASK).apply(_sample(), BEVTransform(np.deg2rad(20), False, True))
    targets = sample['targets']
    outside = targets.voxel_semantics == IGNORE
    # Four triangles: 2 sin cos / (1 + sin + cos)^2 = 0.1235 of a square turned by 20 degrees; a voxel at the
    # rim is 1/200 of the side.
    assert outside.mean() == pytest.approx(0.1235, abs=0.003)
    assert outside[0, 0].all() and not outside[100].any()
    assert (targets.voxel_instances[outside] == 255).all() and not targets.mask_camera[outside].any()
    assert targets.mask_camera[~outside].all() and targets.instance_class_ids.tolist() == [CAR]


def test_the_matrix_is_the_inverse_on_the_right_and_once_only():
    transform = BEVTransform(0.3, True, False)
    before = _sample()
    after = BEVAug(TASK).apply(_sample(), transform)
    np.testing.assert_allclose(after['ego2lidar'] @ transform.matrix(), before['ego2lidar'], atol=1e-12)
    np.testing.assert_array_equal(after['lidar2img'], before['lidar2img'])


def test_a_grid_that_is_not_centred_on_the_car_turns_about_the_car():
    task = Task('occ3d', point_cloud_range=(-10, -20, -1, 50, 20, 5.4))
    semantics = np.full(task.grid_shape, FREE, np.uint8)
    index = (np.array([20.2, 0.2]) - [-10, -20]) / 0.4
    semantics[int(index[0]), int(index[1]), 3] = CAR
    transform = BEVTransform(np.deg2rad(20), False, False)
    sample = dict(targets=OccupancyTargets(semantics), ego2lidar=np.eye(4)[None])
    found = np.argwhere(BEVAug(task).apply(sample, transform)['targets'].voxel_semantics == CAR)
    centre = voxel_centers(task.point_cloud_range, 0.4, task.grid_shape, found).mean(axis=0)
    expected = transform.matrix() @ [20.2, 0.2, 0, 1]
    np.testing.assert_allclose(centre[:2], expected[:2], atol=0.4)  # one voxel


def test_draws_are_uniform_angles_and_fair_flips():
    seen = []

    class Recording(BEVAug):
        def apply(self, sample, transform):
            seen.append(transform)
            return sample

    step = Recording(TASK)
    for seed in range(300):
        step(dict(rng=np.random.default_rng(seed), test_mode=False))
    angles = np.rad2deg([transform.angle for transform in seen])
    assert -22.5 <= angles.min() < -20 and 20 < angles.max() <= 22.5
    assert abs(angles.mean()) < 4 * 13 / 300**0.5  # four deviations of the mean
    for flips in ([t.flip_x for t in seen], [t.flip_y for t in seen]):
        assert 115 < sum(flips) < 185  # 300 coins: 150 +- 8.7, four deviations


def test_evaluation_is_refused():
    with pytest.raises(ConfigError, match='training only'):
        BEVAug(TASK)(dict(test_mode=True))
