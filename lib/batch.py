"""Moving a batch to the device."""

from typing import Dict

import torch

from .targets import OccupancyTargets


def to_device(batch: Dict, device, non_blocking: bool = True) -> Dict:
    """A copy of the batch with its tensors, also inside lists and targets, on ``device``; other values stay as they are.

    Args:
        batch: what ``loaders.collate`` returns.
        device: torch device or its name.
        non_blocking: let copies from pinned memory overlap with work on the device.
    """
    return {key: _move(value, device, non_blocking) for key, value in batch.items()}


def _move(value, device, non_blocking):
    if isinstance(value, (torch.Tensor, OccupancyTargets)):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [_move(item, device, non_blocking) for item in value]
    return value
