"""Mask decoder: learned queries look at their own masks and sharpen them (paper section 3.3).

Shapes: B batch, Q queries, K kept voxels, C channels, T frames, G groups, P points per group.
"""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from mmcv.runner import BaseModule
from torch import Tensor, nn

from models.decoders.fused import MadeOnce, kernels_for, run_ffn, type_of_queries
from models.decoders.layers import AdaptiveMixing, DecoderSizes, MaskGuidedSampling
from models.decoders.sparse_voxel_decoder import VoxelStage
from models.encoder import ImageFeatures


@dataclass
class MaskPrediction:
    """One prediction of all queries.

    Attributes:
        class_logits: [B, Q, classes without free] float32, for a sigmoid.
        mask_logits: [B, Q, K], in the order of the voxels; positive is inside. float32, or, at inference in mixed
            precision on a GPU, narrower.
    """

    class_logits: Tensor
    mask_logits: Tensor


class Attended(NamedTuple):
    """Queries that have attended to each other, and what they decide before they look at masks and images.

    query     [B, Q, C]
    asked     [B, Q, G*P*3 + G*P*L], as ``MaskGuidedSampling.ask`` gives it, offsets in voxels
    matrices  as ``AdaptiveMixing.generate`` gives them, or None
    """

    query: Tensor
    asked: Tensor
    matrices: Optional[Tensor] = None


class Projected(NamedTuple):
    """[B, Q, C], whose products with the voxels' features are the masks; class logits float32 [B, Q, classes]."""

    masks: Tensor
    class_logits: Tensor


class MaskDecoderLayer(BaseModule):
    """Self-attention, mask-guided sampling and mixing, FFN; and the prediction heads.

    Args:
        sizes: of the decoder.
        out_points: p_out of the mixing.
        guided: see ``MaskGuidedSampling``.
    """

    def __init__(self, sizes: DecoderSizes, out_points: int, guided: bool = True):
        super().__init__()
        embed_dims, task = sizes.embed_dims, sizes.task
        self.self_attn = QueryAttention(embed_dims)
        self.sampling = MaskGuidedSampling(sizes, guided)
        self.mixing = AdaptiveMixing(embed_dims, sizes.num_points * task.num_frames, out_points, sizes.num_groups)
        self.ffn = FFN(embed_dims, feedforward_channels=2 * embed_dims, ffn_drop=sizes.dropout)
        self.mask_proj = nn.Linear(embed_dims, embed_dims)
        self.classifier = nn.Linear(embed_dims, task.label_set.num_occupied)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        mask_logits: Tensor,
        voxels: Tensor,
        draws,
        features: ImageFeatures,
        hidden: Optional[Tensor] = None,
    ) -> Tensor:
        """query and position [B, Q, C], mask_logits [B, Q, K], voxels int64 [B, K, 3] -> [B, Q, C]; hidden bool [Q, Q]
        as in ``QueryAttention``."""
        kernels = None if self.training or hidden is not None or not self.sampling.guided else kernels_for(query)
        if kernels is not None:
            return self._forward_fused(kernels, query, position, mask_logits, voxels, draws, features)
        query = self.norm1(self.self_attn(query, position, hidden))
        sampled = self.sampling(query, mask_logits.detach() > 0, voxels, draws, features)
        query = self.norm2(self.mixing(sampled, query))
        return self.norm3(self.ffn(query))

    def _forward_fused(
        self, kernels, query: Tensor, position: Tensor, mask_logits: Tensor, voxels: Tensor, draws, features
    ) -> Tensor:
        """As :meth:`forward`, with the kernels of ``kernels_for``."""
        return self.look(kernels, self.attend(kernels, query, position), mask_logits, voxels, draws, features)

    def attend(self, kernels, query: Tensor, position: Tensor) -> 'Attended':
        """The part of :meth:`forward` that looks at neither masks nor images."""
        dtype = type_of_queries(query)
        query = kernels.add_and_norm(query, self.norm1, dtype, added=self.self_attn.attend_fused(query, position))
        return Attended(query, self.sampling.ask(query))

    def prepare(self, attended: 'Attended') -> 'Attended':
        """With all that queries alone decide."""
        return attended._replace(matrices=self.mixing.generate(attended.query))

    def look(
        self, kernels, attended: 'Attended', mask_logits: Tensor, voxels: Tensor, draws, features: ImageFeatures
    ) -> Tensor:
        """The rest of :meth:`forward`."""
        query, asked, matrices = attended
        dtype, sampling = type_of_queries(query), self.sampling
        wanted = (*query.shape[:2], sampling.sizes.num_groups * sampling.sizes.num_points, query.device)
        drawn = draws.fractions(*wanted), draws.positions(*wanted)
        volume = sampling.grid_shape, sampling.range_min, sampling.range_span
        points, level_logits = kernels.draw_points(mask_logits, *drawn, voxels, asked, kernels.Volume(*volume))
        sampled = sampling.sample(query, sampling.group(points), features, level_logits)
        query = kernels.add_and_norm(query, self.norm2, dtype, added=self.mixing.mix(sampled, query, matrices))
        return kernels.add_and_norm(query, self.norm3, dtype, added=run_ffn(self.ffn, query))

    def project(self, query: Tensor) -> Projected:
        """query [B, Q, C] -> what its masks and classes are made of."""
        return Projected(self.mask_proj(query), self.classifier(query).float())

    def predict(self, query: Tensor, voxel_features: Tensor, projected: Optional[Projected] = None) -> MaskPrediction:
        """query [B, Q, C], voxel_features [B, K, C]; projected: what :meth:`project` gave for the query, if known."""
        masks, class_logits = self.project(query) if projected is None else projected
        mask_logits = torch.bmm(masks, voxel_features.transpose(1, 2))
        if self.training or kernels_for(query) is None:  # which take any type
            mask_logits = mask_logits.float()
        return MaskPrediction(class_logits, mask_logits)


class QueryAttention(BaseModule):
    """Self-attention of the queries with their positions added to queries and keys, plus the residual."""

    def __init__(self, embed_dims: int, num_heads: int = 8):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dims, num_heads, batch_first=True)

    def init_weights(self):
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, query: Tensor, position: Tensor, hidden: Optional[Tensor] = None) -> Tensor:
        """query and position [B, Q, C] -> [B, Q, C]; row q of hidden, bool [Q, Q], says which others q cannot see."""
        return query + self.attend(query, position, hidden)

    def attend(self, query: Tensor, position: Tensor, hidden: Optional[Tensor] = None) -> Tensor:
        """The same without the query that is added."""
        placed = query + position
        return self.self_attn(placed, placed, value=query, need_weights=False, attn_mask=hidden)[0]

    def attend_fused(self, query: Tensor, position: Tensor) -> Tensor:
        """As :meth:`attend`, with one product for queries and keys; from PyTorch 2.0."""
        layer, sizes = self.self_attn, [2 * query.shape[2], query.shape[2]]
        layers = zip(layer.in_proj_weight.split(sizes), layer.in_proj_bias.split(sizes))
        both, values = [F.linear(given, *own) for given, own in zip((query + position, query), layers)]
        queries, keys = both.view(query.shape[:2] + (2, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        values = values.view(query.shape[:2] + (layer.num_heads, -1)).transpose(1, 2)
        return layer.out_proj(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class MaskDecoder(BaseModule):
    """One layer, applied ``num_layers`` times with shared weights; a prediction before and after each.

    Args:
        sizes: of the decoder.
        num_layers: applications of the layer.
        num_queries: Q.
        out_points: p_out of the mixing.
        guided: see ``MaskGuidedSampling``.
    """

    def __init__(
        self, sizes: DecoderSizes, num_layers: int, num_queries: int, out_points: int = 128, guided: bool = True
    ):
        super().__init__()
        self.num_layers = num_layers
        self.decoder_layer = MaskDecoderLayer(sizes, out_points, guided)
        self.query_feat = nn.Embedding(num_queries, sizes.embed_dims)
        self.query_pos = nn.Embedding(num_queries, sizes.embed_dims)
        self._begun: MadeOnce[Tuple[Projected, Attended, Tensor]] = MadeOnce(self._weights_of_beginning)

    def forward(self, stage: VoxelStage, draws, features: ImageFeatures) -> List[MaskPrediction]:
        """``num_layers + 1`` predictions over the voxels of the last stage."""
        batch = stage.features.shape[0]
        query = self.query_feat.weight.unsqueeze(0).expand(batch, -1, -1)
        position = self.query_pos.weight.unsqueeze(0).expand(batch, -1, -1)
        voxels = stage.corners
        layer = self.decoder_layer
        kernels = None if self.training or not layer.sampling.guided else kernels_for(query)
        projected, attended = None, None
        if kernels is not None:
            projected, attended, position = self._begin(kernels, query, position)
        predictions = [layer.predict(query, stage.features, projected)]
        for _ in range(self.num_layers):
            mask_logits = predictions[-1].mask_logits
            if attended is not None:
                query = layer.look(kernels, attended, mask_logits, voxels, draws, features)
                attended = None
            else:
                query = layer(query, position, mask_logits, voxels, draws, features)
            predictions.append(layer.predict(query, stage.features))
        return predictions

    def _begin(self, kernels, query: Tensor, position: Tensor) -> Tuple[Projected, Attended, Tensor]:
        """What the learned queries do before they look at anything, and their positions in the type that queries go on
        in: always the same, made once and kept."""
        layer = self.decoder_layer

        def make() -> Tuple[Projected, Attended, Tensor]:
            attended = layer.prepare(layer.attend(kernels, query, position))
            return layer.project(query), attended, position.to(type_of_queries(query))

        return self._begun.get(query, make)

    def _weights_of_beginning(self) -> List[Tensor]:
        layer = self.decoder_layer
        of_layer = layer.self_attn, layer.norm1, layer.sampling, layer.mixing.parameter_generator
        others = layer.mask_proj, layer.classifier, self.query_feat, self.query_pos
        return [weight for part in (*of_layer, *others) for weight in part.parameters()]

    def made_once(self) -> List[MadeOnce]:
        """All that inference makes of weights alone."""
        return [self._begun, self.decoder_layer.sampling.asking]
