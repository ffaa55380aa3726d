"""The public function of ray casting: checks its arguments and picks the device."""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence

import numpy as np

from . import cpu, gpu

MAX_VOLUMES = 8


@dataclass(frozen=True)
class RayHits:
    """Where M rays end in one volume. NumPy arrays from the CPU, tensors on the device from CUDA.

    Attributes:
        label: [M], label of the voxel the ray ends in (type of the labels).
        distance_m: float32 [M], metres from the origin to where the ray leaves that voxel.
        voxel: int32 [M], that voxel's row-major index in [X, Y, Z].
        instance: [M], instance of that voxel (type of the instances); None if no instances were given.
    """

    label: Any
    distance_m: Any
    voxel: Any
    instance: Optional[Any] = None


def cast_rays(
    semantics,
    origins,
    directions,
    point_cloud_range: Sequence[float],
    voxel_size: float,
    free_id: int,
    instances=None,
    rays=None,
    device='cpu',
) -> RayHits:
    """Cast every direction from every origin through a volume.

    A ray ends in the first occupied voxel it meets inside the grid, or in the last voxel inside. A ray that
    never comes inside gets distance -voxel_size and voxel 0.

    Args:
        semantics: labels [X, Y, Z], integer 0..255, array or tensor.
        origins: [O, 3], metres, frame of the volume.
        directions: [R, 3], unit vectors; used in float32.
        point_cloud_range: (x0, y0, z0, ...) metres, lower corner of the volume first.
        voxel_size: metres.
        free_id: label that lets rays pass.
        instances: ids [X, Y, Z], integer, array or tensor.
        rays: indices of the rays to cast, in o * R + r; None casts all O * R.
        device: ``'cpu'`` or a CUDA device. Without the built extension the CPU does it and says so once.

    Returns:
        RayHits of the rays in the order asked for, on ``device``.
    """
    return cast_rays_through(
        [semantics],
        origins,
        directions,
        point_cloud_range,
        voxel_size,
        free_id,
        None if instances is None else [instances],
        rays,
        device,
    )[0]


def cast_rays_through(
    semantics: Sequence,
    origins,
    directions,
    point_cloud_range: Sequence[float],
    voxel_size: float,
    free_id: int,
    instances: Optional[Sequence] = None,
    rays=None,
    device='cpu',
) -> List[RayHits]:
    """Cast the same rays through several volumes at once, e.g. truth and prediction: paths are walked once.

    Args:
        semantics: at most 8 volumes [X, Y, Z] of one shape.
        instances: as many [X, Y, Z], or None.

    The other arguments are those of :func:`cast_rays`.

    Returns:
        RayHits per volume.
    """
    _check(semantics, origins, directions, point_cloud_range, voxel_size, instances)
    arguments = (origins, directions, point_cloud_range[:3], voxel_size, free_id, instances, rays)
    if choose_device(device) != 'cpu':
        return _cast_cuda(semantics, *arguments, device)
    hits = _cast_cpu(semantics, *arguments)
    return hits if _device_type(device) == 'cpu' else [_to_device(one, device) for one in hits]


def choose_device(device) -> str:
    """``device`` as text, or ``'cpu'`` (said once) where it is CUDA but the extension is not built."""
    if _device_type(device) == 'cpu' or gpu.extension_available(device):
        return str(device)
    return 'cpu'


def _device_type(device):
    kind = str(device).split(':')[0]
    if kind not in ('cpu', 'cuda'):
        raise ValueError(f'rays are cast on "cpu" or "cuda", not on {device!r}')
    return kind


def _check(semantics, origins, directions, point_cloud_range, voxel_size, instances):
    """Raise ValueError for arguments that do not fit together; only shapes are looked at."""
    if not 1 <= len(semantics) <= MAX_VOLUMES:
        raise ValueError(f'1 to {MAX_VOLUMES} volumes can be cast through at once, got {len(semantics)}')
    shape = tuple(semantics[0].shape)
    if len(shape) != 3 or 0 in shape or any(tuple(volume.shape) != shape for volume in semantics):
        raise ValueError(
            'semantics must be volumes [X, Y, Z] of one shape, not empty; got '
            f'{[tuple(volume.shape) for volume in semantics]}'
        )
    if instances is not None and [tuple(volume.shape) for volume in instances] != [shape] * len(semantics):
        raise ValueError(
            f'instances have shapes {[tuple(volume.shape) for volume in instances]}, semantics '
            f'{[shape] * len(semantics)}; they must be equal'
        )
    for name, points in (('origins', origins), ('directions', directions)):
        if len(points.shape) != 2 or points.shape[1] != 3:
            raise ValueError(f'{name} must be [n, 3], got shape {tuple(points.shape)}')
    if len(point_cloud_range) < 3 or not voxel_size > 0:
        raise ValueError(
            f'point_cloud_range needs its lower corner and voxel_size must be positive; got {list(point_cloud_range)} '
            f'and {voxel_size!r}'
        )


def _cast_cpu(semantics, origins, directions, lower_corner, voxel_size, free_id, instances, rays):
    semantics = [_to_numpy(volume) for volume in semantics]
    origins = np.array(_to_numpy(origins), dtype=np.float64, order='C')
    directions = np.array(_to_numpy(directions), dtype=np.float32, order='C')
    total = len(origins) * len(directions)
    rays = np.arange(total, dtype=np.int32) if rays is None else _check_rays(_to_numpy(rays), total)
    voxel, distance = cpu.trace(semantics, free_id, origins, directions, lower_corner, voxel_size, rays)
    instances = [None] * len(semantics) if instances is None else [_to_numpy(volume) for volume in instances]
    return [
        RayHits(
            label=_look_up(volume, index),
            distance_m=depth,
            voxel=index,
            instance=None if ids is None else _look_up(ids, index),
        )
        for volume, ids, index, depth in zip(semantics, instances, voxel, distance)
    ]


def _to_numpy(value):
    return value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()


def _check_rays(rays, total):
    rays = np.array(rays, dtype=np.int32)
    if rays.ndim != 1 or (len(rays) and not (rays.min() >= 0 and rays.max() < total)):
        raise ValueError(f'rays must be a list of indices in 0..{total - 1}')
    return rays


def _look_up(volume, voxel):
    return volume.reshape(-1)[voxel]


def _cast_cuda(semantics, origins, directions, lower_corner, voxel_size, free_id, instances, rays, device):
    import torch

    as_tensor = lambda value, dtype=None: torch.as_tensor(value, dtype=dtype, device=device)  # noqa: E731
    volumes = torch.stack([as_tensor(volume, torch.uint8) for volume in semantics])
    origins, directions = (
        as_tensor(_writable(points), dtype).contiguous()
        for points, dtype in ((origins, torch.float64), (directions, torch.float32))
    )
    if rays is None:
        rays = torch.arange(len(origins) * len(directions), dtype=torch.int32, device=device)
    rays = as_tensor(rays, torch.int32).contiguous()  # unchecked: the kernel takes ray 0 for a wrong index
    found = gpu.trace(volumes, free_id, origins, directions, lower_corner, voxel_size, rays)
    if instances is None:
        instances = [None] * len(volumes)
    else:
        instances = [as_tensor(ids).reshape(-1) for ids in instances]
    return [
        RayHits(label=label, distance_m=depth, voxel=index, instance=None if ids is None else ids[index.long()])
        for label, index, depth, ids in zip(*found, instances)
    ]


def _writable(points):
    """A copy of a read-only array, about which PyTorch would warn; anything else as it is."""
    return points.copy() if isinstance(points, np.ndarray) and not points.flags.writeable else points


def _to_device(hits, device):
    import torch

    move = lambda array: None if array is None else torch.from_numpy(array).to(device)  # noqa: E731
    return RayHits(
        label=move(hits.label), distance_m=move(hits.distance_m), voxel=move(hits.voxel), instance=move(hits.instance)
    )
