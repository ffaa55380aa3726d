"""Predictions: dense volumes and files."""

import errno

import numpy as np
import pytest

from lib.errors import DataError, UserError
from lib.io import load_npz_checked
from lib.prediction import save_prediction, to_dense
from lib.task import Task

TASK = Task.from_config(dict(label_set='occ3d', point_cloud_range=[0, 0, 0, 4, 4, 2], voxel_size=1.0))


def make(panoptic):
    prediction = dict(
        sem_pred=np.array([[4, 17, 11]], np.uint8), occ_loc=np.array([[[0, 1, 0], [3, 3, 1], [2, 0, 1]]], np.uint8)
    )
    if panoptic:
        prediction.update(pano_sem=np.array([[4, 17, 16]], np.uint8), pano_inst=np.array([[300, 0, 2]], np.int16))
    return prediction


def test_semantic_prediction_becomes_a_volume():
    dense = to_dense(make(False), TASK)
    assert set(dense) == {'semantics'} and dense['semantics'].shape == (4, 4, 2)
    expected = np.full((4, 4, 2), 17, np.uint8)
    expected[0, 1, 0], expected[2, 0, 1] = 4, 11
    np.testing.assert_array_equal(dense['semantics'], expected)


def test_panoptic_prediction_uses_its_own_classes():
    dense = to_dense(make(True), TASK)
    assert dense['semantics'][2, 0, 1] == 16 and dense['instances'].dtype == np.int32
    assert dense['instances'][0, 1, 0] == 300 and (dense['instances'] > 0).sum() == 2


def test_file_keeps_every_array(tmp_path):
    save_prediction(tmp_path / 'a.npz', make(True))
    loaded = load_npz_checked(tmp_path / 'a.npz')
    assert set(loaded) == set(make(True))
    for name, value in make(True).items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


def test_a_file_has_the_mode_of_any_new_file_and_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    prediction = dict(sem_pred=np.zeros((1, 2), np.uint8), occ_loc=np.zeros((1, 2, 3), np.uint8))
    (tmp_path / 'other').touch()
    save_prediction(tmp_path / 'a.npz', prediction)
    assert (tmp_path / 'a.npz').stat().st_mode == (tmp_path / 'other').stat().st_mode

    def fill_disk(path, **arrays):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(np, 'savez_compressed', fill_disk)
    with pytest.raises(UserError, match='cannot write .*b.npz: No space left on device; free some space'):
        save_prediction(tmp_path / 'b.npz', prediction)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.npz', 'other']


@pytest.mark.parametrize(
    'name, value, sentence',
    [
        ('occ_loc', [[[0, 1, 0], [-1, 3, 1], [2, 0, 1]]], "the model's output: 'occ_loc' holds -1"),
        ('occ_loc', [[[0, 1, 0], [2, 0, 1], [2, 0, 1]]], r'lists voxel \[2, 0, 1\] more than once .1 voxels too many'),
        ('sem_pred', [[4, 260, 11]], "'sem_pred' holds 260, allowed are 0..17"),
        ('sem_pred', [4, 17, 11], 'do not fit together'),
        ('pano_inst', [[1.5, 0, 2]], "'pano_inst' holds 1.5, whole numbers"),
    ],
)
def test_what_is_no_prediction_of_the_task_is_refused(name, value, sentence):
    with pytest.raises(DataError, match=sentence):
        to_dense(dict(make(True), **{name: np.array(value)}), TASK, "the model's output")
