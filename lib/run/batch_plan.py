"""How the total batch is dealt over processes and accumulation steps, and which samples make it up.

The samples of an optimizer step, and their order, depend on the seed and the step alone. Only their division
into forward passes depends on the number of processes and on the accumulation.
"""

from dataclasses import dataclass
from typing import Iterator, List, Tuple, Union

import torch

from ..errors import ConfigError
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
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ConfigError(f'total_batch_size must be an integer of at least 1, got {total!r}')
    if isinstance(accumulate, str):  # 'auto'
        per_process = -(-total // world_size)
        accumulate = -(-per_process // max_per_pass) if max_per_pass else 1
        accumulate = min(accumulate, max(total // world_size, 1))
    if total < world_size * accumulate:
        raise ConfigError(
            f'total_batch_size {total} is too small for {world_size} processes x {accumulate} accumulation '
            f'steps: each forward pass needs a sample; use at most {max(total // accumulate, 1)} processes, '
            'fewer accumulation steps, or a larger total_batch_size'
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
    """

    def __init__(self, num_samples: int, total: int, seed: int):
        self.num_samples, self.total, self.seed = num_samples, total, seed

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; the last is filled up from the epoch's first samples."""
        return -(-self.num_samples // self.total)

    def order(self, epoch: int) -> List[int]:
        """Sample indices of an epoch: each once, the first ones once more where the last step needs it."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        wanted = self.steps * self.total
        return (order * -(-wanted // len(order)))[:wanted]


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
