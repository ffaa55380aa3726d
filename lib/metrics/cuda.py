"""Counting on CUDA, several samples at once; the counts come back in one piece.

S samples; M = O * R rays, volume 0 the truth and 1 the prediction; C classes without free; T thresholds; G regions.
"""

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

from ..raycast import to_tensor, trace_on_gpu
from ..task import Task
from .counts import CLASS_BITS, ID_BITS, LEVEL_BITS, REGION_BITS

_staged = {}  # pinned memory by name and shape of a volume: pinning takes longer than copying


class RayEnds(NamedTuple):
    """Where rays end: label uint8, voxel int32, distance float32 (metres), [S, 2, M] each."""

    label: torch.Tensor
    voxel: torch.Tensor
    distance_m: torch.Tensor


def trace(samples: Sequence, directions: np.ndarray, task: Task, device) -> RayEnds:
    """Cast the rays of samples (``counts.Volumes``)."""
    semantics = _to_device('semantics', [sample.semantics for sample in samples], device)
    counts = [len(sample.origins) for sample in samples]
    origins = np.zeros((len(samples), max(counts), 3))
    for sample, row in zip(samples, origins):
        row[: len(sample.origins)] = sample.origins
    return RayEnds(
        *trace_on_gpu(
            semantics,
            task.label_set.free_id,
            torch.from_numpy(origins).to(device),
            torch.tensor(counts, dtype=torch.int32, device=device),
            to_tensor(directions, torch.float32, device),
            task.point_cloud_range,
            task.voxel_size,
        )
    )


def _to_device(name, volumes, device):
    """One tensor [S, 2, X, Y, Z] on the device of S pairs of volumes, through pinned memory."""
    volumes = [pair[side] for pair in volumes for side in (0, 1)]
    shape = volumes[0].shape
    as_signed = np.int16 if volumes[0].dtype == np.uint16 else volumes[0].dtype  # PyTorch has little of uint16
    staged = _staged.get((name, shape))
    if staged is None or len(staged) < len(volumes):
        staged = _staged[name, shape] = torch.from_numpy(np.empty((len(volumes),) + shape, as_signed)).pin_memory()
    torch.cuda.current_stream(device).synchronize()  # what was staged before has been copied
    for target, volume in zip(staged.numpy(), volumes):
        target[...] = volume.view(as_signed)
    return staged[: len(volumes)].to(device, non_blocking=True).view(len(volumes) // 2, 2, *shape)


def levels(ends: RayEnds, thresholds: np.ndarray) -> torch.Tensor:
    """Number of thresholds that each ray's depth error is below, int64 [S, M]."""
    error = (ends.distance_m[:, 0] - ends.distance_m[:, 1]).abs()
    return sum((error < float(limit)).long() for limit in thresholds)


def regions(ends: RayEnds, of_column: np.ndarray, height: int) -> torch.Tensor:
    """Region of each ray's true end, int64 [S, M]."""
    column = torch.div(ends.voxel[:, 0], height, rounding_mode='floor')
    return torch.from_numpy(of_column).to(column.device)[column.long()].long()


def count_rays(ends: RayEnds, level, region, shape: Tuple[int, ...]) -> np.ndarray:
    """Rays with a true class, int64 [S, G, C, C + 1, T + 1] for ``shape`` [G, C, C + 1, T + 1]."""
    samples, bins = len(ends.label), int(np.prod(shape))
    true, predicted = ends.label[:, 0].long(), ends.label[:, 1].long()
    sample = torch.arange(samples, device=true.device)[:, None]
    key = (((sample * shape[0] + region) * shape[1] + true) * shape[2] + predicted) * shape[3] + level
    key = torch.where(true < shape[1], key, torch.full_like(key, samples * bins)).reshape(-1)
    counts = torch.bincount(key, minlength=samples * bins + 1)[:-1]
    return counts.cpu().numpy().reshape((samples,) + shape)


def group_rays(ends: RayEnds, level, region, instances, free: int) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Keys and numbers of rays as ``kernels.group_rays`` gives them, of each sample.

    Args:
        instances: S pairs of uint16 [X, Y, Z].
    """
    samples = len(ends.label)
    ids = _to_device('instances', instances, ends.label.device).view(samples, 2, -1)
    ids = torch.gather(ids, 2, ends.voxel.long()).long() & ((1 << ID_BITS) - 1)
    true = ends.label[:, 0].long()
    key = torch.arange(samples, device=true.device)[:, None]
    for value, bits in (
        (true, CLASS_BITS),
        (ids[:, 0], ID_BITS),
        (ends.label[:, 1].long(), CLASS_BITS),
        (ids[:, 1], ID_BITS),
        (region, REGION_BITS),
        (level, LEVEL_BITS),
    ):
        key = (key << bits) | value
    both = torch.stack(torch.unique(key[true < free], return_counts=True)).cpu().numpy()
    bits = 2 * (CLASS_BITS + ID_BITS) + REGION_BITS + LEVEL_BITS
    borders = np.searchsorted(both[0], np.arange(samples + 1, dtype=np.int64) << bits)
    return [
        (both[0, first:last] & ((1 << bits) - 1), both[1, first:last].copy())
        for first, last in zip(borders[:-1], borders[1:])
    ]
