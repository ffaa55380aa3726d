"""Pictures of a toy world: what a camera sees at a moment, traced and shaded on the CPU or a GPU."""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from .rig import Camera
from .shade import Hits, Images, Shadows, make_painter, paint, shape_rows
from .shapes import ShapeTable, concat_tables
from .trace import PackedScene, pack_scene
from .world import ToyWorld

SMALL_IMAGE = 160000  # pixels; smaller images are traced at twice the resolution and averaged
PIXELS_AT_ONCE = 12 * 800 * 450  # a GPU is quickest with few large steps, and ``pool`` counts on so much memory
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


class _Shot(NamedTuple):
    """A camera at a moment: rotation float64 [3, 3] to map axes, eye float64 [3], intrinsic and size (width,
    height) of the traced image, which has ``fine`` pixels per pixel and side, what may be seen, and which shadow
    map falls on it."""

    rotation: np.ndarray
    eye: np.ndarray
    intrinsic: np.ndarray
    size: Tuple[int, int]
    fine: int
    table: ShapeTable
    scene: PackedScene
    moment: int


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
        return self.views([camera], [t], shadows)[0]

    def views(
        self,
        cameras: Sequence[Camera],
        times: Sequence[float],
        shadows: Optional[Shadows] = None,
        moments: Optional[Sequence[int]] = None,
    ) -> List[View]:
        """The views of several cameras with images of one size, each at its own time.

        ``moments``: which of the shadow maps each takes; None = the first.
        """
        views: List[View] = []
        for shots in self._groups(cameras, times, moments):
            images, depth, hit = self._expose(shots, shadows)
            middle = slice(shots[0].fine // 2, None, shots[0].fine)
            depth, hit = (part[:, middle, middle].cpu().numpy() for part in (depth, hit))
            owners = np.concatenate([shot.table.owner for shot in shots])
            owner = np.where(hit >= 0, owners[np.maximum(hit, 0)], hit).astype(np.int32)
            views += [View(*parts) for parts in zip(images, depth, owner)]
        return views

    def images(
        self,
        cameras: Sequence[Camera],
        times: Sequence[float],
        shadows: Optional[Shadows] = None,
        moments: Optional[Sequence[int]] = None,
    ) -> Iterator[np.ndarray]:
        """Only the images of :meth:`views`."""
        for shots in self._groups(cameras, times, moments):
            yield from self._expose(shots, shadows)[0]

    def _groups(self, cameras, times, moments):
        """What is traced together: many on a GPU, one after another on the CPU, which caches like better."""
        shots = [self._shot(*which) for which in zip(cameras, times, moments or [0] * len(times))]
        width, height = shots[0].size
        at_once = 1 if self.device.type == 'cpu' else max(PIXELS_AT_ONCE // (width * height), 1)
        return [shots[k : k + at_once] for k in range(0, len(shots), at_once)]

    def _shot(self, camera, t, moment):
        fine = 2 if camera.size[0] * camera.size[1] < SMALL_IMAGE else 1
        to_map = self.world.ego_to_map(t) @ camera.to_ego
        table = self.world.shapes_at(t, to_map[:3, 3])
        return _Shot(
            to_map[:3, :3],
            to_map[:3, 3],
            np.diag([fine, fine, 1.0]) @ camera.intrinsic,
            (camera.size[0] * fine, camera.size[1] * fine),
            fine,
            table,
            pack_scene(table, self.world.waves, to_map[:3, 3]),
            moment,
        )

    def _expose(self, shots, shadows):
        """Images uint8 [C, height, width, 3], and as traced, with ``fine`` pixels a pixel and side, depths and hits."""
        width, height = shots[0].size
        fine = shots[0].fine
        depth, hit = self._trace(
            [s.scene for s in shots], [s.rotation for s in shots], [s.intrinsic for s in shots], shots[0].size
        )
        rays = torch.cat([self._directions(s) for s in shots])
        eyes = torch.as_tensor(np.array([s.eye for s in shots], dtype=np.float32), device=self.device)
        moments = torch.as_tensor(np.array([s.moment for s in shots], dtype=np.int32), device=self.device)
        image = torch.arange(len(shots), dtype=torch.int32, device=self.device).repeat_interleave(width * height)
        table = concat_tables([s.table for s in shots])
        rows = shape_rows([s.scene for s in shots], table, self.device)
        hits = Hits(rays, depth.reshape(-1), hit.reshape(-1), image)
        colour = paint(self._painter, rows, hits, Images(eyes, moments), shadows)
        colour = colour.reshape(len(shots), height // fine, fine, width // fine, fine, 3).mean(dim=(2, 4))
        return (colour * 255.0 + 0.5).to(torch.uint8).cpu().numpy(), depth, hit

    def shadows(self, *times: float) -> Shadows:
        """Shadows around the ego car at each of the times, traced together on a GPU."""
        sun = self.world.look.sun
        right = np.array([-sun[1], sun[0], 0.0]) / np.hypot(sun[0], sun[1])
        rotation = np.stack([right, np.cross(-sun, right), -sun], axis=1)
        focal = 0.5 * _SHADOW_PIXELS * _SUN_METRES / _SHADOW_REACH
        intrinsic = np.array([[focal, 0, _SHADOW_PIXELS / 2], [0, focal, _SHADOW_PIXELS / 2], [0, 0, 1.0]])
        middles = [self.world.ego_to_map(t)[:3, 3] for t in times]
        eyes = [middle + _SUN_METRES * sun for middle in middles]
        tables = [self.world.shapes_at(t, middle, 1.2 * _SHADOW_REACH) for t, middle in zip(times, middles)]
        scenes = [pack_scene(table, self.world.waves, eye) for table, eye in zip(tables, eyes)]
        size = (_SHADOW_PIXELS, _SHADOW_PIXELS)
        if self.device.type == 'cpu':
            depths = torch.cat(
                [self._trace([scene], [rotation], [intrinsic], size, ground=False)[0] for scene in scenes]
            )
        else:
            depths, _ = self._trace(scenes, [rotation] * len(times), [intrinsic] * len(times), size, ground=False)
        return Shadows(depths.reshape(-1), _SHADOW_PIXELS, np.stack(eyes), rotation, focal)

    def _trace(self, scenes, rotations, intrinsics, size, ground=True):
        """Depths and hits, tensors [C, height, width]; hits index the scenes' concatenated shapes."""
        if self.device.type != 'cpu':
            from .trace_torch import trace_images

            return trace_images(scenes, rotations, intrinsics, size, self.device, ground)
        from .trace_cpu import trace_image

        (scene,), (rotation,), (intrinsic,) = scenes, rotations, intrinsics
        depth, hit = trace_image(scene, rotation, intrinsic, size, ground)
        return torch.from_numpy(depth)[None], torch.from_numpy(hit)[None]

    def _directions(self, shot):
        """Rays [height * width, 3] through the middles of the pixels, map axes, depth 1."""
        (width, height), k = shot.size, shot.intrinsic
        u = (torch.arange(width, dtype=torch.float32, device=self.device) + (0.5 - k[0, 2])) / k[0, 0]
        v = (torch.arange(height, dtype=torch.float32, device=self.device) + (0.5 - k[1, 2])) / k[1, 1]
        r = torch.as_tensor(shot.rotation.astype(np.float32), device=self.device)
        rays = u[None, :, None] * r[:, 0] + v[:, None, None] * r[:, 1] + r[:, 2]
        return rays.reshape(-1, 3)
