"""The head: transformer, losses, and merging of its predictions.

Shapes: B batch, K kept voxels of the last stage; X, Y, Z the grid.
"""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import HEADS, LOSSES
from mmdet.models.utils.builder import TRANSFORMER
from torch import Tensor

from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.builder import build_part, hand_down
from models.cuda_graph import GraphedFunction
from models.decoders import TransformerOutput
from models.encoder import ImageFeatures
from models.losses import VoxelLosses
from models.merging import MergedPrediction, merge_panoptic, merge_semantic

_WHERE = 'model.pts_bbox_head'
MERGE_STUFF = ('published', 'labelled')


@dataclass
class RawPrediction:
    """Everything on the way from images to labels, for tests and analysis.

    Attributes:
        features: image features and projection matrices.
        output: stages of the voxel decoder, layers of the mask decoder.
        merged: labels per sample.
    """

    features: ImageFeatures
    output: TransformerOutput
    merged: List[MergedPrediction]


@HEADS.register_module()
class SparseOccHead(BaseModule):
    """Sparse voxels and masks, their losses, and their merging into labels.

    Args:
        task: classes, range, grid, cameras, frames.
        transformer: config of ``SparseOccTransformer``.
        loss_cfgs: configs of ``loss_mask2former`` and of the terms on voxels, see ``VoxelLosses``.
        embed_dims: C of the transformer, if its config does not have it.
        merge_stuff: 'published' or 'labelled', see ``merge_panoptic``.
        overlap_threshold, score_threshold: see ``merge_panoptic``.
        draws: test-time draws of the transformer's mask-guided sampling, if its config does not have them.
    """

    prediction_type = MergedPrediction  # what ``merge`` gives per sample: a NamedTuple of tensors with ``to_numpy``

    def __init__(
        self,
        task: Task,
        transformer: Mapping,
        loss_cfgs: Mapping,
        embed_dims: Optional[int] = None,
        merge_stuff: str = 'published',
        overlap_threshold: float = 0.8,
        score_threshold: float = 0.3,
        draws: Optional[str] = None,
    ):
        super().__init__()
        if merge_stuff not in MERGE_STUFF:
            raise ConfigError(f'model.test_cfg.merge_stuff must be one of {list(MERGE_STUFF)}, got {merge_stuff!r}')
        self.task, self.merge_stuff = task, merge_stuff
        self.overlap_threshold, self.score_threshold = overlap_threshold, score_threshold
        where = f'{_WHERE}.transformer'
        transformer = hand_down(transformer, where, dict(embed_dims=embed_dims), _WHERE)
        transformer = hand_down(transformer, where, dict(draws=draws), f'model.test_cfg or {_WHERE}')
        self.transformer = build_part(transformer, TRANSFORMER, where, task)
        labels = task.label_set
        is_thing = torch.tensor([c in labels.thing_ids for c in range(labels.num_occupied)])
        self.register_buffer('is_thing', is_thing, persistent=False)
        where = f'{_WHERE}.loss_cfgs'
        terms = dict(loss_cfgs)
        if 'loss_mask2former' not in terms:
            raise ConfigError(f"{where}: key 'loss_mask2former' is missing")
        self.loss_mask2former = build_part(terms.pop('loss_mask2former'), LOSSES, f'{where}.loss_mask2former', task)
        self.voxel_losses = VoxelLosses(task, self.transformer.voxel_decoder.scoring, terms, where)
        self._graphed = GraphedFunction(self._predict_tensors, max_graphs=2)

    def forward(self, features: ImageFeatures) -> TransformerOutput:
        """Predictions of every stage and layer."""
        return self.transformer(features)

    def loss(self, output: TransformerOutput, targets: OccupancyTargets) -> Dict[str, Tensor]:
        """Every loss term by name; names end in the stage or layer number."""
        with torch.autocast(targets.voxel_semantics.device.type, enabled=False):
            losses = {}
            for i, stage in enumerate(output.stages):
                for name, value in self.voxel_losses(stage, targets, i).items():
                    losses[f'{name}_{i}'] = value
            losses.update(self.loss_mask2former(output.layers, output.stages[-1], targets))
            return losses

    def predict_raw(self, features: ImageFeatures) -> RawPrediction:
        """Intermediate results and labels."""
        output = self(features)
        return RawPrediction(features, output, self.merge(output))

    def predict(self, features: ImageFeatures, graphed: bool = False) -> List[MergedPrediction]:
        """Labels of each sample.

        Args:
            graphed: on a GPU, replay the work on one sample as a CUDA graph.
        """
        if not graphed or len(features.ego2img) != 1:
            return self.merge(self(features))
        inputs, fixed = (features.ego2img, features.frame_index), (features.image_size,)
        if features.frame_index is None:
            return [self.prediction_type(*self._graphed(*inputs, *features.maps, fixed=fixed))]
        # stored maps stay where they are, so the graph reads them there
        return [self.prediction_type(*self._graphed(*inputs, fixed=fixed, in_place=features.maps))]

    def _predict_tensors(
        self, image_size: Tuple[int, int], ego2img: Tensor, frame_index: Optional[Tensor], *maps: Tensor
    ) -> MergedPrediction:
        return self.merge(self(ImageFeatures(maps, ego2img, image_size, frame_index)))[0]

    def forget_weights(self):
        """Drop the graphs, which hold the weights that there were."""
        self._graphed.clear()

    def merge(self, output: TransformerOutput) -> List[MergedPrediction]:
        """Labels of each sample from the last layer's prediction."""
        with torch.autocast(output.stages[-1].coords.device.type, enabled=False):
            return [self._merge_sample(output, b) for b in range(output.stages[-1].coords.shape[0])]

    def _merge_sample(self, output: TransformerOutput, b: int) -> MergedPrediction:
        stage, last = output.stages[-1], output.layers[-1]
        class_logits, mask_logits = last.class_logits[b], last.mask_logits[b]
        voxels = stage.coords[b] * stage.scale
        semantics = merge_semantic(class_logits, mask_logits, self.score_threshold)
        if not self.task.panoptic:
            return MergedPrediction(voxels, semantics)
        panoptic = merge_panoptic(
            class_logits,
            mask_logits,
            self.is_thing,
            self.score_threshold,
            self.overlap_threshold,
            label_merged_stuff=self.merge_stuff == 'labelled',
        )
        return MergedPrediction(voxels, semantics, panoptic.instances, panoptic.semantics)
