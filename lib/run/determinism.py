"""Training that repeats to the bit on the same machine."""

import os

import torch

from ..errors import ConfigError

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
            'train.deterministic needs the environment variable {} to be {}, but it is {!r}; unset it'.format(
                _WORKSPACE, ' or '.join(_REPEATABLE_WORKSPACES), workspace
            )
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if hasattr(torch.backends.cuda, 'enable_mem_efficient_sdp'):  # fused attention adds up in no fixed order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        if hasattr(torch.backends.cuda, 'enable_cudnn_sdp'):
            torch.backends.cuda.enable_cudnn_sdp(False)
