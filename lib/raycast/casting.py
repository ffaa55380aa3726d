"""The public function of ray casting: checks its arguments and picks the device."""
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np

from . import cpu, gpu

MAX_VOLUMES = 8


@dataclass(frozen=True)
class RayHits:
    """Where rays end. M rays, V volumes; the axis V is absent where one volume [X, Y, Z] was given.

    NumPy arrays from the CPU, tensors on the device from CUDA.

    Attributes:
        label: [V, M], label of the voxel the ray ends in (type of the labels).
        distance_m: float32 [V, M], metres from the origin to where the ray leaves that voxel.
        voxel: int32 [V, M], that voxel's row-major index in [X, Y, Z].
        instance: [V, M], instance of that voxel; None if no instances were given.
    """
    label: Any
    distance_m: Any
    voxel: Any
    instance: Optional[Any] = None


def cast_rays(semantics, origins, directions, point_cloud_range: Sequence[float], voxel_size: float, free_id: int,
              instances=None, rays=None, device='cpu') -> RayHits:
    """Cast every direction from every origin through one volume, or through several along the same paths.

    A ray ends in the first occupied voxel it meets inside the grid, or in the last voxel inside. A ray that
    never comes inside gets distance -voxel_size and voxel 0.

    Args:
        semantics: labels [X, Y, Z] or [V, X, Y, Z], integer (uint8 on CUDA), at most 8 volumes; array or tensor.
        origins: [O, 3], metres, frame of the volume.
        directions: [R, 3], unit vectors; used in float32.
        point_cloud_range: (x0, y0, z0, ...) metres, lower corner of the volume first.
        voxel_size: metres.
        free_id: label that lets rays pass.
        instances: ids of the shape of ``semantics``, integer; array or tensor.
        rays: indices of the rays to cast, in o * R + r; None casts all O * R.
        device: ``'cpu'`` or a CUDA device. Without the built extension the CPU does the work and says so once.

    Returns:
        RayHits of M rays in the order asked for, on ``device``.
    """
    if _device_type(device) == 'cpu':
        return _cast_cpu(_to_numpy(semantics), _to_numpy(origins), _to_numpy(directions), point_cloud_range,
                         voxel_size, free_id, _to_numpy(instances), _to_numpy(rays))
    if choose_device(device) == 'cpu':
        hits = cast_rays(semantics, origins, directions, point_cloud_range, voxel_size, free_id, instances, rays)
        return _to_device(hits, device)
    return _cast_cuda(semantics, origins, directions, point_cloud_range, voxel_size, free_id, instances, rays, device)


def choose_device(device) -> str:
    """``device`` as text, or ``'cpu'`` (said once) where it is CUDA but the extension is not built."""
    if _device_type(device) == 'cpu' or gpu.extension_available():
        return str(device)
    gpu.warn_not_built()
    return 'cpu'


def _device_type(device):
    kind = str(device).split(':')[0]
    if kind not in ('cpu', 'cuda'):
        raise ValueError('rays are cast on "cpu" or "cuda", not on %r' % (device,))
    return kind


def _to_numpy(value):
    if value is None or isinstance(value, np.ndarray):
        return value
    return value.detach().cpu().numpy() if hasattr(value, 'detach') else np.asarray(value)


def _check(semantics, origins, directions, point_cloud_range, voxel_size, instances):
    """Raise ValueError for arguments that do not fit together (arrays or tensors; only shapes are looked at)."""
    if semantics.ndim not in (3, 4) or 0 in tuple(semantics.shape):
        raise ValueError('semantics must be [X, Y, Z] or [V, X, Y, Z], not empty; got shape %s'
                         % (tuple(semantics.shape),))
    if semantics.ndim == 4 and len(semantics) > MAX_VOLUMES:
        raise ValueError('at most %d volumes at once, got %d' % (MAX_VOLUMES, len(semantics)))
    for name, points in (('origins', origins), ('directions', directions)):
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError('%s must be [n, 3], got shape %s' % (name, tuple(points.shape)))
    if instances is not None and tuple(instances.shape) != tuple(semantics.shape):
        raise ValueError('instances have shape %s, semantics %s; they must be equal'
                         % (tuple(instances.shape), tuple(semantics.shape)))
    if len(point_cloud_range) < 3 or not voxel_size > 0:
        raise ValueError('point_cloud_range needs its lower corner and voxel_size must be positive; got %s and %r'
                         % (list(point_cloud_range), voxel_size))


def _cast_cpu(semantics, origins, directions, point_cloud_range, voxel_size, free_id, instances, rays):
    _check(semantics, origins, directions, point_cloud_range, voxel_size, instances)
    origins = np.ascontiguousarray(origins, dtype=np.float64)
    directions = np.ascontiguousarray(directions, dtype=np.float32)
    total = len(origins) * len(directions)
    rays = np.arange(total, dtype=np.int32) if rays is None else _check_rays(rays, total)
    volumes = semantics.reshape((-1,) + semantics.shape[-3:])
    voxel, distance = cpu.trace(volumes, free_id, origins, directions, point_cloud_range[:3], voxel_size, rays)
    label = _look_up(volumes, voxel)
    instance = None if instances is None else _look_up(instances.reshape(volumes.shape), voxel)
    hits = RayHits(label=label, distance_m=distance, voxel=voxel, instance=instance)
    return hits if semantics.ndim == 4 else _only_volume(hits)


def _check_rays(rays, total):
    rays = np.ascontiguousarray(rays, dtype=np.int32)
    if rays.ndim != 1 or (len(rays) and not (0 <= rays.min() and rays.max() < total)):
        raise ValueError('rays must be a list of indices in 0..%d' % (total - 1))
    return rays


def _look_up(volumes, voxel):
    """Values of each volume [V, X, Y, Z] at its own voxels [V, M]."""
    return np.stack([volume.reshape(-1).take(index) for volume, index in zip(volumes, voxel)])


def _cast_cuda(semantics, origins, directions, point_cloud_range, voxel_size, free_id, instances, rays, device):
    import torch
    semantics = torch.as_tensor(semantics, dtype=torch.uint8, device=device).contiguous()
    origins = torch.as_tensor(origins, dtype=torch.float64, device=device).contiguous()
    directions = torch.as_tensor(directions, dtype=torch.float32, device=device).contiguous()
    if instances is not None:
        instances = torch.as_tensor(instances, device=device)
    _check(semantics, origins, directions, point_cloud_range, voxel_size, instances)
    volumes = semantics.reshape((-1,) + tuple(semantics.shape[-3:]))
    total = len(origins) * len(directions)
    if rays is None:
        rays = torch.arange(total, dtype=torch.int32, device=device)
    rays = torch.as_tensor(rays, dtype=torch.int32, device=device).contiguous()  # checked in the kernel, unsynced
    label, voxel, distance = gpu.trace(volumes, free_id, origins, directions, point_cloud_range[:3], voxel_size, rays)
    instance = None if instances is None else instances.reshape(len(volumes), -1).gather(1, voxel.long())
    hits = RayHits(label=label, distance_m=distance, voxel=voxel, instance=instance)
    return hits if semantics.ndim == 4 else _only_volume(hits)


def _only_volume(hits):
    return RayHits(label=hits.label[0], distance_m=hits.distance_m[0], voxel=hits.voxel[0],
                   instance=None if hits.instance is None else hits.instance[0])


def _to_device(hits, device):
    import torch
    move = lambda array: None if array is None else torch.from_numpy(array).to(device)  # noqa: E731
    return RayHits(label=move(hits.label), distance_m=move(hits.distance_m), voxel=move(hits.voxel),
                   instance=move(hits.instance))
