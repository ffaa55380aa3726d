"""Lovász-Softmax (arXiv 1705.08790) on counted labels.

Shapes: B batch, K blocks, C classes; counts as in ``count_labels``. All voxels of a block share their
prediction, so a block contributes one error for its voxels of a class and one for its others, each with a
multiplicity; the sum telescopes over equal errors, so the value is that of the upsampled voxels.
"""

import torch
from torch import Tensor


def lovasz_softmax(probabilities: Tensor, counts: Tensor, scale: int) -> Tensor:
    """Mean over the classes present in a sample, then over the batch.

    Args:
        probabilities: [B, K, C], softmax.
        counts: float32 [B, K, C].
        scale: edge of a block in voxels; blocks of one voxel hold one label, which halves the work.

    Returns:
        scalar.
    """
    probabilities, own = probabilities.transpose(1, 2), counts.transpose(1, 2)
    others = own.sum(1, keepdim=True) - own
    if scale == 1:
        errors = torch.where(own > 0, 1 - probabilities, probabilities)
    else:
        errors = torch.cat([1 - probabilities, probabilities], dim=-1)
        none = torch.zeros_like(own)
        own, others = torch.cat([own, none], dim=-1), torch.cat([none, others], dim=-1)
    per_class = _lovasz_extension(errors, own, others)
    present = (own.sum(-1) > 0).float()
    per_sample = (per_class * present).sum(1) / present.sum(1).clamp(min=1)
    return per_sample.mean()


def _lovasz_extension(errors: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """errors and the number of own / other voxels that have them, [..., n] -> [...]."""
    errors, order = errors.sort(dim=-1, descending=True)
    with torch.no_grad():
        own, others = own.gather(-1, order).cumsum(-1), others.gather(-1, order).cumsum(-1)
        total = own[..., -1:]
        jaccard = 1 - (total - own) / (total + others).clamp(min=1)
        steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], dim=-1)
    return (errors * steps).sum(-1)
