"""Public sampling operators.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.
"""
from typing import Sequence, Tuple

from torch import Tensor

from models.csrc.msmv_sampling import reference


def extension_available() -> bool:
    """Whether the compiled CUDA operators can be used here."""
    return False


def sample_multi_view(features: Sequence[Tensor], points: Tensor, ego2img: Tensor, level_logits: Tensor,
                      image_size: Tuple[int, int], num_cameras: int, published_weight_order: bool = True) -> Tensor:
    """Features of 3-D points in all frames: projection, choice of the view, sampling, sum over levels.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C], channels last, image index t*N + n; any float dtype.
        points: [B, Q, G, P, 3] metres, ego frame of the current keyframe; the same points serve all frames.
        ego2img: [B, T*N, 4, 4] float32, ego (metres) to pixels.
        level_logits: [B, Q, G, P, L] before the softmax over L, shared by the frames.
        image_size: (height, width) in pixels of the padded image that ``ego2img`` refers to.
        num_cameras: N.
        published_weight_order: slot (frame t, group g) uses the level weights of group (t*G + g) // T, as
            released weights need; otherwise those of group g.

    Returns:
        [B, Q, G, T*P, C/G], dtype of the features, points frame-major (t*P + p).
    """
    return reference.sample_multi_view_reference(features, points, ego2img, level_logits, image_size, num_cameras,
                                                 published_weight_order)


def sample_views(features: Sequence[Tensor], uv: Tensor, views: Tensor, weights: Tensor, num_cameras: int) -> Tensor:
    """Weighted samples at given positions of given views.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C], channels last, image index t*N + n; any float dtype.
        uv: [B, Q, G, T, P, 2] (u right, v down) in 0..1 over the image, sampled at u*(W_l - 1), v*(H_l - 1).
        views: [B, Q, G, T, P] int64, camera within the frame.
        weights: [B, Q, G, T, P, L] of the levels, used as they are.
        num_cameras: N.

    Returns:
        [B, Q, G, T*P, C/G], dtype of the features.
    """
    return reference.sample_views_reference(features, uv, views, weights, num_cameras)
