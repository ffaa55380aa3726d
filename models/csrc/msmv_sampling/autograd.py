"""Autograd Functions around the compiled kernels.

All arguments arrive checked, contiguous where msmv_sampling.h asks for it, and in one floating type for
everything but the features. The kernels do nothing that autocast could change, so these Functions need no
autocast decorators: they run in whatever types they are handed.
"""

from types import ModuleType
from typing import Tuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SampleMultiView(Function):
    """Gradients for the points, the level logits and the features; the choice of the view has none.

    With a frame_index that is not empty there is no backward pass."""

    @staticmethod
    def forward(
        ctx,
        kernels: ModuleType,
        points: Tensor,
        ego2img: Tensor,
        level_logits: Tensor,
        frame_index: Tensor,
        image_size: Tuple[int, int],
        num_cameras: int,
        published_weight_order: bool,
        *features: Tensor,
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.settings = (float(image_size[0]), float(image_size[1]), num_cameras, published_weight_order)
        ctx.save_for_backward(points, ego2img, level_logits, *features)
        return kernels.sample_multi_view_forward(
            list(features), points, ego2img, level_logits, frame_index, *ctx.settings
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        points, ego2img, level_logits, *features = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grads = ctx.kernels.sample_multi_view_backward(
            grad_output.contiguous(),
            features,
            points,
            ego2img,
            level_logits,
            *ctx.settings,
            wants[1] or wants[3],
            any(wants[8:]),
        )
        return (None, grads[0], None, grads[1], None, None, None, None) + _feature_grads(grads, len(features))


class SampleViews(Function):
    """Gradients for the positions, the weights and the features."""

    @staticmethod
    def forward(
        ctx, kernels: ModuleType, uv: Tensor, views: Tensor, weights: Tensor, num_cameras: int, *features: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.num_cameras = num_cameras
        ctx.save_for_backward(uv, views, weights, *features)
        return kernels.sample_views_forward(list(features), uv, views, weights, num_cameras)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        uv, views, weights, *features = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grads = ctx.kernels.sample_views_backward(
            grad_output.contiguous(),
            features,
            uv,
            views,
            weights,
            ctx.num_cameras,
            wants[1] or wants[3],
            any(wants[5:]),
        )
        return (None, grads[0], None, grads[1], None) + _feature_grads(grads, len(features))


def _feature_grads(grads, num_levels: int) -> tuple:
    """The kernels return the gradients of all levels, or of none."""
    return tuple(grads[2:]) if len(grads) > 2 else (None,) * num_levels
