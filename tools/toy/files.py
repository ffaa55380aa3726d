"""Writing the toy data set's many small files: each appears whole or not at all, with bytes that repeat."""

import io
import json
import os
import re
from pathlib import Path
from typing import Dict, Iterable, List

import numpy as np

from lib.errors import UserError

JPEG_QUALITY = 92


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(str(temporary), str(path))
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise UserError(f'cannot write {path}: {error.strerror}; free some space or choose another --out') from error


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed in the midst of ``write_bytes`` left in a folder and those in it."""
    for path in folder.rglob('.*.tmp'):
        if re.fullmatch(r'\..+\.\d+\.tmp', path.name):
            path.unlink()


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write uint8 [height, width, 3] RGB."""
    _write_image(path, image, 'JPEG', quality=JPEG_QUALITY)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [height, width]."""
    _write_image(path, image, 'PNG')


def _write_image(path, image, kind, **options):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    write_bytes(path, stream.getvalue())


def write_npz(path: Path, arrays: Dict[str, np.ndarray]) -> None:
    """Write a compressed .npz."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    write_bytes(path, stream.getvalue())


def json_lines(records: Iterable) -> List[str]:
    """Each record as JSON; NumPy numbers and arrays become plain ones."""
    return [json.dumps(record, default=lambda value: value.tolist()) for record in records]


def json_list(lines: Iterable[str]) -> bytes:
    """JSON of a list, from one or more of its elements a line."""
    text = ',\n'.join(lines)
    return f'[\n{text}\n]\n'.encode() if text else b'[]\n'
