"""Write docs/parity.md: the largest deviation from the published code for each quantity.

python tests/parity_table.py --out docs/parity.md
python tests/parity_table.py --device cuda            # print it for the GPU
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import torch  # noqa: E402
from parity_metrics import DEPTH_TOLERANCE, ORIGIN_TOLERANCE, SCORE_TOLERANCE, check_origins, check_rayeval  # noqa: E402
from parity_model import Deviation, ModelCase, check_inference, check_merging, check_training  # noqa: E402

_UNITS = {
    'kept voxels': 'share unequal',
    'predicted labels': 'share unequal',
    'merging alone': 'share unequal',
    'ray depths': 'm',
    'ray origins': 'm',
    'RayIoU and RayPQ': 'absolute',
}
_HEADER = """# Deviation from the published code

The largest deviation of each quantity over all golden files of `tests/data/golden` (figures made with the
published code, releases 1.0 and 1.1, semantic and panoptic), and what `tests/test_parity.py` tolerates;
`tests/parity_model.py` and `tests/parity_metrics.py` say why. "Relative" is the largest difference of an
array over its largest magnitude. Ray labels are equal on every ray. Made by `python tests/parity_table.py`
on {device}, PyTorch {torch}.

| Quantity | Compared values | Largest deviation | Where | Tolerance | Unit |
| --- | --- | --- | --- | --- | --- |
"""


def model_deviations(golden: Path, device: str):
    """(file name, deviation) of every comparison with the model and the output merging."""
    for path in sorted(golden.glob('*_semantic.npz')) + sorted(golden.glob('*_panoptic.npz')):
        case = ModelCase(path, device)
        found = check_inference(case)
        for b in case.samples:
            found += check_training(case, b)
        for deviation in found:
            yield path.name, deviation
    for path in sorted(golden.glob('post*.npz')):
        for deviation in check_merging(path, device):
            yield path.name, deviation


def metric_deviations(golden: Path, real: Path, device: str):
    """(file name, deviation) of the evaluation; origins only where the real samples are at hand."""
    for path in sorted(golden.glob('rayeval*.npz')):
        found = check_rayeval(path, device)
        yield path.name, Deviation('ray depths', 'all rays', found['depth_m'], DEPTH_TOLERANCE)
        yield path.name, Deviation('RayIoU and RayPQ', 'all scores', max(found['iou'], found['score']), SCORE_TOLERANCE)
    for path in sorted(golden.glob('origins*.npz')) if real.is_dir() else ():
        yield (
            path.name,
            Deviation('ray origins', 'all origins', check_origins(path, real)['origin_m'], ORIGIN_TOLERANCE),
        )


def table(rows) -> str:
    """Markdown rows, one per quantity, in order of appearance."""
    groups = {}
    for file, deviation in rows:
        groups.setdefault(deviation.quantity, []).append((deviation, file))
    lines = []
    for quantity, found in groups.items():
        worst, file = max(found, key=lambda entry: entry[0].value)
        where = f'{file}, `{worst.name}`' if worst.value > 0 else ''
        limit = f'{worst.tolerance:g} | {_UNITS.get(quantity, "relative")}'
        lines.append(f'| {quantity} | {len(found)} | {worst.value:.2g} | {where} | {limit} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--golden',
        type=Path,
        default=Path(os.environ.get('SPARSEOCC_GOLDEN_DIR', ROOT / 'tests' / 'data' / 'golden')),
        help='folder of golden files',
    )
    parser.add_argument(
        '--real',
        type=Path,
        default=Path(os.environ.get('SPARSEOCC_REAL_DIR', ROOT.parent / 'shared' / 'real')),
        help='folder of real samples',
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--out', type=Path, help='file to write (default: print)')
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = list(model_deviations(args.golden, args.device)) + list(
        metric_deviations(args.golden, args.real, args.device)
    )
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'the CPU'
    text = _HEADER.format(device=device, torch=torch.__version__) + table(rows)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == '__main__':
    main()
