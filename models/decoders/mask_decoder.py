"""Mask decoder: learned queries look at their own masks and sharpen them (paper section 3.3).

Shapes: B batch, Q queries, K kept voxels, C channels, T frames, G groups, P points per group.
"""

from dataclasses import dataclass
from typing import List

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.runner import BaseModule
from torch import Tensor, nn

from lib.task import Task
from models.decoders.sparse_voxel_decoder import VoxelStage
from models.layers import AdaptiveMixing
from models.sampling import ImageFeatures, MaskGuidedSampling


@dataclass
class MaskPrediction:
    """One prediction of all queries.

    Attributes:
        class_logits: [B, Q, classes without free] float32, for a sigmoid.
        mask_logits: [B, Q, K] float32, in the order of the voxels; positive is inside.
    """

    class_logits: Tensor
    mask_logits: Tensor


class MaskDecoderLayer(BaseModule):
    """Self-attention, mask-guided sampling and mixing, FFN; and the prediction heads.

    Args:
        task: classes, grid, cameras, frames.
        embed_dims: C.
        out_points: p_out of the mixing.
    """

    def __init__(
        self,
        task: Task,
        embed_dims: int,
        num_groups: int,
        num_points: int,
        num_levels: int,
        dropout: float,
        out_points: int,
        published_weight_order: bool,
    ):
        super().__init__()
        self.self_attn = QueryAttention(embed_dims)
        self.sampling = MaskGuidedSampling(embed_dims, num_groups, num_points, num_levels, task, published_weight_order)
        self.mixing = AdaptiveMixing(embed_dims, num_points * task.num_frames, out_points, num_groups)
        self.ffn = FFN(embed_dims, feedforward_channels=2 * embed_dims, ffn_drop=dropout)
        self.mask_proj = nn.Linear(embed_dims, embed_dims)
        self.classifier = nn.Linear(embed_dims, task.label_set.num_occupied)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.norm3 = nn.LayerNorm(embed_dims)

    def forward(
        self, query: Tensor, position: Tensor, mask_logits: Tensor, voxels: Tensor, draws, features: ImageFeatures
    ) -> Tensor:
        """query and position [B, Q, C], mask_logits [B, Q, K], voxels int64 [B, K, 3] -> [B, Q, C]."""
        query = self.norm1(self.self_attn(query, position))
        sampled = self.sampling(query, mask_logits.detach() > 0, voxels, draws, features)
        query = self.norm2(self.mixing(sampled, query))
        return self.norm3(self.ffn(query))

    def predict(self, query: Tensor, voxel_features: Tensor) -> MaskPrediction:
        """query [B, Q, C], voxel_features [B, K, C]."""
        mask_logits = torch.bmm(self.mask_proj(query), voxel_features.transpose(1, 2))
        return MaskPrediction(self.classifier(query).float(), mask_logits.float())


class QueryAttention(BaseModule):
    """Self-attention of the queries with their positions added to queries and keys, plus the residual."""

    def __init__(self, embed_dims: int, num_heads: int = 8):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dims, num_heads, batch_first=True)

    def init_weights(self):
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, query: Tensor, position: Tensor) -> Tensor:
        """query and position [B, Q, C] -> [B, Q, C]."""
        placed = query + position
        return query + self.self_attn(placed, placed, value=query, need_weights=False)[0]


class MaskDecoder(BaseModule):
    """One layer, applied ``num_layers`` times with shared weights; a prediction before and after each.

    Args:
        task: classes, grid, cameras, frames.
        num_layers: applications of the layer.
        num_queries: Q.
        out_points: p_out of the mixing.
    """

    def __init__(
        self,
        task: Task,
        embed_dims: int,
        num_layers: int,
        num_queries: int,
        num_groups: int,
        num_points: int,
        num_levels: int,
        dropout: float = 0.1,
        out_points: int = 128,
        published_weight_order: bool = True,
    ):
        super().__init__()
        self.num_layers = num_layers
        self.decoder_layer = MaskDecoderLayer(
            task, embed_dims, num_groups, num_points, num_levels, dropout, out_points, published_weight_order
        )
        self.query_feat = nn.Embedding(num_queries, embed_dims)
        self.query_pos = nn.Embedding(num_queries, embed_dims)

    def forward(self, stage: VoxelStage, draws, features: ImageFeatures) -> List[MaskPrediction]:
        """``num_layers + 1`` predictions over the voxels of the last stage."""
        batch = stage.features.shape[0]
        query = self.query_feat.weight.unsqueeze(0).expand(batch, -1, -1)
        position = self.query_pos.weight.unsqueeze(0).expand(batch, -1, -1)
        voxels = stage.coords * stage.scale
        predictions = [self.decoder_layer.predict(query, stage.features)]
        for _ in range(self.num_layers):
            query = self.decoder_layer(query, position, predictions[-1].mask_logits, voxels, draws, features)
            predictions.append(self.decoder_layer.predict(query, stage.features))
        return predictions
