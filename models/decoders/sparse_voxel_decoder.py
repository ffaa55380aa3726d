"""Sparse voxel decoder: coarse blocks are split in eight and thinned out, stage by stage (paper section 3.2).

Shapes: B batch, Q blocks going into a stage, K children kept by it, C channels, T frames, G groups.
Block coordinates are the full-resolution voxel indices of a block's lower corner.
"""

import math
from dataclasses import dataclass, replace
from typing import List, Literal, NamedTuple, Optional, Sequence

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.runner import BaseModule, ModuleList
from torch import Tensor, nn

from lib.errors import ConfigError
from lib.registry import check_value
from lib.task import Task
from models.decoders.draws import running_count
from models.decoders.fused import MadeOnce, kernels_for, linear_relu, run_ffn, type_of_products, type_of_queries
from models.decoders.layers import AdaptiveMixing, BlockSampling, DecoderSizes, DistanceAttention
from models.encoder import ImageFeatures

# Child order: the corner itself, then one step along x, y, z, xy, xz, yz, xyz.
_CHILDREN = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))


@dataclass
class VoxelStage:
    """What one stage keeps, in candidate order (parent order, then child order).

    Attributes:
        coords: int64 [B, K, 3], at the stage's own resolution: full-resolution index // scale.
        seg_logits: [B, K, classes], float32. Without free in release 1.0, with free (last) in 1.1.
        features: [B, K, C].
        scale: edge of a kept block in voxels.
        occ_logits: [B, K] float32, release 1.0 only.
    """

    coords: Tensor
    seg_logits: Tensor
    features: Tensor
    scale: int
    occ_logits: Optional[Tensor] = None

    @property
    def corners(self) -> Tensor:
        """int64 [B, K, 3], full-resolution indices of the lower corners."""
        return self.coords if self.scale == 1 else self.coords * self.scale


class Placed(NamedTuple):
    """Queries of a layer, and what they decide before they look at images.

    query         [B, Q, C]
    points        float32 [B, Q, G, P, 3] metres, ego frame
    level_logits  float32 [B, Q, G*P*L]
    matrices      as ``AdaptiveMixing.generate`` gives them, or None
    """

    query: Tensor
    points: Tensor
    level_logits: Tensor
    matrices: Optional[Tensor] = None


class SparseVoxelDecoderLayer(BaseModule):
    """Position, self-attention (not in the last stage), sampling and mixing, FFN.

    Args:
        sizes: of the decoder, with the points of this layer.
        interval: edge of a block in voxels.
        num_heads: heads of the attention between blocks; 0 leaves it out.
        mixing_chunk: see ``AdaptiveMixing``; if not 0, attention saves memory, too.
    """

    def __init__(self, sizes: DecoderSizes, interval: int, num_heads: int, mixing_chunk: int):
        super().__init__()
        task, embed_dims = sizes.task, sizes.embed_dims
        self.voxel_size, self.interval = task.voxel_size, interval
        self.position_encoder = nn.Sequential(
            nn.Linear(3, embed_dims),
            nn.LayerNorm(embed_dims),
            nn.ReLU(inplace=True),
            nn.Linear(embed_dims, embed_dims),
            nn.LayerNorm(embed_dims),
            nn.ReLU(inplace=True),
        )
        self.self_attn = (
            DistanceAttention(embed_dims, num_heads, sizes.dropout, save_memory=mixing_chunk > 0) if num_heads else None
        )
        self.sampling = BlockSampling(sizes)
        in_points, groups = sizes.num_points * task.num_frames, sizes.num_groups
        self.mixing = AdaptiveMixing(embed_dims, in_points, in_points * groups, groups, mixing_chunk)
        self.ffn = FFN(embed_dims, feedforward_channels=2 * embed_dims, ffn_drop=sizes.dropout)
        self.norm1 = nn.LayerNorm(embed_dims) if num_heads else None
        self.norm2 = nn.LayerNorm(embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)
        self.register_buffer('range_min', torch.tensor(task.point_cloud_range[:3]), persistent=False)
        self.register_buffer('grid_shape', torch.tensor(task.grid_shape).float(), persistent=False)

    def forward(self, query: Tensor, coords: Tensor, features: ImageFeatures) -> Tensor:
        """query [B, Q, C], coords int64 [B, Q, 3] full-resolution lower corners -> [B, Q, C]."""
        kernels = None if self.training else kernels_for(query)
        if kernels is not None:
            return self._forward_fused(kernels, query, coords, features)
        corners = coords.float() * self.voxel_size
        query = query + self.position_encoder(coords.float() / self.grid_shape)
        if self.self_attn is not None:
            query = self.norm1(self.self_attn(query, corners))
        block_size = self.interval * self.voxel_size
        centres = corners + self.range_min + block_size / 2
        sampled = self.sampling(query, centres, block_size, features)
        query = self.norm2(self.mixing(sampled, query))
        return self.norm3(self.ffn(query))

    def _forward_fused(self, kernels, query: Tensor, coords: Tensor, features: ImageFeatures) -> Tensor:
        """As :meth:`forward`, with the kernels of ``kernels_for``."""
        return self.look(kernels, self.place(kernels, query, coords), features)

    def place(self, kernels, query: Tensor, coords: Tensor) -> 'Placed':
        """The part of :meth:`forward` that looks at no image, but for the mixing's matrices."""
        linear, norm, _, second_linear, second_norm, _ = self.position_encoder
        product, dtype = type_of_products(query), type_of_queries(query)
        hidden, corners = kernels.embed_positions(coords, self.grid_shape, linear, norm, self.voxel_size, product)
        query = kernels.add_and_norm(second_linear(hidden), second_norm, dtype, positive=True, after=query)
        if self.self_attn is not None:
            query = kernels.add_and_norm(query, self.norm1, dtype, added=self.self_attn.attend(query, corners))
        size, offsets = self.interval * self.voxel_size, self.sampling.sampling_offset.out_features
        asked = self.sampling.ask(query)
        points, level_logits = kernels.place_points(corners, self.range_min, asked, size, offsets)
        return Placed(query, self.sampling.group(points), level_logits)

    def look(self, kernels, placed: 'Placed', features: ImageFeatures) -> Tensor:
        """The rest of :meth:`forward`."""
        query, points, level_logits, matrices = placed
        dtype, sampled = type_of_queries(query), self.sampling.sample(query, points, features, level_logits)
        query = kernels.add_and_norm(query, self.norm2, dtype, added=self.mixing.mix(sampled, query, matrices))
        return kernels.add_and_norm(query, self.norm3, dtype, added=run_ffn(self.ffn, query))

    def weights_of_place(self) -> List[Tensor]:
        """What :meth:`place` and the matrices depend on beside their arguments."""
        modules = self.position_encoder, self.self_attn, self.norm1, self.sampling, self.mixing.parameter_generator
        return [weight for module in modules if module is not None for weight in module.parameters()]


class SparseVoxelDecoder(BaseModule):
    """Stages of intervals 8, 4, 2 voxels; each keeps the top k of its blocks' children.

    Args:
        sizes: of the decoder; ``num_points`` is that of the first stage, halved from stage to stage.
        topk_training, topk_testing: children kept by each stage; their length is the number of stages.
        scoring: 'semantic' (release 1.1: 1 - probability of free) or 'occupancy' (release 1.0: own head).
        num_heads: of the attention between blocks, in all stages but the last; 0 leaves it out.
        mixing_chunk: see ``AdaptiveMixing``; if not 0, attention saves memory, too.
        keep_threshold: least probability of being occupied of what is kept at test time; see
            ``SparseOccTransformer``.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        topk_training: Sequence[int],
        topk_testing: Sequence[int],
        scoring: str,
        num_heads: int = 8,
        mixing_chunk: int = 0,
        keep_threshold: Optional[float] = None,
    ):
        super().__init__()
        _check_options(sizes, topk_training, topk_testing, scoring, num_heads, keep_threshold)
        self.keep_threshold, self._least_score = keep_threshold, _least_score(keep_threshold, scoring)
        self.topk_training, self.topk_testing = tuple(topk_training), tuple(topk_testing)
        task, embed_dims = sizes.task, sizes.embed_dims
        self.embed_dims, self.scoring = embed_dims, scoring
        stages = len(self.topk_training)
        self.intervals = tuple(2 ** (stages - i) for i in range(stages))
        _check_divisible(task, self.intervals[0])
        self.decoder_layers = ModuleList(
            [
                SparseVoxelDecoderLayer(
                    replace(sizes, num_points=max(1, sizes.num_points >> i)),
                    interval,
                    num_heads if i < stages - 1 else 0,
                    mixing_chunk,
                )
                for i, interval in enumerate(self.intervals)
            ]
        )
        self.lift_feat_heads = ModuleList(
            [nn.Sequential(nn.Linear(embed_dims, 8 * embed_dims), nn.ReLU(inplace=True)) for _ in self.intervals]
        )
        if scoring == 'occupancy':
            self.occ_pred_heads = ModuleList([nn.Linear(embed_dims, 1) for _ in self.intervals])
        classes = task.label_set.num_occupied if scoring == 'occupancy' else task.label_set.num_classes
        self.seg_pred_heads = ModuleList([nn.Linear(embed_dims, classes) for _ in self.intervals])
        self.register_buffer('start', _block_corners(task.grid_shape, self.intervals[0]), persistent=False)
        self.register_buffer('child_steps', torch.tensor(_CHILDREN), persistent=False)
        self._placed: MadeOnce[Placed] = MadeOnce(self.decoder_layers[0].weights_of_place)

    # the first matrices, the same for all images, are made once: sooner, for 82 MB in half precision in release 1.1
    keeps_matrices = False

    @property
    def scales(self) -> List[int]:
        """Edge in voxels of what each stage keeps."""
        return [interval // 2 for interval in self.intervals]

    def forward(self, features: ImageFeatures) -> List[VoxelStage]:
        """One ``VoxelStage`` per stage, from coarse to fine."""
        batch = features.ego2img.shape[0]
        coords = self.start.unsqueeze(0).expand(batch, -1, -1)
        query = features.ego2img.new_zeros(batch, coords.shape[1], self.embed_dims)
        kernels = None if self.training else kernels_for(query)
        stages = []
        for i, layer in enumerate(self.decoder_layers):
            if i == 0 and kernels is not None:
                query = layer.look(kernels, self._place_first(kernels, query, coords), features)
            else:
                query = layer(query, coords, features)
            stage = self._split_and_keep(i, query, coords)
            stages.append(stage)
            query, coords = stage.features.detach(), stage.corners
        return stages

    def _place_first(self, kernels, query: Tensor, coords: Tensor) -> Placed:
        """What the first layer does before it looks at an image, which is the same for all: made once and kept."""
        first = self.decoder_layers[0]
        keeps = self.keeps_matrices and len(query) == 1 and type_of_products(query) != torch.float32

        def make() -> Placed:
            placed = first.place(kernels, query, coords)
            return placed._replace(matrices=first.mixing.generate(placed.query)) if keeps else placed

        return self._placed.get(query, make, keeps)

    def made_once(self) -> List[MadeOnce]:
        """All that inference makes of weights alone."""
        attentions = [layer.self_attn.halves for layer in self.decoder_layers if layer.self_attn is not None]
        return [self._placed, *attentions, *(layer.sampling.asking for layer in self.decoder_layers)]

    def _split_and_keep(self, i: int, query: Tensor, coords: Tensor) -> VoxelStage:
        """Children of the blocks of stage i, scored, the best k kept in candidate order."""
        kernels = None if self.training or self.keep_threshold is not None else kernels_for(query)
        if kernels is not None and self.topk_testing[i] < 8 * query.shape[1]:
            return self._split_fused(kernels, i, query, coords)
        batch, scale = query.shape[0], self.scales[i]
        children = self.lift_feat_heads[i](query).view(batch, -1, self.embed_dims)
        coords = torch.div(coords, scale, rounding_mode='floor').unsqueeze(2) + self.child_steps
        coords = coords.flatten(1, 2)
        if self.scoring == 'occupancy':
            scores = self.occ_pred_heads[i](children).squeeze(-1).float()
            keep = top_in_order(scores, self._how_many(i, scores))
            features = _take(children, keep)
            return VoxelStage(
                _take(coords, keep),
                self.seg_pred_heads[i](features).float(),
                features,
                scale,
                occ_logits=scores.gather(1, keep),
            )
        logits = self.seg_pred_heads[i](children).float()
        scores = 1 - logits.softmax(-1)[..., -1]
        keep = top_in_order(scores, self._how_many(i, scores))
        return VoxelStage(_take(coords, keep), _take(logits, keep), _take(children, keep), scale)

    def _split_fused(self, kernels, i: int, query: Tensor, coords: Tensor) -> VoxelStage:
        """As :meth:`_split_and_keep`, with the kernels of ``kernels_for``."""
        scale, k = self.intervals[i] // 2, self.topk_testing[i]
        children = linear_relu(self.lift_feat_heads[i][0], query).view(query.shape[0], -1, self.embed_dims)
        if self.scoring == 'occupancy':
            scores = self.occ_pred_heads[i](children)
            index = kernels.best_in_order(scores, k, softmaxes=False)
            kept = kernels.take_children(index, coords, scale, scores, children)
            logits = self.seg_pred_heads[i](kept.features).float()
            return VoxelStage(kept.coords, logits, kept.features, scale, occ_logits=kept.logits.squeeze(-1))
        logits = self.seg_pred_heads[i](children)
        index = kernels.best_in_order(logits, k, softmaxes=True)
        kept = kernels.take_children(index, coords, scale, logits, children)
        return VoxelStage(kept.coords, kept.logits, kept.features, scale)

    def _how_many(self, i: int, scores: Tensor) -> int:
        """Children that stage i keeps of those with these scores [B, n]; at least one."""
        if self.training:
            return self.topk_training[i]
        if self.keep_threshold is None:
            return self.topk_testing[i]
        if len(scores) > 1:
            raise ConfigError(
                f'transformer.keep_threshold keeps another number of voxels of every sample, and the batch has '
                f'{len(scores)}; give one sample at a time, or set it to None'
            )
        return min(self.topk_testing[i], max(1, int((scores >= self._least_score).sum())))


def top_in_order(scores: Tensor, k: int) -> Tensor:
    """Indices int64 [B, min(k, n)] of the k largest of scores [B, n], in index order."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[0], -1)
    chosen = scores.detach().topk(k, dim=1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    places = torch.arange(1, k + 1, dtype=torch.int32, device=scores.device)
    return torch.searchsorted(running_count(kept), places.expand(scores.shape[0], -1).contiguous())


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, n, c], index [B, k], none twice -> [B, k, c]."""
    if torch.is_grad_enabled() and values.requires_grad:
        return _TakeRows.apply(values, index)
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class _TakeRows(torch.autograd.Function):
    """``_take`` whose backward pass copies rows; that of ``gather`` adds values up one by one, in no fixed order."""

    @staticmethod
    def forward(ctx, values, index):
        batch, count, width = values.shape
        first = torch.arange(0, batch * count, count, device=index.device).unsqueeze(1)
        rows = (index + first).flatten()
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return values.reshape(-1, width).index_select(0, rows).view(index.shape + (width,))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        grads = grad.new_zeros(ctx.shape)
        grads.view(-1, grad.shape[-1]).index_copy_(0, rows, grad.flatten(0, 1))
        return grads, None


def _block_corners(grid_shape, interval: int) -> Tensor:
    """int64 [blocks, 3]: lower corners of all blocks, z fastest, then y, then x."""
    axes = [torch.arange(0, size, interval) for size in grid_shape]
    return torch.cartesian_prod(*axes)


def _check_options(sizes: DecoderSizes, topk_training, topk_testing, scoring, num_heads, keep_threshold) -> None:
    if keep_threshold is not None and not 0 < keep_threshold < 1:
        raise ConfigError(
            f'transformer.keep_threshold must be a probability between 0 and 1, or None, got {keep_threshold!r}'
        )
    check_value(scoring, Literal['semantic', 'occupancy'], 'transformer.scoring')
    if len(topk_training) != len(topk_testing) or not topk_training:
        raise ConfigError(
            'transformer.topk_training and topk_testing need one number per stage, got '
            f'{topk_training!r} and {topk_testing!r}'
        )
    if num_heads and sizes.embed_dims % num_heads:
        raise ConfigError(
            f'transformer.embed_dims {sizes.embed_dims} is not a multiple of num_heads {num_heads}; change one'
        )


def _least_score(keep_threshold: Optional[float], scoring: str) -> Optional[float]:
    """The threshold as a score, which with 'occupancy' is a logit."""
    if keep_threshold is None or scoring != 'occupancy':
        return keep_threshold
    return math.log(keep_threshold / (1 - keep_threshold))


def _check_divisible(task: Task, interval: int):
    if any(size % interval for size in task.grid_shape):
        grid = 'x'.join(map(str, task.grid_shape))
        raise ConfigError(
            f'the grid of {grid} voxels (task.point_cloud_range / task.voxel_size) cannot be cut '
            f'into blocks of {interval} voxels; make each side a multiple of {interval}'
        )
