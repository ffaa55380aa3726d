"""Draws of the mask-guided sampling."""

import pytest
import torch

from lib.dist import shared_draws
from lib.errors import ConfigError
from models.decoders.draws import EvenDraws, RandomDraws, build_draws, running_count, select_valid
from models.encoder.image_input import draw_jitter, jitter_colours


def naive_selection(valid, fractions):
    picks = []
    for row, draws in zip(valid, fractions):
        indices = row.nonzero().flatten().tolist()
        picks.append([indices[int(u * len(indices))] for u in draws.tolist()] if indices else None)
    return picks


def test_selects_the_nth_valid_entry_in_index_order():
    torch.manual_seed(0)
    valid = torch.rand(3, 11, 50) < torch.linspace(0, 1, 11).view(1, 11, 1)
    valid[:, 1] = False
    valid[:, 1, 49] = True
    fractions = torch.rand(3, 11, 16)
    fractions[..., 0] = 0.0
    fractions[..., 1] = 1 - 2**-24  # the largest float32 below 1
    index, empty = select_valid(valid, fractions)
    for b in range(3):
        for q, expected in enumerate(naive_selection(valid[b], fractions[b])):
            assert bool(empty[b, q]) == (expected is None)
            if expected is not None:
                assert index[b, q].tolist() == expected
    assert empty[:, 0].all() and index.max() < 50


@pytest.mark.parametrize('count', [1, 256, 700, 1280])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 1.0])
def test_selection_in_one_piece_or_several(count, share):
    """Against a search in a list of each row's valid entries, at both ends of the fractions and between."""
    torch.manual_seed(count)
    valid, fractions = torch.rand(2, 3, count) < share, torch.rand(2, 3, 40)
    valid[1, 1], fractions[..., 0], fractions[..., 1] = False, 0.0, 1 - 2**-24
    index, empty = select_valid(valid, fractions)
    assert torch.equal(empty, ~valid.any(-1)) and int(index.min()) >= 0 and int(index.max()) < count
    for row in ((b, q) for b in range(2) for q in range(3) if valid[b, q].any()):
        entries = valid[row].nonzero().flatten()
        number = (fractions[row] * len(entries)).floor().long().clamp(max=len(entries) - 1)
        assert torch.equal(index[row], entries[number])


def test_even_draws_are_the_same_for_every_query_and_call():
    draws = EvenDraws()
    fractions = draws.fractions(2, 3, 16, torch.device('cpu'))
    assert fractions.shape == (2, 3, 16)
    assert torch.equal(fractions[1, 2], (torch.arange(16) + 0.5) / 16)
    positions = draws.positions(2, 3, 16, torch.device('cpu'))
    assert positions.shape == (2, 3, 16, 3) and positions.min() >= 0 and positions.max() < 1
    assert len(torch.unique(positions[0, 0], dim=0)) == 16
    assert torch.equal(positions, draws.positions(2, 3, 16, torch.device('cpu')))


def test_random_draws_differ_between_calls_and_follow_the_seed():
    draws = RandomDraws()
    torch.manual_seed(5)
    first, second = (draws.fractions(1, 4, 16, torch.device('cpu')) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, draws.fractions(1, 4, 16, torch.device('cpu')))
    assert not torch.equal(first, second)


def test_unknown_strategy_is_a_sentence():
    with pytest.raises(ConfigError, match="draws must be one of .*'odd'"):
        build_draws('odd')


@pytest.mark.parametrize('parts', [[(0, 2), (2, 6)], [(0, 1), (1, 6)]])
def test_a_sample_draws_the_same_however_the_batch_is_dealt(parts):
    """Over processes or passes: fractions, positions and colour jitter of a sample stay the same."""
    images = torch.rand(6, 3, 4, 4) * 255

    def draw(begin, end):
        with shared_draws(seed=5, begin=begin, end=end, total=6, device='cpu'):
            return (
                RandomDraws().fractions(end - begin, 3, 4, torch.device('cpu')),
                RandomDraws().positions(end - begin, 3, 4, torch.device('cpu')),
                jitter_colours(images[begin:end], draw_jitter(end - begin, end - begin, images.device)),
            )

    for whole, *pieces in zip(draw(0, 6), *[draw(*part) for part in parts]):
        assert torch.equal(whole, torch.cat(pieces))
        assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize('count', [0, 1, 255, 256, 512, 700, 1280])
def test_running_count_in_one_piece_or_several(count):
    torch.manual_seed(count)
    valid = torch.rand(2, 3, count) < 0.4
    result = running_count(valid)
    assert result.dtype == torch.int32 and torch.equal(result, valid.cumsum(-1).int())
    assert running_count(valid[:, :0]).shape == (2, 0, count)
