"""Challenge submissions: what is written can be read by anybody, what is read is data."""

import collections
import gzip
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import DataError, UserError
from lib.metrics.counting import FlowRays, count_flow
from lib.metrics.counts import Counts, tallies, totals
from lib.metrics.formats import open_predictions
from lib.metrics.submission import ABOUT, read_submission, write_occ3d_submission, write_submission
from lib.task import Task

TASK = Task('openocc_v2', point_cloud_range=(0, 0, 0, 5, 4, 2), voxel_size=1.0)
ME = {
    'method': 'a method',
    'team': 'a team',
    'authors': ['A', 'B'],
    'e-mail': 'a@b.c',
    'institution / company': 'here',
    'country / region': 'CH',
}
RAYS = 30


def rays(seed=0, count=RAYS):
    rng = np.random.default_rng(seed)
    flow = rng.normal(size=(count, 2)).astype(np.float16)
    return FlowRays(rng.integers(0, 17, count).astype(np.uint8), rng.uniform(0, 60, count).astype(np.float16), flow)


def entry(seed=0, **changes):
    return dict(zip(('pcd_cls', 'pcd_dist', 'pcd_flow'), rays(seed)), **changes)


def save(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(gzip.compress(pickle.dumps(content, protocol=protocol)))
    return path


def assert_equal(found, expected):
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_written_submission_is_read_by_pickle_and_by_us(tmp_path):
    write_submission(tmp_path / 's.gz', ME, ((f't{seed}', rays(seed)) for seed in range(2500)))
    with gzip.open(str(tmp_path / 's.gz'), 'rb') as stream:
        content = pickle.load(stream)
    assert list(content) == list(ABOUT) + ['results'] and type(content['results']) is dict
    assert len(content['results']) == 2500
    assert {name: array.dtype.name for name, array in content['results']['t7'].items()} == {
        'pcd_cls': 'uint8',
        'pcd_dist': 'float16',
        'pcd_flow': 'float16',
    }
    about, results = read_submission(tmp_path / 's.gz', TASK, {f't{seed}': RAYS for seed in range(2500)})
    assert about == ME and len(results) == 2500
    for seed in (0, 7, 2499):
        assert_equal(results[f't{seed}'], rays(seed))
        assert_equal(content['results'][f't{seed}'].values(), rays(seed))
    with gzip.open(str(tmp_path / 's.gz'), 'rb') as stream:
        protocol = next(pickletools.genops(stream))
    assert protocol[1] == pickle.HIGHEST_PROTOCOL
    assert (tmp_path / 's.gz').read_bytes()[8] == 2  # gzip's flag for its slowest, best compression


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('kind', [dict, collections.OrderedDict, lambda items: collections.defaultdict(dict, items)])
def test_submissions_of_every_protocol_are_read(tmp_path, protocol, kind):
    content = dict(ME, results=kind({'a': entry(1), 'b': entry(2)}))
    _, results = read_submission(save(tmp_path / 's.gz', content, protocol), TASK, {'a': RAYS, 'b': RAYS})
    assert_equal(results['b'], rays(2))
    counts = Counts(1, 1, None, None, None, count_flow(rays(1), results['a'], TASK.label_set))
    assert totals(tallies(counts), (), TASK.label_set.thing_ids)['OccScore_true_positives'] == 1.0


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_either_numpy_wrote_it_and_other_types_of_equal_values_are_read(tmp_path, core):
    label, distance, flow = rays()
    other = {'pcd_cls': label.astype('>i2'), 'pcd_dist': distance.astype('f4'), 'pcd_flow': np.asfortranarray(flow)}
    content = pickle.dumps(dict(ME, results={'a': other}), protocol=2)
    written = b'numpy._core' if b'numpy._core' in content else b'numpy.core'
    (tmp_path / 's.gz').write_bytes(gzip.compress(content.replace(written, core)))
    assert_equal(read_submission(tmp_path / 's.gz', TASK).results['a'], rays())


class Runs:
    """A pickle of this calls a function when loaded."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def without(key):
    return {name: value for name, value in dict(ME, results={'a': entry()}).items() if name != key}


BAD = {
    **{f'no {key}': (without(key), f'has no .{key}') for key in ABOUT},
    'authors no list': (dict(without('authors'), authors='A, B'), "'authors', or it is not a list of names"),
    'no results': (without('results'), "must hold a dict with .* and 'results'"),
    'results a list': (dict(ME, results=[entry()]), "and 'results'"),
    'a list': ([1], 'must hold a dict'),
    'token a number': (dict(ME, results={3: entry()}), 'keys are not text'),
    'sample missing': (dict(ME, results={'b': entry()}), 'lacks 1 of 1 samples, e.g. a;'),
    'entry a list': (dict(ME, results={'a': list(rays())}), 'sample a needs the arrays pcd_cls'),
    'array missing': (dict(ME, results={'a': entry(pcd_flow=None)}), 'needs the arrays'),
    'array a list': (dict(ME, results={'a': entry(pcd_dist=[1.0] * RAYS)}), 'needs the arrays'),
    'ray missing': (dict(ME, results={'a': {k: v[1:] for k, v in entry().items()}}), 'has 29 rays, needed are 30'),
    'lengths differ': (dict(ME, results={'a': entry(pcd_dist=rays().distance_m[1:])}), 'do not fit together'),
    'flow of one axis': (dict(ME, results={'a': entry(pcd_flow=rays().flow[:, :1])}), r'pcd_flow \[30, 1\]'),
    'class 17': (dict(ME, results={'a': entry(pcd_cls=np.full(RAYS, 17))}), "'pcd_cls' holds 17, allowed are 0..16"),
    'class -1': (dict(ME, results={'a': entry(pcd_cls=np.full(RAYS, -1))}), "'pcd_cls' holds -1"),
    'class 0.5': (dict(ME, results={'a': entry(pcd_cls=np.full(RAYS, 0.5))}), 'whole numbers'),
    'distance NaN': (dict(ME, results={'a': entry(pcd_dist=np.full(RAYS, np.nan))}), "'pcd_dist' holds numbers"),
    'velocity too large': (dict(ME, results={'a': entry(pcd_flow=np.full((RAYS, 2), 1e6))}), 'in half precision'),
    'distance of truth values': (dict(ME, results={'a': entry(pcd_dist=np.ones(RAYS, bool))}), "'pcd_dist' holds bool"),
    'objects': (dict(ME, results={'a': entry(pcd_cls=np.array([None] * RAYS))}), 'only numbers are read'),
    'texts': (dict(ME, results={'a': entry(pcd_cls=np.array(['x'] * RAYS))}), 'only numbers are read'),
    'records': (dict(ME, results={'a': entry(pcd_cls=np.zeros(RAYS, [('a', 'u1')]))}), 'only numbers are read'),
    'code': (dict(ME, results=Runs(print, 'run')), 'names .*builtin.*print,'),
    'code by eval': (dict(ME, results=Runs(eval, '1')), 'names .*builtin.*eval,'),
    'a set': (dict(ME, results={'a'}), 'refused: it holds something other|names'),
    'much memory': (dict(ME, results=Runs(bytearray, 1 << 40)), 'names .*builtin.*bytearray,'),
    'too large': (dict(ME, results={'a': entry(), 'b': np.zeros(1 << 20)}), 'unpacks to more than'),
}


@pytest.mark.parametrize('protocol', [2, 5])
@pytest.mark.parametrize('name', BAD)
def test_bad_submissions_are_refused_in_a_sentence(tmp_path, capsys, name, protocol):
    content, sentence = BAD[name]
    with pytest.raises(DataError, match=sentence) as caught:
        read_submission(save(tmp_path / 's.gz', content, protocol), TASK, {'a': RAYS})
    assert str(tmp_path / 's.gz') in str(caught.value) and capsys.readouterr().out == ''


RAW = {
    'says it is enormous': b'\x80\x05\x8e' + (1 << 60).to_bytes(8, 'little'),
    'byte array of enormous size': b'\x80\x05\x96' + (1 << 40).to_bytes(8, 'little'),
    'frame of enormous size': b'\x80\x05\x95' + (1 << 50).to_bytes(8, 'little'),
    'enormous memo': b'\x80\x02}r\xff\xff\xff\x7f.',
    'nested': b'\x80\x02' + b'(' * 500000,
    'list in itself': b'\x80\x02]q\0h\0a.',
    'empty': b'',
    'stop': b'\x80\x02.',
    'persistent id': b'\x80\x02Pa\n.',
    'changes a function': b'\x80\x02c_codecs\nencode\nq\0}X\x08\0\0\0__name__K\x01sb.',
    'array that stays empty': b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.',
    'text number': b'\x80\x02I' + b'9' * 100000 + b'\n.',
}


@pytest.mark.parametrize('name', RAW)
def test_bytes_that_mean_harm_are_refused(tmp_path, name):
    (tmp_path / 's.gz').write_bytes(gzip.compress(RAW[name]))
    with pytest.raises(DataError, match='s.gz'):
        read_submission(tmp_path / 's.gz', TASK)


def test_files_that_are_no_gzip_are_refused(tmp_path):
    with pytest.raises(DataError, match='does not exist'):
        read_submission(tmp_path / 's.gz', TASK)
    (tmp_path / 's.gz').write_bytes(pickle.dumps(dict(ME, results={})))
    with pytest.raises(DataError, match='must be the gzip of one pickled dict'):
        read_submission(tmp_path / 's.gz', TASK)
    (tmp_path / 's.gz').write_bytes(gzip.compress(b'\0' * (1 << 26)))  # 64 MiB in 64 KiB
    with pytest.raises(DataError, match='s.gz'):
        read_submission(tmp_path / 's.gz', TASK, {'a': RAYS})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_bytes_never_become_other_rays_without_a_word(tmp_path_factory, data):
    """The checksum of gzip is passed on purpose: what is changed is the pickle inside."""
    path = tmp_path_factory.getbasetemp() / 'changed.gz'
    content = bytearray(pickle.dumps(dict(ME, results={'a': entry()}), protocol=data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(gzip.compress(bytes(content), 1))
    try:
        found = read_submission(path, TASK, {'a': RAYS}).results['a']
    except DataError as error:
        assert str(path) in str(error)
        return
    assert found.label.shape == (RAYS,) and found.label.max() <= 16 and found.flow.shape == (RAYS, 2)
    assert np.isfinite(found.distance_m).all() and np.isfinite(found.flow).all()


def test_writing_asks_for_the_description_and_for_each_sample_once(tmp_path):
    with pytest.raises(DataError, match="has no 'team'"):
        write_submission(tmp_path / 's.gz', dict(ME, team=3), [])
    with pytest.raises(DataError, match='sample a comes twice'):
        write_submission(tmp_path / 's.gz', ME, [('a', rays()), ('a', rays())])
    with pytest.raises(UserError, match='cannot write'):
        (tmp_path / 'file').write_text('')
        write_submission(tmp_path / 'file' / 's.gz', ME, [])
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_form_of_2023_is_written_and_read(tmp_path):
    volumes = {f't{seed}': np.random.default_rng(seed).integers(0, 17, TASK.grid_shape) for seed in range(3)}
    write_occ3d_submission(tmp_path / 's.zip', volumes.items())
    predictions = open_predictions(tmp_path / 's.zip', TASK)
    assert predictions.form.classes == 'arr_0' and predictions.tokens == list(volumes)
    for token, volume in volumes.items():
        np.testing.assert_array_equal(predictions.read(token)['semantics'], volume)
