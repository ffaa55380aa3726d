"""What runs, evaluation and checks of the data need of a data set.

Any class with these methods will do; none has to inherit from anything here. Another data set than the one in this
project is one such class, registered and named in ``data.train.type`` and the like.
"""

from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Sequence

import numpy as np

from .io import PathLike
from .labels import OPTIONAL
from .task import Task


class Dataset(Protocol):
    """Samples, by their number from 0; that is all that training reads.

    A sample is a dict: img uint8 [T*N, 3, H, W] (BGR), lidar2img float32 [T*N, 4, 4] (LIDAR_TOP to pixels),
    ego2lidar float64 [T*N, 4, 4] (metres), img_metas (plain values; ``sample_token`` at least), and in training
    ``targets`` (:class:`lib.targets.OccupancyTargets`). T frames, N cameras, the current frame first.

    A sample's random draws depend on the data set's seed, the epoch and the index alone. A sample that cannot be
    read raises :class:`lib.errors.DataError`.
    """

    def __len__(self) -> int:
        """Samples."""

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """A sample, ready to be collated."""

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of this epoch (from 0) from now on."""


class DrivenDataset(Dataset, Protocol):
    """A data set that is quick to go through in order, for a model that keeps the features of frames."""

    def following(self, index: int, before: int) -> Dict[str, Any]:
        """Sample ``index`` as it is asked for right after sample ``before``: ``img`` holds only the frames that the
        latter lacks, at the positions (0..T-1) that ``given`` of ``img_metas`` lists; all else is as ever.
        """


class BalancedDataset(Dataset, Protocol):
    """A data set that ``train.class_balance`` can draw from by class."""

    def object_classes(self, index: int) -> List[str]:
        """Classes of the label set that the sample has objects of, without opening its files."""


class ScoredDataset(Dataset, Protocol):
    """A data set whose samples can be scored."""

    def sample_token(self, index: int) -> str:
        """The sample's name, unique in the data set and good as a file name."""

    def scene_name(self, index: int) -> str:
        """Name of the sample's scene, '' if it is not known; how sure scores are is found out by scenes."""

    def ground_truth(self, index: int, names: Sequence[str] = OPTIONAL) -> Dict[str, np.ndarray]:
        """semantics uint8 [X, Y, Z] (class ids, 255 = ignore), and of ``names`` those there are: instances int
        [X, Y, Z] (0 = none), mask_camera and mask_lidar bool [X, Y, Z], flow float [X, Y, Z, 2] (m/s along x and y);
        the task's volume, ego frame of the sample.

        Raises:
            DataError: there are no labels, or they cannot be read.
        """

    def ray_origins(self, index: int) -> np.ndarray:
        """Where rays begin: float64 [n, 3], metres, ego frame of the sample."""


class CheckedDataset(ScoredDataset, Protocol):
    """A data set whose files can be looked at before long work.

    Attributes:
        task: what is predicted, from which images.
        infos: what is known of each keyframe without opening its files; the samples are some of them.
        positions: of each sample's keyframe in ``infos``.
        ann_file: where that comes from, for messages.
        data_root: folder that the paths of ``infos`` are looked up in.
        version: name of the recordings, for messages; may be empty.
        has_labels: whether ``ground_truth`` and ``label_path`` can be asked for.
        reads_lidar: samples come with the points of the keyframe's LiDAR scan.
        skips_unreadable: a damaged file costs a sample and not the run.
    """

    task: Task
    infos: Sequence[Dict[str, Any]]
    positions: List[int]
    ann_file: PathLike
    data_root: PathLike
    version: str
    has_labels: bool
    reads_lidar: bool
    skips_unreadable: bool

    def previous(self, position: int) -> Optional[int]:
        """Position in ``infos`` of the keyframe before ``infos[position]`` in its scene; None at its start."""

    def label_path(self, index: int) -> Path:
        """Path of the sample's label file."""

    def used_positions(self) -> List[int]:
        """Positions in ``infos`` of all keyframes that samples read, as current or earlier frames."""
