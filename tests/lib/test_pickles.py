"""The look at a pickle's instructions: what is true passes, what asks for too much is found before it is read."""

import collections
import pickle

import numpy as np
import pytest

from lib import pickles
from lib.errors import DataError
from lib.io import load_pickle_safe

VALUE = dict(
    text='x' * 300,
    more='é' * 70000,
    numbers=[0, 255, 256, 65536, 2**40, -(2**90), 2**3000, 1.5, None, True],
    content=(b'y' * 300, bytearray(b'z' * 70000), b''),
    arrays=[np.arange(9.0).reshape(3, 3), np.array(['car']), np.float32(1)],
    others=({1, 2}, frozenset((3,)), collections.OrderedDict(a=1), complex(1, 2)),
    many=[str(number) for number in range(3000)],
)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_whatever_pickle_writes_passes_compiled_or_not(tmp_path, monkeypatch, protocol):
    path = write(tmp_path / 'a.pkl', pickle.dumps(VALUE, protocol=protocol))
    for compile_from in (1, 1 << 30):
        monkeypatch.setattr(pickles, '_COMPILE_FROM', compile_from)
        assert pickles.find_damage(path) is None


BAD = {
    'empty': (b'', 0),
    'no end': (b'\x80\x02]', 3),
    'cut within its frame': (pickle.dumps([1, 2, 3], protocol=4)[:-1], 2),
    'unknown instruction': (b'\x80\x04\xff.', 2),
    'bytes of enormous size': (b'\x80\x04\x8e' + (1 << 60).to_bytes(8, 'little') + b'.', 2),
    'bytes of negative size': (b'\x80\x04\x8e' + b'\xff' * 8 + b'.', 2),
    'text longer than the file': (b'\x80\x04\x8c\x09abc.', 2),
    'frame longer than the file': (b'\x80\x04\x95' + (99).to_bytes(8, 'little') + b'N.', 2),
    'enormous memo': (b'\x80\x02]r\xff\xff\xff\x7f.', 3),
    'cut within a number': (b'\x80\x02J\x01', 2),
}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_true_is_found_compiled_or_not(tmp_path, monkeypatch, name):
    content, place = BAD[name]
    path = write(tmp_path / 'a.pkl', content)
    for compile_from in (0, 1 << 30):
        monkeypatch.setattr(pickles, '_COMPILE_FROM', compile_from)
        assert pickles.find_damage(path) == place
    with pytest.raises(DataError, match=f'a.pkl is not a readable pickle .byte {place} cannot be right'):
        load_pickle_safe(path)


def test_several_pickles_behind_one_another(tmp_path):
    one = pickle.dumps(VALUE, protocol=2)
    path = write(tmp_path / 'a.pkl', one * 3 + b'and what is no pickle')
    assert pickles.find_damage(path, pickles=3) is None
    assert pickles.find_damage(path, pickles=4) == 3 * len(one) + 1  # 'a' is an instruction


@pytest.mark.parametrize('kind', [bytes, bytearray])
def test_memory_by_the_number_is_refused(tmp_path, kind):
    """bytearray(1 << 40), as a pickle may say it."""
    content = (
        b'\x80\x02cbuiltins\n' + kind.__name__.encode() + b'\n\x8a\x06' + (1 << 40).to_bytes(6, 'little') + b'\x85R.'
    )
    with pytest.raises(DataError, match='are not made of a number'):
        load_pickle_safe(write(tmp_path / 'a.pkl', content))
