"""Arrays in ``.npy`` and ``.npz`` files, read as data: nothing is unpickled, and no more is read than may be there.

``numpy.load`` makes room for whatever shape a file says it has; here the size is known to be sensible first.
"""

import ast
import lzma
import struct
import zipfile
import zlib
from typing import List

import numpy as np

from .errors import DataError

NUMBERS, PLAIN = 'biuf', 'biufcUS'  # kinds of types: real numbers; also complex ones and texts
_MOST_HEADER_BYTES = 65536
# What reading a damaged file raises: zipfile and what decompresses for it, and the header's text as Python reads it.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,  # encrypted, or a compression that zipfile lacks
    MemoryError,
    OverflowError,
)


def array_names(archive: zipfile.ZipFile, where: str) -> List[str]:
    """Names of the arrays of an ``.npz``.

    Raises:
        DataError: two have one name.
    """
    names = [name[: -len('.npy')] for name in archive.namelist() if name.endswith('.npy')]
    if len(set(names)) < len(names):
        raise DataError(f'{where} holds two arrays of one name; save it again')
    return names


def read_npy(stream, where: str, most_values: int, kinds: str = NUMBERS) -> np.ndarray:
    """The array in an ``.npy`` stream, which may not be written to.

    Args:
        where: what messages call it.
        most_values: that it may have.
        kinds: of types that it may be of, see ``numpy.dtype.kind``.

    Raises:
        DataError: it has more values, is of another type, cut short or too long.
        UNREADABLE: it is damaged in other ways.
    """
    shape, fortran_order, dtype = _read_header(stream, where, kinds)
    count = 1
    for length in shape:
        count *= length
    if count > most_values or len(shape) > 8:
        raise DataError(
            f'{where} has shape {list(shape)}, more than the {most_values} values that there may be; is it of another '
            'grid?'
        )
    content = stream.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise DataError(f'{where} ends after {len(content)} of {count * dtype.itemsize} bytes; make or fetch it again')
    if stream.read(1):  # at its end a zip compares the checksum
        raise DataError(f'{where} is longer than its shape {list(shape)} says; make or fetch it again')
    return np.frombuffer(content, dtype, count).reshape(shape, order='F' if fortran_order else 'C')


def _read_header(stream, where, kinds):
    """(shape, Fortran order, type) of an ``.npy`` stream."""
    start = stream.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(start[6] if len(start) == 8 else 0)
    if start[:6] != b'\x93NUMPY' or width is None:
        raise DataError(f'{where} is no array of NumPy; save it with numpy.save or numpy.savez_compressed')
    length = int.from_bytes(stream.read(width), 'little')
    if length > _MOST_HEADER_BYTES:
        raise DataError(f'{where} has a header of {length} bytes; it is damaged, make or fetch it again')
    header = ast.literal_eval(stream.read(length).decode('latin1').strip())
    shape, fortran_order, dtype = header['shape'], header['fortran_order'], header['descr']
    if not isinstance(dtype, str) or np.dtype(dtype).kind not in kinds or np.dtype(dtype).itemsize > 1024:
        raise DataError(f'{where} holds {dtype!r}, not plain numbers; objects and records are never read')
    if not isinstance(shape, tuple) or any(type(length) is not int or length < 0 for length in shape):
        raise DataError(f'{where} has shape {shape!r} in its header; it is damaged, make or fetch it again')
    return shape, bool(fortran_order), np.dtype(dtype)
