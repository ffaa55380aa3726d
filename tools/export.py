"""Export a model for other runtimes: ONNX files, or programs of torch.export; checked against PyTorch.

    python tools/export.py --config C --weights W --out DIR                      # ONNX, standard operators only
    python tools/export.py --config C --weights W --out DIR --sampling custom    # the sampling as one node
    python tools/export.py --config C --weights W --out DIR --format torch       # torch.export
    python tools/export.py --config C --random-weights --out DIR                 # to try a size

Writes DIR/encoder.onnx (images of one frame to feature maps) and DIR/decoders.onnx (maps of all frames and their
projection matrices to voxels and classes), or .pt2 files, and DIR/export.json: inputs, outputs, operators, and how far
the results are from PyTorch's. docs/export.md says what the files take and what cannot be exported.
Needs PyTorch 2.8 or later and, for ONNX, requirements/export.txt.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, run_main  # noqa: E402

OPSET = 18
SUFFIX = dict(onnx='.onnx', torch='.pt2')
LOGITS_APART = 1e-3  # at most, in shares of the largest value: they differ by rounding
LABELS_APART = 1e-4  # at most, share of labels
ROUNDINGS = 3  # both may be so many times what PyTorch itself differs by when it adds in another order


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'trust-weights')
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument('--weights', help='checkpoint of the model')
    weights.add_argument('--random-weights', action='store_true', help='seeded random ones, to try a size')
    add('--out', required=True, metavar='DIR', help='folder for the files')
    add('--format', default='onnx', choices=sorted(SUFFIX), help='default: onnx')
    add('--sampling', default='standard', choices=('standard', 'custom'), help='see docs/export.md (default: standard)')
    add('--parts', nargs='+', default=['encoder', 'decoders'], choices=('encoder', 'decoders'), help='default: both')
    add('--optimize', action='store_true', help='fold constants and sequences, which TensorRT needs; takes minutes')
    add('--no-check', action='store_true', help='do not run what was exported')
    return parser.parse_args(argv)


def check_packages(args):
    """Raise UserError if this environment cannot export."""
    import importlib.util

    import torch

    from lib.errors import UserError

    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 8):
        raise UserError(f'exporting needs PyTorch 2.8 or later, and this is {torch.__version__}; use a newer stack')
    needed = ('onnx', 'onnxscript', 'onnxruntime') if args.format == 'onnx' else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'exporting to ONNX needs {", ".join(missing)}; pip install -r requirements/export.txt')
    if args.format == 'torch' and args.sampling == 'custom':
        raise UserError('--sampling custom is a node of ONNX; leave it out with --format torch')


def load_model(args):
    """The model on the CPU in float32; random weights vary, so that a comparison means something."""
    import torch

    from lib.checkpoint import load_model_weights
    from lib.config import load_config
    from lib.run import read_task
    from models import build_model

    cfg = load_config(args.config, args.override)
    torch.manual_seed(0)
    model = build_model(cfg.model, read_task(cfg)).eval()
    if args.weights:
        load_model_weights(model, args.weights, trust=args.trust_weights)
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and 'pts_bbox_head' in name:  # generators and offsets start from zero
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model


def export_part(module, path, sampling='standard', optimize=False):
    """Write a part by the name's suffix.

    Returns:
        PyTorch's outputs for the example inputs.
    """
    import torch

    from tools.exporting.operators import traceable

    inputs = module.example()
    with torch.no_grad():
        expected = module(*inputs.values())
        if path.endswith(SUFFIX['torch']):
            torch.export.save(torch.export.export(module, tuple(inputs.values())), path)
            return expected
        with traceable(sampling):
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=module.output_names(),
                opset_version=OPSET,
                dynamo=True,
                optimize=optimize,
                external_data=False,
                verbose=False,
            )
    return expected


def run_part(module, path):
    """Outputs of what was exported for the example inputs, as NumPy arrays."""
    import torch

    inputs = module.example()
    if path.endswith(SUFFIX['onnx']):
        from tools.exporting.onnx_files import run_file

        return run_file(path, {name: value.numpy() for name, value in inputs.items()}, torch.get_num_threads())
    with torch.no_grad():
        return [value.numpy() for value in torch.export.load(path).module()(*inputs.values())]


def check_part(module, path, expected):
    """Differences to PyTorch by output.

    A voxel whose mask is on the edge moves the draws of its query, so that with random weights rounding alone changes
    much. So what counts is how much PyTorch changes when it adds in another order, as the substitutes do.

    Raises:
        UserError: they are more than rounding.
    """
    from lib.errors import UserError
    from tools.exporting.comparison import compare

    expected = [value.numpy() for value in expected]
    differences = compare(module.output_names(), run_part(module, path), expected)
    roundings = compare(module.output_names(), run_again(module), expected)
    for one, rounding in zip(differences, roundings):
        print(f'  {one}', flush=True)
        if rounding.largest > LOGITS_APART * max(rounding.scale, 1.0):
            print(f'    (PyTorch, adding in another order: {rounding})', flush=True)
    for value, one, rounding in zip(expected, differences, roundings):
        if value.dtype.kind == 'f':
            same = one.largest <= max(LOGITS_APART * max(one.scale, 1.0), ROUNDINGS * rounding.largest)
        else:
            same = 1 - one.equal <= max(LABELS_APART, ROUNDINGS * (1 - rounding.equal))
        if not same:
            raise UserError(f'{path} does not compute what PyTorch does: {one}; please report it with its config')
    return differences


def run_again(module):
    """PyTorch's outputs for the example inputs with the operators that are traced, as NumPy arrays."""
    import torch

    from tools.exporting.operators import traceable

    with torch.no_grad(), traceable():
        return [value.numpy() for value in module(*module.example().values())]


def describe(module, path, seconds, differences):
    """What export.json says about a part."""
    inputs = {name: dict(shape=list(value.shape), dtype=_dtype(value)) for name, value in module.example().items()}
    about = dict(file=os.path.basename(path), inputs=inputs, outputs=module.output_names(), seconds=round(seconds, 1))
    about['differences'] = {
        one.name: dict(equal=one.equal, largest=one.largest, scale=one.scale) for one in differences
    }
    if path.endswith(SUFFIX['onnx']):
        from tools.exporting.onnx_files import list_operators

        about['operators'] = list_operators(path)
    return about


def _dtype(value):
    return str(value.dtype).replace('torch.', '')


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    check_packages(args)
    import torch

    from lib.io import make_folder, write_json
    from tools.exporting.parts import Decoders, Encoder

    model = load_model(args)
    make_folder(args.out)
    encoder = Encoder(model)
    with torch.no_grad():
        modules = dict(encoder=encoder, decoders=Decoders(model, encoder(*encoder.example().values())))
    parts = {}
    for name in args.parts:
        begin, path = time.monotonic(), os.path.join(args.out, name + SUFFIX[args.format])
        expected = export_part(modules[name], path, args.sampling, args.optimize)
        seconds = time.monotonic() - begin
        print(f'wrote {path} ({os.path.getsize(path) / 1e6:.1f} MB, {seconds:.0f} s)', flush=True)
        differences = [] if args.no_check else check_part(modules[name], path, expected)
        parts[name] = describe(modules[name], path, seconds, differences)
    about = dict(config=args.config, weights=args.weights, override=args.override, sampling=args.sampling)
    write_json(os.path.join(args.out, 'export.json'), dict(about, torch=torch.__version__, **parts))


if __name__ == '__main__':
    run_main(main)
