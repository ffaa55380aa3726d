"""Reading files from outside as data, and writing files so that a half-written one is never seen.

Nothing in ``.npy`` and ``.npz`` files is unpickled, and no more is read than may be there: ``numpy.load`` makes room
for whatever shape a file says it has; here the size is known to be sensible first.
"""

import ast
import contextlib
import errno
import json
import lzma
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple, Union

import numpy as np

from .errors import DataError, UserError, reason
from .pickles import RefusedName, SafeUnpickler, find_damage

PathLike = Union[str, os.PathLike]

MOST_VALUES = 1 << 27  # of an array in a file where nothing more is known: 1 GiB in double precision
NUMBERS, PLAIN = 'biuf', 'biufcUS'  # kinds of types: real numbers; also complex ones and texts
_MOST_HEADER_BYTES = 65536
_LONGEST_FILE_NAME = 255  # bytes, of all file systems in use
# What reading a damaged file raises: zipfile and what decompresses for it, Python's parser of headers, unpicklers.
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
    ImportError,
    AssertionError,
)
_CANNOT_WRITE = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.EFBIG,
        errno.EIO,
        errno.ESTALE,
    )
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


def expand_path(path: PathLike) -> str:
    """The path with ``~`` and ``$VARIABLES`` replaced; an unknown variable stays as it is."""
    return os.path.expandvars(os.path.expanduser(os.fspath(path)))


def find_under(root: PathLike, value: PathLike) -> Path:
    """A path of a config: absolute, relative to ``root``, or, as published configs have it, with the root in front.

    >>> find_under('data/nuscenes', 'occ3d'), find_under('data/nuscenes', 'data/nuscenes/occ3d')
    (PosixPath('data/nuscenes/occ3d'), PosixPath('data/nuscenes/occ3d'))
    """
    base, path = Path(expand_path(root)), Path(expand_path(value))
    under = base / path
    has_root = path.parts[: len(base.parts)] == base.parts
    return path if (has_root or path.exists()) and not under.exists() else under


def require_file(path: PathLike, remedy: str = 'check the path, or fetch the file') -> Path:
    """The path. Raises DataError, which tells the remedy, if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f'{path} does not exist; {remedy}')
    return path


def load_pickle_safe(path: PathLike, allow_any: bool = False):
    """Object from a pickle that may hold only plain containers, numbers, strings and numpy arrays.

    Args:
        path: file to read.
        allow_any: trust the file and let it build (and so run) anything.

    Raises:
        DataError: missing or damaged file, or one that asks for another class or function.
    """
    path = require_file(path, 'check the path (data_root, ann_file), or make the info files with gen_sweep_info.py')
    try:
        damage = None if allow_any else find_damage(path)
        if damage is not None:
            raise DataError(f'{path} is not a readable pickle (byte {damage} cannot be right); make or fetch it again')
        with open(path, 'rb') as stream:
            return (pickle.Unpickler if allow_any else SafeUnpickler)(stream).load()
    except RefusedName as error:
        raise DataError(
            f'{path} was refused: {reason(error)}, and only plain data and numpy arrays are read from pickles; if you '
            'trust where the file is from, set allow_any_pickle=True in that section of data'
        ) from error
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        raise DataError(
            f'{path} is not a readable pickle ({type(error).__name__}: {reason(error)}); make or fetch it again'
        ) from error


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well it replaces ``path`` in one step.

    A crash, a full disk or an exception in the block leaves ``path`` as it was. The temporary name keeps
    the suffix, because np.savez and others add one that is missing. Missing folders are made.
    What is no file, as /dev/null or a pipe, is yielded itself: root would put a file in its place for everybody.

    Raises:
        UserError: the file cannot be written (disk full, no permission, ...).
    """
    path = Path(path)
    is_device = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    temporary = path if is_device else path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not is_device:
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f'cannot write {path}: {os.strerror(error.errno)}; free some space or choose another folder (an earlier '
            'file of that name is untouched)'
        ) from error
    finally:
        if not is_device:
            with contextlib.suppress(OSError):
                temporary.unlink()


def check_outputs(*paths: Optional[PathLike]) -> None:
    """Raise UserError for the first of the files that can be told beforehand not to be writable; None is left out.

    For scripts that write at their end with :func:`atomic_write`, which makes missing folders: the work should not be
    lost to a wrong name.
    """
    for path in [Path(path) for path in paths if path]:
        if path.is_dir():
            raise UserError(f'cannot write {path}, which is a folder; give the name of a file in it')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f'cannot write {path}: {folder} is no folder that you may write to; choose another place')


def make_folder(path: PathLike, option: str = '--out') -> Path:
    """The folder, made if missing and checked to be writable.

    Args:
        option: of the command line that names it.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make the folder {path} ({error.strerror}); choose another {option}') from error
    if not os.access(folder, os.W_OK):
        raise UserError(f'cannot write to {path}; choose another {option}')
    return folder


def _flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_pickle(path: PathLike, value) -> None:
    """Write ``value`` as a pickle (protocol 4: Python 3.8 reads it), atomically."""
    with atomic_write(path) as temporary, open(temporary, 'wb') as stream:
        pickle.dump(value, stream, protocol=4)


def save_npz(path: PathLike, arrays: Dict[str, np.ndarray]) -> None:
    """Write arrays as a compressed ``.npz``, atomically."""
    with atomic_write(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def write_json(path: PathLike, value) -> None:
    """Write ``value`` as indented JSON, atomically. NumPy numbers and arrays become plain ones."""
    with atomic_write(path) as temporary, open(temporary, 'w', encoding='utf-8') as stream:
        json.dump(value, stream, indent=2, default=_to_plain)
        stream.write('\n')


def _to_plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f'{type(value).__name__} cannot be written as JSON')


def read_json(path: PathLike):
    """Value of a JSON file.

    Raises:
        DataError: missing or damaged file.
    """
    path = require_file(path)
    try:
        with open(path, encoding='utf-8') as stream:
            return json.load(stream)
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f'{path} is not readable JSON ({reason(error)}); make or fetch it again') from error


def load_npz_checked(
    path: PathLike,
    required: Iterable[str] = (),
    optional: Optional[Iterable[str]] = None,
    most_values: int = MOST_VALUES,
) -> Dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file; objects in it are never unpickled.

    Args:
        path: file to read.
        required: keys that must be there.
        optional: further keys to read where present; None reads everything.
        most_values: that one array may have.

    Raises:
        DataError: missing or damaged file, a required key is not in it, or an array is larger.
    """
    arrays = {}
    with _open_npz(path) as (archive, names):
        missing = [key for key in required if key not in names]
        if missing:
            found = ', '.join(sorted(names)) or 'nothing'
            raise DataError(f'{path} has no {missing[0]!r} (it holds {found}); is it a file of another kind?')
        for name in names if optional is None else [k for k in names if k in set(required) | set(optional)]:
            with archive.open(f'{name}.npy') as stream:
                arrays[name] = read_npy(stream, f'{path}: {name!r}', most_values, PLAIN).copy()
    return arrays


def npz_sizes(path: PathLike) -> Dict[str, int]:
    """Bytes of each array of an ``.npz`` file once unpacked, with its header; its directory alone is read.

    Raises:
        DataError: missing or damaged file.
    """
    with _open_npz(path) as (archive, names):
        return {name: archive.getinfo(f'{name}.npy').file_size for name in names}


@contextlib.contextmanager
def _open_npz(path: PathLike) -> Iterator[Tuple[zipfile.ZipFile, List[str]]]:
    """An ``.npz`` file and the names of its arrays; DataError where it is missing, or what is done with it fails."""
    path = require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, array_names(archive, str(path))
    except UNREADABLE as error:
        raise DataError(f'{path} is damaged or no .npz file ({reason(error)}); make or fetch it again') from error


def load_npy_checked(path: PathLike, most_values: int) -> np.ndarray:
    """The array of an ``.npy`` file of real numbers, read as data.

    Raises:
        DataError: missing or damaged file, another type, or more values.
    """
    path = require_file(path)
    try:
        with open(path, 'rb') as stream:
            return read_npy(stream, str(path), most_values)
    except UNREADABLE as error:
        raise DataError(f'{path} is damaged or no .npy file ({reason(error)}); make or fetch it again') from error


def path_inside(folder: PathLike, *parts: str) -> Path:
    """``folder/parts...``, where the parts come from data and must be plain names.

    Raises:
        UserError: a part is empty, '.' or '..', too long, or holds a path separator or what cannot be printed.
    """
    for part in parts:
        fits = part.isprintable() and len(os.fsencode(part)) <= _LONGEST_FILE_NAME
        if part in ('', '.', '..') or '/' in part or '\\' in part or not fits:
            raise UserError(
                f'{part[:60]!r} is no plain file or folder name, so nothing is read or written under it in {folder}; '
                'the file that it comes from is damaged'
            )
    return Path(folder, *parts)
