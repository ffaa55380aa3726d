"""What a run ran on: versions, devices, commit."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torch

_PACKAGES = (
    'torch',
    'torchvision',
    'numpy',
    'mmcv',
    'mmcv-full',
    'mmdet',
    'mmsegmentation',
    'mmdet3d',
    'numba',
    'opencv-python-headless',
    'opencv-python',
    'Pillow',
    'Pillow-SIMD',
    'PyTurboJPEG',
)
_ROOT = Path(__file__).resolve().parent.parent.parent


def describe_environment(device: torch.device, world_size: int) -> List[str]:
    """Lines ``name: value`` about Python, packages, devices and the source tree."""
    facts = dict(
        command=' '.join(sys.argv),
        python=sys.version.split()[0],
        system=platform.platform(),
        processes=str(world_size),
        device=device_name(device),
        git=describe_commit(),
    )
    for package in _PACKAGES:
        version = _version(package)
        if version:
            facts[package] = version
    if torch.version.cuda:
        facts['cuda of torch'] = torch.version.cuda
        facts['cudnn'] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else 'no GPU'
    return ['{}: {}'.format(*fact) for fact in facts.items()]


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return 'CPU (%s, %d threads)' % (_cpu_model(), torch.get_num_threads())


def describe_commit() -> str:
    """Commit of the source tree and whether it was changed since, or 'no git repository'."""
    commit = _git('rev-parse', 'HEAD')
    if commit is None:
        return 'no git repository'
    changed = _git('status', '--porcelain', '--untracked-files=no') or ''
    names = [line[3:] for line in changed.splitlines()]
    more = ', ...' if len(names) > 5 else ''
    return commit + (' with changes in {}{}'.format(', '.join(names[:5]), more) if names else '')


def versions() -> Dict[str, str]:
    """For a checkpoint's meta."""
    return dict(python=sys.version.split()[0], torch=str(torch.__version__), git=describe_commit())


def _version(package) -> Optional[str]:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments) -> Optional[str]:
    try:
        done = subprocess.run(
            ('git',) + arguments, cwd=str(_ROOT), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode('utf-8', 'replace').rstrip('\n') if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()
