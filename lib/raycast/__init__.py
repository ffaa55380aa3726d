"""Casting of rays through voxel volumes, on the CPU and on CUDA."""

from .casting import RayHits, cast_rays, choose_device, num_threads, trace
from .gpu import extension_available

__all__ = ['RayHits', 'cast_rays', 'choose_device', 'extension_available', 'num_threads', 'trace']
