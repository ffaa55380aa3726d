"""Prediction files: every kind of file is read right, or refused with a sentence that names file, array and value."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import DataError
from lib.metrics.formats import open_predictions
from lib.prediction import RECORD_FILE, save_prediction, write_record
from lib.task import Task

TASK = Task(label_set='occ3d', point_cloud_range=(0, 0, 0, 5, 4, 2), voxel_size=1.0)
FREE = TASK.label_set.free_id
GRID = TASK.grid_shape


def volumes(seed=0):
    """Dense semantics, instances and flow that agree: free voxels have none."""
    rng = np.random.default_rng(seed)
    semantics = np.where(rng.random(GRID) < 0.4, rng.integers(0, FREE, GRID), FREE).astype(np.uint8)
    occupied = semantics != FREE
    instances = np.where(occupied, rng.integers(0, 400, GRID), 0).astype(np.int16)
    flow = np.where(occupied[..., None], rng.normal(size=GRID + (2,)), 0).astype(np.float32)
    return semantics, instances, flow


def sparse(seed=0, panoptic=True):
    semantics, instances, flow = volumes(seed)
    where = np.argwhere(semantics != FREE)
    at = tuple(where.T)
    arrays = {'occ_loc': where[None].astype(np.uint8), 'sem_pred': semantics[at][None]}
    if panoptic:
        arrays.update(pano_sem=semantics[at][None], pano_inst=instances[at][None], flow=flow[at][None])
    return arrays


def dense(seed=0, classes='pred', instances=''):
    semantics, ids, _ = volumes(seed)
    return {classes: semantics, **({instances: ids} if instances else {})}


def write_npz(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(str(path), **arrays)
    return path


def read_prediction(path):
    """The one file in its folder."""
    return open_predictions(path.parent, TASK).read(path.stem)


def read(tmp_path, arrays, name='a.npz'):
    return read_prediction(write_npz(tmp_path / name, arrays))


# --- what is read ---


@pytest.mark.parametrize('instances', ['', 'pano_inst', 'instances'])
@pytest.mark.parametrize('classes', ['pred', 'arr_0', 'semantics', 'pano_sem'])
def test_dense_arrays_are_read_under_every_name(tmp_path, classes, instances):
    found = read(tmp_path, dense(classes=classes, instances=instances))
    semantics, ids, _ = volumes()
    np.testing.assert_array_equal(found['semantics'], semantics)
    assert set(found) == {'semantics'} | ({'instances'} if instances else set())
    if instances:
        np.testing.assert_array_equal(found['instances'], ids)


def test_label_files_are_read_as_predictions_with_flow(tmp_path):
    semantics, ids, flow = volumes()
    mask = np.ones(GRID, bool)
    found = read(tmp_path, {'semantics': semantics, 'instances': ids, 'flow': flow, 'mask_camera': mask})
    assert set(found) == {'semantics', 'instances', 'flow'}
    np.testing.assert_array_equal(found['flow'], flow)


@pytest.mark.parametrize('batched', [True, False])
def test_sparse_files_are_read_with_and_without_the_batch_axis(tmp_path, batched):
    arrays = {name: array if batched else array[0] for name, array in sparse().items()}
    found = read(tmp_path, arrays)
    for name, expected in zip(('semantics', 'instances', 'flow'), volumes()):
        np.testing.assert_array_equal(found[name], expected)
    assert [found[name].dtype for name in ('semantics', 'instances', 'flow')] == [np.uint8, np.int32, np.float32]


@pytest.mark.parametrize('count', [0, 1])
@pytest.mark.parametrize('batched', [True, False])
def test_few_voxels_are_no_special_case(tmp_path, count, batched):
    arrays = {'occ_loc': np.full((count, 3), 1, np.int64), 'sem_pred': np.full(count, 4, np.int64)}
    found = read(tmp_path, {name: array[None] if batched else array for name, array in arrays.items()})
    assert (found['semantics'] != FREE).sum() == count
    assert count == 0 or found['semantics'][1, 1, 1] == 4


NUMBERS = ['u1', 'i1', '<u2', '>u2', '<i4', '>i8', '<u8', 'f2', '<f4', '>f8']


@pytest.mark.parametrize('dtype', NUMBERS)
@pytest.mark.parametrize('order', ['C', 'F'])
def test_any_type_of_whole_numbers_and_either_order_is_read(tmp_path, dtype, order):
    semantics, _, _ = volumes()
    as_given = np.array(semantics, dtype=dtype, order=order)
    np.testing.assert_array_equal(read(tmp_path / 'dense', {'pred': as_given})['semantics'], semantics)
    alone = tmp_path / 'alone' / 'a.npy'
    alone.parent.mkdir()
    np.save(str(alone), as_given)
    np.testing.assert_array_equal(read_prediction(alone)['semantics'], semantics)
    listed = {name: array.astype(dtype) for name, array in sparse(panoptic=False).items()}
    np.testing.assert_array_equal(read(tmp_path / 'listed', listed)['semantics'], semantics)


def test_a_batch_axis_of_one_is_taken_off_dense_arrays(tmp_path):
    arrays = {name: array[None] for name, array in dense(instances='pano_inst').items()}
    assert read(tmp_path, arrays)['instances'].shape == GRID
    with pytest.raises(DataError, match=r"a.npz: 'pred' has shape \[1, 5, 4, 2\], but the task needs \[5, 4, 2\]"):
        read(tmp_path, dict(arrays, pano_inst=arrays['pano_inst'][0]))


# --- what is refused: {name: (change of a valid file, what the sentence says)} ---


def changed(arrays, **changes):
    return {name: value for name, value in dict(arrays, **changes).items() if value is not None}


def with_value(array, value, dtype=np.int64):
    array = array.astype(dtype, order='C')
    array.reshape(-1)[1] = value
    return array


S, D, P = sparse(), dense(), dense(instances='pano_inst')
BAD_FILES = {
    'negative index': (changed(S, occ_loc=with_value(S['occ_loc'], -1)), "'occ_loc' holds -1.*along y"),
    'index out of range': (changed(S, occ_loc=with_value(S['occ_loc'], 4)), r"'occ_loc' holds 4, allowed are 0\.\.3"),
    'fractional index': (changed(S, occ_loc=with_value(S['occ_loc'], 0.5, float)), "'occ_loc' holds 0.5, whole"),
    'index not a number': (changed(S, occ_loc=with_value(S['occ_loc'], np.nan, float)), "'occ_loc' holds nan"),
    'bool indices': (changed(S, occ_loc=S['occ_loc'] > 0), "'occ_loc' holds bool"),
    'voxel listed twice': (changed(S, **{name: np.repeat(S[name], 2, axis=1) for name in S}), 'more than once'),
    'classes that wrap': (changed(S, sem_pred=S['sem_pred'].astype(np.int64) + 256), "'sem_pred' holds 2.., allowed"),
    'classes of floats that wrap': (changed(S, pano_sem=S['pano_sem'] + 256.0), "'pano_sem' holds 2.., allowed"),
    'class 18': (changed(S, sem_pred=with_value(S['sem_pred'], 18)), r"'sem_pred' holds 18, allowed are 0\.\.17"),
    'class -1': (changed(S, pano_sem=with_value(S['pano_sem'], -1)), "'pano_sem' holds -1"),
    'enormous class': (changed(S, sem_pred=with_value(S['sem_pred'], 1e30, float)), "'sem_pred' holds 1000000"),
    'infinite class': (changed(S, sem_pred=with_value(S['sem_pred'], np.inf, float)), "'sem_pred' holds inf"),
    'text classes': (changed(S, sem_pred=S['sem_pred'].astype(str)), 'not plain numbers'),
    'complex classes': (changed(S, sem_pred=S['sem_pred'].astype(complex)), 'not plain numbers'),
    'one array shorter': (changed(S, sem_pred=S['sem_pred'][:, :-1]), r'do not fit together: occ_loc \[1'),
    'instances shorter': (changed(S, pano_inst=S['pano_inst'][:, 1:]), 'do not fit together'),
    'one batch axis lacks': (changed(S, occ_loc=S['occ_loc'][0]), 'do not fit together'),
    'the other batch axis lacks': (changed(S, sem_pred=S['sem_pred'][0]), 'do not fit together'),
    'a batch of two': (changed(S, **{name: np.concatenate([S[name]] * 2) for name in S}), 'do not fit together'),
    'four columns': (changed(S, occ_loc=np.pad(S['occ_loc'], ((0, 0), (0, 0), (0, 1)))), 'do not fit together'),
    'columns first': (changed(S, occ_loc=S['occ_loc'].transpose(0, 2, 1)), 'do not fit together'),
    'no partner pano_sem': (changed(S, pano_sem=None), "has 'pano_inst' but no 'pano_sem'"),
    'no partner pano_inst': (changed(S, pano_inst=None), "has 'pano_sem' but no 'pano_inst'"),
    'no occ_loc': (changed(S, occ_loc=None), "has 'sem_pred' but no 'occ_loc'"),
    'no sem_pred': (changed(S, sem_pred=None), "has 'occ_loc' but no 'sem_pred'"),
    'negative instance': (changed(S, pano_inst=with_value(S['pano_inst'], -3)), "'pano_inst' holds -3"),
    'instance too large': (changed(S, pano_inst=with_value(S['pano_inst'], 1 << 16)), "'pano_inst' holds 65536"),
    'infinite flow': (changed(S, flow=S['flow'] * np.inf), "'flow' holds velocities that are not finite"),
    'flow of one axis': (changed(S, flow=S['flow'][..., :1]), r'do not fit together.*flow \[1, K, 2\]'),
    'sparse and dense': (dict(S, **D), "and 'pred'; save one form"),
    'two class arrays': (dict(D, semantics=D['pred']), "both 'pred' and 'semantics'"),
    'two instance arrays': (dict(P, instances=P['pano_inst']), "both 'pano_inst' and 'instances'"),
    'two unnamed arrays': ({'arr_0': D['pred'], 'arr_1': D['pred']}, "both 'arr_0' and 'arr_1'"),
    'nothing known': ({'x': np.zeros(3), 'y': np.zeros(3)}, 'holds no prediction .its arrays: x, y'),
    'empty': ({}, 'holds no prediction .its arrays: nothing'),
    'dense class 18': ({'pred': with_value(D['pred'], 18)}, "a.npz: 'pred' holds 18.*'occ3d', 17 = free"),
    'dense classes that wrap': ({'pred': D['pred'].astype(np.int16) + 256}, "'pred' holds 2.., allowed"),
    'dense ignore label': ({'semantics': with_value(D['pred'], 255, np.uint8)}, "'semantics' holds 255"),
    'dense bool': ({'pred': D['pred'] < FREE}, "'pred' holds bool"),
    'other grid': ({'pred': np.zeros((4, 5, 2), np.uint8)}, r'shape \[4, 5, 2\], but the task needs \[5, 4, 2\]'),
    'flat': ({'pred': D['pred'].reshape(-1)}, r'shape \[40\]'),
    'scalar': ({'pred': np.uint8(3)}, r'shape \[\]'),
    'instances of other shape': (dict(P, pano_inst=P['pano_inst'][:, :2]), "'pano_inst' has shape"),
    'dense flow of other shape': (dict(D, flow=np.zeros(GRID)), "'flow' has shape"),
    'larger than the grid': ({'pred': np.zeros((500, 500, 16), np.uint8)}, 'more than the 120 values'),
    'objects': ({'pred': np.array([{}, []], dtype=object)}, 'objects and records are never read'),
    'records': ({'pred': np.zeros(GRID, dtype=[('a', 'u1')])}, 'objects and records are never read'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files_are_refused_in_a_sentence(tmp_path, name):
    arrays, sentence = BAD_FILES[name]
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path, arrays)
    assert str(tmp_path / 'a.npz') in str(caught.value) and '\n' not in str(caught.value)


def npy_with_header(header, content=b'', version=1):
    text = header.encode('latin1')
    size = len(text).to_bytes(2 if version == 1 else 4, 'little')
    return b'\x93NUMPY' + bytes([version, 0]) + size + text + content


NPY = io.BytesIO()
np.save(NPY, D['pred'])
NPY = NPY.getvalue()
HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000)}"
BAD_BYTES = {
    'a.npy': {
        'empty': (b'', 'is no array of NumPy'),
        'text': (b'hello world, hello', 'is no array of NumPy'),
        'a pickle': (pickle.dumps(D['pred']), 'is no array of NumPy'),
        'cut in its header': (NPY[:40], 'damaged'),
        'cut': (NPY[:-1], 'ends after 39 of 40 bytes'),
        'longer': (NPY + b'x', 'longer than its shape'),
        'huge': (npy_with_header(HUGE), 'more than the 120 values'),
        'huge header': (b'\x93NUMPY\x02\x00\xff\xff\xff\xff', 'a header of 4294967295 bytes'),
        'negative shape': (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, -8)}"),
            r'shape \(-5',
        ),
        'shape of floats': (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (5.0,)}"), 'shape'),
        'shape no tuple': (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': 40}"), 'shape 40'),
        'header that is code': (npy_with_header("__import__('os').getpid()"), 'damaged'),
        'header that lacks a key': (npy_with_header("{'descr': '|u1'}"), 'damaged'),
        'header that is no dict': (npy_with_header('[1, 2]'), 'damaged'),
        'unknown type': (npy_with_header("{'descr': '<q9', 'fortran_order': False, 'shape': (40,)}"), 'damaged'),
        'type with a shape': (
            npy_with_header("{'descr': '(9999,9999)f8', 'fortran_order': False, 'shape': ()}"),
            'plain',
        ),
        'deeply nested header': (npy_with_header('(' * 9000 + ')' * 9000), 'damaged'),
    },
    'a.npz': {'empty': (b'', 'damaged'), 'text': (b'hello', 'damaged'), 'an npy': (NPY, 'damaged')},
}


@pytest.mark.parametrize('file, name', [(file, name) for file in BAD_BYTES for name in BAD_BYTES[file]])
def test_damaged_bytes_are_refused_in_a_sentence(tmp_path, file, name):
    content, sentence = BAD_BYTES[file][name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_prediction(tmp_path / file)


def test_members_of_an_npz_are_checked_as_files_are(tmp_path):
    for name, (content, sentence) in BAD_BYTES['a.npy'].items():
        with zipfile.ZipFile(str(tmp_path / 'a.npz'), 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('pred.npy', content)
        with pytest.raises(DataError, match=sentence):
            read_prediction(tmp_path / 'a.npz')
        assert name


def test_a_flipped_byte_of_an_npz_is_found_by_its_checksum(tmp_path):
    np.savez(str(tmp_path / 'a.npz'), pred=D['pred'])  # stored, not compressed: nothing but the checksum can tell
    content = bytearray((tmp_path / 'a.npz').read_bytes())
    at = content.index(D['pred'].tobytes()) + 7
    content[at] ^= 1
    (tmp_path / 'a.npz').write_bytes(bytes(content))
    with pytest.raises(DataError, match='a.npz is damaged.*CRC'):
        read_prediction(tmp_path / 'a.npz')


def test_an_array_stored_twice_is_refused(tmp_path):
    with zipfile.ZipFile(str(tmp_path / 'a.npz'), 'w') as archive, pytest.warns(UserWarning):
        archive.writestr('pred.npy', NPY)
        archive.writestr('pred.npy', NPY)
    with pytest.raises(DataError, match='two arrays of one name'):
        read_prediction(tmp_path / 'a.npz')


# --- folders and zips ---


LAYOUTS = {
    'flat': '{token}.npz',
    'by scene': '{scene}/{token}.npz',
    'nested': '{scene}/{token}/pred.npz',
    'labels': '{scene}/{token}/labels.npz',
    'npy': '{token}.npy',
}


def fill(folder, layout, count=3, **kind):
    for seed in range(count):
        path = folder / LAYOUTS[layout].format(scene=f'scene-{seed % 2}', token=f'token{seed}')
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == 'npy':
            np.save(str(path), volumes(seed)[0])
        else:
            write_npz(path, dense(seed, **kind))
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(str(path), 'w', zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob('*')):
            archive.write(str(file), file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize('as_zip', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_found_in_a_folder_and_in_a_zip(tmp_path, layout, as_zip):
    path = fill(tmp_path / 'in', layout)
    (path / 'notes.txt').write_text('others leave things here')
    if as_zip:
        path = zipped(path, tmp_path / 'all.zip')
    predictions = open_predictions(path, TASK)
    assert predictions.tokens == ['token0', 'token1', 'token2'] and 'token1' in predictions
    for seed in range(3):
        np.testing.assert_array_equal(predictions.read(f'token{seed}')['semantics'], volumes(seed)[0])
    assert '3 predictions in' in predictions.describe() and 'no predictions.json' in predictions.describe()
    again = pickle.loads(pickle.dumps(predictions))  # to another process
    np.testing.assert_array_equal(again.read('token2')['semantics'], volumes(2)[0])


def test_a_folder_mixes_nothing(tmp_path):
    fill(tmp_path, 'flat')
    np.save(str(tmp_path / 'other.npy'), D['pred'])
    with pytest.raises(DataError, match=r'mixes files <token>.npy and <token>.npz \(other.npy and token0.npz\)'):
        open_predictions(tmp_path, TASK)
    (tmp_path / 'other.npy').unlink()
    write_npz(tmp_path / 'scene' / 'other' / 'pred.npz', D)
    with pytest.raises(DataError, match='mixes files pred.npz and <token>.npz'):
        open_predictions(tmp_path, TASK)


@pytest.mark.parametrize('other', [S, P, dense(classes='semantics'), dict(D, flow=volumes()[2])])
def test_files_of_another_form_are_refused(tmp_path, other):
    fill(tmp_path, 'flat')
    write_npz(tmp_path / 'token1.npz', other)
    predictions = open_predictions(tmp_path, TASK)
    with pytest.raises(DataError, match='token1.npz is of another form .* than the files before it .dense .npz'):
        predictions.read('token1')


def test_what_the_metrics_need_is_asked_for_at_once(tmp_path):
    fill(tmp_path, 'flat')
    with pytest.raises(DataError, match=r"have no instances \(dense .npz, classes in 'pred'\)"):
        open_predictions(tmp_path, TASK, needs=('instances',))
    with pytest.raises(DataError, match='have no flow'):
        open_predictions(tmp_path, TASK, needs=('flow',))
    write_npz(tmp_path / 'panoptic' / 'a.npz', S)
    open_predictions(tmp_path / 'panoptic', TASK, needs=('instances', 'flow'))


def test_missing_and_surplus_samples_are_counted_and_named(tmp_path):
    predictions = open_predictions(fill(tmp_path, 'flat'), TASK)
    assert predictions.choose(['token2', 'token0', 'token1']) == ([0, 1, 2], '')
    tokens = ['token2', 'absent', 'token0']
    with pytest.raises(DataError, match=r'1 of 3 samples have no prediction, e.g. absent; 1 sample \(e.g. token1\)'):
        predictions.choose(tokens)
    chosen, note = predictions.choose(tokens, only_predicted=True)
    assert chosen == [0, 2]
    assert note == (
        'left out: 1 sample (e.g. absent) without a prediction; '
        'not used: 1 sample (e.g. token1) predicted but not in the data set'
    )
    with pytest.raises(DataError, match='2 of 2 samples have no prediction, e.g. a; 3 samples'):
        predictions.choose(['a', 'b'], only_predicted=True)


def test_one_sample_with_two_files_is_refused(tmp_path):
    fill(tmp_path, 'flat')
    write_npz(tmp_path / 'scene' / 'token1.npz', D)
    with pytest.raises(DataError, match='are both predictions of sample token1'):
        open_predictions(tmp_path, TASK)


def test_places_without_predictions_are_named(tmp_path):
    for path, sentence in (('absent', 'does not exist'), ('.', 'holds no .npz or .npy files'), ('a.txt', 'neither')):
        (tmp_path / 'a.txt').write_text('')
        with pytest.raises(DataError, match=sentence):
            open_predictions(tmp_path / path, TASK)
    write_npz(tmp_path / 'pred.npz', D)
    with pytest.raises(DataError, match='lies in no folder named after its sample'):
        open_predictions(tmp_path, TASK)


def test_damaged_zips_are_a_sentence(tmp_path):
    path = zipped(fill(tmp_path / 'in', 'flat', classes='arr_0'), tmp_path / 'all.zip')
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match='all.zip is damaged'):
        open_predictions(path, TASK)
    at = content.index(b'token1.npz') + 40
    path.write_bytes(content[:at] + b'\0' * 20 + content[at + 20 :])
    with pytest.raises(DataError, match='all.zip: token1.npz is damaged'):
        open_predictions(path, TASK).read('token1')


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / 'all.zip'
    with zipfile.ZipFile(str(path), 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('token0.npz', b'\0' * (3 << 20))
    with pytest.raises(DataError, match='unpacks to more than'):
        open_predictions(path, TASK)


# --- the record beside predictions ---


OTHERS = {
    'label set': (
        Task('openocc_v2', point_cloud_range=(0, 0, 0, 5, 4, 2), voxel_size=1.0),
        "'occ3d' .18 .*'openocc_v2'",
    ),
    'range': (Task('occ3d', point_cloud_range=(-2, 0, 0, 3, 4, 2), voxel_size=1.0), 'have point_cloud_range'),
    'voxel': (Task('occ3d', point_cloud_range=(0, 0, 0, 5, 4, 2), voxel_size=0.5), 'have voxel_size 1.0, but .* 0.5'),
}


@pytest.mark.parametrize('as_zip', [False, True])
@pytest.mark.parametrize('other', OTHERS)
def test_predictions_of_another_task_are_refused_with_both_values(tmp_path, other, as_zip):
    path = fill(tmp_path / 'in', 'flat')
    write_record(path, TASK, config='c.py', weights='w.pth', split='val')
    if as_zip:
        path = zipped(path, tmp_path / 'all.zip')
    assert 'config c.py, weights w.pth' in open_predictions(path, TASK).describe()
    task, sentence = OTHERS[other]
    with pytest.raises(DataError, match=sentence):
        open_predictions(path, task)


def test_a_folder_is_not_filled_with_predictions_of_two_tasks(tmp_path):
    write_record(tmp_path, TASK)
    write_record(tmp_path, TASK, weights='newer.pth')
    with pytest.raises(DataError, match='holds already'):
        write_record(tmp_path, OTHERS['voxel'][0])
    assert json.loads((tmp_path / RECORD_FILE).read_text())['weights'] == 'newer.pth'


@pytest.mark.parametrize(
    'text, sentence',
    [
        ('{', 'readable JSON|damaged'),
        ('[' * 100000, 'readable JSON|damaged'),
        ('{"kind": "occupancy predictions"}', "'label_set' is missing"),
        ('{"kind": "occupancy predictions", "label_set": "a", "class_names": [1]}', "'class_names' is missing"),
        ('RECORD "voxel_size": "x"}', "'voxel_size' is missing"),
        ('RECORD "voxel_size": NaN}', "'voxel_size' is missing"),
        ('RECORD "point_cloud_range": [1, 2]}', r'have point_cloud_range \[1, 2\]'),
    ],
)
@pytest.mark.parametrize('as_zip', [False, True])
def test_damaged_records_are_a_sentence(tmp_path, text, sentence, as_zip):
    path = fill(tmp_path / 'in', 'flat')
    write_record(path, TASK)
    good = json.dumps(json.loads((path / RECORD_FILE).read_text()))[:-1] + ','
    (path / RECORD_FILE).write_text(text.replace('RECORD', good))
    if as_zip:
        path = zipped(path, tmp_path / 'all.zip')
    with pytest.raises(DataError, match=sentence):
        open_predictions(path, TASK)


@pytest.mark.parametrize('text', ['[]', '3', '{"results": {}}'])
def test_a_file_of_that_name_by_others_is_no_record(tmp_path, text):
    fill(tmp_path, 'flat')
    (tmp_path / RECORD_FILE).write_text(text)
    assert open_predictions(tmp_path, TASK).record is None


# --- many inputs ---


SHAPES = st.sampled_from([GRID, (1,) + GRID, (4, 5, 2), (40,), (1, 7), (7,), (1, 7, 3), (7, 3), (1, 0, 3), (0,), ()])
TYPES = st.sampled_from(['u1', 'i1', 'i2', 'u8', 'i8', 'f4', 'f8', '?', 'c8', 'U3', 'O'])
LIMITS = st.sampled_from([(0, 2), (0, 18), (-1, 3), (0, 300), (250, 290)])
NAMES = st.sampled_from(['occ_loc', 'sem_pred', 'pano_sem', 'pano_inst', 'pred', 'semantics', 'instances', 'flow', 'x'])


@st.composite
def array(draw):
    low, high = draw(LIMITS)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(low, high, draw(SHAPES)) + draw(st.sampled_from([0, 0, 0.25, np.nan]))
    with np.errstate(invalid='ignore'):
        return np.asarray(values).astype(draw(TYPES))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, array(), min_size=1, max_size=4), st.booleans())
def test_made_up_files_are_read_right_or_refused(tmp_path_factory, arrays, from_valid):
    """A file that is read holds ids of the task, and the very values that the arrays hold."""
    path = tmp_path_factory.getbasetemp() / 'made_up' / 'a.npz'
    arrays = dict(sparse() if from_valid else {}, **arrays)
    write_npz(path, arrays)
    try:
        found = read_prediction(path)
    except DataError as error:
        assert os.fspath(path) in str(error)
        return
    assert found['semantics'].shape == GRID and found['semantics'].dtype == np.uint8
    assert found['semantics'].max() <= FREE
    if 'occ_loc' in arrays:
        at = tuple(arrays['occ_loc'].reshape(-1, 3).astype(int).T)
        given_classes = arrays['pano_sem' if 'pano_sem' in arrays else 'sem_pred'].reshape(-1)
        np.testing.assert_array_equal(found['semantics'][at], given_classes)
        assert (found['semantics'] != FREE).sum() == (given_classes != FREE).sum()
    else:
        name = next(name for name in ('pred', 'semantics', 'pano_sem') if name in arrays)
        np.testing.assert_array_equal(found['semantics'], arrays[name].reshape(GRID))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(['sparse', 'dense', 'npy']), st.data())
def test_cut_and_flipped_bytes_never_become_another_prediction(tmp_path_factory, kind, data):
    """Of a compressed file, every damage is found or harmless; of an .npy only its length and header can tell."""
    folder = tmp_path_factory.getbasetemp() / f'damage_{kind}'
    folder.mkdir(exist_ok=True)
    path = folder / ('a.npy' if kind == 'npy' else 'a.npz')
    if kind == 'npy':
        np.save(str(path), D['pred'])
    else:
        save_prediction(path, S if kind == 'sparse' else P)
    right, content = read_prediction(path), bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        found = read_prediction(path)
    except DataError as error:
        assert os.fspath(path) in str(error)
        return
    assert found['semantics'].max() <= FREE and found['semantics'].shape == GRID
    if kind != 'npy':
        np.testing.assert_array_equal(found['semantics'], right['semantics'])
