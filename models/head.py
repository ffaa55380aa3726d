"""The head: transformer, losses, and merging of its predictions: one semantic map, and panoptic segments (section 3.4).

Shapes: B batch, Q queries, K kept voxels of the last stage, C classes without free; X, Y, Z the grid. In merging
everything stays on the device, and no shape depends on the values, so that nothing waits for the GPU.
"""

from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import HEADS, LOSSES
from mmdet.models.utils.builder import TRANSFORMER
from torch import Tensor

from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.builder import build_part, hand_down
from models.decoders import TransformerOutput, VoxelStage
from models.decoders.fused import kernels_for
from models.encoder import ImageFeatures
from models.losses import VoxelLosses

_WHERE = 'model.pts_bbox_head'
MERGE_STUFF = ('published', 'labelled')
_MIN_SEMANTIC_SCORE = 0.01
_MASK_THRESHOLD = 0.5


class PanopticMap(NamedTuple):
    """Panoptic labels of the kept voxels.

    instances  int16 [K], segment id from 1, 0 = none
    semantics  uint8 [K], class id, free where there is no segment
    """

    instances: Tensor
    semantics: Tensor


class MergedPrediction(NamedTuple):
    """Labels of the kept voxels of one sample, on the device.

    voxels     int64 [K, 3], full-resolution indices
    semantics  uint8 [K], class of each voxel
    pano_inst  int16 [K], segment of each voxel; panoptic tasks only
    pano_sem   uint8 [K], class of its segment; panoptic tasks only
    """

    voxels: Tensor
    semantics: Tensor
    pano_inst: Optional[Tensor] = None
    pano_sem: Optional[Tensor] = None

    def arrays(self, index_type: torch.dtype) -> Dict[str, Tensor]:
        """sem_pred [1, K], occ_loc [1, K, 3] of the given type and, if there are, pano_inst and pano_sem [1, K]."""
        arrays = dict(
            sem_pred=self.semantics,
            occ_loc=self.voxels.to(index_type),
            pano_inst=self.pano_inst,
            pano_sem=self.pano_sem,
        )
        return {name: value.unsqueeze(0) for name, value in arrays.items() if value is not None}


def begin_reading(arrays: Mapping[str, Tensor]) -> Callable[[], Dict[str, np.ndarray]]:
    """The arrays on the CPU by name, when it is called; their copies are on their way. See ``join_arrays``."""
    values = list(arrays.values())
    finish = begin_splitting(join_arrays(values), values)
    return lambda: dict(zip(arrays, finish()))


def join_arrays(arrays: Sequence[Tensor]) -> List[Tensor]:
    """All values of each type in one row [n], so that few copies bring them to the CPU."""
    return [torch.cat([array.flatten() for array in arrays if array.dtype == kind]) for kind in _types_of(arrays)]


def begin_splitting(rows: Sequence[Tensor], arrays: Sequence[Tensor]) -> Callable[[], List[np.ndarray]]:
    """The arrays on the CPU, when it is called; the rows are on their way, and on a GPU may be overwritten in the order
    of its work.

    Args:
        rows: what :func:`join_arrays` made of the arrays.
        arrays: tell types and shapes; their values are not looked at.
    """
    on_cpu = [row.to('cpu', non_blocking=True) for row in rows]
    there = torch.cuda.current_stream(rows[0].device).record_event() if rows[0].is_cuda else None

    def finish() -> List[np.ndarray]:
        if there is not None:
            there.synchronize()
        left = dict(zip(_types_of(arrays), [row.numpy().copy() for row in on_cpu]))  # pinned memory is for later steps
        results = []
        for array in arrays:
            row, count = left[array.dtype], array.numel()
            results.append(row[:count].reshape(tuple(array.shape)))
            left[array.dtype] = row[count:]
        return results

    return finish


def _types_of(arrays: Sequence[Tensor]) -> List[torch.dtype]:
    return list(dict.fromkeys(array.dtype for array in arrays))


def merge_semantic(class_logits: Tensor, mask_logits: Tensor, score_threshold: float) -> Tensor:
    """Class of each voxel: arg max over classes of the sum over queries of class score x mask.

    Args:
        class_logits: [Q, C] float32, before the sigmoid.
        mask_logits: [Q, K], before the sigmoid.
        score_threshold: queries whose best class score is not above this do not count.

    Returns:
        uint8 [K], C (free) where the best class has less than 0.01.
    """
    kernels = kernels_for(mask_logits)
    if kernels is not None and kernels.merges(class_logits):
        return kernels.merge_labels(class_logits, mask_logits, score_threshold, _MIN_SEMANTIC_SCORE)
    mask_logits = mask_logits.float()
    scores = class_logits.sigmoid()
    scores = scores * (scores.max(-1, keepdim=True).values > score_threshold)
    best = torch.einsum('qc,qk->ck', scores, mask_logits.sigmoid()).max(0)
    free = torch.full_like(best.indices, class_logits.shape[1])
    return torch.where(best.values < _MIN_SEMANTIC_SCORE, free, best.indices).to(torch.uint8)


def merge_panoptic(
    class_logits: Tensor,
    mask_logits: Tensor,
    is_thing: Tensor,
    score_threshold: float,
    overlap_threshold: float,
    label_merged_stuff: bool,
) -> PanopticMap:
    """Segments: each voxel goes to the query with the largest score x mask; overruled queries are dropped.

    Args:
        class_logits: [Q, C] float32, before the sigmoid.
        mask_logits: [Q, K], before the sigmoid.
        is_thing: bool [C], classes counted one by one; queries of any other class merge into one segment.
        score_threshold: queries whose best class score is not above this do not count.
        overlap_threshold: least ratio of the voxels a query won to those of its own mask.
        label_merged_stuff: False is the published behaviour (a quirk that published numbers contain): the
            second and later queries of a stuff class give their voxels the segment's id but leave them free.
    """
    masks = mask_logits.float().sigmoid()
    scores, classes = class_logits.sigmoid().max(-1)
    candidate = scores > score_threshold
    weighted = scores.masked_fill(~candidate, -1.0).unsqueeze(1) * masks
    winner = weighted.argmax(0, keepdim=True)
    inside = masks >= _MASK_THRESHOLD
    labelled = inside.gather(0, winner).squeeze(0)
    winner = winner.squeeze(0)
    survives = candidate & _holds_its_mask(winner, labelled, inside, overlap_threshold)
    segment, opens = _number_segments(classes, survives, is_thing[classes])
    labelled = labelled & survives[winner]
    names_voxels = labelled if label_merged_stuff else labelled & opens[winner]
    none, free = torch.zeros_like(winner), torch.full_like(winner, class_logits.shape[1])
    return PanopticMap(
        torch.where(labelled, segment[winner], none).to(torch.int16),
        torch.where(names_voxels, classes[winner], free).to(torch.uint8),
    )


def _holds_its_mask(winner: Tensor, labelled: Tensor, inside: Tensor, overlap_threshold: float) -> Tensor:
    """bool [Q]: the query won some voxel of its mask, and (all it won) / (its mask) reaches the threshold."""
    counts = torch.zeros(2, inside.shape[0], device=winner.device)
    ones = torch.ones(winner.shape, device=winner.device)
    counts[0].scatter_add_(0, winner, ones)
    counts[1].scatter_add_(0, winner, labelled.to(ones.dtype))
    mask_area = inside.sum(1).to(ones.dtype)
    return (counts[1] > 0) & (counts[0] / mask_area.clamp(min=1) >= overlap_threshold)


def _number_segments(classes: Tensor, survives: Tensor, is_thing: Tensor):
    """Segment id int64 [Q] (from 1, in query order), and bool [Q]: the query opens its segment."""
    same = (classes.unsqueeze(0) == classes.unsqueeze(1)) & survives
    first_of_class = same.to(torch.uint8).argmax(1)
    position = torch.arange(len(classes), device=classes.device)
    opens = survives & (is_thing | (first_of_class == position))
    number = opens.cumsum(0)
    return torch.where(is_thing, number, number[first_of_class]), opens


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

    @property
    def index_type(self) -> torch.dtype:
        """Of the voxel indices in predictions."""
        return torch.uint8 if max(self.task.grid_shape) <= 256 else torch.int16

    def forward(self, features: ImageFeatures) -> TransformerOutput:
        """Predictions of every stage and layer."""
        return self.transformer(features)

    def loss(
        self, output: TransformerOutput, targets: OccupancyTargets, known: Optional[Mapping[str, Tensor]] = None
    ) -> Dict[str, Tensor]:
        """Every loss term by name; names end in the stage or layer number.

        Args:
            known: what :meth:`terms_on_voxels` gave of the terms that graphs can hold, if it was asked.
        """
        losses = self.terms_on_voxels(output.stages, targets, of_graphs=None if known is None else False)
        with torch.autocast(targets.voxel_semantics.device.type, enabled=False):
            return dict(known or {}, **losses, **self.loss_mask2former(output.layers, output.stages[-1], targets))

    def terms_on_voxels(
        self, stages: Sequence[VoxelStage], targets: OccupancyTargets, of_graphs: Optional[bool] = None
    ) -> Dict[str, Tensor]:
        """The terms of all stages by name; of_graphs: see ``VoxelLosses``."""
        with torch.autocast(targets.voxel_semantics.device.type, enabled=False):
            return {
                f'{name}_{i}': value
                for i, stage in enumerate(stages)
                for name, value in self.voxel_losses(stage, targets, i, of_graphs).items()
            }

    def predict_raw(self, features: ImageFeatures) -> RawPrediction:
        """Intermediate results and labels."""
        output = self(features)
        return RawPrediction(features, output, self.merge(output))

    def predict(self, features: ImageFeatures) -> List[MergedPrediction]:
        """Labels of each sample."""
        return self.merge(self(features))

    def forget_weights(self):
        """Drop the graphs, which hold the weights that there were, and what else was made from them."""
        self.transformer.forget_weights()

    def merge(self, output: TransformerOutput) -> List[MergedPrediction]:
        """Labels of each sample from the last layer's prediction."""
        with torch.autocast(output.stages[-1].coords.device.type, enabled=False):
            return [self._merge_sample(output, b) for b in range(output.stages[-1].coords.shape[0])]

    def _merge_sample(self, output: TransformerOutput, b: int) -> MergedPrediction:
        stage, last = output.stages[-1], output.layers[-1]
        class_logits, mask_logits = last.class_logits[b], last.mask_logits[b]
        voxels = stage.corners[b]
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
