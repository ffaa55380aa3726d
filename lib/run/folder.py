"""The run folder: never deleted, never overwritten; its checkpoints, and which of them to continue from."""

import os
import re
import time
from pathlib import Path
from typing import List, Optional

from ..checkpoint import is_complete, save_checkpoint
from ..errors import CheckpointError, UserError

OUTPUTS = 'outputs'
LATEST = 'latest.pth'
_NAME = re.compile(r'^(?:epoch_\d+_)?iter_(\d+)\.pth$')
_LEFTOVER = re.compile(r'^\..*\.tmp\.pth$')


def checkpoint_name(iteration: int, epoch: Optional[int]) -> str:
    """``epoch_3_iter_1200.pth`` at the end of an epoch, otherwise ``iter_1200.pth``."""
    return ('epoch_%d_' % epoch if epoch is not None else '') + 'iter_%d.pth' % iteration


def create_run_folder(path: Optional[str], config_path: str) -> Path:
    """Make a new folder: ``path``, or ``outputs/<config>/<date_time>``; with ``-1``, ... if it exists.

    Raises:
        UserError: it cannot be made.
    """
    wanted = Path(path) if path else experiment_folder(config_path) / time.strftime('%Y%m%d_%H%M%S')
    for n in range(10000):
        folder = wanted if n == 0 else wanted.with_name('%s-%d' % (wanted.name, n))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if n == 0 and folder.is_dir() and not any(folder.iterdir()):
                return folder
        except OSError as error:
            raise UserError(
                f'cannot make the run folder {folder}: {error.strerror}; choose another --work-dir'
            ) from error
    raise UserError(f'10000 run folders named {wanted} exist; choose another --work-dir')


def experiment_folder(config_path: str) -> Path:
    """Where all runs of a config lie."""
    return Path(OUTPUTS) / Path(config_path).stem


def find_checkpoint_to_resume(resume: str, work_dir: Optional[str], config_path: str) -> Optional[Path]:
    """Checkpoint that ``--resume`` means.

    Args:
        resume: 'auto' (newest whole checkpoint of ``work_dir``, or of the config's newest run that has one),
            a folder, or a file.
        work_dir: ``--work-dir``.
        config_path: of the run to start.

    Returns:
        None with 'auto' where there is none.

    Raises:
        CheckpointError: a named file or folder does not exist or holds no whole checkpoint.
    """
    if resume != 'auto':
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f'checkpoint {resume} (--resume) does not exist; give a .pth file, a folder or auto')
        found = newest_checkpoint(path) if path.is_dir() else path
        if found is None:
            raise CheckpointError(f'run folder {resume} (--resume) holds no whole checkpoint')
        return found
    if work_dir:
        return newest_checkpoint(Path(work_dir))
    runs = experiment_folder(config_path)
    folders = [p for p in runs.iterdir() if p.is_dir()] if runs.is_dir() else []
    for folder in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True):
        found = newest_checkpoint(folder)
        if found is not None:
            return found
    return None


def checkpoints(folder: Path) -> List[Path]:
    """Checkpoints of a run folder by iteration, newest first; whole or not."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.match(path.name), path) for path in folder.iterdir()]
    found = [(int(match.group(1)), path) for match, path in matches if match]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """Newest checkpoint whose check sums agree; damaged ones are passed over with a warning."""
    for path in checkpoints(folder):
        if is_complete(str(path)):
            return path
        print(f'warning: {path} is not whole (cut short while written?) and is passed over', flush=True)
    return None


class CheckpointKeeper:
    """Writes a run's checkpoints, points ``latest.pth`` at the newest and removes old ones.

    Args:
        folder: run folder.
        keep: newest checkpoints kept; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, checkpoint, iteration: int, epoch: Optional[int] = None) -> Path:
        """Write ``epoch_E_iter_N.pth`` (or ``iter_N.pth``); older ones go only once it is on the disk.

        Raises:
            UserError: it cannot be written; all earlier ones are still there.
        """
        path = self.folder / checkpoint_name(iteration, epoch)
        save_checkpoint(str(path), checkpoint)
        self._point_latest_at(path)
        self._remove_old(path)
        return path

    def remove_leftovers(self) -> None:
        """Delete temporary files of a process that was killed while it wrote a checkpoint."""
        for path in self.folder.iterdir():
            if _LEFTOVER.match(path.name):
                path.unlink()

    def _point_latest_at(self, path):
        """For people and for val.py; resuming does not rely on it. Not every file system has links."""
        temporary = self.folder / '.latest.tmp'
        try:
            if temporary.is_symlink() or temporary.exists():
                temporary.unlink()
            os.symlink(path.name, str(temporary))
            os.replace(str(temporary), str(self.folder / LATEST))
        except OSError as error:
            print(f'warning: cannot point {self.folder / LATEST} at {path.name} ({error.strerror})', flush=True)

    def _remove_old(self, newest):
        if not self.keep:
            return
        older = [path for path in checkpoints(self.folder) if path != newest]
        for path in older[self.keep - 1 :]:
            path.unlink()
