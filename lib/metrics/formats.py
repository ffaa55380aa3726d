"""Prediction files of any project: the form is recognised once, and every file read is checked against it.

What is read, for each sample one file of one of these kinds:

* dense ``.npz``: class ids [X, Y, Z] under ``pred``, ``arr_0`` (one unnamed array), ``semantics`` (label files) or
  ``pano_sem``, with panoptic predictions instance ids under ``pano_inst`` or ``instances``, and perhaps ``flow``
  [X, Y, Z, 2];
* sparse ``.npz`` of this project: ``occ_loc``, ``sem_pred`` and perhaps ``pano_inst``, ``pano_sem``, ``flow``
  (``lib.prediction``);
* dense ``.npy``.

They are named ``<token>.npz``, or ``pred.npz`` / ``labels.npz`` in a folder named after the token, at any depth of one
folder or one ``.zip``. Class ids and indices are integers of any type, or whole numbers in floats; dense arrays may
have a batch axis of 1 in front. Files are data: objects in them are never unpickled, and no array is read that is
larger than the grid allows. X, Y, Z the task's grid.
"""

import io
import json
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import DataError, reason
from ..io import UNREADABLE, array_names, read_npy
from ..prediction import (
    RECORD_FILE,
    check_record,
    class_ids,
    instance_ids,
    read_record,
    select_record,
    to_dense,
    velocities,
)
from ..task import Task

_CLASS_NAMES = ('pred', 'arr_0', 'semantics', 'pano_sem')
_INSTANCE_NAMES = ('pano_inst', 'instances')
_SPARSE_PARTNERS = (
    ('occ_loc', 'sem_pred'),
    ('sem_pred', 'occ_loc'),
    ('pano_inst', 'pano_sem'),
    ('pano_sem', 'pano_inst'),
)
_SUFFIXES = ('.npz', '.npy')
_NAMED_BY_FOLDER = ('pred', 'labels')
_MOST_BYTES_PER_VOXEL = 256  # of one file in a zip: all arrays in 64 bits, and others' extra arrays


class PredictionForm(NamedTuple):
    """How the files of one folder are written.

    Attributes:
        suffix: ``.npz`` or ``.npy``.
        classes: name of the array of class ids; '' in ``.npy``.
        instances: name of the array of instance ids; '' if there is none.
        flow: there is an array ``flow``.
        sparse: voxels are listed in ``occ_loc``.
    """

    suffix: str
    classes: str = ''
    instances: str = ''
    flow: bool = False
    sparse: bool = False

    def describe(self) -> str:
        """One phrase, e.g. ``dense .npz, classes in 'pred'``."""
        parts = [f'{"sparse" if self.sparse else "dense"} {self.suffix}']
        parts += [f'classes in {self.classes!r}'] if self.classes else []
        parts += [f'instances in {self.instances!r}'] if self.instances else []
        return ', '.join(parts + ['with flow'] * self.flow)


def recognise(names: Sequence[str], where: str) -> PredictionForm:
    """Form of an ``.npz`` with arrays of these names.

    Raises:
        DataError: there are no class ids, or more than one array could be them.
    """
    flow = 'flow' in names
    if 'occ_loc' in names or 'sem_pred' in names:
        rivals = [name for name in ('pred', 'arr_0', 'semantics', 'instances') if name in names]
        if rivals:
            raise DataError(f"{where} holds 'occ_loc' or 'sem_pred' and {rivals[0]!r}; save one form, sparse or dense")
        for name, partner in _SPARSE_PARTNERS:
            if name in names and partner not in names:
                raise DataError(f'{where} has {name!r} but no {partner!r}; a sparse prediction needs both')
        classes, instances = ('pano_sem', 'pano_inst') if 'pano_sem' in names else ('sem_pred', '')
        return PredictionForm('.npz', classes, instances, flow, sparse=True)
    classed = [name for name in _CLASS_NAMES if name in names]
    counted = [name for name in _INSTANCE_NAMES if name in names]
    if not classed:
        found = ', '.join(sorted(names)[:10]) or 'nothing'
        raise DataError(
            f'{where} holds no prediction (its arrays: {found}); name the class ids [X, Y, Z] pred, arr_0 or semantics'
        )
    pairs = [two for two in (classed, counted, ['arr_0', 'arr_1'] * ('arr_1' in names)) if len(two) > 1]
    if pairs:
        raise DataError(f'{where} holds both {pairs[0][0]!r} and {pairs[0][1]!r}; save the one that is to be scored')
    return PredictionForm('.npz', classed[0], ''.join(counted), flow)


class PredictionFiles:
    """Predictions of many samples in one form; made by :func:`open_predictions`.

    Attributes:
        path: the folder or zip.
        form: how each file is written.
        record: what the writer says about them (``lib.prediction.write_record``); None with those of others.
        tokens: samples that have a prediction, sorted.
    """

    def __init__(self, source, files: Dict[str, str], task: Task, record: Optional[dict]):
        self.path, self.record, self.tokens = source.path, record, sorted(files)
        self._source, self._files, self._task = source, files, task
        first = files[self.tokens[0]]
        with source.open(first, _most_bytes(task)) as stream:
            self.form = _form_of(stream, Path(first).suffix, source.describe(first))

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._files

    def describe(self) -> str:
        """One line: how many, of what form, and what their record says."""
        record = f'no {RECORD_FILE} beside them, so label set and grid are taken on trust'
        if self.record:
            record = ', '.join(f'{key} {self.record[key]}' for key in ('config', 'weights') if self.record.get(key))
        return f'{len(self)} predictions in {self.path}: {self.form.describe()}' + (f'; {record}' if record else '')

    def read(self, token: str, names: Sequence[str] = ('instances', 'flow')) -> Dict[str, np.ndarray]:
        """Dense prediction of a sample, as ``lib.prediction`` describes it; may be called by several threads.

        Args:
            token: of the sample.
            names: arrays to read beside ``semantics`` where the file has them.

        Raises:
            DataError: the file is damaged, of another form, or does not fit the task.
        """
        if token not in self:
            raise DataError(f'{self.path} has no prediction of sample {token}; predict it, or choose another sample')
        name = self._files[token]
        where = self._source.describe(name)
        with self._source.open(name, _most_bytes(self._task)) as stream:
            return _read(stream, self._task, where, self.form, names)

    def choose(self, tokens: Iterable[str], only_predicted: bool = False) -> Tuple[List[int], str]:
        """Which of a data set's samples to score.

        Args:
            tokens: of all samples, in order.
            only_predicted: leave out samples without a prediction.

        Returns:
            Their numbers, and a line about samples left out and predictions not used ('' if there are none).

        Raises:
            DataError: samples lack a prediction and may not be left out, or none has one.
        """
        tokens = list(tokens)
        chosen = [index for index, token in enumerate(tokens) if token in self]
        missing = [token for token in tokens if token not in self]
        surplus = sorted(set(self.tokens).difference(tokens))
        unused = f'; {_count(surplus)} in {self.path} are of no sample of it' if surplus else ''
        if missing and (not chosen or not only_predicted):
            remedy = ', or score the others with --only-predicted' if chosen else ''
            raise DataError(
                f'{len(missing)} of {len(tokens)} samples have no prediction, e.g. {missing[0]}{unused}; predict them, '
                f'or give the split or infos that they are of{remedy}'
            )
        notes = [f'left out: {_count(missing)} without a prediction'] if missing else []
        notes += [f'not used: {_count(surplus)} predicted but not in the data set'] if surplus else []
        return chosen, '; '.join(notes)


def _count(tokens):
    return f'{len(tokens)} sample{"s" * (len(tokens) != 1)} (e.g. {tokens[0]})'


def open_predictions(path, task: Task, needs: Sequence[str] = ()) -> PredictionFiles:
    """Find predictions and recognise their form; only the first one is opened.

    Args:
        path: folder or ``.zip``.
        task: grid and classes that are scored.
        needs: ``'instances'`` and ``'flow'``, as far as they are needed.

    Raises:
        DataError: there are none, two of one sample, files of several kinds, or they are of another label set or grid.
    """
    source = _open_source(path)
    names = [name for name in source.names() if PurePosixPath(name).suffix in _SUFFIXES]
    files = _by_token(names, source)
    if not files:
        raise DataError(f'{path} holds no .npz or .npy files; give the folder of val.py --save-predictions')
    record = source.record()
    if record is not None:
        check_record(record, task, f'the predictions in {path}')
    predictions = PredictionFiles(source, files, task, record)
    for name in needs:
        if not getattr(predictions.form, name):
            raise DataError(
                f'the predictions in {path} have no {name} ({predictions.form.describe()}), which the metrics need; '
                'predict with a model that has them, or leave these metrics out'
            )
    return predictions


def find_record(path) -> Optional[dict]:
    """What the writer of a folder or zip of predictions says about them; None where nothing is said.

    Raises:
        DataError: there is no such folder or zip, or the record is damaged.
    """
    return _open_source(path).record()


def _by_token(names, source) -> Dict[str, str]:
    """{sample token: file} of files of one kind."""
    files: Dict[str, str] = {}
    kinds: Dict[str, str] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        by_folder = path.stem in _NAMED_BY_FOLDER
        kinds.setdefault(path.name if by_folder else f'<token>{path.suffix}', name)
        token = path.parent.name if by_folder else path.stem
        if not token:
            raise DataError(
                f'{source.describe(name)} lies in no folder named after its sample; keep <token>/{path.name}'
            )
        if token in files:
            two = f'{source.describe(files[token])} and {source.describe(name)}'
            raise DataError(f'{two} are both predictions of sample {token}; give the folder of one run')
        files[token] = name
    if len(kinds) > 1:
        (one, example), (other, another) = list(kinds.items())[:2]
        raise DataError(
            f'{source.path} mixes files {one} and {other} ({example} and {another}); give a folder that holds one kind'
        )
    return files


def _open_source(path):
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise DataError(f'prediction folder {path} does not exist; give the folder of val.py --save-predictions')
    if path.suffix != '.zip':
        raise DataError(f'{path} is neither a folder of predictions nor a .zip of one; give the folder that it lies in')
    return _Zip(path)


class _Folder:
    """Files under a folder, named by their path in it."""

    def __init__(self, path):
        self.path = path

    def names(self):
        for folder, _, files in os.walk(self.path):
            for name in files:
                if not name.startswith('.'):
                    yield (Path(folder) / name).relative_to(self.path).as_posix()

    def describe(self, name):
        return str(self.path / name)

    def open(self, name, most_bytes):
        return _opened(self.path / name)

    def record(self):
        found = sorted((name for name in self.names() if PurePosixPath(name).name == RECORD_FILE), key=len)
        return read_record((self.path / found[0]).parent) if found else None


class _Zip:
    """Members of a zip. Each process opens it anew: a forked one would share its place in the file."""

    def __init__(self, path):
        self.path, self._opened = path, (None, None)

    def _archive(self):
        if self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except UNREADABLE as error:
                raise _damaged(self.path, error) from error
        return self._opened[1]

    def __getstate__(self):
        return dict(path=self.path, _opened=(None, None))

    def names(self):
        for name in self._archive().namelist():
            parts = PurePosixPath(name).parts
            if parts and not name.endswith('/') and '__MACOSX' not in parts and not parts[-1].startswith('.'):
                yield name

    def describe(self, name):
        return f'{self.path}: {name}'

    def open(self, name, most_bytes):
        where = self.describe(name)
        try:
            with self._archive().open(name) as stream:
                content = stream.read(most_bytes + 1)
        except UNREADABLE as error:
            raise _damaged(where, error) from error
        if len(content) > most_bytes:
            raise DataError(
                f'{where} unpacks to more than {most_bytes} bytes, too many for the task grid; is it a prediction?'
            )
        return io.BytesIO(content)

    def record(self):
        found = [name for name in self.names() if PurePosixPath(name).name == RECORD_FILE]
        if not found:
            return None
        where = self.describe(found[0])
        try:
            value = json.loads(self.open(found[0], 1 << 20).read().decode('utf-8'))
        except (ValueError, RecursionError) as error:
            raise _damaged(where, error) from error
        return select_record(value, where)


def _opened(path):
    try:
        return open(path, 'rb')
    except OSError as error:
        raise DataError(f'{path} cannot be read ({error.strerror}); check its permissions') from error


def _damaged(where, error):
    return DataError(f'{where} is damaged or no prediction file ({reason(error)}); make or fetch it again')


def _most_values(task):
    return 3 * int(np.prod(task.grid_shape))  # as many as indices of every voxel


def _most_bytes(task):
    return int(np.prod(task.grid_shape)) * _MOST_BYTES_PER_VOXEL + (1 << 20)


def _form_of(stream, suffix, where) -> PredictionForm:
    if suffix == '.npy':
        return PredictionForm(suffix)
    try:
        with zipfile.ZipFile(stream) as archive:
            return recognise(array_names(archive, where), where)
    except UNREADABLE as error:
        raise _damaged(where, error) from error


def _read(stream, task, where, form, extras) -> Dict[str, np.ndarray]:
    """Dense prediction from an open file of the form; ``extras`` are read beside the classes."""
    try:
        arrays, found = _arrays(stream, task, where, form, extras)
    except UNREADABLE as error:
        raise _damaged(where, error) from error
    if found.sparse:
        return to_dense(arrays, task, where)
    return _check_dense(arrays, found, task, where)


def _arrays(stream, task, where, form, extras) -> Tuple[Dict[str, np.ndarray], PredictionForm]:
    if form.suffix == '.npy':
        return {'': read_npy(stream, where, _most_values(task))}, form
    with zipfile.ZipFile(stream) as archive:
        names = array_names(archive, where)
        found = recognise(names, where)
        if found != form:
            raise DataError(
                f'{where} is of another form ({found.describe()}) than the files before it ({form.describe()}); give a '
                'folder that holds one kind'
            )
        if not found.sparse:
            kept = found.instances if 'instances' in extras else ''
            found = found._replace(instances=kept, flow=found.flow and 'flow' in extras)
        wanted = ('occ_loc', 'sem_pred', 'pano_sem', 'pano_inst') if found.sparse else (found.classes, found.instances)
        arrays = {}
        for name in wanted + ('flow',) * found.flow:
            if name in names:
                with archive.open(name + '.npy') as member:
                    arrays[name] = read_npy(member, f'{where}: {name!r}', _most_values(task))
    return arrays, found


def _check_dense(arrays, form, task, where) -> Dict[str, np.ndarray]:
    """Dense prediction from the arrays of a dense file."""
    shapes = {name: (arrays[name].shape, task.grid_shape + (2,) * (name == 'flow')) for name in arrays}
    if all(shape == (1,) + wanted for shape, wanted in shapes.values()):
        arrays = {name: array[0] for name, array in arrays.items()}
    elif any(shape != wanted for shape, wanted in shapes.values()):
        name = next(name for name, (shape, wanted) in shapes.items() if shape != wanted)
        shape, wanted = shapes[name]
        raise DataError(
            f'{where}: {name or "the array"!r} has shape {list(shape)}, but the task needs {list(wanted)}; check '
            'task.point_cloud_range and task.voxel_size'
        )
    dense = {'semantics': class_ids(arrays[form.classes], form.classes or 'the array', task, where)}
    if form.instances:
        dense['instances'] = instance_ids(arrays[form.instances], form.instances, where)
    if form.flow:
        dense['flow'] = velocities(arrays['flow'], 'flow', where)
    return {name: np.ascontiguousarray(array) for name, array in dense.items()}
