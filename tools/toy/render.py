"""Pictures of a toy world: what a camera sees at a moment, traced and shaded on the CPU or a GPU."""
from typing import NamedTuple, Optional

import numpy as np
import torch

from .rig import Camera
from .shade import Hits, Shadows, make_painter, paint, shape_rows
from .trace import pack_scene
from .world import ToyWorld

SMALL_IMAGE = 160000        # pixels; smaller images are traced at twice the resolution and averaged
_SHADOW_REACH, _SHADOW_PIXELS, _SUN_METRES = 45.0, 640, 400.0


class View(NamedTuple):
    """What a camera sees.

    Attributes:
        image: uint8 [height, width, 3], RGB.
        depth: float32 [height, width], metres along the optical axis.
        owner: int32 [height, width], index of the object in ``world.objects``; GROUND or SKY where none.
    """
    image: np.ndarray
    depth: np.ndarray
    owner: np.ndarray


class Renderer:
    """Renders views of one world on one device.

    Args:
        world: the scene.
        device: where pixels are traced and shaded.
    """

    def __init__(self, world: ToyWorld, device: torch.device):
        self.world, self.device = world, device
        self._painter = make_painter(world, device)

    def view(self, camera: Camera, t: float, shadows: Optional[Shadows] = None) -> View:
        """The view of ``camera`` at time t (seconds from the scene's first keyframe)."""
        fine = 2 if camera.size[0] * camera.size[1] < SMALL_IMAGE else 1
        size = camera.size[0] * fine, camera.size[1] * fine
        intrinsic = np.diag([fine, fine, 1.0]) @ camera.intrinsic
        to_map = self.world.ego_to_map(t) @ camera.to_ego
        table = self.world.shapes_at(t, to_map[:3, 3])
        scene = pack_scene(table, self.world.waves, to_map[:3, 3])
        depth, hit = self._trace(scene, to_map[:3, :3], intrinsic, size)
        hits = Hits(self._directions(intrinsic, size, to_map[:3, :3]), depth.reshape(-1), hit.reshape(-1))
        colour = paint(self._painter, shape_rows(scene, table, self.device), hits, to_map[:3, 3], shadows)
        colour = colour.reshape(camera.size[1], fine, camera.size[0], fine, 3).mean(dim=(1, 3))
        image = (colour * 255.0 + 0.5).to(torch.uint8).cpu().numpy()
        depth, hit = depth[fine // 2::fine, fine // 2::fine].cpu().numpy(), hit[fine // 2::fine, fine // 2::fine].cpu()
        owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit).astype(np.int32)
        return View(image, depth, owner)

    def shadows(self, t: float) -> Shadows:
        """Shadows around the ego car at time t."""
        sun, middle = self.world.look.sun, self.world.ego_to_map(t)[:3, 3]
        right = np.array([-sun[1], sun[0], 0.0]) / np.hypot(sun[0], sun[1])
        rotation = np.stack([right, np.cross(-sun, right), -sun], axis=1)
        eye = middle + _SUN_METRES * sun
        focal = 0.5 * _SHADOW_PIXELS * _SUN_METRES / _SHADOW_REACH
        intrinsic = np.array([[focal, 0, _SHADOW_PIXELS / 2], [0, focal, _SHADOW_PIXELS / 2], [0, 0, 1.0]])
        scene = pack_scene(self.world.shapes_at(t, middle, 1.2 * _SHADOW_REACH), self.world.waves, eye)
        depth, _ = self._trace(scene, rotation, intrinsic, (_SHADOW_PIXELS, _SHADOW_PIXELS), ground=False)
        return Shadows(depth.reshape(-1), _SHADOW_PIXELS, eye, rotation, focal)

    def _trace(self, scene, rotation, intrinsic, size, ground=True):
        """Depth and hit tensors [height, width] on the device."""
        if self.device.type == 'cpu':
            from .trace_cpu import trace_image
            depth, hit = trace_image(scene, rotation, intrinsic, size, ground)
            return torch.from_numpy(depth), torch.from_numpy(hit)
        from .trace_torch import trace_image
        return trace_image(scene, rotation, intrinsic, size, self.device, ground)

    def _directions(self, intrinsic, size, rotation):
        """Rays [height * width, 3] through the middles of the pixels, map axes, depth 1."""
        width, height = size
        k = intrinsic
        u = (torch.arange(width, dtype=torch.float32, device=self.device) + (0.5 - k[0, 2])) / k[0, 0]
        v = (torch.arange(height, dtype=torch.float32, device=self.device) + (0.5 - k[1, 2])) / k[1, 1]
        r = torch.as_tensor(rotation.astype(np.float32), device=self.device)
        rays = u[None, :, None] * r[:, 0] + v[:, None, None] * r[:, 1] + r[:, 2]
        return rays.reshape(-1, 3)
