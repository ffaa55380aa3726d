"""What mixed precision is on, asked in the way that the installed PyTorch wants."""

from typing import Optional

import torch


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The type that autocast computes in on this kind of device ('cpu' or 'cuda'), or None if it is off."""
    if hasattr(torch, 'get_autocast_dtype'):  # PyTorch 2.4 and later
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
