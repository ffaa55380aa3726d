"""A look at the instructions of a pickle before it is read: whether its sizes and numbers can be true.

``pickle.Unpickler`` believes them: one flipped byte of a file, and it asks for gigabytes, or fills a memo of billions
of places. Reading the instructions alone takes about a second per gigabyte.
"""

import functools
import os
import pickletools
from typing import Optional

import numpy as np

_COMPILE_FROM = 1 << 18  # bytes; smaller pickles are looked at sooner than a loop is compiled
_UNKNOWN, _LINE, _TWO_LINES, _COUNTED = (
    100,
    101,
    102,
    110,
)  # above: so many bytes follow; _COUNTED + width: a size, then that many
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
    content = np.memmap(str(path), dtype=np.uint8, mode='r') if os.path.getsize(path) else np.zeros(0, np.uint8)
    if len(content) < _COMPILE_FROM:
        found = _scan(content.tobytes(), _argument_kinds().tolist(), pickles)
    else:
        found = _compiled_scan()(content, _argument_kinds(), pickles)
    return None if found < 0 else int(found)


@functools.lru_cache(maxsize=1)
def _compiled_scan():
    from .extension import jit

    return jit(_scan)
