"""Make the weights that the repository carries, and their card, from a finished run.

    python tools/ship_weights.py --run outputs/toybench/small_seed0 --baseline outputs/toybench/baseline.json

Keeps the model alone, in half precision, and writes weights/toybench_small.pth and weights/README.md: data,
recipe, commit, scores, checksum. ``--run`` is a folder of tools/toybench.sh (checkpoint, environment.txt and the
scores.json of val.py).
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402
from lib.errors import CheckpointError  # noqa: E402

MOST_BYTES = 10 * 1000 * 1000
_CARD = """# Weights

## toybench_small.pth
A small SparseOcc trained on the toy nuScenes, for `make demo` and for trying things out. It has never seen a real
image and is of no use on real ones.

| | |
|---|---|
| model | `{config}`, half precision |
| data | toy benchmark v1 (`tools/make_toy_nuscenes.py --preset toybench-v1`), 50 scenes of 20 keyframes |
| training | {steps} steps of {batch} samples, seed {seed}, {precision}{note} |
| commit | {commit} |
| machine | {machine} |
| size | {size:,} bytes |
| SHA-256 | `{checksum}` |

Scores on {scored_on}, percent (`val.py`; mIoU over {voxels}):

| | RayIoU | @1 m | @2 m | @4 m | mIoU |
|---|---|---|---|---|---|
| these weights | {scores} |
| guess that never looks | {guess} |

Per class, RayIoU: {classes}.

Made by `python tools/ship_weights.py --run RUN` from a run of `tools/toybench.sh`. The toy world and these weights are
under the licence of the project.
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, required=True, help='folder of the run')
    parser.add_argument('--baseline', type=Path, help='JSON of tools/baseline.py')
    parser.add_argument('--config', default='configs/toybench/small.py', help='what the run trained (%(default)s)')
    parser.add_argument('--scored-on', default='the 10 validation scenes', help='data of scores.json (%(default)s)')
    parser.add_argument('--note', default='', help='what else to say about the training')
    parser.add_argument('--out', type=Path, default=Path('weights/toybench_small.pth'), help='default: %(default)s')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def ship(source: Path, out: Path):
    """Write the model of a checkpoint in half precision; returns the checkpoint's meta.

    Raises:
        CheckpointError: it would be too large, or half precision cannot hold it.
    """
    import torch

    from lib.checkpoint import read_checkpoint, save_checkpoint, state_dict_of

    checkpoint = read_checkpoint(str(source))
    weights = {name: w.half() if w.is_floating_point() else w for name, w in state_dict_of(checkpoint, source).items()}
    wild = [name for name, w in weights.items() if w.is_floating_point() and not bool(torch.isfinite(w).all())]
    if wild:
        raise CheckpointError(f'{source}: half precision cannot hold {wild[0]}; ship another run')
    meta = checkpoint.get('meta', {})
    kept = {name: meta[name] for name in ('seed', 'iteration', 'total_batch_size', 'versions') if name in meta}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(str(out), dict(meta=kept, state_dict=weights))
    if out.stat().st_size > MOST_BYTES:
        raise CheckpointError(f'{out} takes {out.stat().st_size:,} bytes, more than the {MOST_BYTES:,} that may ship')
    return meta


def facts(run: Path):
    """{key: value} of a run's environment.txt."""
    lines = (run / 'environment.txt').read_text(encoding='utf-8').splitlines()
    return dict(line.split(': ', 1) for line in lines if ': ' in line)


def card(args, meta) -> str:
    """Text of weights/README.md."""
    from lib.config import load_config
    from lib.io import read_json

    scores, environment = read_json(args.run / 'scores.json'), facts(args.run)
    guess = read_json(args.baseline) if args.baseline else {}
    names = ('RayIoU', 'RayIoU@1', 'RayIoU@2', 'RayIoU@4', 'mIoU')
    percent = lambda value: '-' if value is None else f'{100 * value:.1f}'  # noqa: E731
    row = lambda result: ' | '.join(percent(result.get(name)) for name in names)  # noqa: E731
    per_class = scores['per_class'].items()
    content = args.out.read_bytes()
    return _CARD.format(
        config=args.config,
        steps=meta.get('iteration'),
        batch=meta.get('total_batch_size'),
        seed=meta.get('seed'),
        precision=load_config(args.config).train.amp,
        note=args.note and f'; {args.note}',
        scored_on=args.scored_on,
        commit=environment.get('git', 'unknown'),
        machine=environment.get('device', 'unknown'),
        size=len(content),
        checksum=hashlib.sha256(content).hexdigest(),
        voxels=scores.get('mIoU_voxels', 'mask_camera'),
        scores=row(scores),
        guess=row(guess),
        classes=', '.join(f'{name} {percent(values["RayIoU"])}' for name, values in per_class),
    )


def main():
    args = parse_args()
    meta = ship(args.run / 'latest.pth', args.out)
    text = card(args, meta)
    (args.out.parent / 'README.md').write_text(text, encoding='utf-8')
    print(text)
    print(f'wrote {args.out} and its README.md')


if __name__ == '__main__':
    run_main(main)
