"""Mixed precision and TF32, on PyTorch 1.10 and later."""

import contextlib
from typing import Optional

import torch
from torch import nn

from ..errors import ConfigError

_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def check_precision(amp: Optional[str], device: torch.device) -> None:
    """Raise ConfigError if this device cannot compute in the asked-for precision."""
    if amp is not None and amp not in _DTYPES:
        raise ConfigError(f'amp must be fp16 or bf16, got {amp!r}')
    if amp == 'fp16' and device.type == 'cpu':
        raise ConfigError('--amp fp16 needs a GPU; use --amp bf16 or no --amp on the CPU')
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
    are: attention, norms, and whatever is below a module with an attribute ``keeps_float32``.

    Args:
        model: on its device.
        amp: 'fp16', 'bf16', or None, which converts nothing.
    """
    if amp is not None:
        _convert(model, _DTYPES[amp])
        model.to(next(model.parameters()).device)  # the model forgets what it made from the weights before
    return model


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if getattr(module, 'keeps_float32', False) or isinstance(module, nn.MultiheadAttention):
        return
    for child in module.children():
        _convert(child, dtype)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
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
        text += f'; TF32 in convolutions {_on_off(torch.backends.cudnn.allow_tf32)}, in matrix products {_on_off(torch.backends.cuda.matmul.allow_tf32)}'
        text += f'; cuDNN benchmark {_on_off(torch.backends.cudnn.benchmark)}'
    if torch.are_deterministic_algorithms_enabled():
        text += '; deterministic algorithms only'
    return text


def _on_off(flag):
    return 'on' if flag else 'off'
