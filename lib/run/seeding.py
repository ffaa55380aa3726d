"""Random numbers of a run: everything drawn is a function of the seed and of where in the run it is drawn.

So no generator state has to be stored: a run that continues at step n draws what it would have drawn.
"""

import random
from typing import Optional

import numpy as np
import torch

_MODULUS = 2**63 - 25  # a prime; torch takes seeds below 2**63
_MULTIPLIER = 6364136223846793005


def pick_seed(seed: Optional[int]) -> int:
    """The given seed, or one from the operating system."""
    return random.SystemRandom().randrange(2**31) if seed is None else int(seed)


def mix(*numbers: int) -> int:
    """One seed from several numbers; the same on every machine."""
    value = 1
    for number in numbers:
        value = (value * _MULTIPLIER + int(number) + 1442695040888963407) % _MODULUS
    return value


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, iteration: int, rank: int, micro_step: int) -> None:
    """Seed the draws of one forward pass: dropout, colour jitter, sampled mask voxels."""
    seed_everything(mix(seed, iteration, rank, micro_step))
