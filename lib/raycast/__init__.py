"""Casting of rays through voxel volumes, on the CPU and on CUDA behind one function."""

from .casting import RayHits, cast_rays, cast_rays_through, choose_device
from .gpu import extension_available

__all__ = ['RayHits', 'cast_rays', 'cast_rays_through', 'choose_device', 'extension_available']
