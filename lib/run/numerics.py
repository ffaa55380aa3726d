"""How a run computes: mixed precision and TF32 (on PyTorch 1.10 and later), repeatability, random numbers.

Everything drawn is a function of the seed and of where in the run it is drawn. So no generator state has to be
stored: a run that continues at step n draws what it would have drawn.
"""

import contextlib
import os
import random
from typing import Optional

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError

_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}
_CPU_HAS_BF16 = int(torch.__version__.split('.')[0]) >= 2  # PyTorch 1.10 has no LayerNorm of it there


def check_precision(amp: Optional[str], device: torch.device) -> None:
    """Raise ConfigError if this device cannot compute in the asked-for precision."""
    if amp is not None and amp not in _DTYPES:
        raise ConfigError(f'amp must be fp16 or bf16, got {amp!r}')
    if amp == 'fp16' and device.type == 'cpu':
        raise ConfigError('--amp fp16 needs a GPU; use --amp bf16 or no --amp on the CPU')
    if amp == 'bf16' and device.type == 'cpu' and not _CPU_HAS_BF16:
        raise ConfigError(
            f'--amp bf16 on the CPU needs PyTorch 2.0 or newer, and this is {torch.__version__}; use no --amp'
        )
    if amp == 'bf16' and device.type == 'cuda' and not torch.cuda.is_bf16_supported():
        raise ConfigError(f'--amp bf16: {torch.cuda.get_device_name(device)} does not support bfloat16; use --amp fp16')


def autocast(amp: Optional[str], device: torch.device):
    """Context in which the forward pass runs in ``amp`` (None: float32) where that is safe."""
    if amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[amp])


def convert_weights(model: nn.Module, amp: Optional[str]) -> nn.Module:
    """Convert, in place, the weights that autocast would convert again in every step; for inference only.

    The results are the same to the bit. Afterwards the model runs under ``autocast(amp, ...)`` alone. Left as they
    are: norms, and whatever is below a module with an attribute ``keeps_float32``, such as attention between blocks.
    A module with ``convert_for_inference``, such as a backbone whose norms are folded, does it itself, given the type.

    Args:
        model: on its device.
        amp: 'fp16', 'bf16', or None, which converts nothing.
    """
    if amp is not None:
        _convert(model, _DTYPES[amp])
        model.to(next(model.parameters()).device)  # the model forgets what it made from the weights before
    return model


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if getattr(module, 'keeps_float32', False):
        return
    if hasattr(module, 'convert_for_inference'):
        module.convert_for_inference(dtype)
        return
    for child in module.children():
        _convert(child, dtype)
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
        module.to(dtype)


def make_scaler(amp: Optional[str]):
    """Loss scaler for fp16; a disabled one, which passes everything through, otherwise."""
    if hasattr(torch, 'amp') and hasattr(torch.amp, 'GradScaler'):
        return torch.amp.GradScaler('cuda', enabled=amp == 'fp16')
    return torch.cuda.amp.GradScaler(enabled=amp == 'fp16')


def set_tf32(policy: Optional[str]) -> None:
    """'default' or None leaves PyTorch's settings, 'on' and 'off' set convolutions and matrix products alike."""
    if policy in (None, 'default'):
        return
    torch.backends.cuda.matmul.allow_tf32 = policy == 'on'
    torch.backends.cudnn.allow_tf32 = policy == 'on'


def describe_precision(amp: Optional[str], device: torch.device, training: bool = False) -> str:
    """One sentence for the log."""
    text = {None: 'float32', 'fp16': 'mixed float16', 'bf16': 'mixed bfloat16'}[amp]
    if training and amp == 'fp16':
        text += ' with loss scaling'
    if device.type == 'cuda':
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        text += f'; TF32 in convolutions {_on_off(cudnn.allow_tf32)}, in matrix products {_on_off(products.allow_tf32)}'
        text += f'; cuDNN benchmark {_on_off(cudnn.benchmark)}'
    if torch.are_deterministic_algorithms_enabled():
        text += '; deterministic algorithms only'
    return text


def _on_off(flag):
    return 'on' if flag else 'off'


# -- repeatability


_WORKSPACE = 'CUBLAS_WORKSPACE_CONFIG'
_REPEATABLE_WORKSPACES = (':4096:8', ':16:8')  # with others cuBLAS may sum in another order from run to run


def set_deterministic(on: bool) -> None:
    """Let PyTorch take repeatable algorithms only; ``on=False`` leaves its settings alone.

    An operation that has no repeatable algorithm raises RuntimeError when it is reached; on GPUs this was tried
    with PyTorch 2.11, and older releases lack more of them. To be called before the first matrix product on a
    GPU, because cuBLAS reads its setting once.

    Raises:
        ConfigError: the environment asks for a cuBLAS workspace that does not repeat.
    """
    if not on:
        return
    workspace = os.environ.setdefault(_WORKSPACE, _REPEATABLE_WORKSPACES[0])
    if torch.cuda.is_available() and workspace not in _REPEATABLE_WORKSPACES:
        raise ConfigError(
            f'train.deterministic needs the environment variable {_WORKSPACE} to be '
            f'{" or ".join(_REPEATABLE_WORKSPACES)}, but it is {workspace!r}; unset it'
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if hasattr(torch.backends.cuda, 'enable_mem_efficient_sdp'):  # fused attention adds up in no fixed order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        if hasattr(torch.backends.cuda, 'enable_cudnn_sdp'):
            torch.backends.cuda.enable_cudnn_sdp(False)


# -- random numbers


_MODULUS = 2**63 - 25  # a prime; torch takes seeds below 2**63
_MULTIPLIER = 6364136223846793005


def pick_seed(seed: Optional[int]) -> int:
    """The given seed, or one from the operating system.

    Raises:
        ConfigError: it is no whole number from 0 to 2^63 - 1.
    """
    if seed is None:
        return random.SystemRandom().randrange(2**31)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f'seed must be a whole number from 0 to 2^63 - 1, or None for a random one, got {seed!r}')
    return seed


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
