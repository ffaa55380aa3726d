"""Tests of Triton's kernels: on a GPU as they are; elsewhere Triton interprets them, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # Triton decides it when it is imported
DEVICE = torch.device('cuda' if torch.cuda.is_available() and not IS_INTERPRETED else 'cpu')
HAS_TRITON = all(map(importlib.util.find_spec, ('triton', 'triton.runtime.interpreter')))  # Triton 2.0 has too little

runs = pytest.mark.skipif(
    not HAS_TRITON or DEVICE.type == 'cpu' and not IS_INTERPRETED, reason='runs on a GPU or in a process of its own'
)
without_a_gpu = pytest.mark.skipif(
    not HAS_TRITON or IS_INTERPRETED or DEVICE.type == 'cuda', reason='for machines without a GPU'
)


def run_interpreted(file: str) -> None:
    """All tests of a file, with Triton interpreting its kernels."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(Path(file).resolve())]
    environment = dict(os.environ, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='')
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout.decode()
