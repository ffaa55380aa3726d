"""Multi-view, multi-scale sampling in plain PyTorch: the definition of the operator; CPU tensors run it.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.

Every point is sampled in one camera only, so nothing is computed for the other cameras. Per level the four
corners of all points are one ``embedding_bag`` over the map's rows: no gathered rows are stored, and the
gradients of the bilinear weights (hence of points and level weights) and of the map come from its backward.

Positions, matrices and weights have one dtype, float32 or float64, which is also the type of all sums.
"""

from typing import List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

DEPTH_EPS = 1e-5


class ViewLocations(NamedTuple):
    """Where each point falls in each frame.

    uv     [B, Q, G, T, P, 2] pixel (u right, v down) over image size; 0..1 inside the image
    views  [B, Q, G, T, P] int64, the camera within the frame: the first that sees the point, 0 if none does
    """

    uv: Tensor
    views: Tensor


def locate_points(points: Tensor, ego2img: Tensor, image_size: Tuple[int, int], num_cameras: int) -> ViewLocations:
    """Project points into every frame and choose the first camera that sees each.

    Args:
        points: [B, Q, G, P, 3] metres, ego frame.
        ego2img: [B, T*N, 4, 4] ego (metres) to pixels, index t*N + n.
        image_size: (height, width) in pixels of the padded image that ``ego2img`` refers to.
        num_cameras: N.

    The choice of the camera is not differentiated; the position in the chosen camera is.
    """
    batch, queries, groups, per_group, _ = points.shape
    frames = ego2img.shape[1] // num_cameras
    matrices = ego2img[..., :3, :].reshape(batch, frames, num_cameras, 12)
    flat = points.reshape(batch, 1, queries * groups * per_group, 3)
    with torch.no_grad():
        views = _first_valid_view(flat, matrices, image_size)
    chosen = matrices.gather(2, views.unsqueeze(-1).expand(-1, -1, -1, 12))
    uv, _ = _project(flat, chosen, image_size)
    shape = (batch, frames, queries, groups, per_group)
    return ViewLocations(
        uv=uv.reshape(shape + (2,)).permute(0, 2, 3, 1, 4, 5), views=views.reshape(shape).permute(0, 2, 3, 1, 4)
    )


def _first_valid_view(points: Tensor, matrices: Tensor, image_size: Tuple[int, int]) -> Tensor:
    """points [B, 1, M, 3], matrices [B, T, N, 12] -> int64 [B, T, M]."""
    batch, frames, cameras, _ = matrices.shape
    views = torch.zeros(batch, frames, points.shape[2], dtype=torch.int64, device=points.device)
    for camera in reversed(range(cameras)):
        uv, depth = _project(points, matrices[:, :, camera].unsqueeze(2), image_size)
        inside = ((uv > 0) & (uv < 1)).all(-1) & (depth > DEPTH_EPS)
        views = views.masked_fill(inside, camera)
    return views


def _project(points: Tensor, matrices: Tensor, image_size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    """points [B, 1, M, 3], matrices [B, T, M or 1, 12] -> uv [B, T, M, 2], depth [B, T, M] in metres.

    Written as sums of products, not as a matrix product, so that neither autocast nor TF32 touches it.
    """
    x, y, z = points.unbind(-1)
    a = matrices.unbind(-1)
    u, v, depth = [a[r] * x + a[r + 1] * y + a[r + 2] * z + a[r + 3] for r in (0, 4, 8)]
    height, width = image_size
    clamped = depth.clamp(min=DEPTH_EPS)
    return torch.stack([u / clamped * (1.0 / width), v / clamped * (1.0 / height)], dim=-1), depth


def spread_level_weights(level_logits: Tensor, num_frames: int, published_weight_order: bool) -> Tensor:
    """Softmax over levels, handed to every (frame, group) slot.

    Args:
        level_logits: [B, Q, G, P, L].
        published_weight_order: slot (t, g) takes the weights of group (t*G + g) // T, which released weights
            were trained with; otherwise those of its own group g.

    Returns:
        [B, Q, G, T, P, L].
    """
    groups = level_logits.shape[2]
    weights = F.softmax(level_logits, dim=-1)
    if not published_weight_order:
        return weights.unsqueeze(3).expand(-1, -1, -1, num_frames, -1, -1)
    source = published_weight_groups(num_frames, groups, level_logits.device)
    return weights[:, :, source]


def published_weight_groups(num_frames: int, num_groups: int, device=None) -> Tensor:
    """int64 [G, T]: the group whose level weights slot (frame t, group g) uses in the published code.

    It flattens features in (frame, group) order but weights in (group, frame) order.
    """
    frame = torch.arange(num_frames, device=device).unsqueeze(0)
    group = torch.arange(num_groups, device=device).unsqueeze(1)
    return torch.div(frame * num_groups + group, num_frames, rounding_mode='floor')


def sample_views_reference(
    features: Sequence[Tensor], uv: Tensor, views: Tensor, weights: Tensor, num_cameras: int
) -> Tensor:
    """Bilinear samples (align_corners, zero padding) of every level, summed with the given weights.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C], channels last.
        uv: [B, Q, G, T, P, 2] in 0..1 over the image.
        views: [B, Q, G, T, P] int64, camera within the frame.
        weights: [B, Q, G, T, P, L].
        num_cameras: N.

    Returns:
        [B, Q, G, T*P, C/G] in the dtype of the features.
    """
    batch, queries, groups, frames, per_group, _ = uv.shape
    images = _image_index(views, num_cameras)
    total = None
    for level, feature in enumerate(features):
        corners, corner_weights = _corners(uv, images, feature.shape[2], feature.shape[3])
        corner_weights = corner_weights * weights[..., level].unsqueeze(-1)
        rows = feature.to(uv.dtype).reshape(-1, feature.shape[4] // groups)
        group = torch.arange(groups, device=uv.device).view(1, 1, groups, 1, 1, 1)
        samples = _weighted_rows(rows, corners * groups + group, corner_weights)
        total = samples if total is None else total + samples
    return total.reshape(batch, queries, groups, frames * per_group, total.shape[-1]).to(features[0].dtype)


def _image_index(views: Tensor, num_cameras: int) -> Tensor:
    """Camera within the frame [B, Q, G, T, P] -> index of the image among all B*T*N."""
    batch, _, _, frames, _ = views.shape
    sample = torch.arange(batch, device=views.device).view(batch, 1, 1, 1, 1)
    frame = torch.arange(frames, device=views.device).view(1, 1, 1, frames, 1)
    return (sample * frames + frame) * num_cameras + views


def _corners(uv: Tensor, images: Tensor, height: int, width: int) -> Tuple[Tensor, Tensor]:
    """Per corner: pixel index [..., 4] over all images, bilinear weight [..., 4] (0 outside the map)."""
    x0, x1, weight_x0, weight_x1 = _axis_corners(uv[..., 0], width)
    y0, y1, weight_y0, weight_y1 = _axis_corners(uv[..., 1], height)
    row0, row1 = (images * height + y0) * width, (images * height + y1) * width
    pixels = torch.stack([row0 + x0, row0 + x1, row1 + x0, row1 + x1], dim=-1)
    weights = torch.stack(
        [weight_y0 * weight_x0, weight_y0 * weight_x1, weight_y1 * weight_x0, weight_y1 * weight_x1], dim=-1
    )
    return pixels, weights


def _axis_corners(position: Tensor, size: int) -> List[Tensor]:
    """The two cells next to a normalised position along one axis, kept inside the map, and their weights."""
    position = (position * (size - 1)).clamp(-1, size)
    low = position.detach().floor()
    fraction = position - low
    low_index = low.to(torch.int64)
    result = []
    for index, weight in ((low_index, 1 - fraction), (low_index + 1, fraction)):
        outside = (index < 0) | (index >= size)
        result.append((index.clamp(0, size - 1), weight.masked_fill(outside, 0)))
    (i0, w0), (i1, w1) = result
    return [i0, i1, w0, w1]


def _weighted_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[..., k] * rows[index[..., k]] -> [slots, channels of a row]."""
    index, weights = index.reshape(-1, 4), weights.reshape(-1, 4)
    if index.shape[0] == 0:
        return rows.new_zeros(0, rows.shape[1]) + 0 * (rows.sum() + weights.sum())
    if not rows.is_cuda:
        return _WeightedRowsOnCpu.apply(rows, index, weights)
    if weights.requires_grad and not rows.requires_grad:
        # Before PyTorch 2.1 the backward pass fails where only the weights want a gradient.
        rows = rows.detach().requires_grad_()
    return F.embedding_bag(index, rows, mode='sum', per_sample_weights=weights)


class _WeightedRowsOnCpu(Function):
    """``embedding_bag`` with a backward pass that takes half the CPU time of its own, and less memory."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index, weights)
        return F.embedding_bag(index, rows, mode='sum', per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, index, weights = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_weights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
        for corner in range(index.shape[1]):
            if grad_rows is not None:
                grad_rows.index_add_(0, index[:, corner], grad * weights[:, corner : corner + 1])
            if grad_weights is not None:
                torch.sum(rows.index_select(0, index[:, corner]) * grad, dim=1, out=grad_weights[:, corner])
        return grad_rows, None, grad_weights


def sample_multi_view_reference(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size: Tuple[int, int],
    num_cameras: int,
    published_weight_order: bool = True,
) -> Tensor:
    """The fused operator as a chain of the steps above; see ``sample_multi_view``."""
    located = locate_points(points, ego2img, image_size, num_cameras)
    num_frames = ego2img.shape[1] // num_cameras
    weights = spread_level_weights(level_logits, num_frames, published_weight_order)
    return sample_views_reference(features, located.uv, located.views, weights, num_cameras)
