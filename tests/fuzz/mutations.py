"""Damage to valid input: of bytes, of arrays, and of nested values. Every change comes from the generator given."""

import copy
import random

import numpy as np

HUGE = 2**200


class Untouched(random.Random):
    """Draws of which no damage comes: what a target makes with it is a valid file."""

    def random(self):
        return 1.0

    def choice(self, items):
        return items[0]


JUNK = (
    None,
    True,
    0,
    -1,
    1,
    255,
    256,
    65536,
    2**31,
    2**63,
    -(2**63),
    HUGE,
    0.5,
    1e-300,
    1e308,
    float('nan'),
    float('inf'),
    float('-inf'),
    '',
    'x',
    ' ',
    'CAM_FRONT',
    '../../outside',
    '/etc/hostname',
    '~',
    'a\0b',
    'a\nb',
    '\ud800',
    'é' * 40,
    (),
    [],
    [[]],
    {},
    {'x': 1},
    [0, 0, 0],
    [float('nan')] * 3,
    [1, 2, 3, 4, 5],
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    'x' * 300,
)
OBJECTS = (
    b'',
    b'\xff\xfe',
    1j,
    {1, 2},
    range(3),
    np.float32('nan'),
    np.zeros(0),
    np.array(None),
    np.zeros((2, 2), 'U3'),
)
TYPES = ('u1', 'i1', '>i2', 'i4', 'u8', 'f2', 'f4', 'f8', '?', 'c8', 'U4', 'S3', 'O', 'M8[s]', [('a', 'u1')])
EXTREMES = (-1, 1, 0, 17, 18, 255, 256, -129, 2**31, 2**40, 0.5, -0.25, 1e30, float('nan'), float('inf'))


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, flip, overwrite, repeat or insert bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        action = rng.randrange(7)
        if action == 0:
            del content[at:]
        elif action == 1:
            del content[at : at + length]
        elif action == 2:
            content[at:at] = bytes(rng.randrange(256) for _ in range(length))
        elif action == 3:
            content[at:at] = content[max(0, at - length) : at]
        elif action == 4:
            content[at : at + length] = rng.choice((b'\0', b'\xff', b'(', b'9')) * len(content[at : at + length])
        else:
            for place in range(at, min(at + length, len(content))):
                content[place] = rng.randrange(256)
    return bytes(content)


def mutate_array(rng: random.Random, array) -> np.ndarray:
    """Another type, shape or length, or other values."""
    array = np.asarray(array)
    action = rng.randrange(9)
    if action == 0:
        with np.errstate(all='ignore'):
            try:
                return array.astype(np.dtype(rng.choice(TYPES)))
            except (TypeError, ValueError, OverflowError):  # -1 as uint8, for NumPy 2
                return np.zeros(array.shape, rng.choice(TYPES))
    if action == 1:
        return array.reshape(rng.choice(((-1,), (1,) + array.shape, array.shape + (1,), array.shape[::-1])))
    if action == 2 and array.ndim:
        axis = rng.randrange(array.ndim)
        return np.take(array, range(rng.randrange(array.shape[axis] + 1)), axis=axis)
    if action == 3 and array.ndim:
        return np.repeat(array, 2, axis=rng.randrange(array.ndim))
    if action == 4:
        return np.moveaxis(array, 0, -1) if array.ndim > 1 else array[:0] if array.ndim else array
    if action == 5:
        return np.zeros(rng.choice(((), (0,), (3,), (0, 3), (1, 0, 3), (7, 7, 7, 7))), array.dtype)
    if action == 6 and array.dtype.kind in 'biuf':
        return array.astype(np.float64) + rng.choice((256, -1, 0.5, 1, 1e18))
    if array.size and array.dtype.kind in 'biuf':
        value = rng.choice(EXTREMES)
        whole = value == value and abs(value) < 2**60 and value == int(value)
        array = np.array(array, dtype=np.int64 if whole else np.float64, order='C')
        array.reshape(-1)[rng.randrange(array.size)] = value
        return array
    return np.array([None] * 3, dtype=object)


def mutate_value(rng: random.Random, value, plain: bool = False):
    """A copy of nested dicts and lists with something else, too much or nothing at one or a few places.

    Args:
        plain: put in nothing that JSON cannot hold.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _mutate_once(rng, value, plain, depth=rng.randrange(12))
    return value


def _mutate_once(rng, value, plain, depth):
    if depth and isinstance(value, dict) and value:
        key = rng.choice(sorted(value, key=str))
        action = rng.randrange(12)
        if action == 0:
            del value[key]
        elif action == 1:
            value[rng.choice(('x', key if plain else 3, f'{key}_', ''))] = value.pop(key)
        elif action == 2:
            value[rng.choice(('extra', '', 'type'))] = rng.choice(JUNK)
        else:
            value[key] = _mutate_once(rng, value[key], plain, depth - 1)
        return value
    if depth and isinstance(value, (list, tuple)) and len(value):
        items, at = list(value), rng.randrange(len(value))
        action = rng.randrange(12)
        if action == 0:
            del items[at]
        elif action == 1:
            items.insert(at, copy.deepcopy(items[at]))
        elif action == 2:
            items.append(rng.choice(JUNK))
        elif action == 3:
            items = items[::-1]
        else:
            items[at] = _mutate_once(rng, items[at], plain, depth - 1)
        return type(value)(items)
    if isinstance(value, np.ndarray) and rng.random() < 0.8:
        return mutate_array(rng, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((-value, value * 1e6, value + 1, str(value), [value], value / 3))
    return rng.choice(JUNK if plain or rng.random() < 0.7 else OBJECTS)
