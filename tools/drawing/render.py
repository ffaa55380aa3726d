"""Pictures of occupancy: a small software renderer for voxels, in numpy and OpenCV, no display needed.

Shapes: K occupied voxels, X Y Z the grid, F faces. Images are uint8 [height, width, 3], RGB.
"""

import colorsys
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import cv2
import numpy as np

BACKGROUND = (238, 242, 247)
EGO_COLOUR = (40, 44, 52)
EGO_BOX = (-1.0, -0.9, 0.0, 3.2, 0.9, 1.5)  # x0 y0 z0 x1 y1 z1, metres; nuScenes' ego frame sits on the rear axle
_SUPERSAMPLING = 2
_SUBPIXEL_BITS = 4
_AXIS_LIGHT = (0.80, 0.66, 1.0)  # faces along x, y, z: the sun is high, a little ahead
_NO_INSTANCE = (176, 180, 186)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera of a rendered view.

    Attributes:
        position: where it is, metres, ego frame.
        target: the point in the middle of the picture, metres, ego frame.
        field_of_view: horizontal, degrees.
    """

    position: Tuple[float, float, float] = (-34.0, 0.0, 27.0)
    target: Tuple[float, float, float] = (4.0, 0.0, -1.0)
    field_of_view: float = 74.0


def class_colours(semantics: np.ndarray, palette: Sequence[Tuple[int, int, int]]) -> np.ndarray:
    """RGB of every voxel by class.

    Args:
        semantics: uint8 [...], ids into ``palette``; ids beyond it (255 = ignore) become dark grey.
        palette: RGB 0..255 per class.
    Returns:
        uint8 [..., 3].
    """
    table = np.full((256, 3), 90, np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    return table[semantics]


def instance_colours(instances: np.ndarray) -> np.ndarray:
    """RGB of every voxel by instance id: far-apart hues for successive ids, grey for 0 (none).

    Args:
        instances: integer [...], 0 = none.
    Returns:
        uint8 [..., 3].
    """
    highest = int(instances.max()) if instances.size else 0
    table = np.empty((highest + 1, 3), np.uint8)
    for i in range(highest + 1):
        hue, level = (0.61803398875 * i) % 1.0, i % 3
        table[i] = [round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.9 - 0.15 * level, 0.95 - 0.12 * level)]
    table[0] = _NO_INSTANCE
    return table[np.clip(instances, 0, highest)]


def render_bird_eye(occupied: np.ndarray, colours: np.ndarray, pixels_per_voxel: int = 2) -> np.ndarray:
    """Seen from above: x (forward) up, y (left) to the left; the topmost voxel of each column, shaded by height.

    Args:
        occupied: bool [X, Y, Z].
        colours: uint8 [X, Y, Z, 3].
    Returns:
        uint8 [X * pixels_per_voxel, Y * pixels_per_voxel, 3].
    """
    depth = occupied.shape[2]
    top = depth - 1 - np.argmax(occupied[:, :, ::-1], axis=2)
    seen = occupied.any(axis=2)
    colour = np.take_along_axis(colours, top[:, :, None, None], axis=2)[:, :, 0].astype(np.float32)
    height = np.where(seen, top, 0).astype(np.float32)
    slope = height - np.roll(height, (1, 1), axis=(0, 1))  # light from ahead and left makes edges visible
    light = 0.9 + 0.1 * height / max(depth - 1, 1) + np.clip(0.03 * slope, -0.2, 0.1)
    image = np.where(seen[:, :, None], np.clip(colour * light[:, :, None], 0, 255), BACKGROUND).astype(np.uint8)
    image = image[::-1, ::-1]
    return np.ascontiguousarray(image.repeat(pixels_per_voxel, axis=0).repeat(pixels_per_voxel, axis=1))


def with_ego(
    occupied: np.ndarray, colours: np.ndarray, range_min: Sequence[float], voxel_size: float
) -> Tuple[np.ndarray, np.ndarray]:
    """Copies of a volume with the ego car drawn into it as dark voxels.

    Args:
        occupied: bool [X, Y, Z]; colours: uint8 [X, Y, Z, 3].
        range_min: lower corner of the grid, metres, ego frame.
    """
    occupied, colours = occupied.copy(), colours.copy()
    low = np.round((np.asarray(EGO_BOX[:3]) - np.asarray(range_min[:3])) / voxel_size).astype(int)
    high = np.round((np.asarray(EGO_BOX[3:]) - np.asarray(range_min[:3])) / voxel_size).astype(int)
    low, high = np.clip(low, 0, occupied.shape), np.clip(high, 0, occupied.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high))
    occupied[box] = True
    colours[box] = EGO_COLOUR
    return occupied, colours


def render_oblique(
    occupied: np.ndarray,
    colours: np.ndarray,
    range_min: Sequence[float],
    voxel_size: float,
    size: Tuple[int, int] = (450, 800),
    camera: Optional[Camera] = None,
) -> np.ndarray:
    """Perspective view of the volume as solid, shaded cubes.

    Args:
        occupied: bool [X, Y, Z].
        colours: uint8 [X, Y, Z, 3].
        range_min: lower corner of the grid, metres, ego frame.
        voxel_size: metres.
        size: (height, width) of the picture, pixels.
    Returns:
        uint8 [height, width, 3].
    """
    camera = camera or Camera()
    canvas = _sky(size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    corners, shades = _visible_faces(
        occupied, colours, np.asarray(camera.position), np.asarray(range_min[:3]), voxel_size
    )
    pixels, depth = _project(corners, camera, canvas.shape)
    inside = (
        (depth > 0.3).all(axis=1)
        & (pixels.max(axis=1) > 0).all(axis=1)
        & (pixels.min(axis=1) < (canvas.shape[1], canvas.shape[0])).all(axis=1)
    )
    _paint(canvas, pixels[inside], shades[inside])
    return cv2.resize(canvas, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def _sky(height: int, width: int) -> np.ndarray:
    """Background, a shade darker towards the top."""
    ramp = np.linspace(0.86, 1.0, height, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(
        np.broadcast_to(np.asarray(BACKGROUND, np.float32) * ramp, (height, width, 3)).astype(np.uint8)
    )


def _visible_faces(occupied, colours, camera_position, range_min, voxel_size):
    """Faces turned to the camera with nothing in front, back to front.

    A grid's voxels never cover each other the wrong way when drawn by falling index distance from the
    camera's own voxel along x, then y, then z, so that no depth buffer is needed.

    Returns:
        corners float64 [F, 4, 3] (metres, ego frame), shades uint8 [F, 3].
    """
    padded = np.pad(occupied, 1)
    eye = (camera_position - range_min) / voxel_size  # in voxels
    coords = np.argwhere(occupied)
    corners, shades, owners = [], [], []
    for axis in range(3):
        for sign in (-1, 1):
            step = np.zeros(3, int)
            step[axis] = sign
            plane = coords[:, axis] + (sign > 0)
            facing = (eye[axis] - plane) * sign > 0
            neighbour = coords + 1 + step
            chosen = np.flatnonzero(facing & ~padded[tuple(neighbour.T)])
            corners.append(_face_corners(coords[chosen], axis, sign))
            shades.append(_shade(colours[tuple(coords[chosen].T)], padded, neighbour[chosen], axis))
            owners.append(coords[chosen])
    owners = np.concatenate(owners)
    distance = np.abs(owners - np.floor(eye))
    order = np.lexsort((-distance[:, 2], -distance[:, 1], -distance[:, 0]))
    corners = np.concatenate(corners)[order] * voxel_size + range_min
    return corners, np.concatenate(shades)[order]


def _face_corners(coords, axis, sign):
    """Corners of one face of each voxel, in voxels, [F, 4, 3], around the face."""
    u, v = [a for a in range(3) if a != axis]
    corners = np.repeat(coords[:, None].astype(np.float64), 4, axis=1)
    corners[:, :, axis] += sign > 0
    corners[:, :, u] += (0, 1, 1, 0)
    corners[:, :, v] += (0, 0, 1, 1)
    return corners


def _shade(colours, padded, neighbour, axis):
    """Face colours: light by direction, darker where voxels crowd around the open side (ambient occlusion)."""
    others = [a for a in range(3) if a != axis]
    crowd = np.zeros(len(neighbour), np.float32)
    for du in (-1, 0, 1):
        for dv in (-1, 0, 1):
            shifted = neighbour.copy()
            shifted[:, others[0]] += du
            shifted[:, others[1]] += dv
            shifted = np.clip(shifted, 0, np.asarray(padded.shape) - 1)
            crowd += padded[tuple(shifted.T)]
    light = _AXIS_LIGHT[axis] * (1.0 - 0.045 * crowd)
    return np.clip(colours * light[:, None], 0, 255).astype(np.uint8)


def _project(corners, camera, canvas_shape):
    """Pixels float64 [F, 4, 2] and depth in metres [F, 4] of points in the ego frame."""
    position = np.asarray(camera.position, np.float64)
    forward = np.asarray(camera.target) - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right = right / np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    local = (corners - position) @ rotation.T
    depth = local[..., 2]
    height, width = canvas_shape[:2]
    focal = 0.5 * width / np.tan(np.radians(camera.field_of_view) / 2)
    pixels = local[..., :2] / np.maximum(depth, 1e-3)[..., None] * focal + (width / 2, height / 2)
    return pixels, depth


def _paint(canvas, pixels, shades):
    """Fill the quads in order; the larger a quad, the darker its rim, so that near voxels can be told apart."""
    scale = 1 << _SUBPIXEL_BITS
    quads = np.round(np.clip(pixels, -1e5, 1e5) * scale).astype(np.int32)
    extent = (pixels.max(axis=1) - pixels.min(axis=1)).max(axis=1) / _SUPERSAMPLING
    strength = np.clip((extent - 3) / 8, 0, 1)
    rims = (shades * (1 - 0.25 * strength)[:, None]).astype(np.uint8).tolist()
    for quad, colour, rim, has_rim in zip(quads, shades.tolist(), rims, (strength > 0).tolist()):
        cv2.fillConvexPoly(canvas, quad, colour, shift=_SUBPIXEL_BITS)
        if has_rim:
            cv2.polylines(canvas, [quad], True, rim, shift=_SUBPIXEL_BITS)
