"""Label files of other projects: lists of occupied voxels around LIDAR_TOP, one file a keyframe.

They become dense volumes with Occ3D's ids, which the classes 1-16 have in common: 0, unknown, is ignored (255), and
what is not listed is free (17). ``task.label_files`` names the format, which brings its grid with it.
"""

from pathlib import Path
from typing import Callable, Dict, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from .classes import IGNORE_LABEL, OCC3D
from .errors import DataError
from .geometry import Grid
from .io import load_npy_checked, path_inside

NPZ = 'npz'  # this project's, and Occ3D's and OpenOcc's: dense, <scene>/<token>/labels.npz
_REMEDY = 'give an info file that gen_sweep_info.py made (ann_file, --infos)'


class LabelFormat(NamedTuple):
    """Where the files of a project lie and what stands in them.

    Attributes:
        grid: volume and voxels.
        columns: where x, y, z and the class stand in a row.
        path: file of a keyframe, from the label folder and the keyframe's info.
    """

    grid: Grid
    columns: Tuple[int, int, int, int]
    path: Callable[[Path, Mapping], Path]


def _named_after_scan(root: Path, info: Mapping) -> Path:
    """SurroundOcc: ``samples/<file of the LiDAR's scan>.npy``; without ``samples`` where the folder is that one."""
    name = Path(str(info.get('lidar_path') or '').replace('\\', '/')).name
    if not name:
        raise DataError(f'keyframe {info["token"]} has no lidar_path, which names its file in {root}; {_REMEDY}')
    folder = root / 'samples' if (root / 'samples').is_dir() else root
    return path_inside(folder, f'{name}.npy')


def _named_after_tokens(root: Path, info: Mapping) -> Path:
    """OpenOccupancy: ``scene_<token>/occupancy/<token of the LiDAR's scan>.npy``."""
    missing = [key for key in ('scene_token', 'lidar_token') if not info.get(key)]
    if missing:
        raise DataError(f'keyframe {info["token"]} has no {missing[0]}, which names its file in {root}; {_REMEDY}')
    return path_inside(root, f'scene_{info["scene_token"]}', 'occupancy', f'{info["lidar_token"]}.npy')


LABEL_FORMATS: Dict[str, LabelFormat] = {
    'surroundocc': LabelFormat(
        Grid('lidar', (-50.0, -50.0, -5.0, 50.0, 50.0, 3.0), 0.5), (0, 1, 2, 3), _named_after_scan
    ),
    'openoccupancy': LabelFormat(
        Grid('lidar', (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), 0.2), (2, 1, 0, 3), _named_after_tokens
    ),
}


def read_listed(path, name: str) -> np.ndarray:
    """Dense labels of a file of format ``name``: uint8 [U, V, W], Occ3D's ids. A voxel listed twice is the last.

    Raises:
        DataError: missing or damaged file, rows of another kind, or voxels and classes that there are not.
    """
    form = LABEL_FORMATS[name]
    shape = form.grid.shape
    rows = load_npy_checked(path, 4 * int(np.prod(shape)))
    if rows.ndim != 2 or rows.shape[1] != 4 or not (rows == np.floor(rows)).all():
        raise DataError(
            f'{path} holds {rows.dtype} {list(rows.shape)}, but {name} lists voxels as whole numbers [N, 4]; correct '
            'task.label_files'
        )
    columns = rows.astype(np.int64)[:, form.columns]
    _check_rows(path, name, columns, [*shape, OCC3D.free_id])
    semantics = np.full(shape, OCC3D.free_id, dtype=np.uint8)
    x, y, z, classes = columns.T
    semantics[x, y, z] = np.where(classes == 0, IGNORE_LABEL, classes)
    return semantics


def _check_rows(path, name, columns, limits: Sequence[int]):
    for values, limit, what in zip(columns.T, limits, ('x', 'y', 'z', 'class')):
        if len(values) and not 0 <= values.min() <= values.max() < limit:
            raise DataError(
                f'{path} holds {what} from {values.min()} to {values.max()}, but {name} has 0..{limit - 1}; the file '
                'is damaged, or task.label_files names another format'
            )
