"""Activation checkpointing: intermediates are given up, and made again in the backward pass."""

import inspect
from typing import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NON_REENTRANT = 'use_reentrant' in inspect.signature(checkpoint).parameters  # PyTorch 1.11 and later


def recompute(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``function(*args)`` whose intermediates are not kept; random draws repeat in the backward pass."""
    if _NON_REENTRANT:
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args)
