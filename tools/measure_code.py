#!/usr/bin/env python
"""How large the library is, and how many of its files a training sample passes on the way from disk to its losses.

    python tools/measure_code.py --data-root data/toy
    python tools/measure_code.py --tree ../other_checkout --data-root data/toy

Files and lines are those that git tracks in lib, loaders and models and the five scripts. A function is long if it has
over 40 lines, from ``def`` to its end. A sample (ResNet-18, 2 frames of 6 cameras, one training step without update, on
the CPU) passes a file if a function there is called; ``img`` and ``labels.npz`` pass it if the function is given or
returns, itself or within a dict, list or object, an image or a tensor computed from images, or a volume of the grid.
Another checkout is measured as it is, if it has ``tests/models/small_model.py``.
"""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = ('train.py', 'val.py', 'timing.py', 'gen_sweep_info.py', 'gen_instance_info.py')
FOLDERS = ('lib', 'loaders', 'models')
LONG = 40
IMAGE_SIZE = (64, 96)  # of the network


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tree', type=Path, default=Path(__file__).resolve().parents[1], help='checkout to measure')
    parser.add_argument('--data-root', type=Path, required=True, help='prepared data in the format of nuScenes')
    return parser.parse_args()


def print_sizes(tree: Path) -> None:
    """Files, lines and functions of the library."""
    patterns = [f'{folder}/*.py' for folder in FOLDERS] + list(SCRIPTS)
    listed = subprocess.run(['git', 'ls-files', *patterns], cwd=str(tree), stdout=subprocess.PIPE, check=True)
    texts = [(tree / name).read_text(encoding='utf-8') for name in listed.stdout.decode().split()]
    functions = [n for text in texts for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = sum(function.end_lineno - function.lineno + 1 > LONG for function in functions)
    print(f'{len(texts)} files, {sum(len(text.splitlines()) for text in texts)} lines')
    print(f'{len(functions)} functions, {long} of them over {LONG} lines')


def arrays_in(value, depth=3):
    """The arrays and tensors that a value holds."""
    if hasattr(value, 'shape') and hasattr(value, 'dtype'):
        yield value
    elif depth:
        inner = vars(value) if hasattr(value, '__dataclass_fields__') else value
        inner = inner.values() if isinstance(inner, dict) else inner
        for one in inner if isinstance(inner, (list, tuple, type({}.values()))) else ():
            yield from arrays_in(one, depth - 1)


class Passes:
    """Notes which files of a tree are passed, for ``sys.setprofile``."""

    def __init__(self, tree: Path, tests):
        self.root, self.tests = os.path.join(str(tree.resolve()), ''), tests
        self.files = {name: {} for name in ('all', *tests)}

    def __call__(self, frame, event, result):
        path = frame.f_code.co_filename
        if event not in ('call', 'return') or not path.startswith(self.root):
            return
        name = path[len(self.root) :].replace(os.sep, '/')
        if name.split('/')[0] in FOLDERS:
            self.files['all'][name] = True
            given = [value for key, value in frame.f_locals.items() if key != 'self']
            self._note(name, given if event == 'call' else [result])

    def _note(self, name, values):
        for array in (array for value in values for array in arrays_in(value)):
            for what, test in self.tests.items():
                if test(array):
                    self.files[what][name] = True


def pass_sample(tree: Path, data_root: Path) -> Passes:
    """Read a sample of the tree's data set and compute its losses, by the modules of that tree."""
    sys.path[:0] = [str(tree), str(tree / 'tests' / 'models')]
    import torch
    from small_model import small_config

    from lib.task import Task
    from loaders import build_dataset, collate
    from models import build_model

    torch.set_num_threads(1)
    task = Task('occ3d', num_frames=2, image_size=IMAGE_SIZE)
    steps = ('LoadMultiViewImageFromMultiSweeps', 'LoadOccGTFromFile', 'RandomTransformImage', 'BEVAug')
    data = dict(data_root=str(data_root), ann_file='nuscenes_infos_train_sweep.pkl', occ_gt_root='occ3d')
    dataset = build_dataset(dict(data, type='NuSceneOcc', pipeline=[dict(type=step) for step in steps]), task)
    model = build_model(small_config(), task)

    def is_image(array):
        shape, colours = tuple(array.shape), (3 in (array.shape[-1:] + array.shape[-3:-2]))
        computed = getattr(array, 'grad_fn', None) is not None
        return computed or (len(shape) >= 3 and colours and str(array.dtype).endswith('uint8'))

    passes = Passes(tree, {'img': is_image, 'labels.npz': lambda array: tuple(array.shape)[-3:] == task.grid_shape})
    sys.setprofile(passes)
    try:
        model(**collate([dataset[0]]))
    finally:
        sys.setprofile(None)
    return passes


def main():
    args = parse_args()
    args.tree, args.data_root = args.tree.resolve(), args.data_root.resolve()
    print_sizes(args.tree)
    for what, files in pass_sample(args.tree, args.data_root).files.items():
        print(f'{what}: {len(files)} files\n    ' + '\n    '.join(files))


if __name__ == '__main__':
    main()
