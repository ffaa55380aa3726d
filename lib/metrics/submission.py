"""Challenge submissions, written and read: CVPR 2024 Occupancy and Flow, and Occ3D 2023.

The first is ``submission.gz``: gzip of one pickled dict with the keys of ``ABOUT`` and ``results``, which holds for
each sample the ends of its N rays: ``pcd_cls`` uint8 [N], ``pcd_dist`` float16 [N] metres, ``pcd_flow`` float16 [N, 2]
m/s (``lib.metrics.counting``). Samples are written one at a time, so that memory stays flat. A submission from others
is data: it is read by ``lib.pickles``, and no more of it is unpacked than the samples asked for can need. The second is
a zip of ``<token>.npz``, which ``lib.metrics.formats`` reads.
"""

import gzip
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import DataError, reason
from ..io import PathLike, atomic_write, require_file
from ..pickles import NotPlain, read_plain_pickle
from ..prediction import class_ids, finite
from ..task import Task
from .counting import FlowRays
from .origins import MAX_ORIGINS, lidar_rays

ABOUT = {
    'method': str,
    'team': str,
    'authors': list,
    'e-mail': str,
    'institution / company': str,
    'country / region': str,
}
_ARRAYS = ('pcd_cls', 'pcd_dist', 'pcd_flow')
_BYTES_PER_RAY = 16  # 7 as the challenge asks for, 13 with distances and velocities in single precision
_BYTES_AROUND = 1 << 16
_INSTRUCTIONS_PER_SAMPLE = 500
_MOST_SAMPLES = 10000


class Submission(NamedTuple):
    """A submission to the occupancy and flow challenge.

    Attributes:
        about: the keys of ``ABOUT``.
        results: rays of each sample by its token.
    """

    about: Dict[str, Any]
    results: Dict[str, FlowRays]


def write_submission(path: PathLike, about: Mapping[str, Any], results: Iterable[Tuple[str, FlowRays]]) -> None:
    """Write a submission, compressed and pickled as the challenge asks for.

    Args:
        path: e.g. ``submission.gz``.
        about: the keys of ``ABOUT``.
        results: (token, rays) of every sample; may be a generator.

    Raises:
        DataError: a key is missing or of the wrong type, or a sample comes twice.
        UserError: the file cannot be written.
    """
    about = check_about(about, 'the description of the submission')
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        with gzip.GzipFile('', 'wb', compresslevel=9, fileobj=file, mtime=0) as stream:
            pickler = pickle.Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL)
            pickler.fast = True  # remembers nothing, so that samples can be forgotten once they are written
            pickler.dump(dict(about, results=_Streamed(results)))


class _Streamed:
    """Is pickled as a dict whose items are made while they are written."""

    def __init__(self, results):
        self._results = results

    def __reduce__(self):
        return dict, (), None, None, self._items()

    def _items(self):
        seen = set()
        for token, rays in self._results:
            if token in seen:
                raise DataError(f'sample {token} comes twice in the submission; predict each sample once')
            seen.add(token)
            types = (np.uint8, np.float16, np.float16)
            yield token, {name: np.ascontiguousarray(part, kind) for name, part, kind in zip(_ARRAYS, rays, types)}


def check_about(about: Mapping[str, Any], where: str) -> Dict[str, Any]:
    """The keys of ``ABOUT`` alone. Raises DataError for one that is missing or of the wrong type."""
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key), kind):
            wanted = 'a list of names' if kind is list else 'text'
            raise DataError(f'{where} has no {key!r}, or it is not {wanted}; the keys are {", ".join(ABOUT)}')
    return {key: about[key] for key in ABOUT}


def read_submission(path: PathLike, task: Task, num_rays: Optional[Mapping[str, int]] = None) -> Submission:
    """Read a submission from anywhere, and check it.

    Args:
        path: file as :func:`write_submission` and the challenge's examples write it.
        task: its label set.
        num_rays: {token: origins * 14,040} of the samples that must be there; None takes what there is.

    Raises:
        DataError: it is missing or damaged, asks for more than plain data, lacks a key or a sample, or has arrays of
            the wrong type, length or range.
    """
    path = Path(path)
    samples, most = _MOST_SAMPLES, MAX_ORIGINS * len(lidar_rays())
    if num_rays is not None:
        samples, most = len(num_rays), max(num_rays.values(), default=0)
    content = _load(path, samples, (samples + 1) * (most * _BYTES_PER_RAY + _BYTES_AROUND))
    if not isinstance(content, dict) or not isinstance(content.get('results'), dict):
        raise DataError(f"{path} is no submission: it must hold a dict with {', '.join(ABOUT)} and 'results'")
    about, found = check_about(content, str(path)), content['results']
    missing = [token for token in num_rays or () if token not in found]
    if missing:
        raise DataError(
            f'{path} lacks {len(missing)} of {len(num_rays or ())} samples, e.g. {missing[0]}; predict them'
        )
    results = {}
    for token in found if num_rays is None else num_rays:
        results[token] = _rays(found[token], task, f'{path}, sample {token}')
        if num_rays is not None and len(results[token].label) != num_rays[token]:
            raise DataError(
                f'{path}, sample {token} has {len(results[token].label)} rays, needed are {num_rays[token]}; cast '
                f'{len(lidar_rays())} from each of its origins'
            )
    return Submission(about, results)


def _rays(entry, task, where) -> FlowRays:
    """Checked rays of one sample."""
    arrays: List[Any] = [entry.get(name) for name in _ARRAYS] if isinstance(entry, dict) else [None]
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise DataError(f'{where} needs the arrays {", ".join(_ARRAYS)}')
    count = arrays[0].shape
    if len(count) != 1 or [array.shape for array in arrays] != [count, count, count + (2,)]:
        shapes = ', '.join(f'{name} {list(array.shape)}' for name, array in zip(_ARRAYS, arrays))
        raise DataError(f'{where} has arrays that do not fit together: {shapes}; needed are [N], [N] and [N, 2]')
    label = class_ids(arrays[0], 'pcd_cls', task, where)
    lost = 'numbers that are not finite in half precision'
    rest = (finite(array, np.float16, name, where, lost) for name, array in zip(_ARRAYS[1:], arrays[1:]))
    return FlowRays(label, *rest)


def write_occ3d_submission(path: PathLike, results: Iterable[Tuple[str, np.ndarray]]) -> None:
    """Write the form of the Occ3D challenge of 2023: a zip of ``<token>.npz``, one unnamed array each.

    Args:
        path: e.g. ``submission.zip``.
        results: (token, class ids uint8 [X, Y, Z] with free) of every sample; may be a generator.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:
        for token, semantics in results:
            content = io.BytesIO()
            np.savez_compressed(content, np.asarray(semantics, dtype=np.uint8))
            archive.writestr(f'{token}.npz', content.getvalue())


def _load(path, samples, most_bytes):
    """The object in a gzipped pickle of plain data."""
    require_file(path)
    try:
        with gzip.open(path, 'rb') as stream:
            return read_plain_pickle(stream, most_bytes, (samples + 1) * _INSTRUCTIONS_PER_SAMPLE)
    except NotPlain as error:
        raise DataError(f'{path} was refused: {error}') from error
    except (zlib.error, OSError, EOFError) as error:
        raise DataError(
            f'{path} is no readable submission ({reason(error)}); it must be the gzip of one pickled dict'
        ) from error
