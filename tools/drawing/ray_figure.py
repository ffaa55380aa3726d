"""The picture that explains RayIoU in docs/metrics.md: one street, three predictions of it, and what rays meet.

    python -m tools.drawing.ray_figure --out docs/images/ray_iou.svg

A section 24 m wide with voxels of 0.4 m: road, a car and a wall. Every panel has its RayIoU and its mIoU over all and
over the visible voxels, counted by lib.metrics on this very section; the picture cannot say anything else.
"""

import argparse
from typing import Dict, List

import numpy as np

from lib.metrics import Evaluator
from lib.metrics.counts import Counts, tallies, totals
from lib.metrics.kernels import count_rays
from lib.raycast import trace
from lib.task import Task

CAR, ROAD, WALL, FREE = range(4)
COLOURS = {CAR: '#ff9e00', ROAD: '#00a892', WALL: '#b08d5f'}
TASK = Task(
    dict(name='street', class_names=('car', 'road', 'wall', 'free'), things=('car',)),
    point_cloud_range=(-12.0, -0.4, -2.0, 12.0, 0.4, 5.2),
    voxel_size=0.4,
)
ORIGINS = np.array([[-8.0, 0.0, 1.0], [6.0, 0.0, 1.0]])  # now, and where the LiDAR will be in a while
LIMITS = np.array([1.0, 2.0, 4.0], dtype=np.float32)
SCALE, MARGIN, TITLE = 13, 12, 44  # units per voxel and around a panel


def street() -> np.ndarray:
    """True labels uint8 [60, 2, 18]; only surfaces, as a LiDAR sees them. Both slices along y are the same."""
    section = np.full((TASK.grid_shape[0], TASK.grid_shape[2]), FREE, dtype=np.uint8)
    section[:52, 2] = ROAD
    section[27:36, 3:7] = CAR
    section[28:35, 4:6] = FREE
    section[52, 2:17] = WALL
    return np.repeat(section[:, None], 2, axis=1)


def predictions(truth: np.ndarray) -> Dict[str, np.ndarray]:
    """By title: a shift by a voxel, thick surfaces, and a car that is missing."""
    shifted = np.full_like(truth, FREE)
    shifted[1:] = truth[:-1]
    shifted[0] = truth[0]
    thick = truth.copy()
    thick[:52, :, 0:2] = ROAD
    thick[27:52, :, 3:7] = CAR
    thick[53:58, :, 2:17] = WALL
    missing = truth.copy()
    missing[27:36, :, 3:7] = FREE
    return {'everything one voxel further': shifted, 'thick surfaces': thick, 'no car': missing}


def directions() -> np.ndarray:
    """Unit vectors float32 [38, 3] in the plane of the section, forward and backward."""
    pitch = np.radians(np.linspace(-40, 14, 19))
    forward = np.stack([np.cos(pitch), np.zeros(len(pitch)), np.sin(pitch)], axis=1)
    return np.concatenate([forward, forward * [-1, 1, 1]]).astype(np.float32)


def cast(truth, prediction):
    """Ends of the rays, truth first."""
    return trace([truth, prediction], ORIGINS, directions(), TASK.point_cloud_range, TASK.voxel_size, FREE, threads=1)


def scores(truth: np.ndarray, prediction: np.ndarray, seen: np.ndarray) -> str:
    """RayIoU over the picture's rays, and mIoU with both choices of voxels."""
    ends = cast(truth, prediction)
    rays = np.zeros((1, 3, 4, 4), dtype=np.int64)
    columns = np.zeros(truth.shape[0] * truth.shape[1], dtype=np.uint8)
    count_rays(truth.reshape(-1), prediction.reshape(-1), *ends, columns, LIMITS, rays)
    ray_iou = totals(tallies(Counts(1, 1, rays, None, None)), LIMITS, ())['RayIoU']
    found = [f'RayIoU {100 * ray_iou:.0f}']
    for mask, said in (('camera', 'visible voxels'), ('none', 'all voxels')):
        evaluator = Evaluator(TASK, ['miou'], miou_mask=mask)
        evaluator.update(prediction, dict(semantics=truth, mask_camera=seen))
        found.append(f'mIoU {100 * evaluator.compute().totals["mIoU"]:.0f} ({said})')
    return ' · '.join(found)


def visible(truth: np.ndarray) -> np.ndarray:
    """bool like ``truth``: voxels that cameras see now, where a dense fan of rays passes or ends."""
    seen = np.zeros(truth.shape, dtype=bool)
    for pitch in np.radians(np.linspace(-80, 60, 800)):
        for distance in np.arange(0.0, 25.0, 0.1):
            point = ORIGINS[0] + distance * np.array([np.cos(pitch), 0.0, np.sin(pitch)])
            voxel = np.floor((point - TASK.point_cloud_range[:3]) / TASK.voxel_size).astype(int)
            if (voxel < 0).any() or (voxel >= truth.shape).any():
                break
            seen[voxel[0], :, voxel[2]] = True
            if truth[tuple(voxel)] != FREE:
                break
    return seen


def panel(title: str, text: str, volume: np.ndarray, truth: np.ndarray) -> List[str]:
    """Shapes of one section with its rays; a ray is green where it counts at 1 m, else red."""
    height = truth.shape[2]
    shapes = [f'<text x="0" y="-24" class="title">{title}</text><text x="0" y="-8">{text}</text>']
    shapes.append(f'<rect class="frame" width="{truth.shape[0] * SCALE}" height="{height * SCALE}"/>')
    for x, z in np.argwhere(volume[:, 0] != FREE):
        colour, y = COLOURS[int(volume[x, 0, z])], (height - 1 - z) * SCALE
        shapes.append(f'<rect x="{x * SCALE}" y="{y}" width="{SCALE}" height="{SCALE}" fill="{colour}"/>')
    ends = cast(truth, volume)
    labels = [side.reshape(-1)[voxel] for side, voxel in zip((truth, volume), ends.voxel)]
    aims = [(origin, direction) for origin in ORIGINS for direction in directions()]
    for ray, (origin, direction) in enumerate(aims):
        if labels[0][ray] == FREE:
            continue
        right = labels[0][ray] == labels[1][ray] and abs(ends.distance_m[0, ray] - ends.distance_m[1, ray]) < LIMITS[0]
        start, (x, y) = to_units(origin, height), to_units(origin + ends.distance_m[1, ray] * direction, height)
        colour = 'right' if right else 'wrong'
        shapes.append(f'<line class="{colour}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    places = (to_units(origin, height) for origin in ORIGINS)
    return shapes + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>' for x, y in places]


def to_units(point, height):
    """Picture coordinates of a point in metres."""
    x, _, z = (point - np.array(TASK.point_cloud_range[:3])) / TASK.voxel_size
    return x * SCALE, (height - z) * SCALE


def figure() -> str:
    """The whole picture as SVG."""
    truth = street()
    legend = 'black: where the LiDAR stands, and where it will; rays end in the first voxel that they meet'
    seen, panels = visible(truth), [('the truth', legend, truth)]
    panels += [(title, scores(truth, volume, seen), volume) for title, volume in predictions(truth).items()]
    width, height = truth.shape[0] * SCALE, truth.shape[2] * SCALE
    parts = []
    for number, (title, text, volume) in enumerate(panels):
        shapes = '\n'.join(panel(title, text, volume, truth))
        parts.append(f'<g transform="translate({MARGIN}, {TITLE + number * (height + TITLE + 8)})">{shapes}</g>')
    size = (width + 2 * MARGIN, len(panels) * (height + TITLE + 8) + MARGIN)
    return _SVG.format(width=size[0], height=size[1], body='\n'.join(parts))


_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"
 font-size="13">
<style>
.title {{ font-weight: bold; font-size: 15px; }} .frame {{ fill: #f6f6f4; stroke: #999; }}
.right {{ stroke: #1b8a3a; fill: #1b8a3a; }} .wrong {{ stroke: #c8202f; fill: #c8202f; }} line {{ stroke-width: 1; }}
</style>
<rect width="{width}" height="{height}" fill="#fff"/>
{body}
</svg>
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='docs/images/ray_iou.svg')
    args = parser.parse_args()
    with open(args.out, 'w', encoding='utf-8') as stream:
        stream.write(figure())


if __name__ == '__main__':
    main()
