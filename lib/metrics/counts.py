"""What of samples is counted: counts by class, and by region of the ground plan; and how a ray's group is numbered.

X, Y the task's grid; C classes without free; T thresholds; G regions of the ground plan (distance rings x camera
sectors), P parts that it is told apart by.
"""

from typing import List, NamedTuple, Optional, Tuple

import numpy as np

from ..prediction import MAX_INSTANCE_ID
from ..task import Task

ID_BITS = MAX_INSTANCE_ID.bit_length()
CLASS_BITS, REGION_BITS, LEVEL_BITS = 7, 5, 4  # of the key of a group of rays; with two ids 55, of 63 that there are
MIN_SEGMENT_RAYS = 10  # smaller segments are no misses and no false alarms
EXACT = 2.0**53  # IoUs above one half are whole multiples of 1 / EXACT
HALF_BITS = 27  # of such a multiple that are summed apart, so that sums fit 64 bits
MATCHED, IOU_HIGH, IOU_LOW, MISSED, FALSE_ALARMS = range(5)  # columns of the counts of segments
FLOW_THRESHOLDS = (1.0, 2.0, 4.0)  # metres
RING_EDGES = (10.0, 20.0, 40.0)  # metres from the ego origin, in the ground plan
CAMERA_AZIMUTHS = {  # degrees from x (forward) to y (left) that nuScenes' cameras look along
    'CAM_FRONT': 0,
    'CAM_FRONT_LEFT': 55,
    'CAM_BACK_LEFT': 110,
    'CAM_BACK': 180,
    'CAM_BACK_RIGHT': 250,
    'CAM_FRONT_RIGHT': 305,
}


class FlowCounts(NamedTuple):
    """What samples contribute to the score of occupancy and flow (``lib.metrics.counting``).

    Attributes:
        rays: int64 [C, C + 1, T + 1], rays with a true class by true class, predicted class and thresholds kept.
        error: float64 [2, C], m/s, sum of velocity errors, over true positives and over all rays; 0 for classes that
            do not move.
        counted: int64 [2, C], rays that the sum is over.
    """

    rays: np.ndarray
    error: np.ndarray
    counted: np.ndarray


class Counts(NamedTuple):
    """What one sample, or many together, contribute to the scores; None where a metric was not asked for.

    Attributes:
        samples: how many.
        occupied: samples with a voxel predicted as something other than free.
        rays: int64 [G, C, C + 1, T + 1], rays with a true class by region, true class, predicted class and number of
            thresholds that the depth error is below.
        segments: int64 [P, T, C, 5] (see ``kernels.count_segments``); part 0 is everything, then rings, then sectors.
        voxels: int64 [G, C + 1, C + 1], voxels by region, true and predicted class.
        flow: of occupancy and flow.
    """

    samples: int
    occupied: int
    rays: Optional[np.ndarray]
    segments: Optional[np.ndarray]
    voxels: Optional[np.ndarray]
    flow: Optional[FlowCounts] = None


def add_counts(one: Counts, other: Counts) -> Counts:
    """Sum of two counts of the same metrics."""
    rays, segments, voxels = (None if a is None else a + b for a, b in zip(one[2:5], other[2:5]))
    flow = (
        None if one.flow is None or other.flow is None else FlowCounts(*(a + b for a, b in zip(one.flow, other.flow)))
    )
    return Counts(one.samples + other.samples, one.occupied + other.occupied, rays, segments, voxels, flow)


class Regions(NamedTuple):
    """Parts of the ground plan.

    Attributes:
        rings, sectors: their names; G = rings x sectors, sectors running faster.
        of_column: uint8 [X * Y], region of each column of voxels.
    """

    rings: Tuple[str, ...]
    sectors: Tuple[str, ...]
    of_column: np.ndarray

    @property
    def parts(self) -> List[Tuple[str, str]]:
        """(kind, name) of everything, then of each of several ``rings`` and ``sectors``."""
        several = [
            (kind, names) for kind, names in (('rings', self.rings), ('sectors', self.sectors)) if len(names) > 1
        ]
        return [('', 'all')] + [(kind, name) for kind, names in several for name in names]

    @property
    def members(self) -> np.ndarray:
        """bool [P, G]: which regions each part is made of."""
        of_region = [(ring, sector) for ring in self.rings for sector in self.sectors]
        return np.array([[not kind or name in pair for pair in of_region] for kind, name in self.parts])


def whole_plan(task: Task) -> Regions:
    """One region that is everything."""
    return Regions(('all',), ('all',), np.zeros(task.grid_shape[0] * task.grid_shape[1], dtype=np.uint8))


def rings_and_sectors(task: Task) -> Regions:
    """Distance rings around the ego origin, and the sectors nearest to the directions of the task's cameras.

    Where the direction of a camera is not known there is one sector.
    """
    x, y = (
        task.point_cloud_range[axis] + (np.arange(task.grid_shape[axis]) + 0.5) * task.voxel_size for axis in (0, 1)
    )
    x, y = np.meshgrid(x, y, indexing='ij')
    ring = np.digitize(np.hypot(x, y), RING_EDGES)
    sectors = task.cameras if set(task.cameras) <= set(CAMERA_AZIMUTHS) else ('all',)
    azimuth = np.degrees(np.arctan2(y, x))[..., None]
    apart = np.abs((azimuth - [CAMERA_AZIMUTHS.get(name, 0) for name in sectors] + 180) % 360 - 180)
    sector = apart.argmin(axis=-1)
    edges = ('0',) + tuple(f'{edge:g}' for edge in RING_EDGES)
    rings = tuple(f'{low}-{high} m' for low, high in zip(edges, edges[1:])) + (f'over {edges[-1]} m',)
    return Regions(rings, sectors, (ring * len(sectors) + sector).astype(np.uint8).reshape(-1))
