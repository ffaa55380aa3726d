"""What a run has finished: a folder in the data root that lets a stopped run go on, gone once all is made."""

import io
import json
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np

from lib.errors import UserError
from lib.io import load_npz_checked, read_json, write_json

from . import tables
from .files import json_lines, json_list, remove_unfinished, write_bytes
from .lidar import Surface

FOLDER = 'toy_work'


class SurfaceParts(NamedTuple):
    """What the scans of one keyframe contribute to the labels of its scene: a surface, and how far the rays of the
    keyframe's own scan went (``lidar.Scan.distance``)."""

    surface: Surface
    distance: np.ndarray


class Receipt(NamedTuple):
    """What the tables need to know of one keyframe; ``categories`` by object index."""

    sensors: List[tables.SensorRecord]
    boxes: List[tables.BoxRecord]
    categories: Dict[int, str]


class WorkFolder:
    """Receipts of one run, by scene index and keyframe.

    Args:
        out: the data root.
    """

    def __init__(self, out: Path):
        self.path = Path(out) / FOLDER

    def begin(self, arguments: Dict) -> None:
        """Start, or go on where a run stopped that had the same arguments (JSON values).

        Raises:
            UserError: the unfinished run had others.
        """
        file = self.path / 'arguments.json'
        if not file.exists():
            write_json(file, arguments)
            return
        before = read_json(file)
        for name, value in arguments.items():
            if before.get(name) != value:
                raise UserError(
                    f'{self.path.parent} holds an unfinished run with {name} {before.get(name)}, not {value}; '
                    'give the same arguments to go on, or another --out'
                )
        remove_unfinished(self.path.parent)

    def finish(self) -> None:
        """Everything is made."""
        shutil.rmtree(str(self.path))

    def _file(self, scene, name, suffix) -> Path:
        return self.path / str(scene) / f'{name}{suffix}'

    def has_scans(self, scene: int, keyframe: int) -> bool:
        """Scans of the keyframe are made, and what the tables need to know of it."""
        return self._file(scene, keyframe, '.json').exists()

    def has_images(self, scene: int, keyframe: int) -> bool:
        """Images of the keyframe are made."""
        return self._file(scene, keyframe, '.images').exists()

    def has_labels(self, scene: int, keyframe: int) -> bool:
        """Labels of the keyframe are made."""
        return self._file(scene, keyframe, '.labels').exists()

    def put_images(self, scene: int, keyframe: int) -> None:
        """Images of the keyframe are made."""
        write_bytes(self._file(scene, keyframe, '.images'), b'')

    def put_receipt(self, scene: int, keyframe: int, receipt: Receipt) -> None:
        """Scans of the keyframe are made; the receipt is of its images too."""
        write_bytes(self._file(scene, keyframe, '.json'), json_list(json_lines(receipt)))

    def receipt(self, scene: int, keyframe: int) -> Receipt:
        """The same again."""
        sensors, boxes, categories = read_json(self._file(scene, keyframe, '.json'))
        return Receipt(
            [tables.SensorRecord(*r[:5], np.array(r[5]), tuple(r[6])) for r in sensors],
            [tables.BoxRecord(r[0], r[1], np.array(r[2]), *r[3:]) for r in boxes],
            {int(index): category for index, category in categories.items()},
        )

    def put_scans(self, scene: int, keyframe: int, parts: SurfaceParts) -> None:
        """What the keyframe's scans contribute to the labels of the scene."""
        stream = io.BytesIO()
        np.savez(stream, points=parts.surface.points, source=parts.surface.source, distance=parts.distance)
        write_bytes(self._file(scene, keyframe, '.npz'), stream.getvalue())

    def scans(self, scene: int, keyframe: int) -> SurfaceParts:
        """The same again."""
        found = load_npz_checked(self._file(scene, keyframe, '.npz'))
        return SurfaceParts(Surface(found['points'], found['source']), found['distance'])

    def put_labels(self, scene: int, keyframe: int) -> None:
        """Labels of the keyframe are made."""
        write_bytes(self._file(scene, keyframe, '.labels'), b'')

    def has_rows(self, scene: int) -> bool:
        """The scene's part of the tables is made."""
        return self._file(scene, 'tables', '.json').exists()

    def put_rows(self, scene: int, rows: Dict[str, str]) -> None:
        """The scene's part of every table (see ``tables.scene_rows``)."""
        write_bytes(self._file(scene, 'tables', '.json'), json.dumps(rows).encode())

    def rows(self, scene: int) -> Dict[str, str]:
        """The same again."""
        return read_json(self._file(scene, 'tables', '.json'))
