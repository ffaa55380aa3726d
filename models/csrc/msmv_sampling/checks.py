"""Argument checks of the sampling operators: one sentence naming the argument, what it is and should be.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_features(features: Sequence[Tensor], num_cameras: int) -> None:
    """L >= 1 levels [B, T*N, H_l, W_l, C] of one float type and device."""
    if isinstance(features, Tensor) or not isinstance(features, (list, tuple)):
        raise TypeError(
            f'features must be a list of tensors, one per pyramid level, but is a {type(features).__name__}'
        )
    if not features:
        raise ValueError('features must hold at least one pyramid level but is empty')
    first = features[0]
    for level, feature in enumerate(features):
        name = 'features[%d]' % level
        _check_float(name, feature)
        if feature.dim() != 5 or 0 in feature.shape[2:4]:
            raise ValueError(f'{name} must be [B, T*N, H, W, C] with H and W at least 1 but is {list(feature.shape)}')
        if feature.shape[:2] != first.shape[:2] or feature.shape[4] != first.shape[4]:
            raise ValueError(
                f'{name} must have the B, T*N and C of features[0], {list(first.shape)}, but is {list(feature.shape)}'
            )
        if feature.dtype != first.dtype:
            raise TypeError(f'{name} must have the dtype of features[0], {first.dtype}, but is {feature.dtype}')
        _check_device(name, feature, first.device)
    if num_cameras < 1 or first.shape[1] % num_cameras:
        raise ValueError('num_cameras must divide the %d images of features but is %s' % (first.shape[1], num_cameras))


def check_multi_view(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size,
    num_cameras: int,
    frame_index: Optional[Tensor] = None,
) -> None:
    """Arguments of ``sample_multi_view``."""
    check_features(features, num_cameras)
    first = features[0]
    for name, tensor in (('points', points), ('ego2img', ego2img), ('level_logits', level_logits)):
        _check_float(name, tensor)
        _check_device(name, tensor, first.device)
    if points.dim() != 5 or points.shape[0] != first.shape[0] or points.shape[4] != 3:
        raise ValueError('points must be [B, Q, G, P, 3] with B = %d but is %s' % (first.shape[0], list(points.shape)))
    _check_groups(points.shape[2], first.shape[4])
    images = first.shape[1]
    if frame_index is not None:
        _check_frame_index(frame_index, images // num_cameras, first.device)
        images = frame_index.shape[0] * num_cameras
    _check_shape('ego2img', ego2img, (first.shape[0], images, 4, 4))
    _check_shape('level_logits', level_logits, points.shape[:4] + (len(features),))
    if len(image_size) != 2 or min(image_size) <= 0:
        raise ValueError(f'image_size must be (height, width) in pixels, both positive, but is {tuple(image_size)}')


def check_views(features: Sequence[Tensor], uv: Tensor, views: Tensor, weights: Tensor, num_cameras: int) -> None:
    """Arguments of ``sample_views``."""
    check_features(features, num_cameras)
    first = features[0]
    for name, tensor in (('uv', uv), ('weights', weights)):
        _check_float(name, tensor)
        _check_device(name, tensor, first.device)
    batch, frames = first.shape[0], first.shape[1] // num_cameras
    if uv.dim() != 6 or uv.shape[0] != batch or uv.shape[3] != frames or uv.shape[5] != 2:
        raise ValueError(
            'uv must be [B, Q, G, T, P, 2] with B = %d and T = %d but is %s' % (batch, frames, list(uv.shape))
        )
    _check_groups(uv.shape[2], first.shape[4])
    if not isinstance(views, Tensor) or views.dtype not in INTEGER_TYPES:
        raise TypeError(f'views must be an integer tensor but is {_kind(views)}')
    _check_device('views', views, first.device)
    _check_shape('views', views, uv.shape[:5])
    _check_shape('weights', weights, uv.shape[:5] + (len(features),))
    if not views.is_cuda and views.numel() and not 0 <= int(views.min()) <= int(views.max()) < num_cameras:
        raise ValueError(
            'views must lie in 0..%d but spans %d..%d' % (num_cameras - 1, int(views.min()), int(views.max()))
        )


def _check_frame_index(index: Tensor, stored: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or not index.shape[0]:
        raise TypeError(
            f'frame_index must be an int64 tensor [T] with T at least 1 but is {_kind(index)}'
            + (f' {list(index.shape)}' if isinstance(index, Tensor) else '')
        )
    _check_device('frame_index', index, device)
    if not index.is_cuda and not 0 <= int(index.min()) <= int(index.max()) < stored:
        raise ValueError(
            'frame_index must lie in 0..%d, the stored frames, but spans %d..%d'
            % (stored - 1, int(index.min()), int(index.max()))
        )


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_TYPES:
        raise TypeError(f'{name} must be a float64, float32, float16 or bfloat16 tensor but is {_kind(tensor)}')


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f'{name} must be on the device of features[0], {device}, but is on {tensor.device}')


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f'{name} must be {list(shape)} but is {list(tensor.shape)}')


def _check_groups(groups: int, channels: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError('the number of groups must divide the %d channels of features but is %d' % (channels, groups))


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else 'a ' + type(value).__name__
