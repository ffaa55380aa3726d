"""One-to-one matching of queries and instances at the least total cost."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Matching(NamedTuple):
    """Matched pairs of one sample, by query index.

    queries    int64 [m]
    instances  int64 [m]
    """

    queries: Tensor
    instances: Tensor


def match(cost: Tensor) -> Matching:
    """Hungarian matching.

    Args:
        cost: [Q, n] float, on any device; NaN and infinities count as very expensive.

    Returns:
        min(Q, n) pairs, on the CPU; none if there is no instance.
    """
    cost = torch.nan_to_num(cost.detach().float().cpu(), nan=1e8, posinf=1e8, neginf=-1e8)
    rows, columns = linear_sum_assignment(cost.numpy())
    return Matching(torch.from_numpy(rows), torch.from_numpy(columns))
