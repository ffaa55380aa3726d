"""Is what was exported the same network? Outputs beside PyTorch's."""

from typing import List, NamedTuple, Sequence

import numpy as np


class Difference(NamedTuple):
    """One output beside that of PyTorch.

    Attributes:
        name: of the output.
        shape: of it.
        equal: share of equal values, 0..1.
        largest: largest difference.
        scale: largest value of PyTorch's, for comparison.
    """

    name: str
    shape: Sequence[int]
    equal: float
    largest: float
    scale: float

    def __str__(self) -> str:
        said = f'{self.name} {list(self.shape)}: {100 * self.equal:.4f} % equal'
        return said if self.equal == 1 else f'{said}, at most {self.largest:.2g} apart (values up to {self.scale:.3g})'


def compare(names: Sequence[str], found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> List[Difference]:
    """How outputs differ from PyTorch's.

    Raises:
        ValueError: they are not of the same number, shapes and types.
    """
    differences = []
    for name, one, other in zip(names, found, expected):
        if one.shape != other.shape or one.dtype != other.dtype or len(found) != len(expected):
            raise ValueError(f'{name}: {one.dtype} {one.shape} instead of {other.dtype} {other.shape}')
        apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
        scale = float(np.abs(other.astype(np.float64)).max(initial=0))
        differences.append(
            Difference(name, one.shape, float((one == other).mean()), float(apart.max(initial=0)), scale)
        )
    return differences
