"""Public sampling operators.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.

CUDA tensors take the compiled kernels when these are built, everything else the PyTorch reference.
Positions, matrices and level weights are float32 whatever the features are (so half-precision features do
not move a sample), or float64 if any floating argument is. Sums over corners and levels are in that type too.
"""

from types import ModuleType
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from models.csrc.extension import find_kernels
from models.csrc.msmv_sampling import reference
from models.csrc.msmv_sampling.autograd import SampleMultiView, SampleViews
from models.csrc.msmv_sampling.checks import check_multi_view, check_views

MAX_KERNEL_LEVELS = 16


def extension_available() -> bool:
    """Whether the compiled kernels can run on the current CUDA device."""
    return torch.cuda.is_available() and find_kernels('_msmv_sampling', torch.device('cuda')) is not None


def sample_multi_view(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size: Tuple[int, int],
    num_cameras: int,
    published_weight_order: bool = True,
    frame_index: Optional[Tensor] = None,
) -> Tensor:
    """Features of 3-D points in all frames: projection, choice of view, sampling, weighted sum over levels.

    A point is sampled in the first camera that sees it (depth over 1e-5 m, strictly inside the image), in
    camera 0 if none does; cells outside the map count as zero.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C], image index t*N + n, any float dtype. Channels should be
            contiguous (maps where they are not are copied); the other dimensions may have any strides.
        points: [B, Q, G, P, 3] metres, ego frame of the current keyframe; the same points serve all frames.
        ego2img: [B, T*N, 4, 4] ego (metres) to pixels; gets no gradient.
        level_logits: [B, Q, G, P, L] before the softmax over L, shared by the frames.
        image_size: (height, width) in pixels of the padded image that ``ego2img`` refers to.
        num_cameras: N.
        published_weight_order: slot (frame t, group g) uses the level weights of group (t*G + g) // T, as
            released weights need; otherwise those of group g.
        frame_index: int64 [T], 0..S-1, where ``features`` hold S stored frames [B, S*N, ...] and frame t is
            the frame_index[t]-th; None: S = T, in order. Without gradients nothing is copied for it.

    Returns:
        [B, Q, G, T*P, C/G], dtype of the features, points frame-major (t*P + p).

    Gradients reach features, points and level_logits, once. On CUDA the features' gradient is summed with
    atomic additions, in no fixed order, so its last bits may differ from run to run; under
    ``torch.use_deterministic_algorithms(True)`` training takes the reference instead. All else is repeatable.
    """
    check_multi_view(features, points, ego2img, level_logits, image_size, num_cameras, frame_index)
    real = _real_type([features[0], points, level_logits])
    points, ego2img, level_logits = points.to(real), ego2img.detach().to(real), level_logits.to(real)
    maps = _widen(features, real)
    kernels = _kernels_for(maps)
    if frame_index is not None and (kernels is None or torch.is_grad_enabled()):
        maps, frame_index = select_frames(maps, frame_index, num_cameras), None
    if kernels is None:
        result = reference.sample_multi_view_reference(
            maps, points, ego2img, level_logits, image_size, num_cameras, published_weight_order
        )
    else:
        result = SampleMultiView.apply(
            kernels,
            points.contiguous(),
            ego2img.contiguous(),
            level_logits.contiguous(),
            _index_or_empty(frame_index, points),
            tuple(image_size),
            num_cameras,
            published_weight_order,
            *_channels_last(maps),
        )
    return result.to(features[0].dtype)


def sample_views(features: Sequence[Tensor], uv: Tensor, views: Tensor, weights: Tensor, num_cameras: int) -> Tensor:
    """Weighted samples at given positions of given views: the part of ``sample_multi_view`` after projection.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C], as for ``sample_multi_view``.
        uv: [B, Q, G, T, P, 2] (u right, v down) in 0..1 over the image, sampled at u*(W_l - 1), v*(H_l - 1).
        views: [B, Q, G, T, P] integer, camera within the frame, 0..N-1.
        weights: [B, Q, G, T, P, L] of the levels, used as they are.
        num_cameras: N.

    Returns:
        [B, Q, G, T*P, C/G], dtype of the features. Gradients reach features, uv and weights, once.
    """
    check_views(features, uv, views, weights, num_cameras)
    real = _real_type([features[0], uv, weights])
    uv, weights, views = uv.to(real), weights.to(real), views.to(torch.int64)
    maps = _widen(features, real)
    kernels = _kernels_for(maps)
    if kernels is None:
        result = reference.sample_views_reference(maps, uv, views, weights, num_cameras)
    else:
        result = SampleViews.apply(
            kernels, uv.contiguous(), views.contiguous(), weights.contiguous(), num_cameras, *_channels_last(maps)
        )
    return result.to(features[0].dtype)


def _real_type(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _widen(features: Sequence[Tensor], real: torch.dtype) -> List[Tensor]:
    """The maps as they are, or in double where the computation is in double."""
    return [feature.to(real) if real == torch.float64 else feature for feature in features]


def _kernels_for(features: Sequence[Tensor]) -> Optional[ModuleType]:
    """The compiled kernels if they can serve these features."""
    if not features[0].is_cuda or len(features) > MAX_KERNEL_LEVELS:
        return None
    needs_atomics = torch.is_grad_enabled() and any(feature.requires_grad for feature in features)
    if needs_atomics and torch.are_deterministic_algorithms_enabled():
        return None
    return find_kernels('_msmv_sampling', features[0].device)


def _channels_last(features: Sequence[Tensor]) -> List[Tensor]:
    """Copies only maps whose channels are not contiguous."""
    return [
        feature if feature.stride(4) == 1 or feature.shape[4] == 1 else feature.contiguous() for feature in features
    ]


def select_frames(features: Sequence[Tensor], frame_index: Tensor, num_cameras: int) -> List[Tensor]:
    """The frames that the index names, in its order.

    Args:
        features: L tensors [B, S*N, ...].
        frame_index: int64 [T], 0..S-1.
        num_cameras: N.

    Returns:
        L tensors [B, T*N, ...].
    """
    cameras = torch.arange(num_cameras, device=frame_index.device)
    images = (frame_index.unsqueeze(1) * num_cameras + cameras).flatten()
    return [feature.index_select(1, images) for feature in features]


def _index_or_empty(frame_index: Optional[Tensor], like: Tensor) -> Tensor:
    """What the kernels take for 'no index': an empty one."""
    if frame_index is None:
        return torch.empty(0, dtype=torch.int64, device=like.device)
    return frame_index.contiguous()
