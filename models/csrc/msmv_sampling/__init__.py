"""Public sampling operator: argument checks, dispatch to kernels or reference, autograd.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels.

CUDA tensors take the compiled kernels when these are built, everything else the PyTorch reference.
Positions, matrices and level weights are float32 whatever the features are (so half-precision features do
not move a sample), or float64 if any floating argument is. Sums over corners and levels are in that type too.
"""

from types import ModuleType
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.csrc import find_kernels
from models.csrc.msmv_sampling.reference import sample_multi_view_reference

MAX_KERNEL_LEVELS = 16
FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sample_multi_view(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size: Tuple[int, int],
    num_cameras: int,
    published_weight_order: bool = True,
    frame_index: Optional[Tensor] = None,
    gradient_sum: Optional['GradientSum'] = None,
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
        gradient_sum: of these very features, where several calls sample them.

    Returns:
        [B, Q, G, T*P, C/G], dtype of the features, points frame-major (t*P + p).

    Gradients reach features, points and level_logits, once. On CUDA the features' gradient is summed with
    atomic additions, in no fixed order, so its last bits may differ from run to run; under
    ``torch.use_deterministic_algorithms(True)`` training takes the reference instead. All else is repeatable.
    """
    _check(features, points, ego2img, level_logits, image_size, num_cameras, frame_index)
    real = _real_type([features[0], points, level_logits])
    points, ego2img, level_logits = points.to(real), ego2img.detach().to(real), level_logits.to(real)
    maps = _widen(features, real)
    kernels = _kernels_for(maps)
    if frame_index is not None and (kernels is None or torch.is_grad_enabled()):
        maps, frame_index = select_frames(maps, frame_index, num_cameras), None
    if kernels is None:
        result = sample_multi_view_reference(
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
            gradient_sum.sums if gradient_sum is not None and gradient_sum.holds(maps) else None,
            *_channels_last(maps),
        )
    return result.to(features[0].dtype)


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


class GradientSum:
    """Adds up in float32 what several calls of ``sample_multi_view`` give as gradients of the same features.

    By itself PyTorch would fill, convert and add one set of gradients for each call; in a training step these
    passes over all maps take longer than the sampling. Every backward pass has to go through all the calls.

    Args:
        features: L tensors [B, T*N, H_l, W_l, C].
        at_the_end: the sums are made when all calls have been gone through, and what else these needed is free; of
            features in half precision, than which they are twice as large, sample by sample. Every call goes over its
            points twice.

    Attributes:
        features: the same, to be sampled.
        sums: what their gradients are added to.
    """

    def __init__(self, features: Sequence[Tensor], at_the_end: bool = False):
        self.sums = FeatureSums(features, at_the_end)
        self.features = list(_CollectGradients.apply(self.sums, *features))

    def holds(self, maps: Sequence[Tensor]) -> bool:
        """Whether these are its features, in a layout that the kernels take without a copy."""
        return all(a is b and a.stride(4) == 1 for a, b in zip(maps, self.features))


class FeatureSums:
    """Sums of gradients; knows how large the features are, but not them, which a graph of calls would keep alive."""

    def __init__(self, features: Sequence[Tensor], at_the_end: bool):
        self._like = _shapes_of(features)
        self._at_the_end = at_the_end
        self._sums: List[Tensor] = []
        self._later: List[_PutOff] = []

    def open(self) -> List[Tensor]:
        """What to add to: L tensors, float32 (float64 for such features), contiguous; none where that comes later."""
        if not self._sums and not self._at_the_end:
            self._sums = _zeros_for(self._like)
        return self._sums

    def put_off(self, kernels: ModuleType, grad_output: Tensor, given: Sequence[Tensor], settings: Tuple) -> None:
        """Note what to add, if that comes later.

        Args:
            given: points, matrices and level logits of a call.
            settings: of the kernels.
        """
        if self._at_the_end:
            self._later.append(_PutOff(kernels, [grad_output, *given], settings))

    def take(self) -> List[Tensor]:
        """The sums, in the features' type, after which they are empty."""
        if self._later:
            return self._add_up()
        totals = []
        while self._sums:
            totals.append(self._sums.pop(0).to(self._like[0].dtype))
        return totals

    def _add_up(self) -> List[Tensor]:
        """What was put off. In half precision sample by sample, so that the sums of one are held in float32."""
        later, self._later = self._later, []
        if _real_type(self._like[:1]) == self._like[0].dtype:
            totals = _zeros_for(self._like)
            for call in later:
                call.add_to(totals, self._like)
            return totals
        totals = [like.new_empty(like.shape) for like in self._like]
        of_one = _shapes_of([like[:1] for like in self._like])
        sums = _zeros_for(of_one)
        for b in range(len(totals[0])):
            for call in later:
                call.of_sample(b).add_to(sums, of_one)
            for total, own in zip(totals, sums):
                total[b].copy_(own[0])
                own.zero_()
        return totals


class _PutOff(NamedTuple):
    """A backward pass that is to add to sums: kernels; gradient of the result, points, matrices and level logits of
    samples; settings of the kernels."""

    kernels: ModuleType
    tensors: Sequence[Tensor]
    settings: Tuple

    def of_sample(self, b: int) -> '_PutOff':
        return self._replace(tensors=[tensor[b : b + 1] for tensor in self.tensors])

    def add_to(self, sums: Sequence[Tensor], like: Sequence[Tensor]) -> None:
        grad_output, *given = self.tensors
        self.kernels.sample_multi_view_backward(grad_output, like, *given, *self.settings, False, sums)


def _shapes_of(features: Sequence[Tensor]) -> List[Tensor]:
    """Tensors of these sizes and types that take no memory."""
    return [feature.new_empty(feature.shape[-1:]).expand(feature.shape) for feature in features]


class _CollectGradients(Function):
    """The features as they are; backward, which runs after that of all samplings, hands on the sums and empties them.

    It knows the sums alone: knowing the features, it would keep itself alive.
    """

    @staticmethod
    def forward(ctx, sums: FeatureSums, *features: Tensor):
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return tuple(feature.view_as(feature) for feature in features)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Optional[Tensor]):
        totals = ctx.sums.take()
        if not totals:
            return (None,) + grads
        return (None,) + tuple(total if grad is None else total + grad for total, grad in zip(totals, grads))


def _zeros_for(features: Sequence[Tensor]) -> List[Tensor]:
    real = _real_type(features[:1])
    return [torch.zeros(feature.shape, dtype=real, device=feature.device) for feature in features]


class SampleMultiView(Function):
    """The compiled kernels, with gradients for the points, the level logits and the features.

    All arguments arrive checked, contiguous where msmv_sampling.h asks for it, and in one floating type for
    everything but the features. The kernels do nothing that autocast could change, so this needs no autocast
    decorators. The choice of the view has no gradient; with a frame_index that is not empty there is no
    backward pass.
    """

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
        sums: Optional[FeatureSums],
        *features: Tensor,
    ) -> Tensor:
        ctx.kernels, ctx.sums = kernels, sums
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
        sums: List[Tensor] = []
        grad_output = grad_output.contiguous()
        if any(wants[9:]) and ctx.sums is None:
            sums = _zeros_for(features)
        elif any(wants[9:]):
            sums = ctx.sums.open()
            ctx.sums.put_off(ctx.kernels, grad_output, (points, ego2img, level_logits), ctx.settings)
        grads = ctx.kernels.sample_multi_view_backward(
            grad_output, features, points, ego2img, level_logits, *ctx.settings, wants[1] or wants[3], sums
        )
        of_features = (None,) * len(features)
        if sums and ctx.sums is None:
            of_features = tuple(total.to(feature.dtype) for total, feature in zip(sums, features))
        return (None, grads[0], None, grads[1], None, None, None, None, None) + of_features


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


def _index_or_empty(frame_index: Optional[Tensor], like: Tensor) -> Tensor:
    """What the kernels take for 'no index': an empty one."""
    if frame_index is None:
        return torch.empty(0, dtype=torch.int64, device=like.device)
    return frame_index.contiguous()


def _check(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size,
    num_cameras: int,
    frame_index: Optional[Tensor] = None,
) -> None:
    """Arguments of ``sample_multi_view``."""
    _check_features(features, num_cameras)
    first = features[0]
    for name, tensor in (('points', points), ('ego2img', ego2img), ('level_logits', level_logits)):
        _check_float(name, tensor)
        _check_device(name, tensor, first.device)
    if points.dim() != 5 or points.shape[0] != first.shape[0] or points.shape[4] != 3:
        raise ValueError(f'points must be [B, Q, G, P, 3] with B = {first.shape[0]} but is {list(points.shape)}')
    _check_groups(points.shape[2], first.shape[4])
    images = first.shape[1]
    if frame_index is not None:
        _check_frame_index(frame_index, images // num_cameras, first.device)
        images = frame_index.shape[0] * num_cameras
    _check_shape('ego2img', ego2img, (first.shape[0], images, 4, 4))
    _check_shape('level_logits', level_logits, points.shape[:4] + (len(features),))
    if len(image_size) != 2 or min(image_size) <= 0:
        raise ValueError(f'image_size must be (height, width) in pixels, both positive, but is {tuple(image_size)}')


def _check_features(features: Sequence[Tensor], num_cameras: int) -> None:
    """L >= 1 levels [B, T*N, H_l, W_l, C] of one float type and device."""
    if isinstance(features, Tensor) or not isinstance(features, (list, tuple)):
        raise TypeError(
            f'features must be a list of tensors, one per pyramid level, but is a {type(features).__name__}'
        )
    if not features:
        raise ValueError('features must hold at least one pyramid level but is empty')
    first = features[0]
    for level, feature in enumerate(features):
        name = f'features[{level}]'
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
        raise ValueError(f'num_cameras must divide the {first.shape[1]} images of features but is {num_cameras}')


def _check_frame_index(index: Tensor, stored: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or not index.shape[0]:
        raise TypeError(
            f'frame_index must be an int64 tensor [T] with T at least 1 but is {_kind(index)}'
            + (f' {list(index.shape)}' if isinstance(index, Tensor) else '')
        )
    _check_device('frame_index', index, device)
    if index.is_cuda:
        return  # without waiting for the GPU; the kernel looks
    least, most = int(index.min()), int(index.max())
    if not 0 <= least <= most < stored:
        raise ValueError(f'frame_index must lie in 0..{stored - 1}, the stored frames, but spans {least}..{most}')


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
        raise ValueError(f'the number of groups must divide the {channels} channels of features but is {groups}')


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else 'a ' + type(value).__name__
