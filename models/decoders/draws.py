"""Which voxels of its mask a query draws.

The published code draws at random also at test time, so that its results change from run to run. Ours are
repeatable by default: ``even``. A strategy of drawing is any object with the two methods of :class:`RandomDraws`.

Shapes: B batch, Q queries, K kept voxels.
"""

import functools
from typing import Sequence, Tuple

import torch
from torch import Tensor

from lib.dist import batch_rand
from lib.errors import ConfigError

_PIECE = 256
_CUBE_RATIOS = (0.8191725134, 0.6710436067, 0.5497004779)  # powers of 1/1.2207..., the root of x^4 = x + 1


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
        return _even_fractions(count, device).expand(batch, queries, count)

    def positions(self, batch: int, queries: int, count: int, device: torch.device) -> Tensor:
        """float32 [B, Q, count, 3], a Kronecker sequence that fills the unit cube evenly."""
        return _even_positions(count, device).expand(batch, queries, count, 3)


# Made once and kept, also for CUDA graphs, which read them where they are; not to be written to.


@functools.lru_cache(maxsize=None)
def _even_fractions(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return (torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count


@functools.lru_cache(maxsize=None)
def _even_positions(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32).unsqueeze(1)
        return torch.cat([steps * ratio for ratio in _CUBE_RATIOS], dim=1).frac()


class GivenDraws:
    """Numbers that were drawn before, in the order in which they are asked for.

    Args:
        numbers: results of ``fractions`` and ``positions``.
    """

    def __init__(self, numbers: Sequence[Tensor]):
        self._numbers = iter(numbers)

    def fractions(self, *_) -> Tensor:
        return next(self._numbers)

    def positions(self, *_) -> Tensor:
        return next(self._numbers)


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
