"""Time the model on made-up images: inference, training step and image encoder; no data set needed.

    python tools/benchmark.py --config configs/r50_nuimg_704x256_8f_v1.1.py
    python tools/benchmark.py --config CONFIG --what inference --amp fp16
    torchrun --nproc_per_node 2 tools/benchmark.py --config CONFIG --what training --batch-sizes 4
    python tools/benchmark.py --config CONFIG --what training --changes docs/common_changes.md --steps 4 --warmup 3
    python tools/benchmark.py --config CONFIG --table --batch-sizes 1 2 4 8 --json new.json --against old.json

The fourth times the config and every change of the page's table in turn, the fifth every row of docs/performance.md;
what does not fit into memory is said. With --against, rows of a stored run are put beside the new ones, and the status
is 2 if one of them is slower or takes more memory by more than --tolerance; tools/benchmark_table.py prints tables.
Times are medians over device-synchronised steps after warm-up; memory is the peak that PyTorch allocated.
Weights are random and images are noise, so scores mean nothing; timing.py times a trained model on a data set.
"""

import argparse
import contextlib
import gc
import re
import sys
import tempfile
from pathlib import Path
from typing import List, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, real_number, run_main, whole_number  # noqa: E402
from tools.benchmark_table import SETTINGS, compare, read_rows  # noqa: E402

PARTS = ('inference', 'encoder', 'training')


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'amp', 'tf32', 'device')
    add = parser.add_argument
    add('--what', nargs='+', default=list(PARTS), choices=PARTS)
    add('--no-cudnn-benchmark', action='store_true', help='let cuDNN guess its algorithms')
    add('--cuda-graph', action='store_true', help='inference: replay encoder and head as CUDA graphs')
    add('--batch-sizes', nargs='+', type=whole_number(1), default=[1], help='training batch sizes per GPU')
    add('--steps', type=whole_number(1), default=30, help='timed steps')
    add('--warmup', type=whole_number(0), default=10, help='steps before timing')
    add('--changes', help='a page with a table of changes of the config: time each of them as well')
    add('--table', action='store_true', help='time every precision, with and without graphs, one after the other')
    add('--against', metavar='JSON', help='a stored run (--json) to compare with')
    add('--tolerance', type=real_number(least=0), default=0.1, help='share that a row may be worse by (default: 0.1)')
    add('--json', help='write the figures to this file as well')
    add('--profile', help='write a PyTorch profiler table of one inference step to this file')
    return parser.parse_args(argv)


class Change(NamedTuple):
    """A row of the table of docs/common_changes.md: its name, and lines of Python after ``_base_``."""

    name: str
    lines: List[str]


def read_changes(page) -> List[Change]:
    """The changes of a page's first table, which has columns of names and of lines in backquotes."""
    text = Path(page).read_text(encoding='utf-8').split('\n## ')[0]
    rows = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('| ') and '= ' in line]
    changes = [Change(cells[0].strip(), re.findall(r'`([a-z]\w+ = [^`]+)`', cells[1])) for cells in rows]
    return [change for change in changes if change.lines]


def load_changed(config, change: Change, override=()):
    """The config that ``change`` makes of the file ``config``."""
    from lib.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'change.py'
        path.write_text('\n'.join([f'_base_ = {str(Path(config).resolve())!r}', *change.lines]), encoding='utf-8')
        return load_config(str(path), override)


class Bench:
    """One model on one device, and the loop that times it."""

    def __init__(self, args, processes, cfg):
        import torch

        from lib.run import read_task
        from lib.run.numerics import check_precision, set_tf32
        from models import build_model

        self.torch, self.args, self.processes, self.device = torch, args, processes, processes.device
        train = {} if args.table else cfg.get('train', {})  # a table's settings say all themselves
        self.training_amp, self.training_tf32 = args.amp or train.get('amp'), args.tf32 or train.get('tf32')
        for amp in (args.amp, self.training_amp):
            check_precision(amp, self.device)
        self.graphs_training = bool(train.get('cuda_graph'))
        set_tf32(args.tf32)
        torch.backends.cudnn.benchmark = not args.no_cudnn_benchmark
        self.task = read_task(cfg)
        self.build_model = lambda: build_model(cfg.model, self.task).to(self.device)
        torch.manual_seed(0)
        self.model = self.build_model()
        self.rows = []

    def autocast(self, amp):
        from lib.run.numerics import autocast

        return autocast(amp, self.device)

    def model_for_inference(self):
        from lib.run.numerics import convert_weights

        model = convert_weights(self.model.eval(), self.args.amp)
        model.cuda_graph = self.args.cuda_graph
        return model

    def batch(self, size, with_labels=False, first_index=0):
        from lib.run.loading import to_device
        from tools.synthetic import synthetic_batch

        return to_device(
            synthetic_batch(self.task, size, with_labels=with_labels, first_index=first_index), self.device
        )

    def row(self, name, step, samples=1):
        """Figures of ``step(i)``, kept and printed by the main process."""
        from lib.run.timing_script import time_steps

        seconds, peak_mib = time_steps(step, self.args.warmup, self.args.steps, self.device)
        median, p90 = (float(value) for value in np.quantile(seconds, (0.5, 0.9)))
        row = dict(
            name=name,
            median_ms=round(1e3 * median, 3),
            p90_ms=round(1e3 * p90, 3),
            samples_per_second=round(samples * self.processes.world_size / median, 2),
            peak_gib=round(peak_mib / 2**10, 2) if self.device.type == 'cuda' else 0.0,
        )
        if self.processes.is_main:
            print(
                '{name:44s} {median_ms:10.2f} ms  p90 {p90_ms:10.2f} ms  {samples_per_second:8.2f} /s  '
                '{peak_gib:6.2f} GiB'.format(**row),
                flush=True,
            )
        self.rows.append(row)

    def inference(self):
        """One step at batch 1: with cached history every step sees one new frame, as along a drive."""
        from tools.synthetic import synthetic_meta

        model, torch = self.model_for_inference(), self.torch
        data = self.batch(1)
        for history in ('cached', 'full'):
            model.history = history
            model.reset_history()

            def step(i):
                data['img_metas'] = [synthetic_meta(self.task, i)]
                with torch.no_grad(), self.autocast(self.args.amp):
                    model(return_loss=False, **data)

            self.row(f'inference, batch 1, history {history}', step)
        if self.args.profile and self.processes.is_main:
            self._profile(lambda: step(0))

    def _profile(self, step):
        from torch.profiler import ProfilerActivity, profile

        from lib.run.timing_script import synchronize

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == 'cuda' else [])
        with profile(activities=activities) as profiler:
            step()
            synchronize(self.device)
        key = 'cuda_time_total' if self.device.type == 'cuda' else 'self_cpu_time_total'
        Path(self.args.profile).write_text(profiler.key_averages().table(sort_by=key, row_limit=60))

    def encoder(self):
        """ResNet and FPN on the six images of one frame."""
        model, torch = self.model_for_inference(), self.torch
        images = self.batch(1)['img'][:, : self.task.num_cameras]

        def step(_):
            with torch.no_grad(), self.autocast(self.args.amp):
                model.encoder.encode(images, graphed=model.cuda_graph)

        self.row(f'encoder, one frame of {self.task.num_cameras} images', step)

    def training(self):
        """Forward, backward and AdamW step, in the precision of --amp and --tf32, or else of the config's ``train``."""
        from lib.run.numerics import make_scaler, set_tf32
        from lib.run.optimizer import can_fuse

        torch = self.torch
        if self.args.amp:  # inference has converted the weights
            self.model = self.build_model()
        set_tf32(self.training_tf32)
        model = self.model.train()
        model.graphs_training = self.graphs_training
        if self.processes.world_size > 1:
            ids = [self.device.index] if self.device.type == 'cuda' else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        scaler = make_scaler(self.training_amp)
        for size in self.args.batch_sizes:
            fused = dict(fused=True) if can_fuse(torch.optim.AdamW, model) else {}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **fused)
            data = self.batch(size, with_labels=True, first_index=size * self.processes.rank)

            def step(_):
                optimizer.zero_grad(set_to_none=True)
                with self.autocast(self.training_amp):
                    loss = sum(model(**data).values())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

            precision = '' if self.training_amp == self.args.amp else f' {self.training_amp}'
            self.row(f'training{precision}, batch {size} on each of {self.processes.world_size}', step, size)


def main():
    args = parse_args()
    check_files(args.config)
    from lib.run.processes import start_processes

    with start_processes(args.device) as processes:
        run(args, processes)


def run(args, processes):
    from lib.config import load_config
    from lib.io import check_outputs, write_json
    from lib.run.log import device_name

    check_outputs(args.json, args.profile)
    stored = read_rows(args.against) if args.against else []  # first, should it not be there
    device = processes.device
    about = dict(device=device_name(device), precision=args.amp or 'fp32', config=args.config)
    results = []
    for change in [None, *(read_changes(args.changes) if args.changes else [])]:
        cfg = load_changed(args.config, change, args.override) if change else load_config(args.config, args.override)
        name = change.name if change else 'as it is'
        results.append(measure_table(args, processes, cfg) if args.table else measure(args, processes, cfg, name))
        if args.json and processes.is_main:
            write_json(args.json, dict(about, **results[0], changes=results[1:]))
    for path in filter(None, (args.json, args.profile)) if processes.is_main else ():
        print(f'wrote {path}')
    if args.against and processes.is_main:
        tell_difference(results[0]['rows'], stored, args)


def tell_difference(rows, stored, args):
    """Print how the rows compare with those stored; UserError if one is worse."""
    from lib.errors import UserError

    lines, worse = compare(rows, stored, args.tolerance)
    print('\n'.join([f'compared with {args.against}:', *lines]))
    if not lines:
        raise UserError(f'{args.against} has none of the rows that were timed; give a run of the same settings')
    if worse:
        raise UserError(
            f'{len(worse)} of {len(lines)} rows are worse than in {args.against} by more than '
            f'{100 * args.tolerance:g} %: {"; ".join(worse)}'
        )


def measure_table(args, processes, cfg):
    """Time every setting of the table that the device can compute in; a result with the rows of all."""
    from lib.errors import ConfigError

    rows, result = [], {}
    for setting in SETTINGS:
        own = argparse.Namespace(**dict(vars(args), **setting.options))
        own.what = [part for part in own.what if part in args.what]
        try:
            result = measure(own, processes, cfg, setting.name)
        except ConfigError as error:
            print(f'{setting.name}: left out, {error}')
            continue
        rows += [dict(row, setting=setting.name) for row in result['rows']]
    return dict(result, name='table', rows=rows)


@contextlib.contextmanager
def kept_switches():
    """PyTorch's TF32 switches are as they were afterwards."""
    import torch

    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def measure(args, processes, cfg, name):
    """Time one config; dict of its name, parameters and rows. One of several that fails is told and keeps its rows."""
    with kept_switches():
        return _measure(args, processes, cfg, name)


def _measure(args, processes, cfg, name):
    import torch

    from lib.errors import reason
    from lib.run.log import device_name

    bench = Bench(args, processes, cfg)
    result = dict(name=name, parameters=sum(p.numel() for p in bench.model.parameters()), rows=bench.rows)
    if processes.is_main:
        about = f'{device_name(bench.device)}, torch {torch.__version__}, {args.amp or "fp32"}'
        print(f'{name}: {about}, {result["parameters"] / 1e6:.1f} M parameters', flush=True)
    try:
        for part in args.what:
            getattr(bench, part)()
    except RuntimeError as error:
        if not (args.changes or args.table):
            raise
        no_room = 'out of memory' in str(error)
        result['ended'] = 'needs more memory than the GPU has' if no_room else f'failed: {reason(error)}'
        print(f'{name}: the next step {result["ended"]}', flush=True)
    del bench
    gc.collect()
    if processes.device.type == 'cuda':
        torch.cuda.empty_cache()
    return result


if __name__ == '__main__':
    run_main(main)
