"""lib.geometry against pyquaternion and hand-made cases. Tolerance 1e-12: double precision."""

import math

import numpy as np
import pytest
from pyquaternion import Quaternion

from lib import geometry
from lib.run.loading import to_device

EXACT = dict(rtol=0, atol=1e-12)


@pytest.mark.parametrize('seed', range(5))
def test_quaternions_turn_as_pyquaternion_does(seed):
    q = np.random.default_rng(seed).normal(size=4)
    np.testing.assert_allclose(geometry.quaternion_to_matrix(q), Quaternion(q).unit.rotation_matrix, **EXACT)


def test_rotation_about_z_takes_x_to_y():
    np.testing.assert_allclose(geometry.rotation_z(math.pi / 2) @ [1, 0, 0], [0, 1, 0], **EXACT)


def test_a_rigid_inverse_undoes_the_transform():
    rng = np.random.default_rng(0)
    matrix = geometry.pose_to_matrix(rng.normal(size=4), rng.normal(size=3))
    points = rng.normal(size=(7, 3))
    there = geometry.transform_points(matrix, points)
    np.testing.assert_allclose(geometry.transform_points(geometry.invert_rigid(matrix), there), points, **EXACT)
    assert not np.allclose(there, points)


def test_voxel_centers():
    centres = geometry.voxel_centers((-40, -40, -1, 40, 40, 5.4), 0.4, (200, 200, 16))
    assert centres.shape == (200, 200, 16, 3)
    np.testing.assert_allclose(centres[0, 0, 0], [-39.8, -39.8, -0.8], **EXACT)
    np.testing.assert_allclose(centres[100, 199, 15], [0.2, 39.8, 5.2], **EXACT)
    chosen = geometry.voxel_centers((-40, -40, -1, 40, 40, 5.4), 0.4, (200, 200, 16), np.array([[100, 199, 15]]))
    np.testing.assert_allclose(chosen, [[0.2, 39.8, 5.2]], **EXACT)


def test_to_device_moves_tensors_and_lists_of_tensors_only():
    import torch

    batch = dict(img=torch.zeros(2), ids=[torch.ones(1), torch.ones(2)], img_metas=[dict(a=1)], n=3)
    moved = to_device(batch, 'meta')
    assert moved['img'].device.type == 'meta' and [t.device.type for t in moved['ids']] == ['meta', 'meta']
    assert moved['img_metas'] is batch['img_metas'] and moved['n'] == 3
    assert batch['img'].device.type == 'cpu'
