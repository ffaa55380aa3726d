"""What both decoders are made of: their common sizes, sampling of features, adaptive mixing, attention by distance.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels, K kept
voxels, p_in sampled points (T*P), p_out mixed points. Points are in metres, ego frame of the current keyframe; the same
points serve all frames.
"""

import functools
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.runner import BaseModule
from torch import Tensor, nn

from lib.errors import ConfigError
from lib.registry import check_whole
from lib.task import Task
from models.csrc import autocast_dtype, recompute
from models.csrc.adaptive_mixing import adaptive_mix, mix_in_pieces
from models.csrc.distance_attention import distance_attention, distance_attention_in_training, trains_fused
from models.csrc.msmv_sampling import sample_multi_view
from models.decoders.draws import select_valid
from models.decoders.fused import MadeOnce, kernels_for, wide_linear
from models.encoder import ImageFeatures

_WHERE = 'model.pts_bbox_head.transformer'


@dataclass(frozen=True)
class DecoderSizes:
    """What every layer of both decoders needs to know.

    Attributes:
        task: classes, range, grid, cameras, frames.
        embed_dims: C.
        num_groups: G.
        num_points: P, sampled points per group; in the voxel decoder those of the first stage.
        num_levels: L, pyramid levels.
        dropout: of the attention between blocks and of the FFNs.
        published_weight_order: keep the level-weight order that released weights were trained with.
    """

    task: Task
    embed_dims: int = 256
    num_groups: int = 4
    num_points: int = 4
    num_levels: int = 4
    dropout: float = 0.1
    published_weight_order: bool = True

    def __post_init__(self):
        for name in ('embed_dims', 'num_groups', 'num_points', 'num_levels'):
            check_whole(getattr(self, name), 1, f'{_WHERE}.{name}')
        if self.embed_dims % self.num_groups:
            raise ConfigError(
                f'{_WHERE}.embed_dims {self.embed_dims} is not a multiple of num_groups {self.num_groups}; change one'
            )


class AdaptiveMixing(BaseModule):
    """x·M -> LN -> ReLU -> S·x -> LN -> ReLU -> linear -> add the query; M and S are made from the query.

    Every query filters its own sampled features (paper section 3.2; from AdaMixer).

    The generated matrices dominate the memory of a training step (8,000 queries x 17,408 floats). With
    ``chunk`` set, training works through the queries in pieces of that many and makes the matrices of a
    piece again in its backward pass, so that only one piece is ever held.

    Args:
        channels: C.
        in_points: p_in.
        out_points: p_out.
        num_groups: G.
        chunk: queries per checkpointed piece in training; 0 keeps everything.
    """

    def __init__(self, channels: int, in_points: int, out_points: int, num_groups: int = 4, chunk: int = 0):
        super().__init__()
        self.in_points, self.out_points = in_points, out_points
        self.num_groups, self.chunk = num_groups, chunk
        self.width = channels // num_groups
        per_group = self.width * self.width + out_points * in_points
        self.parameter_generator = nn.Linear(channels, num_groups * per_group)
        self.out_proj = nn.Linear(num_groups * out_points * self.width, channels)

    def init_weights(self):
        """The generator starts from its bias alone: every query mixes alike."""
        nn.init.zeros_(self.parameter_generator.weight)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        """sampled [B, Q, G, p_in, C/G], query [B, Q, C] -> [B, Q, C]."""
        return query + self.mix(sampled, query)

    def mix(self, sampled: Tensor, query: Tensor, matrices: Optional[Tensor] = None) -> Tensor:
        """The same without the query that is added; matrices: what :meth:`generate` gave for the queries, if known."""
        sampled, flat = sampled.flatten(0, 1), query.flatten(0, 1)
        if matrices is not None:
            return self._mix_with(matrices, sampled).view(query.shape)
        in_pieces = self.chunk and torch.is_grad_enabled() and flat.requires_grad
        mixed = self._mix_in_pieces(sampled, flat) if in_pieces else self._mix(sampled, flat)
        return mixed.view(query.shape)

    def _mix_in_pieces(self, sampled: Tensor, query: Tensor) -> Tensor:
        layers = self.parameter_generator, self.out_proj
        mixed = mix_in_pieces(sampled, query, *layers, self.out_points, self.chunk)
        if mixed is None:
            pieces = zip(sampled.split(self.chunk), query.split(self.chunk))
            mixed = torch.cat([recompute(self._mix, s, q, preserve_rng_state=False) for s, q in pieces])
        return mixed

    def _mix(self, sampled: Tensor, query: Tensor) -> Tensor:
        """sampled [n, G, p_in, C/G], query [n, C] -> [n, C]."""
        return self._mix_with(wide_linear(self.parameter_generator, query), sampled)

    def generate(self, query: Tensor) -> Tensor:
        """Matrices [B*Q, G * (W*W + p_out*p_in)] of the queries [B, Q, C]."""
        return wide_linear(self.parameter_generator, query.flatten(0, 1))

    def _mix_with(self, generated: Tensor, sampled: Tensor) -> Tensor:
        mixed = adaptive_mix(sampled.to(generated.dtype), generated, self.out_points)
        return self.out_proj(mixed.flatten(1))


class DistanceAttention(BaseModule):
    """Multi-head self-attention with bias -tau * distance; tau, a learned reach per head, is read from the query.

    Paper section 3.2.
    Computed in float32 also under autocast, which lets products of queries, keys and values be of TF32; but inference
    in mixed float16, whose products are as precise as TF32's, takes float16 where Triton is.

    Args:
        embed_dims: C.
        num_heads: a divisor of C.
        dropout: of the attention weights.
        save_memory: in training, make the bias and the weights (heads x Q x Q numbers each) again in the
            backward pass.
    """

    keeps_float32 = True  # for lib.run.numerics.convert_weights

    def __init__(self, embed_dims: int, num_heads: int = 8, dropout: float = 0.1, save_memory: bool = False):
        super().__init__()
        self.num_heads, self.save_memory = num_heads, save_memory
        self.attention = MultiheadAttention(embed_dims, num_heads, attn_drop=dropout, batch_first=True)
        self.gen_tau = nn.Linear(embed_dims, num_heads)
        self.halves: MadeOnce[List[Tensor]] = MadeOnce(self._weights)  # in float16

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.gen_tau.weight)
        nn.init.uniform_(self.gen_tau.bias, 0.0, 2.0)

    def forward(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [B, Q, C], positions [B or 1, Q, 2 or more] metres -> [B, Q, C]: the query plus what it attends to."""
        return query + self.attend(query, positions)

    def attend(self, query: Tensor, positions: Tensor) -> Tensor:
        """The same without the query that is added."""
        exact = autocast_dtype(query.device.type) is None and not torch.backends.cuda.matmul.allow_tf32
        attend = functools.partial(self._attend, exact)
        again = self.save_memory and torch.is_grad_enabled() and query.requires_grad
        width = query.shape[2] // self.num_heads
        in_half = autocast_dtype(query.device.type) == torch.float16 and not self.training
        if in_half and kernels_for(query) is not None and trains_fused(width, query.device):
            halves = self.halves.get(query, lambda: [weight.half() for weight in self._weights()])
            return attend(query, positions, halves)
        with torch.autocast(query.device.type, enabled=False):
            if again and not trains_fused(width, query.device):
                return recompute(attend, query.float(), positions)
            return attend(query.float(), positions)

    def _weights(self) -> List[Tensor]:
        """Weight and bias of the first projection, of tau's layer and of the last projection."""
        attention, tau = self.attention.attn, self.gen_tau
        first, last = (attention.in_proj_weight, attention.in_proj_bias), attention.out_proj
        return [*first, tau.weight, tau.bias, last.weight, last.bias]

    def _attend(
        self, exact: bool, query: Tensor, positions: Tensor, weights: Optional[Sequence[Tensor]] = None
    ) -> Tensor:
        weights = self._weights() if weights is None else weights
        parts = F.linear(query, *weights[:2])
        parts = parts.view(query.shape[:2] + (3, self.num_heads, query.shape[2] // self.num_heads))
        reach = F.linear(query, *weights[2:4])
        if self.training:  # the CUDA kernel has neither dropout nor a backward pass
            attended = distance_attention_in_training(parts, reach, positions, self.attention.attn.dropout, exact)
        else:
            attended = distance_attention(parts, reach, positions, exact)
        return F.linear(attended, *weights[4:])


class _Sampling(BaseModule):
    """What both kinds share: offsets and level weights from the query, then the sampling op.

    Args:
        sizes: of the decoder; its ``num_points`` is P.
    """

    def __init__(self, sizes: DecoderSizes):
        super().__init__()
        self.sizes = sizes
        self.scale_weights = nn.Linear(sizes.embed_dims, sizes.num_groups * sizes.num_points * sizes.num_levels)
        self.asking: MadeOnce[Tuple[Tensor, Tensor]] = MadeOnce(self.parameters)

    def sample(
        self, query: Tensor, points: Tensor, features: ImageFeatures, level_logits: Optional[Tensor] = None
    ) -> Tensor:
        """query [B, Q, C], points [B, Q, G, P, 3] metres, level_logits [B, Q, G*P*L], if they are known ->
        [B, Q, G, T*P, C/G]."""
        if level_logits is None:
            level_logits = self.scale_weights(query)
        level_logits = level_logits.view(points.shape[:4] + (-1,))
        return sample_multi_view(
            features.maps,
            points,
            features.ego2img,
            level_logits,
            features.image_size,
            self.sizes.task.num_cameras,
            published_weight_order=self.sizes.published_weight_order,
            frame_index=features.frame_index,
            gradient_sum=features.gradient_sum,
        )

    def ask(self, query: Tensor) -> Tensor:
        """query [B, Q, C] -> offsets and level logits [B, Q, G*P*3 + G*P*L] by one product; no gradients."""
        weight, bias = self.asking.get(query, self._join_layers)
        return F.linear(query, weight, bias)

    def _join_layers(self) -> Tuple[Tensor, Tensor]:
        layers = self.offset_layer(), self.scale_weights
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def offset_layer(self) -> nn.Linear:
        """From queries to offsets of their points."""
        raise NotImplementedError

    def group(self, values: Tensor) -> Tensor:
        """[B, Q, G*P*3] or [B, Q, G*P, 3] -> [B, Q, G, P, 3]."""
        return values.reshape(values.shape[:2] + (self.sizes.num_groups, self.sizes.num_points, 3))


class BlockSampling(_Sampling):
    """Points around the centre of each query's block (paper section 3.2)."""

    def __init__(self, sizes: DecoderSizes):
        super().__init__(sizes)
        self.sampling_offset = nn.Linear(sizes.embed_dims, sizes.num_groups * sizes.num_points * 3)

    def offset_layer(self) -> nn.Linear:
        return self.sampling_offset

    def init_weights(self):
        nn.init.zeros_(self.sampling_offset.weight)
        nn.init.uniform_(self.sampling_offset.bias, -0.5, 0.5)

    def forward(self, query: Tensor, centres: Tensor, block_size: float, features: ImageFeatures) -> Tensor:
        """query [B, Q, C], centres [B, Q, 3] metres, block_size metres -> [B, Q, G, T*P, C/G]."""
        offsets = self.group(self.sampling_offset(query).float())
        return self.sample(query, centres[:, :, None, None, :] + block_size * offsets, features)


class MaskGuidedSampling(_Sampling):
    """Points at voxels drawn from each query's own mask (paper section 3.3).

    Args:
        sizes: of the decoder.
        guided: False draws from the whole volume, whatever the mask, which is what the paper compares with.
    """

    def __init__(self, sizes: DecoderSizes, guided: bool = True):
        super().__init__(sizes)
        task, self.guided = sizes.task, guided
        self.offset = nn.Linear(sizes.embed_dims, sizes.num_groups * sizes.num_points * 3)
        span = torch.tensor(task.point_cloud_range[3:]) - torch.tensor(task.point_cloud_range[:3])
        self.register_buffer('grid_shape', torch.tensor(task.grid_shape).float(), persistent=False)
        self.register_buffer('range_min', torch.tensor(task.point_cloud_range[:3]), persistent=False)
        self.register_buffer('range_span', span, persistent=False)

    def offset_layer(self) -> nn.Linear:
        return self.offset

    def init_weights(self):
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, query: Tensor, valid: Tensor, voxels: Tensor, draws, features: ImageFeatures) -> Tensor:
        """Sampled features of each query's mask.

        Args:
            query: [B, Q, C].
            valid: bool [B, Q, K], voxels of each query's mask.
            voxels: int64 [B, K, 3], full-resolution voxel indices.
            draws: strategy of drawing.

        Returns:
            [B, Q, G, T*P, C/G].
        """
        drawn = self.draw_voxels(valid, voxels, draws)
        offsets = self.offset(query).float().view(drawn.shape)
        points = (drawn + offsets) / self.grid_shape * self.range_span + self.range_min
        return self.sample(query, self.group(points), features)

    def draw_ahead(self, batch: int, queries: int, draws, device: torch.device) -> List[Tensor]:
        """What ``draw_voxels`` will ask the strategy for, in its order."""
        count = self.sizes.num_groups * self.sizes.num_points
        ways = [draws.fractions, draws.positions] if self.guided else [draws.positions]
        return [draw(batch, queries, count, device) for draw in ways]

    def draw_voxels(self, valid: Tensor, voxels: Tensor, draws) -> Tensor:
        """Voxel positions [B, Q, G*P, 3] float32: drawn from the mask, or from the volume if it is empty."""
        batch, queries, _ = valid.shape
        count = self.sizes.num_groups * self.sizes.num_points
        if not self.guided:
            return draws.positions(batch, queries, count, valid.device) * self.grid_shape
        fractions = draws.fractions(batch, queries, count, valid.device)
        index, empty = select_valid(valid, fractions)
        chosen = voxels.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, 3))
        chosen = chosen.view(batch, queries, count, 3).float()
        anywhere = draws.positions(batch, queries, count, valid.device) * self.grid_shape
        return torch.where(empty[:, :, None, None], anywhere, chosen)
