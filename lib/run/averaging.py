"""Averaging the weights over training (EMA): the average is evaluated and shipped, training itself takes no notice."""

import contextlib
from typing import Dict, Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a model's weights.

    After step n the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights, so that it does not hang
    on to its random start in a short run. Running means and variances of batch norm are averaged alike: they belong
    to the weights that they were gathered with. Counters are the model's.

    Args:
        model: on its device; its tensors must be changed in place from now on, as optimizers do.
        decay: in 0..1, e.g. 0.999.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.updates = model, decay, 0
        own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self._names, self._weights = list(own), list(own.values())
        self._average = [value.clone() for value in self._weights]

    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        step = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if hasattr(torch, '_foreach_lerp_'):
            torch._foreach_lerp_(self._average, self._weights, step)
        else:  # an older PyTorch
            torch._foreach_mul_(self._average, 1 - step)
            torch._foreach_add_(self._average, self._weights, alpha=step)

    def state_dict(self) -> Dict[str, Tensor]:
        """The model's state dict with the average in place of its weights."""
        return dict(self.model.state_dict(), **dict(zip(self._names, self._average)))

    def begin(self, updates: int = 0) -> None:
        """Begin anew at the model's present weights, as an average of so many updates."""
        self.updates = updates
        for average, weight in zip(self._average, self._weights):
            average.copy_(weight)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weight in zip(self._average, self._weights):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
