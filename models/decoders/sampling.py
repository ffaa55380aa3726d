"""From queries to sampled features: where each decoder looks, and which voxels of its mask a query draws.

Shapes: B batch, T frames, N cameras, L pyramid levels, Q queries, G groups, P points per group, C channels,
K kept voxels. Points are in metres, ego frame of the current keyframe; the same points serve all frames.

The published code draws at random also at test time, so that its results change from run to run. Ours are
repeatable by default: ``even``. A strategy of drawing is any object with the two methods of :class:`RandomDraws`.
"""

from typing import Tuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from lib.dist import batch_rand
from lib.errors import ConfigError
from models.csrc.msmv_sampling import sample_multi_view
from models.decoders.layers import DecoderSizes
from models.encoder import ImageFeatures

_PIECE = 256
_CUBE_RATIOS = (0.8191725134, 0.6710436067, 0.5497004779)  # powers of 1/1.2207..., the root of x^4 = x + 1


class _Sampling(BaseModule):
    """What both kinds share: offsets and level weights from the query, then the sampling op.

    Args:
        sizes: of the decoder; its ``num_points`` is P.
    """

    def __init__(self, sizes: DecoderSizes):
        super().__init__()
        self.sizes = sizes
        self.scale_weights = nn.Linear(sizes.embed_dims, sizes.num_groups * sizes.num_points * sizes.num_levels)

    def sample(self, query: Tensor, points: Tensor, features: ImageFeatures) -> Tensor:
        """query [B, Q, C], points [B, Q, G, P, 3] metres -> [B, Q, G, T*P, C/G]."""
        level_logits = self.scale_weights(query).view(points.shape[:4] + (-1,))
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

    def group(self, values: Tensor) -> Tensor:
        """[B, Q, G*P*3] or [B, Q, G*P, 3] -> [B, Q, G, P, 3]."""
        return values.reshape(values.shape[:2] + (self.sizes.num_groups, self.sizes.num_points, 3))


class BlockSampling(_Sampling):
    """Points around the centre of each query's block (paper section 3.2)."""

    def __init__(self, sizes: DecoderSizes):
        super().__init__(sizes)
        self.sampling_offset = nn.Linear(sizes.embed_dims, sizes.num_groups * sizes.num_points * 3)

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


class RandomDraws:
    """Uniform random numbers, as in training."""

    def fractions(self, batch: int, queries: int, count: int, device: torch.device) -> Tensor:
        """float32 [B, Q, count] in [0, 1): fraction u takes the floor(u * n)-th of a query's n voxels."""
        return batch_rand(batch, queries, count, device=device)

    def positions(self, batch: int, queries: int, count: int, device: torch.device) -> Tensor:
        """float32 [B, Q, count, 3] in [0, 1): places in the volume for a query without any voxel."""
        return batch_rand(batch, queries, count, 3, device=device)


class EvenDraws:
    """A fixed, evenly spread set, the same for every query: u_j = (j + 0.5) / count."""

    def fractions(self, batch: int, queries: int, count: int, device: torch.device) -> Tensor:
        """float32 [B, Q, count], the same for every query."""
        steps = torch.arange(count, device=device, dtype=torch.float32)
        return ((steps + 0.5) / count).expand(batch, queries, count)

    def positions(self, batch: int, queries: int, count: int, device: torch.device) -> Tensor:
        """float32 [B, Q, count, 3], a Kronecker sequence that fills the unit cube evenly."""
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32).unsqueeze(1)
        places = torch.cat([steps * ratio for ratio in _CUBE_RATIOS], dim=1).frac()
        return places.expand(batch, queries, count, 3)


STRATEGIES = {'even': EvenDraws, 'random': RandomDraws}


def build_draws(name: str):
    """Strategy from its name in ``model.test_cfg.draws``."""
    if name not in STRATEGIES:
        raise ConfigError(f'model.test_cfg.draws must be one of {sorted(STRATEGIES)}, got {name!r}')
    return STRATEGIES[name]()


def select_valid(valid: Tensor, fractions: Tensor) -> Tuple[Tensor, Tensor]:
    """The floor(u * n)-th valid entry of each row, in index order, without leaving the device.

    In pieces where K allows: few entries are drawn, so it is enough to count along the pieces that hold them.

    Args:
        valid: bool [B, Q, K].
        fractions: float32 [B, Q, count] in [0, 1).

    Returns:
        index int64 [B, Q, count] (any index where a row has no valid entry), and bool [B, Q]: no valid entry.
    """
    count = valid.shape[-1]
    if count % _PIECE:
        running = valid.cumsum(-1, dtype=torch.int32)
        number = _drawn_number(fractions, running[..., -1:])
        index = torch.searchsorted(running, number)
        return index.clamp(max=count - 1), running[..., -1] == 0
    pieces = valid.reshape(valid.shape[:-1] + (count // _PIECE, _PIECE))
    counts = pieces.sum(-1, dtype=torch.int32)
    ends = counts.cumsum(-1, dtype=torch.int32)
    number = _drawn_number(fractions, ends[..., -1:])
    piece = torch.searchsorted(ends, number).clamp(max=count // _PIECE - 1)
    before = (ends - counts).gather(-1, piece)
    drawn_from = pieces.gather(-2, piece.unsqueeze(-1).expand(piece.shape + (_PIECE,))).cumsum(-1, dtype=torch.int32)
    index = piece * _PIECE + torch.searchsorted(drawn_from, (number - before).unsqueeze(-1)).squeeze(-1)
    return index.clamp(max=count - 1), ends[..., -1] == 0


def _drawn_number(fractions: Tensor, total: Tensor) -> Tensor:
    """Which of ``total`` [..., 1] entries a fraction takes, from 1; int32."""
    return torch.min((fractions * total).floor().to(torch.int32), (total - 1).clamp(min=0)) + 1


def running_count(valid: Tensor) -> Tensor:
    """int32 [..., K]: how many entries of a row are true up to each, itself included; valid is bool [..., K].

    In pieces where K allows: a GPU gives each row to one block, so that a few long rows leave most of it idle.
    """
    count = valid.shape[-1]
    if count % _PIECE or count == _PIECE:
        return valid.cumsum(-1, dtype=torch.int32)
    pieces = valid.reshape(valid.shape[:-1] + (count // _PIECE, _PIECE)).cumsum(-1, dtype=torch.int32)
    before = pieces[..., -1].cumsum(-1, dtype=torch.int32) - pieces[..., -1]
    return pieces.add_(before.unsqueeze(-1)).view(valid.shape)
