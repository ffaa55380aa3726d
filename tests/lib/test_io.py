"""lib.io: pickles that are data, files that are whole or absent, npz and JSON with clear errors."""

import collections
import errno
import json
import os
import pickle

import numpy as np
import pytest

from lib import io
from lib.errors import DataError, UserError


class _Runs:
    """A pickle of this calls a function when loaded."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def _dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize('protocol', [0, 2, 3, 4, 5])
def test_plain_data_and_numpy_arrays_are_read(tmp_path, protocol):
    value = dict(
        a=[1, 2.5, None, True, 'x', b'y'],
        b=(np.arange(6.0).reshape(2, 3), np.array(['car', 'bus'])),
        c=np.float32(3),
        d={1, 2},
        e=collections.OrderedDict(k=np.array([True])),
        f=np.int64(7),
        g=np.zeros(0),
        h=np.asfortranarray(np.eye(2)),
        i=bytearray(b'z'),
        j=complex(1, 2),
    )
    loaded = io.load_pickle_safe(_dump(tmp_path / 'a.pkl', value, protocol))
    np.testing.assert_array_equal(loaded['b'][0], value['b'][0])
    assert loaded['b'][1].tolist() == ['car', 'bus'] and loaded['c'] == 3 and loaded['f'] == 7
    assert loaded['a'] == value['a'] and loaded['d'] == {1, 2} and loaded['i'] == b'z' and loaded['j'] == 1 + 2j


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_arrays_pickled_by_either_numpy_are_read(tmp_path, module):
    content = pickle.dumps(np.arange(3), protocol=2)
    written = b'numpy._core.multiarray' if b'numpy._core' in content else b'numpy.core.multiarray'
    path = tmp_path / 'a.pkl'
    path.write_bytes(content.replace(written, module.encode()))
    assert io.load_pickle_safe(path).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    'function, arguments',
    [
        (os.system, ('touch %s',)),
        (eval, ('open("%s", "w")',)),
        (exec, ('open("%s", "w")',)),
        (getattr, (1, 'real')),
        (np.load, ('%s',)),
        (__import__, ('os',)),
        (np.save, ('%s', 1)),
    ],
)
def test_a_pickle_that_runs_something_is_refused(tmp_path, function, arguments):
    mark = tmp_path / 'mark'
    arguments = [a % mark if isinstance(a, str) and '%' in a else a for a in arguments]
    path = _dump(tmp_path / 'evil.pkl', dict(infos=[_Runs(function, *arguments)]))
    with pytest.raises(DataError, match=r'evil\.pkl was refused: it names .*allow_any_pickle'):
        io.load_pickle_safe(path)
    assert not mark.exists()


def test_a_function_hidden_in_an_object_array_is_refused(tmp_path):
    mark = tmp_path / 'mark'
    array = np.array([None], dtype=object)
    array[0] = _Runs(os.system, f'touch {mark}')
    with pytest.raises(DataError, match='refused'):
        io.load_pickle_safe(_dump(tmp_path / 'evil.pkl', array))
    assert not mark.exists()


def test_a_trusted_pickle_may_hold_any_object(tmp_path):
    path = _dump(tmp_path / 'a.pkl', collections.Counter('ab'))
    with pytest.raises(DataError, match='collections.Counter'):
        io.load_pickle_safe(path)
    assert io.load_pickle_safe(path, allow_any=True) == collections.Counter('ab')


@pytest.mark.parametrize('content', [b'', b'junk', b'\x80\x04\x95', pickle.dumps(list(range(1000)))[:50]])
def test_a_damaged_pickle_is_named(tmp_path, content):
    path = tmp_path / 'damaged.pkl'
    path.write_bytes(content)
    with pytest.raises(DataError, match='damaged.pkl is not a readable pickle'):
        io.load_pickle_safe(path)


def test_a_missing_pickle_is_named_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match='none.pkl does not exist.*gen_sweep_info.py'):
        io.load_pickle_safe(tmp_path / 'none.pkl')


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / 'out' / 'a.json'
    io.write_json(path, dict(a=1))
    with pytest.raises(RuntimeError), io.atomic_write(path) as temporary:
        temporary.write_text('half')
        raise RuntimeError('killed')
    assert json.loads(path.read_text()) == dict(a=1)
    assert os.listdir(str(path.parent)) == ['a.json']


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_file(tmp_path):
    path = tmp_path / 'a.json'
    io.write_json(path, dict(a=1))
    with pytest.raises(UserError, match=r'cannot write .*a\.json: No space left on device; free some space'):
        with io.atomic_write(path) as temporary:
            temporary.write_text('half')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert json.loads(path.read_text()) == dict(a=1) and os.listdir(str(tmp_path)) == ['a.json']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_really_full_device_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match='No space left'), io.atomic_write(tmp_path / 'a.bin') as temporary:
        os.symlink('/dev/full', str(temporary))
        with open(str(temporary), 'wb') as stream:
            stream.write(b'x')


def test_a_folder_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        io.write_json(tmp_path / 'file' / 'a.json', {})


def test_a_pipe_is_written_to_and_stays(tmp_path):
    """As /dev/null, which root could replace by a file."""
    path = tmp_path / 'pipe.json'
    os.mkfifo(str(path))
    reading = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK)
    io.write_json(path, [1])
    assert json.loads(os.read(reading, 100)) == [1] and path.is_fifo()
    os.close(reading)


def test_json_takes_numpy_values(tmp_path):
    io.write_json(tmp_path / 'a.json', dict(a=np.float64(1.5), b=np.arange(2), c=np.bool_(True)))
    assert io.read_json(tmp_path / 'a.json') == dict(a=1.5, b=[0, 1], c=True)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / 'a.json').write_text('{')
    with pytest.raises(DataError, match='a.json is not readable JSON'):
        io.read_json(tmp_path / 'a.json')


def test_npz_comes_back_and_only_the_keys_asked_for(tmp_path):
    io.save_npz(tmp_path / 'a.npz', dict(a=np.arange(3), b=np.eye(2), c=np.zeros(1)))
    assert sorted(io.load_npz_checked(tmp_path / 'a.npz')) == ['a', 'b', 'c']
    loaded = io.load_npz_checked(tmp_path / 'a.npz', required=['a'], optional=['b', 'z'])
    assert sorted(loaded) == ['a', 'b'] and loaded['a'].tolist() == [0, 1, 2]


def test_npz_without_a_key_names_file_and_key(tmp_path):
    io.save_npz(tmp_path / 'a.npz', dict(other=np.zeros(1)))
    with pytest.raises(DataError, match=r"a\.npz has no 'semantics' \(it holds other\)"):
        io.load_npz_checked(tmp_path / 'a.npz', required=['semantics'])


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'text', 'empty'])
def test_a_damaged_npz_is_named(tmp_path, damage):
    path = tmp_path / 'labels.npz'
    io.save_npz(path, dict(semantics=np.random.default_rng(0).integers(0, 255, 5000)))
    content = bytearray(path.read_bytes())
    if damage == 'flipped':
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {'truncated': content[: len(content) // 2], 'flipped': content, 'text': b'hello', 'empty': b''}[damage]
    )
    with pytest.raises(DataError, match=r'labels\.npz is damaged'):
        io.load_npz_checked(path, required=['semantics'])


def test_objects_in_an_npz_are_not_built(tmp_path):
    mark = tmp_path / 'mark'
    np.savez(str(tmp_path / 'a.npz'), semantics=np.array([_Runs(os.system, f'touch {mark}')], dtype=object))
    with pytest.raises(DataError):
        io.load_npz_checked(tmp_path / 'a.npz')
    assert not mark.exists()


@pytest.mark.parametrize('part', ['..', '.', '', 'a/b', '/etc', 'a\\b', 'a\0', 256 * 'x', 128 * 'ü'])
def test_names_from_data_cannot_leave_the_folder(tmp_path, part):
    with pytest.raises(UserError, match='no plain file or folder name'):
        io.path_inside(tmp_path, part, 'labels.npz')


def test_plain_names_stay_inside_the_folder(tmp_path):
    assert (
        io.path_inside(tmp_path, 'scene-0001', 'ab12', 'labels.npz') == tmp_path / 'scene-0001' / 'ab12' / 'labels.npz'
    )


def test_outputs_that_cannot_be_written_are_told_beforehand(tmp_path):
    (tmp_path / 'file').write_text('')
    io.check_outputs(tmp_path / 'new.json', tmp_path / 'new' / 'deep' / 'x.json', tmp_path / 'file', None, 'x.json')
    with pytest.raises(UserError, match='dir.*, which is a folder; give the name of a file in it'):
        (tmp_path / 'dir').mkdir()
        io.check_outputs(None, tmp_path / 'dir')
    with pytest.raises(UserError, match='x.json: .*file is no folder that you may write to'):
        io.check_outputs(tmp_path / 'file' / 'x.json')


def test_folders_that_cannot_be_made_are_told(tmp_path):
    assert io.make_folder(tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(UserError, match='cannot make the folder .*file.*; choose another --out'):
            io.make_folder(path)
