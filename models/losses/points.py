"""Which voxels the mask losses compare: unsure ones (arXiv 2112.01527, section 3.3), those of rare classes more often.

Shapes: B batch, K kept voxels, m matched pairs of a sample, R candidates, P chosen points.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lib.dist import batch_rand
from lib.errors import ConfigError


@dataclass(frozen=True)
class PointChoice:
    """How points are chosen, with replacement; the draws depend on seed, step and sample alone.

    Attributes:
        num_points: P.
        oversample_ratio: R / P; the candidates that the unsure points are taken from.
        importance_sample_ratio: share of the points that are the candidates whose logit is nearest to 0; the others are
            drawn without looking.
        class_power: a voxel whose class has n voxels is drawn in proportion to n ** -class_power (after arXiv
            2304.05316); 0 draws all alike, 1 all classes alike.
    """

    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float
    class_power: float

    def __post_init__(self):
        if self.num_points < 1 or self.oversample_ratio < 1:
            raise ConfigError(
                'Mask2FormerLoss: num_points (None for all voxels) and oversample_ratio must be at least 1, got '
                f'{self.num_points!r} and {self.oversample_ratio!r}'
            )
        if not 0 <= self.importance_sample_ratio <= 1 or not 0 <= self.class_power <= 1:
            raise ConfigError(
                'Mask2FormerLoss: importance_sample_ratio and class_power must be in 0..1, got '
                f'{self.importance_sample_ratio!r} and {self.class_power!r}'
            )

    @property
    def num_unsure(self) -> int:
        return int(self.importance_sample_ratio * self.num_points)

    @property
    def num_candidates(self) -> int:
        return int(self.oversample_ratio * self.num_points) if self.num_unsure else 0

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Numbers for ``choose``, float32 [B, R + others] in [0, 1)."""
        return batch_rand(batch, self.num_candidates + self.num_points - self.num_unsure, device=device)

    def cumulate(self, labels: Tensor, counted: Optional[Tensor]) -> Tensor:
        """Cumulative weights of a sample's voxels, float64 [K].

        Args:
            labels: uint8 [K], classes; 255 is one of them.
            counted: float32 [K], 0 where a voxel must not be chosen, or None.
        """
        _, of_voxel, counts = labels.unique(return_inverse=True, return_counts=True)
        weights = (counts.double() ** -self.class_power)[of_voxel]
        return (weights if counted is None else weights * counted).cumsum(0)

    def choose(self, logits: Tensor, cumulated: Tensor, numbers: Tensor) -> Tensor:
        """Points of every mask of a sample.

        Args:
            logits: [m, K].
            cumulated: float64 [K], see ``cumulate``.
            numbers: float32 [R + others].

        Returns:
            int64 [m, P], voxels.
        """
        drawn = torch.searchsorted(cumulated, numbers.double() * cumulated[-1], right=True)
        candidates, others = drawn.clamp(max=len(cumulated) - 1).split(
            [self.num_candidates, len(numbers) - self.num_candidates]
        )
        sureness = logits.detach()[:, candidates].abs()
        unsure = candidates[sureness.topk(self.num_unsure, dim=1, largest=False).indices]
        return torch.cat([unsure, others.expand(len(logits), -1)], dim=1)
