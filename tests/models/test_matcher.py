"""Hungarian matching."""

import itertools

import torch

from models.losses.mask2former import match


def test_finds_the_cheapest_assignment():
    torch.manual_seed(0)
    for queries, instances in ((5, 3), (3, 5), (4, 4)):
        cost = torch.randn(queries, instances)
        matching = match(cost)
        total = cost[matching.queries, matching.instances].sum()
        wide = cost if queries >= instances else cost.t()
        best = min(
            sum(wide[row, column] for column, row in enumerate(rows))
            for rows in itertools.permutations(range(wide.shape[0]), wide.shape[1])
        )
        assert abs(total - best) < 1e-5  # the same float32 entries, added in another order
        for side in matching:
            assert len(set(side.tolist())) == len(side) == min(queries, instances)


def test_no_instance_gives_no_pair():
    matching = match(torch.zeros(5, 0))
    assert matching.queries.shape == matching.instances.shape == (0,)
    assert matching.queries.dtype == torch.int64


def test_nan_is_expensive_not_fatal():
    cost = torch.tensor([[float('nan'), 1.0], [2.0, float('inf')]])
    matching = match(cost)
    assert dict(zip(matching.queries.tolist(), matching.instances.tolist())) == {0: 1, 1: 0}
