"""Backbone and neck on a GPU with fewer passes over the feature maps.

ResNet: convolution, norm, residual and ReLU are one cuDNN call. A batch norm whose statistics are fixed is a scale
and a shift per channel. Folded into the convolution before it, it costs no pass over the feature maps, and cuDNN adds
shift and residual and applies the ReLU while it writes the convolution's result. For a step of 48 images those passes
take longer than the convolutions. In training the outputs of the convolutions are not kept either, which saves memory.

The stem's 7x7 convolution of three channels, which tensor cores take badly, is one of 4x4 over squares of 2x2 pixels.

The result differs from the modules' in rounding only; NaN and infinity pass through cuDNN's ReLU as through
PyTorch's (tried on an H200 in all three types).

FPN: mmdet's, step by step, adds a bias, enlarges the level above and adds it: three passes over each level, in
float32 also under autocast. Here one pass adds the bias and every value of the level above, to the four below it.

The weights stay where they are, in mmdet's modules; this only computes with them.
"""

import itertools
import operator
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.necks.fpn import FPN
from torch import Tensor, nn

from models.csrc import NON_REENTRANT, autocast_dtype, has_triton, recompute

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
        self._squared: Dict[torch.dtype, Tensor] = {}  # the stem's weight, see _run_stem
        self._seen: List[Tensor] = []  # weights, and how often each was changed in place
        self._seen_changes: List[int] = []
        self._changes += 1

    def constants(self) -> object:
        """What it computes with beside the backbone's weights, for a graph that goes on reading it."""
        return dict(self._kept), dict(self._squared)

    def __getstate__(self):
        return dict(self.__dict__, _kept={}, _folded={}, _squared={}, _seen=[], _seen_changes=[])

    def version(self) -> int:
        """A number that grows whenever a weight or statistic has changed; folded weights are forgotten then."""
        tensors = [table[name] for table, name in self._weights]
        changes = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # those do not count
        if changes != self._seen_changes or not all(map(operator.is_, tensors, self._seen)):
            self.clear()
            self._seen, self._seen_changes = tensors, changes
        return self._changes

    @property
    def last_version(self) -> int:
        """As :meth:`version`, but for what has changed since that was last called."""
        return self._changes

    def takes_squares(self, size: Sequence[int]) -> bool:
        """Whether the first convolution runs over ``squares_of`` images of this (height, width)."""
        return _is_usual_stem(self.backbone.conv1) and not any(n % 2 for n in size)

    def serves(self, images: Tensor) -> bool:
        """Whether these images can be encoded here: NVIDIA GPU with cuDNN, all statistics fixed, modules as they
        were (none replaced, no hooks), and no wish for deterministic algorithms, which cuDNN's fused calls do
        not heed."""
        return images.dtype in _DTYPES and images.numel() < _MOST_VALUES and self._serves_on(images.device)

    def _serves_on(self, device: torch.device) -> bool:
        return (
            device.type == 'cuda'
            and torch.version.hip is None
            and torch.backends.cudnn.enabled
            and _IS_RECENT
            and not torch.are_deterministic_algorithms_enabled()
            and self.is_as_built()
        )

    def serves_learning(self, images: Tensor) -> bool:
        """Whether :meth:`learn` can encode these images: Triton, statistics of all norms being learned and nothing
        computed twice, modules as they were."""
        return (
            images.dtype in _DTYPES
            and has_triton(images.device)
            and all(norm.training and norm.momentum is not None for norm in self._norms)
            and not any(module.training and getattr(module, 'with_cp', False) for module in self.backbone.modules())
            and self._has_own_modules()
        )

    def learn(self, images: Tensor) -> Tuple[Tensor, ...]:
        """What the backbone gives of images [n, 3, H, W], channels last, while its norms learn; statistics are
        brought up to date."""
        net = self.backbone
        if not images.requires_grad and self.takes_squares(images.shape[2:]):
            x = F.conv2d(squares_of(images), squared_weight(net.conv1.weight))
        else:
            x = net.conv1(images)
        x = net.maxpool(_norm_relu(net.norm1, x))
        stages = []
        for i, name in enumerate(net.res_layers):
            for block in getattr(net, name):
                x = _run_learning_block(block, x)
            if i in net.out_indices:
                stages.append(x)
        torch._foreach_add_([norm.num_batches_tracked for norm in self._norms], 1)
        return tuple(stages)

    def pieces_of(self, images: Tensor) -> List[Tensor]:
        """Images [n, 3, H, W] in as few pieces of about one size as can be encoded here; whole where none can."""
        most = max(1, (_MOST_VALUES - 1) // images[0].numel())
        pieces = list(images.tensor_split(-(-len(images) // most)))
        return pieces if self.serves(pieces[0]) else [images]

    def fold_in_place(self, dtype: torch.dtype) -> None:
        """Where a GPU is to compute here in ``dtype``: put folded weights in the place of the backbone's, so that they
        are held once. The norms then only add their biases. For inference alone."""
        if not self._serves_on(self.backbone.conv1.weight.device):
            return
        with torch.no_grad():
            for conv, norm in self._pairs:
                weight, bias = fold_norm(conv.weight, norm)
                conv.weight.data = weight.to(dtype)
                norm.bias.copy_(bias)
                norm.weight.fill_(1)
                norm.running_mean.zero_()
                norm.running_var.fill_(1 - norm.eps)
        self.clear()

    def is_as_built(self) -> bool:
        """All norms use fixed statistics, no module was replaced, and none has hooks."""
        return not any(norm.training for norm in self._norms) and self._has_own_modules()

    def _has_own_modules(self) -> bool:
        """No module was replaced, and none has hooks."""
        return all(
            table.get(name) is part
            and type(part) is kind
            and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
            for table, name, part, kind in self._parts
        )

    def __call__(self, images: Tensor, in_squares: bool = False) -> Tuple[Tensor, ...]:
        """images [n, 3, H, W], channels last -> the stages of ``out_indices``, as the backbone gives them.

        Args:
            in_squares: given are ``squares_of`` the images, for which :meth:`takes_squares` holds.
        """
        net = self.backbone
        self.version()
        dtype = autocast_dtype(images.device.type) or images.dtype
        self._fold_learning(dtype)
        x = self._run_stem(images.to(dtype), in_squares)
        stages = []
        for i, name in enumerate(net.res_layers):
            x = self._run(getattr(net, name), x)
            if i in net.out_indices:
                stages.append(x)
        self._folded.clear()
        return tuple(stages)

    def _run_stem(self, images: Tensor, in_squares: bool = False) -> Tensor:
        """The first convolution, its norm, ReLU and pooling; of 7x7 with stride 2 as one of 4x4 over squares of four
        pixels."""
        conv, pool = self.backbone.conv1, self.backbone.maxpool
        weight, bias = self._fold(conv, self.backbone.norm1, images.dtype)
        geometry = _geometry(conv)
        if not (in_squares or self.takes_squares(images.shape[2:])):
            return _pool(pool, _ConvolveReLU.apply(images, weight, bias, geometry))
        if _learns(conv, self.backbone.norm1):
            weight = squared_weight(weight)
        else:
            if images.dtype not in self._squared:
                with torch.inference_mode(False), torch.no_grad():
                    self._squared[images.dtype] = squared_weight(weight)
            weight = self._squared[images.dtype]
        squares = images if in_squares else squares_of(images)
        learns = _learns(conv, self.backbone.norm1) or torch.is_grad_enabled() and images.requires_grad
        if not learns and _is_usual_pool(pool) and has_triton(images.device):
            from models.encoder.kernels import can_convolve_and_pool, convolve_and_pool

            if can_convolve_and_pool(squares, weight):
                return convolve_and_pool(squares, weight, bias)
        return _pool(pool, _ConvolveReLU.apply(squares, weight, bias, _Geometry((1, 1), (0, 0), (1, 1), 1)))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage; with checkpointing nothing inside it is kept, which costs no more time than to keep its blocks'
        results, and their memory is needed again only when that of the decoders is free."""
        weights: List[Tensor] = []
        plans = []
        for block in stage:
            pairs = _pairs_of(block)
            layers = [self._fold(conv, norm, x.dtype) for conv, norm in pairs]
            if len(pairs) > _depth(block) and not torch.is_grad_enabled():
                layers = self._with_sum_of_biases(pairs, layers)
            weights += [value for layer in layers for value in layer]
            plans.append(_BlockPlan([_geometry(conv) for conv, _ in pairs], _depth(block)))
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [x, *weights])
        if learns:
            return _Stage.apply(plans, bool(stage[0].with_cp), x, *weights)
        return _run_stage(plans, x, weights, infers=True)

    def _with_sum_of_biases(self, pairs: Sequence[Tuple], layers: List[Tuple]) -> List[Tuple]:
        """Layers of a block with a projection whose last convolution adds the bias of both."""
        (weight, bias), (projection, other) = layers[-2:]
        key = pairs[-2][1], weight.dtype
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = weight, bias + other
        return [*layers[:-2], self._kept[key], (projection, None)]

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
            may_be_folded = conv.weight.dtype == dtype and not torch.is_grad_enabled()  # see fold_in_place
            with torch.inference_mode(False), torch.no_grad():  # a later pass may need gradients through them
                weight, bias = (value.to(dtype) for value in fold_norm(conv.weight, norm))
                if may_be_folded and torch.equal(weight, conv.weight):
                    weight = conv.weight.detach()
                self._kept[conv, dtype] = weight, bias
        return self._kept[conv, dtype]


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


def _is_usual_stem(conv: nn.Conv2d) -> bool:
    kind = conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return kind == (3, (7, 7), (2, 2), (3, 3), (1, 1), 1)


def squares_of(images: Tensor) -> Tensor:
    """Every 2x2 pixels as one of 16 channels: an input that tensor cores take, with the stem's padding around it.

    Args:
        images: [n, 3, H, W], channels last; H and W even.

    Returns:
        [n, 16, H/2 + 3, W/2 + 3], channels last: channel 6 * row + 3 * column + colour of the square, four of zero
        behind; two squares of zero above and left, one below and right.
    """
    count, _, height, width = images.shape
    if has_triton(images.device) and not images.requires_grad:
        from models.encoder.kernels import gather_squares

        return gather_squares(images.contiguous(memory_format=torch.channels_last))
    squares = images.view(count, 3, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    padded = F.pad(squares.reshape(count, height // 2, width // 2, 12), (0, 4, 2, 1, 2, 1))
    return padded.permute(0, 3, 1, 2)


def squared_weight(weight: Tensor) -> Tensor:
    """The stem's weight [C, 3, 7, 7] over ``squares_of`` the images: [C, 16, 4, 4], channels last."""
    taps = F.pad(weight, (1, 0, 1, 0)).view(len(weight), 3, 4, 2, 4, 2)  # the first square begins a pixel earlier
    squares = taps.permute(0, 3, 5, 1, 2, 4).reshape(len(weight), 12, 4, 4)
    return F.pad(squares, (0, 0, 0, 0, 0, 4)).contiguous(memory_format=torch.channels_last)


class _Layer(NamedTuple):
    """A convolution with its norm folded in; bias: None where a projection's is part of that of the last one."""

    weight: Tensor
    bias: Optional[Tensor]
    geometry: _Geometry


def _layers_of(plan: _BlockPlan, weights: Sequence[Tensor]) -> List[_Layer]:
    """weights: weight and bias of each convolution in turn."""
    return [_Layer(*parts) for parts in zip(weights[::2], weights[1::2], plan.geometries)]


def _run_stage(
    plans: Sequence[_BlockPlan], x: Tensor, weights: Sequence[Tensor], kept: Optional[List] = None, infers: bool = False
) -> Tensor:
    """Blocks one after the other.

    Args:
        x: [n, C, H, W].
        weights: weight and bias of each convolution in turn.
        kept: for the backward pass: results of each block's convolutions, a list a block, are put here.
        infers: there will be no backward pass, so that a block's end may round in another way.
    """
    for plan, own in zip(plans, _split(plans, weights)):
        results: Optional[List[Tensor]] = None if kept is None else []
        layers = _layers_of(plan, own)
        if infers and _can_finish(layers, plan.depth, x):
            x = _finish_block(layers, x)
            continue
        x = _run_block(layers, plan.depth, x, results)
        if kept is not None:
            kept.append(results)
    return x


def _split(plans: Sequence[_BlockPlan], values: Sequence) -> List[Sequence]:
    """What belongs to the weights, two a convolution, by blocks."""
    ends = list(itertools.accumulate(2 * len(plan.geometries) for plan in plans))
    return [values[start:end] for start, end in zip([0, *ends], ends)]


def _can_finish(layers: Sequence[_Layer], depth: int, x: Tensor) -> bool:
    """Whether the end of a block, a bottleneck in half precision, is one kernel of Triton's."""
    halves = x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous(memory_format=torch.channels_last)
    if depth != 3 or not halves or not has_triton(x.device) or not _is_pointwise(layers[2], (1, 1)):
        return False
    from models.encoder.kernels import can_finish  # needs Triton

    wide, inner = layers[2].weight.shape[:2]
    if len(layers) == depth:
        return can_finish(inner, wide, 0)
    stride = layers[3].geometry.stride
    square = stride[0] == stride[1] <= 2 and _is_pointwise(layers[3], stride)
    return square and can_finish(inner, wide, layers[3].weight.shape[1])


def _is_pointwise(layer: _Layer, stride: Sequence[int]) -> bool:
    own, padding, _, groups = layer.geometry
    return tuple(layer.weight.shape[2:]) == (1, 1) and tuple(own) == tuple(stride) and not any(padding) and groups == 1


def _finish_block(layers: Sequence[_Layer], x: Tensor) -> Tensor:
    """A block that :func:`_can_finish` holds for."""
    from models.encoder.kernels import finish_block  # needs Triton

    projection = layers[3].weight if len(layers) > 3 else None
    return finish_block(_run_inner(layers[:2], x, None), layers[2].weight, _bias_of_sum(layers, 3), x, projection)


def _bias_of_sum(layers: Sequence[_Layer], depth: int) -> Tensor:
    """That of a block's last convolution and of its projection, if there is one."""
    bias, *others = [layer.bias for layer in layers[depth - 1 :]]
    return bias + others[0] if others and others[0] is not None else bias


def _run_block(layers: Sequence[_Layer], depth: int, x: Tensor, kept: Optional[List[Tensor]]) -> Tensor:
    """A block, whose projection of the shortcut, if there is one, comes last; each result is put into ``kept``."""
    last = layers[depth - 1]
    shortcut, bias = x, _bias_of_sum(layers, depth)  # the last convolution adds it
    if len(layers) > depth:
        projection = layers[depth]
        shortcut = F.conv2d(x, projection.weight, None, *projection.geometry)
    x = _run_inner(layers[: depth - 1], x, kept)
    x = _convolve_relu(x, last.weight, bias, last.geometry, shortcut)
    if kept is not None:
        kept.append(x)
    return x


def _norm_relu(norm: nn.BatchNorm2d, x: Tensor, added: Optional[Tensor] = None, rectifies: bool = True) -> Tensor:
    from models.encoder.batch_norm import norm_relu  # needs Triton

    return norm_relu(norm, x, added, rectifies)


def _run_learning_block(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block whose norms learn their statistics."""
    (*inner, last), projection = _pairs_of(block)[: _depth(block)], _pairs_of(block)[_depth(block) :]
    shortcut, y = x, x
    for conv, norm in projection:
        shortcut = _norm_relu(norm, conv(x), rectifies=False)
    for conv, norm in inner:
        y = _norm_relu(norm, conv(y))
    return _norm_relu(last[1], last[0](y), shortcut)


def _run_inner(layers: Sequence[_Layer], x: Tensor, kept: Optional[List[Tensor]]) -> Tensor:
    """A block up to its last convolution."""
    for layer in layers:
        x = _convolve_relu(x, *layer)
        if kept is not None:
            kept.append(x)
    return x


def _convolve_relu(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: _Geometry, added: Optional[Tensor] = None
) -> Tensor:
    """relu(convolution + bias [+ added]) in cuDNN's fused call, which has no gradients by itself."""
    if added is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *geometry)


class _ConvolveReLU(torch.autograd.Function):
    """``_convolve_relu`` of a layer by itself."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        y = _convolve_relu(x, weight, bias, geometry)
        ctx.save_for_backward(x, weight, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        grad, bias_grad = _through_relu([grad], y, of_bias)
        return (*_through_convolution(grad, x, _Layer(weight, None, ctx.geometry), of_x, of_weight), bias_grad, None)


class _Stage(torch.autograd.Function):
    """``_run_stage`` with its backward pass, in which gradients of a block's two ways meet inside the ReLU's pass.

    It keeps the results of all convolutions or, to save memory, none but the last, which others keep as well; then
    the rest is made again.
    """

    @staticmethod
    def forward(ctx, plans, saves_memory, x, *weights):
        kept: List[List[Tensor]] = []
        y = _run_stage(plans, x, weights, None if saves_memory else kept)
        results = [result for block in kept for result in block] or [y]
        ctx.save_for_backward(x, *weights, *results)
        ctx.plans, ctx.saves_memory = plans, saves_memory
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        count, plans = len(ctx.needs_input_grad) - 3, ctx.plans
        weights, results = rest[:count], rest[count:]
        kept = _run_again(plans, x, weights, results[0]) if ctx.saves_memory else _by_blocks(plans, results)
        del results, rest
        wanted = _split(plans, ctx.needs_input_grad[3:])
        reaches = list(itertools.accumulate([ctx.needs_input_grad[2], *map(any, wanted)], lambda a, b: a or b))
        grads, of_weights = [grad], []
        for i, own in reversed(list(enumerate(_split(plans, weights)))):
            if not (reaches[i] or any(wanted[i])):
                break
            given = kept[i - 1][-1] if i else x
            layers = _layers_of(plans[i], own)
            grads, found = _through_block(layers, plans[i].depth, given, kept.pop(), grads, reaches[i], wanted[i])
            of_weights = found + of_weights
        of_weights = [None] * (count - len(of_weights)) + of_weights
        return (None, None, sum(grads[1:], grads[0]) if ctx.needs_input_grad[2] else None, *of_weights)


def _run_again(plans: Sequence[_BlockPlan], x: Tensor, weights: Sequence[Tensor], y: Tensor) -> List[List[Tensor]]:
    """Results by blocks; all but the last convolution's, which are known."""
    kept: List[List[Tensor]] = []
    last = _split(plans, weights)[-1]
    before = _run_stage(plans[:-1], x, weights[: len(weights) - len(last)], kept)
    inner: List[Tensor] = []
    _run_inner(_layers_of(plans[-1], last)[: plans[-1].depth - 1], before, inner)
    return [*kept, [*inner, y]]


def _by_blocks(plans: Sequence[_BlockPlan], results: Sequence[Tensor]) -> List[List[Tensor]]:
    ends = list(itertools.accumulate(plan.depth for plan in plans))
    return [list(results[start:end]) for start, end in zip([0, *ends], ends)]


def _through_block(
    layers: Sequence[_Layer],
    depth: int,
    x: Tensor,
    results: List[Tensor],
    grads: List[Tensor],
    of_x: bool,
    wanted: Sequence[bool],
) -> Tuple[List[Tensor], List[Optional[Tensor]]]:
    """Backward pass of ``_run_block``.

    Args:
        results: of the convolutions.
        grads: of the block's result, to be added up.
        of_x: whether x has a gradient.
        wanted: whether weight and bias of each layer have.

    Returns:
        gradients of x, to be added up (none if it has none), and those of weights and biases in turn.
    """
    found: List[Optional[Tensor]] = [None] * len(wanted)
    projects, last = len(layers) > depth, 2 * depth - 2
    wants_bias = wanted[last + 1] or projects and wanted[2 * depth + 1]
    at_sum, of_bias = _through_relu(grads, results[-1], wants_bias)
    found[last + 1] = of_bias
    passed = [at_sum] if of_x and not projects else []
    if projects:
        found[2 * depth + 1] = of_bias
        of_shortcut, found[2 * depth] = _through_convolution(at_sum, x, layers[depth], of_x, wanted[2 * depth])
        passed = [of_shortcut] if of_x else []
    grad = at_sum
    for i in reversed(range(depth)):
        given = results[i - 1] if i else x
        further = of_x or any(wanted[: 2 * i])
        if i < depth - 1:
            grad, found[2 * i + 1] = _through_relu([grad], results[i], wanted[2 * i + 1])
        grad, found[2 * i] = _through_convolution(grad, given, layers[i], further, wanted[2 * i])
        if not further:
            break
    return ([grad, *passed] if of_x else []), [value if wants else None for value, wants in zip(found, wanted)]


def _through_relu(grads: Sequence[Tensor], result: Tensor, wants_bias: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """What of the sum of one or two gradients goes through the ReLU and, if wanted, its sum per channel.

    Args:
        grads, result: [n, C, H, W].
    """
    if wants_bias and all(_can_sum_fused(grad, result) for grad in grads):
        from models.encoder.kernels import relu_backward  # needs Triton

        return relu_backward(result, *grads)
    grad = torch.ops.aten.threshold_backward(sum(grads[1:], grads[0]), result, 0)
    return grad, grad.sum((0, 2, 3)) if wants_bias else None


def _through_convolution(
    grad: Tensor, x: Tensor, layer: _Layer, of_x: bool, of_weight: bool
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of x and of the layer's weight, where they are wanted."""
    if not (of_x or of_weight):
        return None, None
    places = (*layer.geometry[:3], False, [0, 0], layer.geometry.groups)
    return torch.ops.aten.convolution_backward(grad, x, layer.weight, None, *places, [of_x, of_weight, False])[:2]


def _is_usual_pool(pool: nn.MaxPool2d) -> bool:
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (3, 2, 1, 1, False)


def _pool(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """The stem's pooling, without places where no gradient will want them."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if not _is_usual_pool(pool) or wants_gradient or not x.is_contiguous(memory_format=torch.channels_last):
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
    levels = []
    for module, level in zip(reversed(neck.fpn_convs), _merge(neck, list(stages))):
        conv = module.conv
        convolved = F.conv2d(level, conv.weight, None, *_geometry(conv))
        levels.append(_AddToLevel.apply(convolved, None, conv.bias.to(convolved.dtype)))
    return levels[::-1]


def _merge(neck: FPN, stages: List[Tensor]) -> List[Tensor]:
    """What the FPN's last convolutions take, from the coarsest level down; takes the stages out of their list."""
    merged: List[Tensor] = []
    del stages[neck.start_level + len(neck.lateral_convs) :]
    for module in reversed(neck.lateral_convs):
        stage, conv, coarse = stages.pop(), module.conv, merged[-1] if merged else None
        if _can_merge_fused(stage, coarse):
            from models.encoder.kernels import merge_level  # needs Triton

            weight = conv.weight.to(stage.dtype).flatten(1).contiguous()
            merged.append(merge_level(stage, weight, conv.bias, coarse))
            continue
        if coarse is None and _can_multiply(stage):
            pixels = stage.permute(0, 2, 3, 1)
            weight, bias = conv.weight.to(stage.dtype).flatten(1), conv.bias.to(stage.dtype)
            merged.append(F.linear(pixels, weight, bias).permute(0, 3, 1, 2))
            continue
        level = F.conv2d(stage, conv.weight)
        merged.append(_AddToLevel.apply(level, coarse, conv.bias.to(level.dtype)))
    return merged


def _can_merge_fused(stage: Tensor, coarse: Optional[Tensor]) -> bool:
    """Each value of the level above is the nearest of four, and :func:`_can_multiply` holds."""
    if coarse is None or not _can_multiply(stage) or not has_triton(stage.device):
        return False
    doubles = tuple(stage.shape[2:]) == (2 * coarse.shape[2], 2 * coarse.shape[3])
    return doubles and coarse.is_contiguous(memory_format=torch.channels_last)


def _can_multiply(stage: Tensor) -> bool:
    """Without gradients, in half precision, a 1x1 convolution is a product of matrices."""
    halves = stage.dtype in (torch.float16, torch.bfloat16) and stage.is_contiguous(memory_format=torch.channels_last)
    return halves and not torch.is_grad_enabled()


def run_neck_into(neck: FPN, stages: List[Tensor], stored: Sequence[Tensor], slots: Tensor) -> None:
    """``run_neck``, its maps written to where frames are stored; no gradients, on a GPU with Triton.

    Args:
        stages: as ``run_neck`` takes them, of F*N images; taken out of the list, so that their memory is free when
            the largest level needs its own.
        stored: L tensors [S, N, H_l, W_l, C], contiguous.
        slots: int64 [F], where each frame goes.
    """
    from models.encoder.kernels import store_level  # needs Triton

    for module, level, own in zip(reversed(neck.fpn_convs), _merge(neck, stages), reversed(stored)):
        conv = module.conv
        result = F.conv2d(level, conv.weight, None, *_geometry(conv)).contiguous(memory_format=torch.channels_last)
        store_level(result, conv.bias.to(result.dtype), own, slots)


def run_neck_again(neck: FPN, stages: Sequence[Tensor]) -> List[Tensor]:
    """``run_neck`` that keeps nothing but its results; the levels that it convolves are added up again in the backward
    pass. That ends before the largest level, which comes last, is convolved again."""
    if not NON_REENTRANT:  # DDP wants every weight's gradient in one backward pass
        return run_neck(neck, stages)
    return list(recompute(lambda *parts: tuple(run_neck(neck, parts)), *stages, preserve_rng_state=False))


class _AddToLevel(torch.autograd.Function):
    """``add_to_level`` and its backward pass."""

    @staticmethod
    def forward(ctx, level, coarse, bias):
        ctx.size = None if coarse is None else coarse.shape
        ctx.mark_dirty(level)
        return add_to_level(level, coarse, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        of_coarse = add_up(grad, ctx.size) if ctx.needs_input_grad[1] else None
        of_bias = grad if of_coarse is None else of_coarse
        return grad, of_coarse, of_bias.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def add_up(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sum of grad [n, C, H, W] over what each value of ``size`` [n, C, h, w] is the nearest of."""
    count, channels, height, width = grad.shape
    if (height, width) != (2 * size[2], 2 * size[3]) or not grad.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.aten.upsample_nearest2d_backward(grad, [height, width], list(size))
    if has_triton(grad.device):
        from models.encoder.kernels import sum_squares

        return sum_squares(grad)
    blocks = grad.permute(0, 2, 3, 1).view(count, height // 2, 2, width // 2, 2, channels)
    return blocks.sum((2, 4)).permute(0, 3, 1, 2)


def add_to_level(level: Tensor, coarse: Optional[Tensor], bias: Tensor) -> Tensor:
    """level [n, C, H, W] plus bias [C], and coarse [n, C, h, w] enlarged to H x W by its nearest values if it is given.

    Overwrites level. Where both are given, the bias is added to coarse first, and that sum rounded.
    """
    if has_triton(level.device) and _is_half_of(coarse, level):
        from models.encoder.kernels import add_to_level as add

        return add(level, coarse, bias.contiguous())
    shift = bias.view(1, -1, 1, 1)
    return level.add_(shift) if coarse is None else add_enlarged(level, coarse + shift)


def _is_half_of(coarse: Optional[Tensor], level: Tensor) -> bool:
    """Whether both lie channels last in memory, and coarse, if it is given, has half the size."""
    layout = torch.channels_last
    halves = coarse is None or (
        coarse.dtype == level.dtype
        and tuple(level.shape[2:]) == (2 * coarse.shape[2], 2 * coarse.shape[3])
        and coarse.is_contiguous(memory_format=layout)
    )
    return halves and level.is_contiguous(memory_format=layout)


def add_enlarged(level: Tensor, coarse: Tensor) -> Tensor:
    """level [n, C, H, W] plus coarse [n, C, h, w] enlarged to H x W by its nearest values; overwrites level."""
    count, channels, height, width = level.shape
    doubles = (height, width) == (2 * coarse.shape[2], 2 * coarse.shape[3])
    if not doubles or not level.is_contiguous(memory_format=torch.channels_last):
        return level.add_(F.interpolate(coarse, size=(height, width), mode='nearest'))
    blocks = level.permute(0, 2, 3, 1).view(count, height // 2, 2, width // 2, 2, channels)
    blocks.add_(coarse.permute(0, 2, 3, 1)[:, :, None, :, None])
    return level
