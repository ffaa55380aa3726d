"""Inputs for the tests of the sampling operators, and a slow, independent implementation of them.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.
"""

import math
from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Sizes of one test case."""

    batch: int = 2
    frames: int = 3
    cameras: int = 3
    levels: int = 3
    queries: int = 7
    groups: int = 2
    points: int = 2
    channels: int = 8  # of a group
    image: Tuple[int, int] = (32, 48)
    seed: int = 0


class Inputs(NamedTuple):
    """Arguments of ``sample_multi_view``."""

    features: List[Tensor]
    points: Tensor
    ego2img: Tensor
    level_logits: Tensor
    image_size: Tuple[int, int]
    num_cameras: int

    def to(self, device=None, features=None, geometry=None) -> 'Inputs':
        """Moved, with the given dtypes for the features and for everything else."""
        maps = [feature.to(device=device, dtype=features) for feature in self.features]
        return self._replace(
            features=maps,
            points=self.points.to(device=device, dtype=geometry),
            ego2img=self.ego2img.to(device=device, dtype=geometry),
            level_logits=self.level_logits.to(device=device, dtype=geometry),
        )

    def requiring_grad(self) -> 'Inputs':
        leaf = lambda tensor: tensor.detach().clone().requires_grad_()  # noqa: E731
        return self._replace(
            features=[leaf(feature) for feature in self.features],
            points=leaf(self.points),
            level_logits=leaf(self.level_logits),
        )


def make_inputs(case: Case) -> Inputs:
    """Random float64 inputs: a ring of overlapping cameras that moves from frame to frame, points all around.

    Some points are seen by several cameras, some by none; some of those fall just outside camera 0's image.
    """
    generator = torch.Generator().manual_seed(case.seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    height, width = case.image
    sizes = [(max(1, height // 4 >> level), max(1, width // 4 >> level)) for level in range(case.levels)]
    images = case.frames * case.cameras
    features = [rand(case.batch, images, h, w, case.groups * case.channels) * 2 - 1 for h, w in sizes]
    shape = (case.batch, case.queries, case.groups, case.points)
    points = (rand(*shape, 3) - 0.5) * torch.tensor([30.0, 30.0, 24.0], dtype=torch.float64)
    logits = rand(*shape, case.levels) * 4 - 2
    ego2img = torch.stack(
        [
            torch.stack(
                [ring_camera(image % case.cameras, case.cameras, case.image, rand(4)) for image in range(images)]
            )
            for _ in range(case.batch)
        ]
    )
    return Inputs(features, points, ego2img, logits, case.image, case.cameras)


def store_frames(inputs: Inputs) -> Tuple[Inputs, Tensor]:
    """The same inputs of three frames with the features stored as frames (2, unused, 0, unused, 1), and frame_index."""
    images = inputs.features[0].shape[1]
    assert images == 3 * inputs.num_cameras

    def store(feature):
        frames = feature.view(feature.shape[0], 3, inputs.num_cameras, *feature.shape[2:])
        unused = torch.full_like(frames[:, :1], float('nan'))
        return torch.cat([frames[:, 2:], unused, frames[:, :1], unused, frames[:, 1:2]], dim=1).flatten(1, 2)

    index = torch.tensor([2, 4, 0], device=inputs.points.device)
    return inputs._replace(features=[store(feature) for feature in inputs.features]), index


def ring_camera(camera: int, cameras: int, image: Tuple[int, int], jitter: Tensor) -> Tensor:
    """ego2img of a camera that looks outwards, with some overlap to the next one. float64 [4, 4]."""
    height, width = image
    yaw = 2 * math.pi * camera / cameras + 0.3 * float(jitter[3])
    forward = [math.cos(yaw), math.sin(yaw), 0.0]
    right = [math.sin(yaw), -math.cos(yaw), 0.0]
    rotation = torch.tensor([right, [0.0, 0.0, -1.0], forward], dtype=torch.float64)
    focal = 0.22 * width
    intrinsic = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = intrinsic @ rotation
    matrix[:3, 3] = intrinsic @ (jitter[:3] - 0.5)
    return matrix


def sample_multi_view_slowly(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size: Tuple[int, int],
    num_cameras: int,
    published_weight_order: bool = True,
) -> Tensor:
    """The operator as nested loops over Python numbers. Returns float64 [B, Q, G, T*P, C/G]."""
    batch, queries, groups, per_group, _ = points.shape
    frames = ego2img.shape[1] // num_cameras
    channels = features[0].shape[-1] // groups
    result = torch.zeros(batch, queries, groups, frames * per_group, channels, dtype=torch.float64)
    for b in range(batch):
        for t in range(frames):
            matrices = ego2img[b, t * num_cameras : (t + 1) * num_cameras].tolist()
            for g in range(groups):
                source = (t * groups + g) // frames if published_weight_order else g
                for q in range(queries):
                    for p in range(per_group):
                        camera, u, v = choose_view(points[b, q, g, p].tolist(), matrices, image_size)
                        weights = softmax(level_logits[b, q, source, p].tolist())
                        for feature, weight in zip(features, weights):
                            image = feature[b, t * num_cameras + camera].double()
                            value = bilinear(image[..., g * channels : (g + 1) * channels], u, v)
                            result[b, q, g, t * per_group + p] += weight * value
    return result


def choose_view(point: Sequence[float], matrices: Sequence, image_size: Tuple[int, int]) -> Tuple[int, float, float]:
    """(camera, u, v) of the first camera that sees the point, else of camera 0."""
    candidates = []
    for camera, matrix in enumerate(matrices):
        x, y, depth = [sum(a * b for a, b in zip(row, list(point) + [1.0])) for row in matrix[:3]]
        divisor = max(depth, 1e-5)
        u, v = x / divisor / image_size[1], y / divisor / image_size[0]
        candidates.append((camera, u, v))
        if depth > 1e-5 and 0 < u < 1 and 0 < v < 1:
            return candidates[-1]
    return candidates[0]


def softmax(values: Sequence[float]) -> List[float]:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def bilinear(image: Tensor, u: float, v: float) -> Tensor:
    """image [H, W, C] at (u*(W-1), v*(H-1)): every cell counts by its distance, cells outside as zero."""
    height, width, channels = image.shape
    x, y = u * (width - 1), v * (height - 1)
    result = torch.zeros(channels, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            weight = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            if weight > 0:
                result += weight * image[row, column]
    return result
