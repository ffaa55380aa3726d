"""Pickles from outside: damage is found before anything is read, and plain data are read without unpickling.

``pickle.Unpickler`` believes a file's sizes and numbers: one flipped byte, and it asks for gigabytes, or fills a memo
of billions of places. With a list of allowed names it runs no foreign code, but can still be made to ask for any
amount of memory, or to build what takes for ever to hash.

* ``find_damage`` reads the instructions alone, about a second per gigabyte: whether sizes and numbers can be true.
* ``SafeUnpickler`` builds plain containers and arrays, quickly, from files that are large and need not be trusted.
* ``read_plain_pickle`` reads dicts with text as keys, lists, text, numbers and numeric arrays. It knows 40
  instructions, looks no name up anywhere, reads a bounded number of bytes and follows a bounded number of
  instructions. Protocols 2 to 5, arrays as NumPy 1 and 2 pickle them.
"""

import functools
import os
import pickle
import pickletools
import re
import struct
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from .errors import reason

_LONGEST_NAME = 200
_COMPILE_FROM = 1 << 18  # bytes; smaller pickles are looked at sooner than a loop is compiled
# What follows an instruction: so many bytes, or one of these; _COUNTED + width: a size, then that many.
_UNKNOWN, _LINE, _TWO_LINES, _COUNTED = 100, 101, 102, 110
_FRAME, _LONG_PUT, _STOP = 0x95, ord('r'), ord('.')


@functools.lru_cache(maxsize=1)
def _argument_kinds() -> np.ndarray:
    """uint8 [256]: what follows each instruction."""
    counted = {
        pickletools.TAKEN_FROM_ARGUMENT1: _COUNTED + 1,
        pickletools.TAKEN_FROM_ARGUMENT4: _COUNTED + 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: _COUNTED + 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: _COUNTED + 8,
        pickletools.UP_TO_NEWLINE: _LINE,
    }
    kinds = np.full(256, _UNKNOWN, dtype=np.uint8)
    for opcode in pickletools.opcodes:
        size = 0 if opcode.arg is None else opcode.arg.n
        kinds[ord(opcode.code)] = counted.get(size, size)
    for code in 'ci':  # module and name
        kinds[ord(code)] = _TWO_LINES
    return kinds


def _scan(content, kinds, pickles):
    """Position of the first instruction that cannot be right; -1 if there is none in so many pickles."""
    place, size = 0, len(content)
    while place < size:
        code = content[place]
        kind = kinds[code]
        begin = place
        place += 1
        if code == _STOP:
            pickles -= 1
            if pickles == 0:
                return -1
        if kind == _UNKNOWN:
            return begin
        if kind in (_LINE, _TWO_LINES):
            for _ in range(kind - _LINE + 1):
                while place < size and content[place] != 10:
                    place += 1
                place += 1
            continue
        width = kind - _COUNTED if kind > _COUNTED else kind
        if place + width > size:
            return begin
        if kind > _COUNTED or code in (_LONG_PUT, _FRAME):
            number = 0
            for byte in range(width):
                number |= int(content[place + byte]) << (8 * byte)
            if number < 0 or (number > begin if code == _LONG_PUT else number > size - place - width):
                return begin
            if kind > _COUNTED:
                place += number
        place += width
    return size


def find_damage(path, pickles: int = 1) -> Optional[int]:
    """Position in a file of the first instruction of its pickle that cannot be right; None if all can.

    Args:
        pickles: how many there are, one behind the other; more may follow, or anything else.

    Wrong are unknown instructions, sizes that reach beyond the end of the file, memo places with numbers higher than
    the instructions before them, and a file that ends before its pickle does.
    """
    content = np.memmap(path, dtype=np.uint8, mode='r') if os.path.getsize(path) else np.zeros(0, np.uint8)
    if len(content) < _COMPILE_FROM:
        found = _scan(content.tobytes(), _argument_kinds().tolist(), pickles)
    else:
        found = _compiled_scan()(content, _argument_kinds(), pickles)
    return None if found < 0 else int(found)


@functools.lru_cache(maxsize=1)
def _compiled_scan():
    from .extension import jit

    return jit(_scan)


# -- names that are safe

_SAFE_BUILTINS = frozenset(
    ('bool', 'complex', 'dict', 'float', 'frozenset', 'int', 'list', 'set', 'slice', 'str', 'tuple')
)
_SAFE_NUMPY = frozenset(('_frombuffer', '_reconstruct', 'dtype', 'ndarray', 'scalar'))
_SAFE_OTHER = frozenset((('collections', 'OrderedDict'), ('_codecs', 'encode')))
# Modules in which the names of _SAFE_NUMPY live; NumPy 2 moved numpy.core to numpy._core.
_NUMPY_MODULES = (
    'numpy',
    'numpy.core.multiarray',
    'numpy.core.numeric',
    'numpy._core.multiarray',
    'numpy._core.numeric',
)


class RefusedName(pickle.UnpicklingError):
    """The pickle asks for a class or function that is not safe."""


class SafeUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays; refuses every other class or function a pickle names."""

    def find_class(self, module: str, name: str):
        if module in ('builtins', '__builtin__') and name in ('bytes', 'bytearray'):
            return functools.partial(_made_of_content, bytes if name == 'bytes' else bytearray)
        if module in ('builtins', '__builtin__') and name in _SAFE_BUILTINS:
            return super().find_class('builtins', name)
        if module in _NUMPY_MODULES and _is_safe_numpy_name(name):
            return _find_in_numpy(super().find_class, module, name)
        if module == 'numpy.dtypes' and name.endswith('DType'):
            return super().find_class(module, name)
        if (module, name) in _SAFE_OTHER:
            return super().find_class(module, name)
        raise RefusedName(f'it names {module}.{name}')


def _is_safe_numpy_name(name):
    if name in _SAFE_NUMPY:
        return True
    kind = getattr(np, name, None)
    return isinstance(kind, type) and issubclass(kind, np.generic) and not issubclass(kind, np.flexible)


def _made_of_content(kind, content=b'', *encoding):
    """``bytes`` or a ``bytearray`` of bytes or of a text; those of a number would take as much memory."""
    if not isinstance(content, (bytes, str)):
        raise pickle.UnpicklingError(f'{kind.__name__} are not made of a number')
    return kind(content, *encoding)


def _find_in_numpy(find_class, module, name):
    """Look the name up where this NumPy keeps it: numpy.core became numpy._core in NumPy 2."""
    core = 'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else 'numpy.core'
    return find_class(re.sub(r'^numpy\._?core\b', core, module), name)


# -- plain data without unpickling


class NotPlain(Exception):
    """The pickle is damaged, asks for more than plain data, or is larger than it may be. One phrase says which."""


def read_plain_pickle(stream, most_bytes: int, most_instructions: int) -> Any:
    """The object in a pickle.

    Args:
        stream: ``read(size)`` gives bytes.
        most_bytes: that may be read.
        most_instructions: that may be followed; a number or a short text is one, an array about 40.

    Raises:
        NotPlain: see there. What ``stream.read`` raises is passed on.
    """
    reader = _Reader(stream, most_bytes)
    try:
        for _ in range(most_instructions):
            code = reader.take(1)
            if code == pickle.STOP:
                return _content(reader.stack.pop())
            if code not in _INSTRUCTIONS:
                raise NotPlain('it holds something other than dicts, lists, text, numbers and arrays')
            _INSTRUCTIONS[code](reader)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise NotPlain(f'it is damaged ({type(error).__name__}: {reason(error)})') from error
    raise NotPlain(f'it needs more than {most_instructions} instructions to build')


class _Reader:
    """The state of the machine that a pickle is a program for."""

    def __init__(self, stream, most_bytes):
        self._stream, self._left, self._most = stream, most_bytes, most_bytes
        self.stack: List[Any] = []
        self.marks: List[int] = []
        self.memo: Dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise NotPlain(f'it unpacks to more than {self._most} bytes, the most that it can need')
        content = self._stream.read(size)
        if len(content) < size:
            raise NotPlain('it ends too early')
        return content

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), 'little')

    def line(self) -> str:
        content = b''
        while not content.endswith(b'\n') and len(content) < _LONGEST_NAME:
            content += self.take(1)
        return content[:-1].decode('ascii')

    def push(self, value) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list:
        items = self.stack[len(self.stack) - count :]
        if len(items) < count:
            raise IndexError('the stack is empty')
        del self.stack[len(self.stack) - count :]
        return items

    def pop_mark(self) -> list:
        return self.pop(len(self.stack) - self.marks.pop())

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError('no list to append to')
        self.stack[-1].extend(_content(item) for item in items)

    def set_items(self, items: list) -> None:
        if type(self.stack[-1]) is not dict or any(type(key) is not str for key in items[::2]):
            raise NotPlain('it holds a dict whose keys are not text')
        self.stack[-1].update(zip(items[::2], map(_content, items[1::2])))

    def find(self, module: str, name: str) -> None:
        if (module, name) not in _STAND_INS:
            raise NotPlain(f'it names {module}.{name}, and only dicts, lists, text, numbers and arrays are read')
        self.push(_STAND_INS[module, name])

    def reduce(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _StandIn):
            raise TypeError('it calls what is no function')
        self.push(function.call(*arguments))

    def build(self) -> None:
        (state,) = self.pop(1)
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise TypeError('it sets the state of what is no array')
        self.stack[-1].set_state(*state)


class _StandIn:
    """Stands for a function or class that a pickle names."""

    def __init__(self, call: Callable):
        self.call = call


class _Dtype:
    """Stands for a ``numpy.dtype`` of numbers."""

    def __init__(self, text, *flags):
        dtype = np.dtype(text) if isinstance(text, str) and len(text) <= 3 else np.dtype(object)
        if dtype.kind not in 'biuf':
            raise NotPlain(f'it holds an array of {text!r}, and only numbers are read')
        self.numpy = dtype

    def set_state(self, version, byte_order, *others):
        if byte_order not in ('<', '>', '|', '='):
            raise ValueError(f'unknown byte order {byte_order!r}')
        self.numpy = self.numpy.newbyteorder(byte_order)


class _Array:
    """Stands for a ``numpy.ndarray``, which is there once its content has come."""

    def __init__(self, *_):
        self.numpy = None

    def set_state(self, version, shape, dtype, fortran_order, content):
        self.numpy = _make_array(content, dtype, shape, 'F' if fortran_order else 'C')


def _make_array(content, dtype, shape, order):
    if not isinstance(content, bytes) or not isinstance(dtype, _Dtype):
        raise NotPlain('it holds an array that is not made of numbers')
    return np.frombuffer(content, dtype.numpy).reshape(shape, order=order)


def _latin1(text, encoding):
    """``_codecs.encode``, with which protocol 2 writes bytes."""
    if encoding != 'latin1':
        raise ValueError(f'unknown encoding {encoding!r}')
    return text.encode('latin1')


def _empty_dict(*_):
    """A dict of whatever class, whose items come later."""
    return {}


def _content(value):
    """The array that a stand-in holds; another value as it is."""
    if isinstance(value, (_StandIn, _Dtype)) or (isinstance(value, _Array) and value.numpy is None):
        raise NotPlain('it holds a class or an array without content')
    return value.numpy if isinstance(value, _Array) else value


_STAND_INS = {
    ('builtins', 'dict'): _StandIn(_empty_dict),
    ('__builtin__', 'dict'): _StandIn(_empty_dict),
    ('collections', 'OrderedDict'): _StandIn(_empty_dict),
    ('collections', 'defaultdict'): _StandIn(_empty_dict),
    ('_codecs', 'encode'): _StandIn(_latin1),
    ('numpy', 'dtype'): _StandIn(_Dtype),
    ('numpy', 'ndarray'): _StandIn(_Array),
    ('numpy.core.multiarray', '_reconstruct'): _StandIn(_Array),
    ('numpy._core.multiarray', '_reconstruct'): _StandIn(_Array),
    ('numpy.core.numeric', '_frombuffer'): _StandIn(_make_array),
    ('numpy._core.numeric', '_frombuffer'): _StandIn(_make_array),
}


def _text(content):
    return content.decode('utf-8', 'surrogatepass')


_INSTRUCTIONS: Dict[bytes, Callable[[_Reader], Any]] = {
    pickle.PROTO: lambda r: r.take(1),
    pickle.FRAME: lambda r: r.take(8),
    pickle.NONE: lambda r: r.push(None),
    pickle.NEWTRUE: lambda r: r.push(True),
    pickle.NEWFALSE: lambda r: r.push(False),
    pickle.BININT: lambda r: r.push(int.from_bytes(r.take(4), 'little', signed=True)),
    pickle.BININT1: lambda r: r.push(r.number(1)),
    pickle.BININT2: lambda r: r.push(r.number(2)),
    pickle.LONG1: lambda r: r.push(int.from_bytes(r.take(r.number(1)), 'little', signed=True)),
    pickle.BINFLOAT: lambda r: r.push(struct.unpack('>d', r.take(8))[0]),
    pickle.SHORT_BINUNICODE: lambda r: r.push(_text(r.take(r.number(1)))),
    pickle.BINUNICODE: lambda r: r.push(_text(r.take(r.number(4)))),
    pickle.BINUNICODE8: lambda r: r.push(_text(r.take(r.number(8)))),
    pickle.SHORT_BINBYTES: lambda r: r.push(r.take(r.number(1))),
    pickle.BINBYTES: lambda r: r.push(r.take(r.number(4))),
    pickle.BINBYTES8: lambda r: r.push(r.take(r.number(8))),
    pickle.BYTEARRAY8: lambda r: r.push(r.take(r.number(8))),
    pickle.EMPTY_DICT: lambda r: r.push({}),
    pickle.EMPTY_LIST: lambda r: r.push([]),
    pickle.EMPTY_TUPLE: lambda r: r.push(()),
    pickle.MARK: lambda r: r.marks.append(len(r.stack)),
    pickle.APPEND: lambda r: r.append(r.pop(1)),
    pickle.APPENDS: lambda r: r.append(r.pop_mark()),
    pickle.SETITEM: lambda r: r.set_items(r.pop(2)),
    pickle.SETITEMS: lambda r: r.set_items(r.pop_mark()),
    pickle.TUPLE1: lambda r: r.push(tuple(r.pop(1))),
    pickle.TUPLE2: lambda r: r.push(tuple(r.pop(2))),
    pickle.TUPLE3: lambda r: r.push(tuple(r.pop(3))),
    pickle.TUPLE: lambda r: r.push(tuple(r.pop_mark())),
    pickle.GLOBAL: lambda r: r.find(r.line(), r.line()),
    pickle.STACK_GLOBAL: lambda r: r.find(*r.pop(2)),
    pickle.REDUCE: lambda r: r.reduce(),
    pickle.BUILD: lambda r: r.build(),
    pickle.BINGET: lambda r: r.push(r.memo[r.number(1)]),
    pickle.LONG_BINGET: lambda r: r.push(r.memo[r.number(4)]),
    pickle.BINPUT: lambda r: r.memo.update({r.number(1): r.stack[-1]}),
    pickle.LONG_BINPUT: lambda r: r.memo.update({r.number(4): r.stack[-1]}),
    pickle.MEMOIZE: lambda r: r.memo.update({len(r.memo): r.stack[-1]}),
}
