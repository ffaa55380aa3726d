"""From mask predictions to labels: one semantic map, and panoptic segments (paper section 3.4).

Shapes: Q queries, K kept voxels, C classes without free. Everything stays on the device, and no shape
depends on the values, so that nothing waits for the GPU.
"""

from typing import Dict, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

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

    def to_numpy(self, index_type: torch.dtype) -> Dict[str, np.ndarray]:
        """sem_pred [1, K], occ_loc [1, K, 3] of the given type and, if there are, pano_inst and pano_sem [1, K]."""
        arrays = dict(
            sem_pred=self.semantics,
            occ_loc=self.voxels.to(index_type),
            pano_inst=self.pano_inst,
            pano_sem=self.pano_sem,
        )
        return {name: value.unsqueeze(0).cpu().numpy() for name, value in arrays.items() if value is not None}


def merge_semantic(class_logits: Tensor, mask_logits: Tensor, score_threshold: float) -> Tensor:
    """Class of each voxel: arg max over classes of the sum over queries of class score x mask.

    Args:
        class_logits: [Q, C] float32, before the sigmoid.
        mask_logits: [Q, K] float32, before the sigmoid.
        score_threshold: queries whose best class score is not above this do not count.

    Returns:
        uint8 [K], C (free) where the best class has less than 0.01.
    """
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
        mask_logits: [Q, K] float32, before the sigmoid.
        is_thing: bool [C], classes counted one by one; queries of any other class merge into one segment.
        score_threshold: queries whose best class score is not above this do not count.
        overlap_threshold: least ratio of the voxels a query won to those of its own mask.
        label_merged_stuff: False is the published behaviour (a quirk that published numbers contain): the
            second and later queries of a stuff class give their voxels the segment's id but leave them free.
    """
    masks = mask_logits.sigmoid()
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
