"""What PyTorch's releases call by different names."""

import functools
import inspect
from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

NON_REENTRANT = 'use_reentrant' in inspect.signature(checkpoint).parameters  # PyTorch 1.11 and later


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The type that autocast computes in on this kind of device ('cpu' or 'cuda'), or None if it is off."""
    if hasattr(torch, 'get_autocast_dtype'):  # PyTorch 2.4 and later
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


# ``recompute(function, *args)``: its intermediates are made again in the backward pass; random draws repeat there
recompute = functools.partial(checkpoint, use_reentrant=False) if NON_REENTRANT else checkpoint
