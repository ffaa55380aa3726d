"""How the total batch is dealt over processes and accumulation steps, and which samples make it up.

The samples of an optimizer step, and their order, depend on the seed and the step alone. Only their division
into forward passes depends on the number of processes and on the accumulation.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..errors import ConfigError
from ..registry import check_whole
from .numerics import mix


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of the forward passes of an optimizer step.

    Attributes:
        total: samples of an optimizer step.
        sizes: [accumulation step][rank] samples of that forward pass; each at least 1.
    """

    total: int
    sizes: Tuple[Tuple[int, ...], ...]

    @property
    def accumulate(self) -> int:
        return len(self.sizes)

    @property
    def world_size(self) -> int:
        return len(self.sizes[0])

    def loss_factor(self, micro_step: int, rank: int) -> float:
        """Factor of a forward pass's loss, whose gradient DDP averages over the processes: the sum over the
        step's passes is then the mean over the total batch. 1.0 if processes share evenly in one pass."""
        return self.sizes[micro_step][rank] * self.world_size / self.total

    def share(self, micro_step: int, rank: int) -> float:
        """This process's part of the samples that all processes hold in an accumulation step."""
        return self.sizes[micro_step][rank] / sum(self.sizes[micro_step])

    def part(self, micro_step: int, rank: int) -> Tuple[int, int]:
        """(begin, end) within the total batch of a forward pass's samples."""
        flat = [size for row in self.sizes for size in row]
        position = micro_step * self.world_size + rank
        begin = sum(flat[:position])
        return begin, begin + flat[position]

    def describe(self) -> str:
        sizes = sorted({size for row in self.sizes for size in row})
        each = f'{sizes[0]}' if len(sizes) == 1 else f'{sizes[0]} or {sizes[-1]}'
        return (
            f'total batch {self.total} = {each} samples x {self.world_size} processes x {self.accumulate} '
            'accumulation steps'
        )


def plan_batch(total: int, world_size: int, accumulate: Union[str, int] = 'auto', max_per_pass: int = 0) -> BatchPlan:
    """Deal ``total`` samples over processes and accumulation steps as evenly as they go.

    Args:
        total: samples of an optimizer step (``total_batch_size``).
        world_size: processes.
        accumulate: forward passes per step, or 'auto': as few as ``max_per_pass`` allows.
        max_per_pass: most samples in one forward pass; 0 sets no limit.

    Raises:
        ConfigError: there would be a forward pass without a sample.
    """
    check_whole(total, 1, 'total_batch_size')
    if isinstance(accumulate, str):  # 'auto'
        per_process = -(-total // world_size)
        accumulate = -(-per_process // max_per_pass) if max_per_pass else 1
        accumulate = min(accumulate, max(total // world_size, 1))
    if total < world_size * accumulate:
        raise ConfigError(
            f'total_batch_size {total} is too small for {world_size} processes x {accumulate} accumulation steps; use '
            f'at most {max(total // accumulate, 1)} processes, fewer steps, or a larger batch'
        )
    base, extra = divmod(total, world_size * accumulate)
    sizes = [base + (i < extra) for i in range(world_size * accumulate)]
    rows = tuple(tuple(sizes[a * world_size : (a + 1) * world_size]) for a in range(accumulate))
    return BatchPlan(total, rows)


class EpochOrder:
    """The order of samples in each epoch.

    Args:
        num_samples: length of the data set.
        total: samples of an optimizer step.
        seed: of the run.
        weights: float64 [num_samples], how often samples are drawn in proportion; None takes each once.
    """

    def __init__(self, num_samples: int, total: int, seed: int, weights: Optional[Tensor] = None):
        self.num_samples, self.total, self.seed, self.weights = num_samples, total, seed, weights

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; the last is filled up from the epoch's first samples."""
        return -(-self.num_samples // self.total)

    def order(self, epoch: int) -> List[int]:
        """Sample indices of an epoch: each once (or by its weight), the first ones once more where the last step needs
        it."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        permutation = torch.randperm(self.num_samples, generator=generator)
        if self.weights is not None:
            permutation = self._drawn(permutation, self.weights, generator)
        order, wanted = permutation.tolist(), self.steps * self.total
        return (order * -(-wanted // len(order)))[:wanted]

    def _drawn(self, permutation: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """As many samples as there are, each drawn its expected number of times, rounded up or down by chance."""
        cumulated = weights[permutation].cumsum(0)
        offset = torch.rand(1, dtype=torch.float64, generator=generator)
        steps = (torch.arange(len(weights), dtype=torch.float64) + offset) * (cumulated[-1] / len(weights))
        drawn = permutation[torch.searchsorted(cumulated, steps, right=True).clamp(max=len(weights) - 1)]
        return drawn[torch.randperm(len(drawn), generator=generator)]


def balancing_weights(classes: Sequence[Iterable[str]], share: float) -> Tensor:
    """How often to draw each sample so that every class is met alike: class-balanced sampling (CBGS, arXiv 1908.09492).

    Args:
        classes: of each sample.
        share: of the draws that is dealt to the classes, evenly, and within a class to its samples, evenly; the rest is
            dealt to all samples alike.

    Returns:
        float64 [samples], mean 1.

    Raises:
        ConfigError: no sample has a class.
    """
    present = [set(names) for names in classes]
    counts = Counter(name for names in present for name in names)
    if not counts:
        raise ConfigError('train.class_balance: no training sample has a box of an occupied class; set it to 0')
    by_class = [sum(1 / counts[name] for name in sorted(names)) / len(counts) for names in present]
    return 1 - share + share * len(present) * torch.tensor(by_class, dtype=torch.float64)


class RankBatches:
    """Batch sampler of one process for one epoch: its samples of every forward pass from a given step on."""

    def __init__(self, order: EpochOrder, plan: BatchPlan, rank: int):
        self.order, self.plan, self.rank = order, plan, rank
        self.epoch, self.first_step, self.last_step = 0, 0, order.steps

    def select(self, epoch: int, first_step: int, last_step: int) -> None:
        """Go over steps first_step .. last_step - 1 of an epoch next."""
        self.epoch, self.first_step, self.last_step = epoch, first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.accumulate

    def __iter__(self) -> Iterator[List[int]]:
        order = self.order.order(self.epoch)
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.plan.accumulate):
                begin, end = self.plan.part(micro_step, self.rank)
                yield order[step * self.plan.total + begin : step * self.plan.total + end]
