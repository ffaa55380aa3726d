"""Operators that ONNX cannot say, said otherwise while a model is traced; the sampling as one node of its own.

Shapes as in ``models.decoders.layers`` and ``models.csrc.msmv_sampling``. The substitutes give the same values as
what they stand for (tests/models/test_export.py); they are for tracing, and slower on a GPU.

``sparseocc::MultiViewSampling``, version 1, is ``models.csrc.msmv_sampling.sample_multi_view``:

    inputs      points float32 [B, Q, G, P, 3] metres, ego2img float32 [B, T*N, 4, 4], level_logits float32
                [B, Q, G, P, L], then L maps float32 [B, T*N, H_l, W_l, C], channels last
    attributes  image_height, image_width: of the padded image, pixels; num_cameras: N; published_weight_order: 0 or 1
    output      float32 [B, Q, G, T*P, C/G]
"""

import contextlib
from typing import Iterator, Sequence, Tuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from models.csrc.msmv_sampling.reference import sample_multi_view_reference

DOMAIN, NODE = 'sparseocc', 'MultiViewSampling'
SAMPLING = ('standard', 'custom')


@contextlib.contextmanager
def traceable(sampling: str = 'standard') -> Iterator[None]:
    """While this is open, the models run on what can be exported.

    Args:
        sampling: 'standard' traces the sampling into standard operators, 'custom' makes it one node.
    """
    substitutes = {
        'models.decoders.layers.select_valid': select_valid_by_table,
        'models.decoders.sparse_voxel_decoder.top_in_order': top_in_order_by_sorting,
        'models.csrc.msmv_sampling.reference._weighted_rows': weighted_rows_by_gathering,
    }
    if sampling == 'custom':
        substitutes['models.decoders.layers.sample_multi_view'] = sampling_node
    with contextlib.ExitStack() as stack:
        for name, substitute in substitutes.items():
            stack.enter_context(mock.patch(name, substitute))
        yield


def select_valid_by_table(valid: Tensor, fractions: Tensor) -> Tuple[Tensor, Tensor]:
    """``models.decoders.draws.select_valid`` by a table of each row's valid entries, not a search."""
    count = valid.shape[-1]
    running = valid.to(torch.int32).cumsum(-1, dtype=torch.int32)
    total = running[..., -1:]
    rank = torch.min((fractions * total).floor().to(torch.int32), (total - 1).clamp(min=0))
    places = torch.where(valid, running - 1, torch.full_like(running, count)).to(torch.int64)
    entries = torch.arange(count, device=valid.device).expand(valid.shape)
    table = torch.zeros(valid.shape[:-1] + (count + 1,), dtype=torch.int64, device=valid.device)
    table = table.scatter(-1, places, entries)  # what is not valid goes to the last place, which is not looked at
    return table.gather(-1, rank.to(torch.int64)), total.squeeze(-1) == 0


def top_in_order_by_sorting(scores: Tensor, k: int) -> Tensor:
    """``models.decoders.sparse_voxel_decoder.top_in_order`` by sorting what was chosen."""
    if k >= scores.shape[1]:
        return torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[0], -1)
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def weighted_rows_by_gathering(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``models.csrc.msmv_sampling.reference._weighted_rows`` without an embedding bag."""
    index, weights = index.reshape(-1, 4), weights.reshape(-1, 4)
    return sum(rows.index_select(0, index[:, corner]) * weights[:, corner : corner + 1] for corner in range(4))


def sampling_node(
    features: Sequence[Tensor],
    points: Tensor,
    ego2img: Tensor,
    level_logits: Tensor,
    image_size: Tuple[int, int],
    num_cameras: int,
    published_weight_order: bool = True,
    frame_index=None,
    gradient_sum=None,
) -> Tensor:
    """``sample_multi_view`` as a node of the graph; it computes nothing."""
    batch, queries, groups, per_group = points.shape[:4]
    frames = ego2img.shape[1] // num_cameras
    attributes = dict(
        image_height=int(image_size[0]),
        image_width=int(image_size[1]),
        num_cameras=num_cameras,
        published_weight_order=int(published_weight_order),
    )
    return torch.onnx.ops.symbolic(
        f'{DOMAIN}::{NODE}',
        (points, ego2img, level_logits, *features),
        attributes,
        dtype=features[0].dtype,
        shape=(batch, queries, groups, frames * per_group, features[0].shape[-1] // groups),
        version=1,
    )


def run_sampling_node(inputs: Sequence[np.ndarray], attributes) -> np.ndarray:
    """What ``sparseocc::MultiViewSampling`` computes: the reference of the operator, on NumPy arrays."""
    points, ego2img, level_logits, *features = (torch.from_numpy(np.ascontiguousarray(value)) for value in inputs)
    image_size = (attributes['image_height'], attributes['image_width'])
    order = bool(attributes['published_weight_order'])
    with torch.no_grad():
        return sample_multi_view_reference(
            features, points, ego2img, level_logits, image_size, attributes['num_cameras'], order
        ).numpy()


def reference_op():
    """The node for ``onnx.reference.ReferenceEvaluator(model, new_ops=[reference_op()])``."""
    from onnx.reference.op_run import OpRun

    def run(self, *inputs, **attributes):
        return (run_sampling_node(inputs, attributes),)

    return type(NODE, (OpRun,), dict(op_domain=DOMAIN, _run=run))
