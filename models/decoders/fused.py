"""Inference of the decoders on a GPU in fewer kernels: what lies between two products is one of Triton's.

The results are those of the modules but for rounding. Without Triton, on the CPU and with gradients the modules run.
In mixed float16 the queries are float16 from one norm to the next, so that no product converts them; in mixed
bfloat16, whose steps are eight times as wide, they stay float32.
"""

import contextlib
import functools
from types import ModuleType
from typing import Callable, Dict, Generic, Hashable, Iterable, Optional, Tuple, TypeVar

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from models.csrc import autocast_dtype, has_triton

_MANY = 512  # rows from which on it pays to take the weights apart
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernels_for(values: Tensor) -> Optional[ModuleType]:
    """``models.decoders.kernels`` if they can compute from these values, for modules in evaluation mode; else None."""
    if not values.is_cuda or values.dtype not in _TYPES or not values.numel() or torch.is_grad_enabled():
        return None
    if not has_triton(values.device):
        return None
    from models.decoders import kernels

    return kernels


def type_of_products(values: Tensor) -> torch.dtype:
    """The type that linear layers take these values in."""
    return autocast_dtype(values.device.type) or values.dtype


def type_of_queries(values: Tensor) -> torch.dtype:
    """The type of queries between norms; see the top."""
    return torch.float16 if type_of_products(values) == torch.float16 else torch.float32


T = TypeVar('T')


class MadeOnce(Generic[T]):
    """What inference makes of weights alone, the same for all images: kept while these stay as they are.

    Args:
        weights: gives those that it is made of.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]]):
        self._weights = weights
        self.clear()

    def clear(self):
        """Drop what was made."""
        self.kept: Dict[Tuple, T] = {}
        self._kept_of: Tuple = ()

    def __getstate__(self):
        return dict(self.__dict__, kept={}, _kept_of=())

    def version(self) -> Tuple:
        """Another value whenever a weight has changed; what was made of it is forgotten then."""
        weights = self._weights()
        version = tuple((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights)
        if version != self._kept_of:
            self.clear()
            self._kept_of = version
        return version

    def last_version(self) -> Tuple:
        """What :meth:`version` told last, without looking; another value when all was dropped since."""
        return self._kept_of

    def get(self, query: Tensor, make: Callable[[], T], *options: Hashable) -> T:
        """What ``make`` gives for so many queries on this device, in this precision, with these options."""
        self.version()
        exact = not torch.backends.cuda.matmul.allow_tf32
        key = tuple(query.shape), query.device, query.dtype, type_of_products(query), exact, options
        if key not in self.kept:
            with torch.inference_mode(False), torch.no_grad():
                self.kept[key] = make()
        return self.kept[key]


def linear_relu(linear: nn.Linear, values: Tensor) -> Tensor:
    """ReLU(linear(values)), values [..., C]; in one kernel where PyTorch has it. No gradients."""
    if not hasattr(torch, '_addmm_activation') or linear.bias is None or not values.is_cuda:
        return F.relu(linear(values))
    dtype = type_of_products(values)
    flat = values.flatten(0, -2).to(dtype)
    result = torch._addmm_activation(linear.bias.to(dtype), flat, linear.weight.to(dtype).t())
    return result.view(values.shape[:-1] + (-1,))


def wide_linear(linear: nn.Linear, values: Tensor) -> Tensor:
    """linear(values), values [rows, n]; for many more outputs than n.

    Without gradients, products of float32 and many rows are three of TF32 where a GPU multiplies that more than three
    times as fast, to 3e-6 of the result (TF32 alone: 3e-4). Taking the values apart costs less than that
    saves where there are many outputs.
    """
    many = type_of_products(values) == torch.float32 and len(values) >= _MANY
    kernels = kernels_for(values) if many else None
    if kernels is None or torch.backends.cuda.matmul.allow_tf32 or not _has_fast_tf32(values.device):
        return linear(values)
    with _tf32_products():
        first, second = kernels.split_for_tf32(values, False), kernels.split_for_tf32(linear.weight, True)
        return F.linear(first, second, linear.bias)


@functools.lru_cache(maxsize=None)
def _has_fast_tf32(device: torch.device) -> bool:
    """GPUs of data centres do; others multiply TF32 hardly faster than float32."""
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


@contextlib.contextmanager
def _tf32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run_ffn(ffn: FFN, query: Tensor) -> Tensor:
    """What the layers give, without the identity that the module adds; in evaluation mode."""
    return ffn.layers[1](linear_relu(ffn.layers[0][0], query))
