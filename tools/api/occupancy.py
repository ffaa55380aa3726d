"""A prediction in the hands of a program: volumes, voxels, instances, metres, a picture, a file.

X, Y, Z the grid; K voxels. Metres are in the ego frame of the predicted moment: x forward, y left, z up.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from lib.geometry import voxel_centers
from lib.io import PathLike, path_inside
from lib.prediction import check_record, read_record, save_prediction, to_dense, write_record
from lib.task import Task


@dataclass(frozen=True)
class Instance:
    """One thing or one piece of stuff, as panoptic models count them.

    Attributes:
        id: its number in ``Occupancy.instances``, from 1.
        class_id: of ``Occupancy.class_names``.
        class_name: e.g. ``car``.
        is_thing: counted one by one; False for stuff, of which there is one per class.
        voxels: int64 [K, 3], its voxels.
    """

    id: int
    class_id: int
    class_name: str
    is_thing: bool
    voxels: np.ndarray


@dataclass(frozen=True)
class Occupancy:
    """Occupancy of one moment.

    Attributes:
        arrays: the sparse prediction as it is saved (``lib.prediction``): sem_pred uint8 [1, K], occ_loc [1, K, 3]
            and, of panoptic models, pano_inst int16 [1, K] and pano_sem uint8 [1, K].
        task: classes, range, grid and cameras.
        name: of the moment; names its file.
        seconds: of the moment; None where unknown.
        source: config, weights and override that it comes from, for the record beside saved predictions.
    """

    arrays: Mapping[str, np.ndarray]
    task: Task
    name: str = 'occupancy'
    seconds: Optional[float] = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> Tuple[str, ...]:
        """By class id; the last one is free."""
        return tuple(self.task.label_set.class_names)

    @property
    def free_id(self) -> int:
        return self.task.label_set.free_id

    @property
    def point_cloud_range(self) -> Tuple[float, ...]:
        """(x0, y0, z0, x1, y1, z1) of the grid, metres."""
        return self.task.point_cloud_range

    @property
    def voxel_size(self) -> float:
        """Edge of a voxel, metres."""
        return self.task.voxel_size

    @property
    def grid_shape(self) -> Tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.task.grid_shape

    @cached_property
    def dense(self) -> Dict[str, np.ndarray]:
        """``semantics`` and, as far as predicted, ``instances`` and ``flow``, as metrics and pictures take them."""
        return to_dense(self.arrays, self.task, f'the prediction {self.name}')

    @property
    def semantics(self) -> np.ndarray:
        """uint8 [X, Y, Z]: class ids, ``free_id`` where nothing is."""
        return self.dense['semantics']

    @property
    def instances(self) -> Optional[np.ndarray]:
        """int32 [X, Y, Z]: ids from 1, 0 = none; None of models that do not count things."""
        return self.dense.get('instances')

    @cached_property
    def voxels(self) -> np.ndarray:
        """int64 [K, 3]: indices x, y, z of the voxels that are not free, in row-major order."""
        return np.argwhere(self.semantics != self.free_id)

    @property
    def classes(self) -> np.ndarray:
        """uint8 [K]: class ids of ``voxels``."""
        return self.semantics[tuple(self.voxels.T)]

    @property
    def centres(self) -> np.ndarray:
        """float64 [K, 3]: centres of ``voxels``, metres."""
        return self.to_metres(self.voxels)

    def list_instances(self) -> List[Instance]:
        """Every instance, by id; empty of models that do not count things."""
        if self.instances is None:
            return []
        labels, found = self.task.label_set, self.instances[tuple(self.voxels.T)]
        result = []
        for number in np.unique(found[found > 0]):
            of_it = found == number
            class_id = int(np.bincount(self.classes[of_it]).argmax())
            is_thing = class_id in labels.thing_ids
            result.append(Instance(int(number), class_id, self.class_names[class_id], is_thing, self.voxels[of_it]))
        return result

    def to_metres(self, voxels: np.ndarray) -> np.ndarray:
        """Centres, float64 [..., 3] in metres, of voxel indices [..., 3]."""
        return voxel_centers(self.point_cloud_range, self.voxel_size, self.grid_shape, np.asarray(voxels))

    def to_voxels(self, points: np.ndarray) -> np.ndarray:
        """Voxels, int64 [..., 3], that hold points [..., 3] in metres; outside the grid their indices are, too."""
        low = np.asarray(self.point_cloud_range[:3])
        return np.floor((np.asarray(points, dtype=np.float64) - low) / self.voxel_size).astype(np.int64)

    def classes_at(self, points: np.ndarray) -> np.ndarray:
        """Class ids, uint8 [...], at points [..., 3] in metres; free outside the grid."""
        voxels = self.to_voxels(points)
        inside = ((voxels >= 0) & (voxels < self.grid_shape)).all(-1)
        found = self.semantics[tuple(np.moveaxis(np.where(inside[..., None], voxels, 0), -1, 0))]
        return np.where(inside, found, self.free_id).astype(np.uint8)

    def plot(
        self, path: Optional[PathLike] = None, images: Optional[Mapping[str, np.ndarray]] = None, title: str = ''
    ) -> np.ndarray:
        """A picture: occupancy (and instances) seen obliquely and from above, with a legend.

        Args:
            path: where to write it; the suffix names the format. None: nowhere.
            images: camera images to show, uint8 [height, width, 3] RGB by name.
            title: of the picture; '' takes ``name``.

        Returns:
            uint8 [height, width, 3] RGB.
        """
        from tools.drawing.figure import draw_figure
        from tools.drawing.frames import prediction_volume
        from tools.drawing.pictures import save_image

        volumes = [prediction_volume(self.dense)]
        picture = draw_figure(self.task, volumes, dict(images or {}), title or self.name)
        if path is not None:
            save_image(path, picture)
        return picture

    def save(self, folder: PathLike, name: Optional[str] = None) -> Path:
        """Write ``<folder>/<name>.npz`` in the form of all predictions, and the record beside it.

        ``tools/evaluate.py`` and ``tools/visualize.py`` read them; ``numpy.load`` does, too.

        Args:
            folder: made if missing; holds predictions of one label set and grid.
            name: None takes ``self.name``.

        Returns:
            the file's path.

        Raises:
            UserError: the folder holds predictions of another kind, the name leads out of it, or it is not writable.
        """
        path = path_inside(folder, f'{name or self.name}.npz')
        Path(folder).mkdir(parents=True, exist_ok=True)
        record = read_record(folder)
        if record is None:
            write_record(folder, self.task, **self.source)
        else:
            check_record(record, self.task, f'the predictions that {folder} holds already')
        save_prediction(path, self.arrays)
        return Path(path)
