"""Checks of the files named on the command line, before anything slow is imported or built."""

import os
from typing import Optional

from ..config import check_config_file
from ..errors import CheckpointError


def check_files(config: str, resume: Optional[str] = None, *weights: Optional[str]) -> None:
    """Raise the sentence for the first of these files that is not there.

    Args:
        config: config file.
        resume: 'auto', or a checkpoint file or run folder, or None.
        weights: checkpoint files, or None.
    """
    check_config_file(config)
    if resume and resume != 'auto' and not os.path.exists(resume):
        raise CheckpointError(f'checkpoint {resume} (--resume) does not exist; give a .pth file, a folder or auto')
    from ..checkpoint import check_checkpoint_file

    for path in weights:
        if path:
            check_checkpoint_file(path)
