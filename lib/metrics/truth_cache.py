"""True ray ends kept between evaluations: the truth does not change, only predictions do."""

from typing import Any, NamedTuple, Optional

import numpy as np

from .comparison import RayEnds


class TrueRays(NamedTuple):
    """Rays of one sample whose true label is a class other than free.

    Attributes:
        rays: int32 [M], indices in o * R + r.
        ends: where they end in the truth.
    """

    rays: Any
    ends: RayEnds


class TruthCache:
    """Bounded store of :class:`TrueRays` by sample.

    Samples come round in the same order in every evaluation, so nothing is thrown out for newcomers: once
    full, what is there stays useful.

    Args:
        max_bytes: memory for the arrays (on the device they live on).
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._samples = {}

    def find(self, key: str, origins: np.ndarray) -> Optional[TrueRays]:
        """True rays of a sample; None if they are not kept or were cast from other origins."""
        known_origins, truth = self._samples.get(key, (None, None))
        return truth if truth is not None and np.array_equal(known_origins, origins) else None

    def has_room(self, num_rays: int) -> bool:
        """Up to ``num_rays`` more rays may be kept."""
        return self._bytes + num_rays * 16 <= self._max_bytes

    def keep(self, key: str, origins: np.ndarray, truth: TrueRays) -> None:
        """Keep the true rays of a sample; a key known already is replaced."""
        if key in self._samples:
            self._bytes -= _size(self._samples.pop(key)[1])
        self._samples[key] = (np.array(origins), truth)
        self._bytes += _size(truth)


def select_true_rays(ends: RayEnds, free_id: int) -> TrueRays:
    """The rays among all O * R whose true label is a class other than free."""
    if isinstance(ends.label, np.ndarray):
        rays = np.flatnonzero(ends.label < free_id)
        indices = rays.astype(np.int32)
    else:
        rays = (ends.label < free_id).nonzero().reshape(-1)
        indices = rays.int()
    instance = None if ends.instance is None else ends.instance[rays]
    return TrueRays(indices, RayEnds(ends.label[rays], ends.distance_m[rays], instance))


def _size(truth):
    arrays = [truth.rays, truth.ends.label, truth.ends.distance_m]
    if truth.ends.instance is not None:
        arrays.append(truth.ends.instance)
    return sum(
        len(array) * (array.itemsize if isinstance(array, np.ndarray) else array.element_size()) for array in arrays
    )
