"""The few facts about the other processes that code outside the run set-up may need.

Everything works in a single process, where torch.distributed is not initialised.
"""

import contextlib
from typing import Dict, Iterator, NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as torch_dist
from torch import Tensor

_share = None  # this process's part of the samples being processed by all; None: equal parts
_counted = None  # where count_share writes to; None: nobody asks
_draws = None  # where batch_rand takes its numbers from; None: the default generator


def is_distributed() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if is_distributed() else 1


def reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of a tensor over the processes, for loss normalisers such as the number of instances.

    When the processes hold unequal numbers of samples (3 GPUs, total batch 8), it is the sum over the
    processes times this process's share of the samples. The gradient, in which each process's loss weighs
    by its share, is then the one of a single process with the whole batch. ``share_of_batch`` sets the share.

    Args:
        tensor: any shape, floating point; on the device of the process group's backend.

    Returns:
        A detached tensor of the same shape; the input's values in a single process.
    """
    result = tensor.detach().clone()
    if world_size() == 1:
        return result
    torch_dist.all_reduce(result, op=torch_dist.ReduceOp.SUM)
    return result * (1.0 / world_size() if _share is None else _share)


@contextlib.contextmanager
def share_of_batch(share: float) -> Iterator[None]:
    """Within the block, this process holds the fraction ``share`` of the samples of all processes."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the processes, as a new tensor."""
    result = tensor.detach().clone()
    if world_size() > 1:
        torch_dist.all_reduce(result, op=torch_dist.ReduceOp.SUM)
    return result


class _SharedDraws(NamedTuple):
    """begin, end: the samples held now, within the ``total`` of the optimizer step."""

    generator: torch.Generator
    begin: int
    end: int
    total: int


@contextlib.contextmanager
def shared_draws(seed: int, begin: int, end: int, total: int, device) -> Iterator[None]:
    """Within the block, ``batch_rand`` gives each sample of a step the numbers it would get in one whole batch.

    Args:
        seed: the same on all processes and for all forward passes of the step.
        begin, end: which of the step's samples this forward pass holds.
        total: samples of the step, over all processes and passes.
        device: where the numbers are drawn.
    """
    global _draws
    before = _draws
    _draws = _SharedDraws(torch.Generator(device=device).manual_seed(seed), begin, end, total)
    try:
        yield
    finally:
        _draws = before


def batch_rand(batch: int, *shape: int, device: Optional[torch.device] = None) -> Tensor:
    """Uniform float32 [batch, *shape] in [0, 1), drawn per sample.

    Within ``shared_draws`` a sample's numbers do not depend on how the step's samples are dealt over processes
    and forward passes; elsewhere they come from PyTorch's default generator.
    """
    if _draws is None:
        return torch.rand(batch, *shape, device=device)
    if batch != _draws.end - _draws.begin:
        raise ValueError(f'drawing for {batch} samples, but this forward pass holds {_draws.end - _draws.begin}')
    numbers = torch.rand(_draws.total, *shape, device=device, generator=_draws.generator)
    return numbers[_draws.begin : _draws.end]


# -- what losses count on the way

Number = Union[Tensor, float]
Counted = Tuple[Number, Number]  # (how many, of how many)


@contextlib.contextmanager
def counting_shares(wanted: bool = True) -> Iterator[Dict[str, Counted]]:
    """Context in which ``count_share`` is written down; if it is not ``wanted``, nothing is counted."""
    global _counted
    before, _counted = _counted, {} if wanted else None
    try:
        yield {} if _counted is None else _counted
    finally:
        _counted = before


def shares_are_counted() -> bool:
    """Whether anybody asks, so that counting is worth its time."""
    return _counted is not None


def count_share(name: str, part: Number, whole: Number) -> None:
    """Note a share, such as of occupied voxels that were kept; sums over all processes are divided later.

    Args:
        name: ``a`` or ``a/b``; every process must note the same ones.
        part, whole: scalars.
    """
    if _counted is not None:
        _counted[name] = (part, whole)
