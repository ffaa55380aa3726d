"""Pictures of a toy world: tracing and shading of one camera image."""
from typing import NamedTuple

import numpy as np
import torch

from .rig import Camera
from .shade import Hits, Painter, make_painter, paint, shape_rows
from .trace import pack_scene
from .trace_cpu import trace_image
from .world import ToyWorld


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
        self.painter: Painter = make_painter(world, device)

    def view(self, camera: Camera, t: float) -> View:
        """The view of ``camera`` at time t (seconds from the scene's first keyframe)."""
        to_map = self.world.ego_to_map(t) @ camera.to_ego
        table = self.world.shapes_at(t, to_map[:3, 3])
        scene = pack_scene(table, self.world.waves, to_map[:3, 3])
        depth, hit = trace_image(scene, to_map[:3, :3], camera.intrinsic, camera.size)
        hits = Hits(self._directions(camera, to_map[:3, :3]), torch.from_numpy(depth).reshape(-1),
                    torch.from_numpy(hit).reshape(-1))
        colour = paint(self.painter, shape_rows(scene, table, self.device), hits, to_map[:3, 3])
        image = (colour * 255.0 + 0.5).to(torch.uint8).reshape(camera.size[1], camera.size[0], 3)
        owner = np.where(hit >= 0, table.owner[np.maximum(hit, 0)], hit).astype(np.int32)
        return View(image.cpu().numpy(), depth, owner)

    def _directions(self, camera, rotation):
        """Rays [height * width, 3] through the middles of the pixels, map axes, depth 1."""
        width, height = camera.size
        k = camera.intrinsic
        u = (torch.arange(width, dtype=torch.float32, device=self.device) + (0.5 - k[0, 2])) / k[0, 0]
        v = (torch.arange(height, dtype=torch.float32, device=self.device) + (0.5 - k[1, 2])) / k[1, 1]
        r = torch.as_tensor(rotation.astype(np.float32), device=self.device)
        rays = u[None, :, None] * r[:, 0] + v[:, None, None] * r[:, 1] + r[:, 2]
        return rays.reshape(-1, 3)
