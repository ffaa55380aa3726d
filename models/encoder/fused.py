"""Backbone and neck on a GPU with fewer passes over the feature maps.

ResNet: convolution, norm, residual and ReLU are one cuDNN call. A batch norm whose statistics are fixed is a scale
and a shift per channel. Folded into the convolution before it, it costs no pass over the feature maps, and cuDNN adds
shift and residual and applies the ReLU while it writes the convolution's result. For a step of 48 images those passes
take longer than the convolutions. In training the outputs of the convolutions are not kept either, which saves memory.

The result differs from the modules' in rounding only; NaN and infinity pass through cuDNN's ReLU as through
PyTorch's (tried on an H200 in all three types).

FPN: mmdet's, step by step, adds a bias, enlarges the level above and adds it: three passes over each level, in
float32 also under autocast. Here the bias is added to the level above while that is small, and one pass adds every
value of it to the four below it.

The weights stay where they are, in mmdet's modules; this only computes with them.
"""

import functools
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.necks import FPN
from torch import Tensor, nn

from models.csrc import has_triton
from models.torch_compat import NON_REENTRANT, autocast_dtype, recompute

# Earlier releases reach cuDNN through another interface, which was not tried.
_IS_RECENT = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest maps, after the stem and in the first stage, hold 16 / 3 times the values of the images, and
# cuDNN's fused calls count in 32 bits.
_MOST_VALUES = 2**31 * 3 // 16


class _Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def _depth(block: nn.Module) -> int:
    return 3 if isinstance(block, Bottleneck) else 2


def _pairs_of(block: nn.Module) -> List[Tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and norms in turn; the shortcut's, if there are any, come last."""
    pairs = [(getattr(block, f'conv{i}'), getattr(block, f'norm{i}')) for i in range(1, _depth(block) + 1)]
    return pairs if block.downsample is None else [*pairs, tuple(block.downsample)]


class _BlockPlan(NamedTuple):
    """A residual block of ``depth`` convolutions and, if there is one more, a projection of the shortcut."""

    geometries: Sequence[_Geometry]
    depth: int


def can_fuse_backbone(backbone: nn.Module) -> bool:
    """Whether this is an mmdet ResNet of plain convolutions and batch norms."""
    if type(backbone) is not ResNet or backbone.deep_stem or backbone.avg_down:
        return False
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in backbone.modules() if 'Norm' in type(module).__name__]
    blocks = [block for name in backbone.res_layers for block in getattr(backbone, name)]
    return (
        all(type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == 'zeros' for conv in convolutions)
        and all(type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats for norm in norms)
        and len(convolutions) == len(norms)
        and all(
            type(block) in (BasicBlock, Bottleneck) and not getattr(block, 'with_plugins', False) for block in blocks
        )
    )


class FusedResNet:
    """Computes the stages of a ResNet; not a module, so that the backbone's weights are registered once.

    Weights changed in place, loaded or exchanged are seen; after writing to ``parameter.data``, which PyTorch
    does not count as a change, call :meth:`clear` (the detector does when it changes between training and
    evaluation).

    Args:
        backbone: for which ``can_fuse_backbone`` holds.
    """

    def __init__(self, backbone: ResNet):
        self.backbone = backbone
        self._parts = [
            (parent._modules, name, part, type(part))
            for parent in backbone.modules()
            for name, part in parent._modules.items()
        ]
        self._norms = [part for _, _, part, kind in self._parts if kind is nn.BatchNorm2d]
        self._weights = [
            (table, name)
            for part in backbone.modules()
            for table in (part._parameters, part._buffers)
            for name in ('weight', 'bias', 'running_mean', 'running_var')
            if table.get(name) is not None
        ]
        self._pairs = [(backbone.conv1, backbone.norm1)]
        for name in backbone.res_layers:
            self._pairs += [pair for block in getattr(backbone, name) for pair in _pairs_of(block)]
        self._changes = 0  # counted by version()
        self.clear()

    def clear(self):
        """Forget the folded weights."""
        self._folded: Dict[nn.Module, Tuple[Tensor, Tensor]] = {}  # in a pass with gradients
        self._kept: Dict[Tuple[nn.Module, torch.dtype], Tuple[Tensor, Tensor]] = {}
        self._seen: List[Tuple[Tensor, int]] = []
        self._changes += 1

    def __getstate__(self):
        return dict(self.__dict__, _kept={}, _folded={}, _seen=[])

    def version(self) -> int:
        """A number that grows whenever a weight or statistic has changed; folded weights are forgotten then."""
        now = [(table[name], _changes_of(table[name])) for table, name in self._weights]
        if len(now) != len(self._seen) or any(
            tensor is not old or changes != count for (tensor, changes), (old, count) in zip(now, self._seen)
        ):
            self.clear()
            self._seen = now
        return self._changes

    def serves(self, images: Tensor) -> bool:
        """Whether these images can be encoded here: NVIDIA GPU with cuDNN, all statistics fixed, modules as they
        were (none replaced, no hooks), and no wish for deterministic algorithms, which cuDNN's fused calls do
        not heed."""
        return (
            images.is_cuda
            and torch.version.hip is None
            and torch.backends.cudnn.enabled
            and _IS_RECENT
            and images.dtype in _DTYPES
            and images.numel() < _MOST_VALUES
            and not torch.are_deterministic_algorithms_enabled()
            and self.is_as_built()
        )

    def is_as_built(self) -> bool:
        """All norms use fixed statistics, no module was replaced, and none has hooks."""
        return not any(norm.training for norm in self._norms) and all(
            table.get(name) is part
            and type(part) is kind
            and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
            for table, name, part, kind in self._parts
        )

    def __call__(self, images: Tensor) -> Tuple[Tensor, ...]:
        """images [n, 3, H, W], channels last -> the stages of ``out_indices``, as the backbone gives them."""
        net = self.backbone
        self.version()
        dtype = autocast_dtype(images.device.type) or images.dtype
        self._fold_learning(dtype)
        x = _convolve_relu(images.to(dtype), *self._fold(net.conv1, net.norm1, dtype), _geometry(net.conv1))
        x = _pool(net.maxpool, x)
        stages = []
        for i, name in enumerate(net.res_layers):
            x = self._run(getattr(net, name), x)
            if i in net.out_indices:
                stages.append(x)
        self._folded.clear()
        return tuple(stages)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage; with checkpointing nothing inside it is kept, which costs no more time than to keep its blocks'
        results, and their memory is needed again only when that of the decoders is free."""
        weights: List[Tensor] = []
        plans = []
        for block in stage:
            pairs = _pairs_of(block)
            weights += [value for conv, norm in pairs for value in self._fold(conv, norm, x.dtype)]
            plans.append(_BlockPlan([_geometry(conv) for conv, _ in pairs], _depth(block)))
        run = functools.partial(_run_stage, plans)
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [x, *weights])
        return recompute(run, x, *weights) if learns and stage[0].with_cp else run(x, *weights)

    def _fold_learning(self, dtype: torch.dtype) -> None:
        """Fold all norms that gradients flow through at once."""
        pairs = [pair for pair in self._pairs if _learns(*pair)]
        if pairs:
            norms = [norm for _, norm in pairs]
            tensors = [conv.weight for conv, _ in pairs]
            tensors += [norm.weight for norm in norms] + [norm.bias for norm in norms]
            statistics = [(norm.running_mean, norm.running_var, norm.eps) for norm in norms]
            folded = _FoldNorms.apply(statistics, dtype, *tensors)
            self._folded = dict(zip([conv for conv, _ in pairs], zip(folded, folded[len(pairs) :])))

    def _fold(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """Weight and bias in ``dtype``; kept where no gradient flows into them."""
        if _learns(conv, norm):
            return self._folded[conv]
        if (conv, dtype) not in self._kept:
            with torch.inference_mode(False), torch.no_grad():  # a later pass may need gradients through them
                self._kept[conv, dtype] = tuple(value.to(dtype) for value in fold_norm(conv.weight, norm))
        return self._kept[conv, dtype]


def _changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what a bias-free convolution and a fixed norm do.

    Args:
        weight: [C_out, C_in, h, w].
        norm: over C_out channels; its running statistics are used.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def _learns(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (conv.weight, norm.weight, norm.bias))


class _FoldNorms(torch.autograd.Function):
    """``fold_norm`` of many layers, whose channels lie in one vector meanwhile.

    A step of a small batch waits for the CPU to launch its kernels, and by themselves these small ones are a
    thousand, there and back.
    """

    @staticmethod
    def forward(ctx, statistics, dtype, *tensors):
        """tensors: L convolutions' weights, L norms' weights, L norms' biases -> L weights and L biases."""
        count = len(statistics)
        weights, gammas, betas = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        sizes = [len(gamma) for gamma in gammas]
        mean = torch.cat([mean for mean, _, _ in statistics])
        eps = statistics[0][2]
        if any(other != eps for _, _, other in statistics):
            eps = torch.cat([var.new_full(var.shape, own) for _, var, own in statistics])
        inverse = torch.rsqrt(torch.cat([var for _, var, _ in statistics]) + eps)
        scale = torch.cat(gammas) * inverse
        biases = (torch.cat(betas) - mean * scale).to(dtype).split(sizes)
        ctx.save_for_backward(mean, inverse, scale, *weights)
        ctx.sizes = sizes
        return tuple(
            torch.mul(weight, _per_channel(own), out=torch.empty_like(weight, dtype=dtype))
            for weight, own in zip(weights, scale.split(sizes))
        ) + tuple(biases)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        mean, inverse, scale, *weights = ctx.saved_tensors
        count, sizes = len(weights), ctx.sizes
        grad_bias = torch.cat(grads[count:]).to(mean.dtype)
        of_scale = [(grad * weight).sum((1, 2, 3)) for grad, weight in zip(grads, weights)]
        grad_gamma = (torch.cat(of_scale) - mean * grad_bias) * inverse
        of_weights = tuple(grad * _per_channel(own) for grad, own in zip(grads, scale.split(sizes)))
        return (None, None) + of_weights + grad_gamma.split(sizes) + grad_bias.split(sizes)


def _per_channel(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _geometry(conv: nn.Conv2d) -> _Geometry:
    return _Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)


def _run_stage(plans: Sequence[_BlockPlan], x: Tensor, *weights: Tensor) -> Tensor:
    """Blocks one after the other.

    Args:
        x: [n, C, H, W].
        weights: weight and bias of each convolution in turn.
    """
    start = 0
    for geometries, depth in plans:
        end = start + 2 * len(geometries)
        x = _run_block(geometries, depth, x, *weights[start:end])
        start = end
    return x


def _run_block(geometries: Sequence[_Geometry], depth: int, x: Tensor, *weights: Tensor) -> Tensor:
    layers = list(zip(weights[::2], weights[1::2], geometries))
    weight, bias, geometry = layers[depth - 1]
    shortcut = x
    if len(layers) > depth:
        projection, shift, its_geometry = layers[depth]
        shortcut = F.conv2d(x, projection, None, *its_geometry)
        bias = bias + shift  # added by the last convolution
    for layer in layers[: depth - 1]:
        x = _convolve_relu(x, *layer)
    return _convolve_relu(x, weight, bias, geometry, shortcut)


def _convolve_relu(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: _Geometry, added: Optional[Tensor] = None
) -> Tensor:
    """relu(convolution + bias [+ added])."""
    return _ConvolveReLU.apply(x, weight, bias, added, geometry)


class _ConvolveReLU(torch.autograd.Function):
    """cuDNN's fused call; the backward pass needs its inputs and its result."""

    @staticmethod
    def forward(ctx, x, weight, bias, added, geometry):
        if added is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *geometry)
        ctx.save_for_backward(x, weight, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        grads, of_bias = [None, None, None], None
        if wanted[2] and _can_sum_fused(grad, y):
            from models.encoder.kernels import relu_backward  # needs Triton

            grad, of_bias = relu_backward(grad, y)
            wanted[2] = False
        else:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        if any(wanted):
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, [weight.shape[0]], *ctx.geometry[:3], False, [0, 0], ctx.geometry.groups, wanted
            )
        grads = [g if wants else None for g, wants in zip(grads, wanted)]
        grads[2] = grads[2] if of_bias is None else of_bias
        return (*grads, grad if ctx.needs_input_grad[3] else None, None)


def _pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """The stem's pooling, without places where no gradient will want them."""
    plain = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (3, 2, 1, 1, False)
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if not plain or wants_gradient or not x.is_contiguous(memory_format=torch.channels_last):
        return pool(x)
    if not has_triton(x.device):
        return pool(x)
    from models.encoder.kernels import max_pool

    return max_pool(x)


def _can_sum_fused(grad: Tensor, result: Tensor) -> bool:
    layout = torch.channels_last
    both = grad.is_contiguous(memory_format=layout) and result.is_contiguous(memory_format=layout)
    return both and grad.dtype == result.dtype and has_triton(grad.device)


def can_fuse_neck(neck: nn.Module) -> bool:
    """Whether this is an mmdet FPN of plain convolutions with biases, nearest upsampling, no extra levels, no hooks."""
    if (
        type(neck) is not FPN
        or neck.num_outs != len(neck.lateral_convs)
        or dict(neck.upsample_cfg) != {'mode': 'nearest'}
    ):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in neck.modules()):
        return False
    return all(
        type(module) is ConvModule
        and type(module.conv) is nn.Conv2d
        and module.conv.bias is not None
        and not module.with_norm
        and not module.with_activation
        for module in list(neck.lateral_convs) + list(neck.fpn_convs)
    )


def run_neck(neck: FPN, stages: Sequence[Tensor]) -> List[Tensor]:
    """What ``neck(stages)`` gives but for rounding.

    Args:
        neck: for which ``can_fuse_neck`` holds.
        stages: of the backbone, [n, C_l, H_l, W_l], channels last.
    """
    merged: List[Tensor] = []  # from the coarsest level down
    for stage, module in reversed(list(zip(stages[neck.start_level :], neck.lateral_convs))):
        level = F.conv2d(stage, module.conv.weight)
        bias = module.conv.bias.to(level.dtype).view(1, -1, 1, 1)
        merged.append(_AddEnlarged.apply(level, merged[-1] + bias) if merged else level.add_(bias))
    levels = [module(level) for module, level in zip(reversed(neck.fpn_convs), merged)]
    return levels[::-1]


def run_neck_again(neck: FPN, stages: Sequence[Tensor]) -> List[Tensor]:
    """``run_neck`` that keeps nothing but its results; the levels that it convolves are added up again in the backward
    pass. That ends before the largest level, which comes last, is convolved again."""
    if not NON_REENTRANT:  # DDP wants every weight's gradient in one backward pass
        return run_neck(neck, stages)
    return list(recompute(lambda *parts: tuple(run_neck(neck, parts)), *stages))


class _AddEnlarged(torch.autograd.Function):
    """``add_enlarged`` and its backward pass."""

    @staticmethod
    def forward(ctx, level, coarse):
        ctx.size = coarse.shape
        ctx.mark_dirty(level)
        return add_enlarged(level, coarse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad, add_up(grad, ctx.size) if ctx.needs_input_grad[1] else None


def add_up(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sum of grad [n, C, H, W] over what each value of ``size`` [n, C, h, w] is the nearest of."""
    count, channels, height, width = grad.shape
    if (height, width) != (2 * size[2], 2 * size[3]) or not grad.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.aten.upsample_nearest2d_backward(grad, [height, width], list(size))
    blocks = grad.permute(0, 2, 3, 1).view(count, height // 2, 2, width // 2, 2, channels)
    return blocks.sum((2, 4)).permute(0, 3, 1, 2)


def add_enlarged(level: Tensor, coarse: Tensor) -> Tensor:
    """level [n, C, H, W] plus coarse [n, C, h, w] enlarged to H x W by its nearest values; overwrites level."""
    count, channels, height, width = level.shape
    doubles = (height, width) == (2 * coarse.shape[2], 2 * coarse.shape[3])
    if not doubles or not level.is_contiguous(memory_format=torch.channels_last):
        return level.add_(F.interpolate(coarse, size=(height, width), mode='nearest'))
    blocks = level.permute(0, 2, 3, 1).view(count, height // 2, 2, width // 2, 2, channels)
    blocks.add_(coarse.permute(0, 2, 3, 1)[:, :, None, :, None])
    return level
