"""Occ3D-style labels in numbers: voxels a keyframe, class shares, and how much of each class is in the masks.

    python -m tools.toy.label_table data/toybench/occ3d
    python -m tools.toy.label_table data/toybench/occ3d --beside real/labels.npz ...

prints a Markdown table: the labels below the folder, then each file of ``--beside``, and the shares that Occ3D
publishes for its training set (counted where the cameras see).
"""

import argparse
import sys
from pathlib import Path
from typing import List, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lib.classes import OCC3D  # noqa: E402
from lib.cli import run_main  # noqa: E402
from lib.errors import DataError  # noqa: E402
from lib.io import load_npz_checked  # noqa: E402

PUBLISHED_KEYFRAMES = 28130


class Counts(NamedTuple):
    """Voxels per class, float64 [classes without free], means over keyframes: all, camera-seen, LiDAR-seen."""

    name: str
    all: np.ndarray
    camera: np.ndarray
    lidar: np.ndarray


def count(name: str, files: List[Path]) -> Counts:
    """Mean counts over label files."""
    sums = np.zeros((3, OCC3D.num_classes))
    for file in files:
        labels = load_npz_checked(file, ('semantics', 'mask_camera', 'mask_lidar'))
        masks = (None, labels['mask_camera'], labels['mask_lidar'])
        for row, mask in zip(sums, masks):
            chosen = labels['semantics'] if mask is None else labels['semantics'][mask > 0]
            row += np.bincount(chosen.ravel(), minlength=OCC3D.num_classes)[: OCC3D.num_classes]
    return Counts(name, *(sums[:, : OCC3D.free_id] / len(files)))


def table(columns: List[Counts]) -> str:
    """Markdown: a row per class."""
    published = np.array([OCC3D.voxel_counts[name] for name in OCC3D.class_names[: OCC3D.free_id]], np.float64)
    head = ' | '.join(f'{c.name}: share | camera | LiDAR' for c in columns)
    lines = [f'| percent | {head} | Occ3D published (camera) |', '|---' * (3 * len(columns) + 2) + '|']
    percent = lambda part, whole: f'{100 * part / whole:.1f}' if whole else '-'  # noqa: E731
    for k, name in enumerate(OCC3D.class_names[: OCC3D.free_id]):
        cells = []
        for c in columns:
            cells += [percent(c.all[k], c.all.sum()), percent(c.camera[k], c.all[k]), percent(c.lidar[k], c.all[k])]
        lines.append(f'| {name} | {" | ".join(cells)} | {percent(published[k], published.sum())} |')
    cells = [f'{value.sum():,.0f}' for c in columns for value in (c.all, c.camera, c.lidar)]
    lines.append(f'| voxels a keyframe | {" | ".join(cells)} | {published.sum() / PUBLISHED_KEYFRAMES:,.0f} |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with labels.npz files below it')
    parser.add_argument('--beside', type=Path, nargs='+', default=[], metavar='NPZ', help='single label files')
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args()
    files = sorted(args.folder.rglob('labels.npz'))
    if not files:
        raise DataError(f'{args.folder} holds no labels.npz; give the occ3d folder of a data root')
    columns = [count(f'{len(files)} keyframes', files)]
    columns += [count(f'sample {number}', [file]) for number, file in enumerate(args.beside, start=1)]
    print(table(columns))


if __name__ == '__main__':
    run_main(main)
