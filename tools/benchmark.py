"""Time the model on made-up images: inference, training step and image encoder; no data set needed.

    python tools/benchmark.py --config configs/r50_nuimg_704x256_8f_v1.1.py
    python tools/benchmark.py --config CONFIG --what inference --amp fp16
    torchrun --nproc_per_node 2 tools/benchmark.py --config CONFIG --what training --batch-sizes 4
    python tools/benchmark.py --config CONFIG --what training --changes docs/common_changes.md --steps 4 --warmup 3
    python tools/benchmark.py --config CONFIG --table --batch-sizes 1 2 4 8 --json new.json --against old.json
    python tools/benchmark.py --config CONFIG --grow --no-cudnn-benchmark --steps 4 --warmup 2 --json growth.json

The fourth times the config and every change of the page's table in turn (or those that --only names), the fifth every
row of docs/performance.md, the sixth what more voxels, frames, pixels and samples cost, which
tools/benchmark_growth.py draws; what does not fit into memory is said. The file of --json is written row by row.
With --against, rows of a stored run are put beside the new ones, and the status is 2 if one of them is slower or takes
more memory by more than --tolerance; tools/benchmark_table.py prints tables. Times are medians over device-synchronised
steps after warm-up; memory is the peak that PyTorch's tensors took, and what it held of the GPU, graphs included.
Weights are random and images are noise, so scores mean nothing; timing.py times a trained model on a data set.
"""

import argparse
import contextlib
import functools
import gc
import re
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, real_number, run_main, whole_number  # noqa: E402
from lib.errors import ConfigError, UserError, reason  # noqa: E402
from lib.registry import did_you_mean  # noqa: E402
from tools import benchmark_growth as growth  # noqa: E402
from tools.benchmark_table import SETTINGS, Setting, compare, read_rows  # noqa: E402

PARTS = ('inference', 'encoder', 'training')
AS_IT_IS = 'as it is'


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'amp', 'tf32', 'device')
    add = parser.add_argument
    add('--what', nargs='+', default=list(PARTS), choices=PARTS)
    add('--no-cudnn-benchmark', action='store_true', help='let cuDNN guess its algorithms')
    add('--cuda-graph', action='store_true', help='inference: replay encoder and head as a CUDA graph')
    add('--batch-sizes', nargs='+', type=whole_number(1), help='training batch sizes per GPU (default: 1)')
    add('--steps', type=whole_number(1), default=30, help='timed steps')
    add('--warmup', type=whole_number(0), default=10, help='steps before timing')
    add('--changes', help='a page with a table of changes of the config: time each of them as well')
    add('--only', nargs='+', metavar='NAME', help='of these, by name; "as it is" is the config itself')
    add('--table', action='store_true', help='time every precision, with and without graphs, one after the other')
    add('--grow', action='store_true', help='time more and fewer voxels, frames, pixels and samples')
    add('--against', metavar='JSON', help='a stored run (--json) to compare with')
    add('--tolerance', type=real_number(least=0), default=0.1, help='share that a row may be worse by (default: 0.1)')
    add('--json', help='write the figures to this file as well')
    add('--profile', help='write a PyTorch profiler table of one inference step to this file')
    args = parser.parse_args(argv)
    args.batch_sizes = args.batch_sizes or (growth.BATCHES if args.grow else [1])
    return args


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

    def __init__(self, args, processes, cfg, record=None, model=None):
        import torch

        from lib.run import read_task
        from lib.run.numerics import check_precision, set_tf32
        from models import build_model

        self.torch, self.args, self.processes, self.device = torch, args, processes, processes.device
        by_settings = args.table or args.grow
        train = dict(cuda_graph=args.cuda_graph) if by_settings else cfg.get('train', {})  # settings say all themselves
        self.training_amp, self.training_tf32 = args.amp or train.get('amp'), args.tf32 or train.get('tf32')
        for amp in (args.amp, self.training_amp):
            check_precision(amp, self.device)
        self.graphs_training = bool(train.get('cuda_graph'))
        set_tf32(args.tf32)
        torch.backends.cudnn.benchmark = not args.no_cudnn_benchmark
        self.task = read_task(cfg)
        self.build_model = lambda: build_model(cfg.model, self.task).to(self.device)
        torch.manual_seed(0)
        self.model = self.build_model() if model is None else model
        self.is_converted = False  # weights are no longer float32
        self.record, self.doing = record or Record(), {}

    def autocast(self, amp):
        from lib.run.numerics import autocast

        return autocast(amp, self.device)

    def model_for_inference(self):
        from lib.run.numerics import convert_weights

        model = convert_weights(self.model.eval(), self.args.amp)
        self.is_converted = self.is_converted or self.args.amp is not None
        model.cuda_graph = self.args.cuda_graph
        return model

    def batch(self, size, with_labels=False, first_index=0):
        from lib.run.loading import to_device
        from tools.synthetic import synthetic_batch

        return to_device(
            synthetic_batch(self.task, size, with_labels=with_labels, first_index=first_index), self.device
        )

    def forget(self):
        """Give back the memory that rows before took."""
        self.model.zero_grad(set_to_none=True)
        self.model.forget_weights()
        gc.collect()
        if self.device.type == 'cuda':
            self.torch.cuda.empty_cache()

    def row(self, name, step, samples=1):
        """Figures of ``step(i)``, which works on so many samples, kept and printed by the main process."""
        from lib.run.timing_script import time_steps

        decoder = self.model.pts_bbox_head.transformer.voxel_decoder
        voxels = (decoder.topk_training if self.model.training else decoder.topk_testing)[-1]
        frames, image = self.task.num_frames, list(self.task.image_size)
        self.doing = dict(name=name, voxels=voxels, frames=frames, image=image, batch=samples)
        self.forget()
        seconds, peak_mib = time_steps(step, self.args.warmup, self.args.steps, self.device)
        median, p90 = (float(value) for value in np.quantile(seconds, (0.5, 0.9)))
        on_gpu = self.device.type == 'cuda'
        row = dict(
            self.doing,
            median_ms=round(1e3 * median, 3),
            p90_ms=round(1e3 * p90, 3),
            samples_per_second=round(samples * self.processes.world_size / median, 2),
            peak_gib=round(peak_mib / 2**10, 2) if on_gpu else 0.0,
            held_gib=round(self.torch.cuda.max_memory_reserved(self.device) / 2**30, 2) if on_gpu else 0.0,
        )
        if self.processes.is_main:
            print(
                '{name:44s} {median_ms:10.2f} ms  p90 {p90_ms:10.2f} ms  {samples_per_second:8.2f} /s  '
                '{peak_gib:6.2f} GiB, {held_gib:6.2f} held'.format(**row),
                flush=True,
            )
        self.record.add(row)

    def inference(self):
        """One step at batch 1, where with cached history every step sees one new frame, as along a drive; when a sweep
        of growth asks for larger batches, these without the cache."""
        from tools.synthetic import synthetic_meta

        model, torch = self.model_for_inference(), self.torch
        for size in self.args.batch_sizes if self.args.grow else [1]:
            data = self.batch(size)
            for history in ('cached', 'full') if size == 1 else ('full',):
                model.history = history

                def step(i):
                    data['img_metas'] = [synthetic_meta(self.task, i)] * size
                    with torch.no_grad(), self.autocast(self.args.amp):
                        model(return_loss=False, **data)

                self.row(f'inference, batch {size}, history {history}', step, size)
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
        from lib.run.step import exchanging_gradients

        torch = self.torch
        if self.is_converted:
            self.model, self.is_converted = self.build_model(), False
        set_tf32(self.training_tf32)
        model = self.model.train()
        model.graphs_training = self.graphs_training
        if self.processes.world_size > 1:
            model = exchanging_gradients(model)
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


class Record:
    """Rows of all that is timed, written to the file of --json whenever there is one more."""

    def __init__(self, path=None, about=None):
        self.path, self.about, self.rows, self.ended = path, about or {}, [], []
        self.labels: Dict[str, str] = {}  # of the rows to come: change and setting

    def add(self, row):
        self.rows.append(dict(self.labels, **row))
        self.write()

    def end(self, doing, why):
        """Note why a row ``doing`` has no figures."""
        self.ended.append(dict(self.labels, **doing, ended=why))
        self.write()

    def write(self):
        from lib.io import write_json

        if self.path:
            write_json(self.path, dict(self.about, rows=self.rows, ended=self.ended))


def configs_by_name(args) -> Dict[str, Callable]:
    """What loads each config that is to be timed, in the order of ``--only`` or else of the page.

    Raises:
        UserError: ``--only`` names another.
    """
    from lib.config import load_config

    base = load_config(args.config, args.override)
    found = {AS_IT_IS: lambda: base}
    for change in read_changes(args.changes) if args.changes else []:
        found[change.name] = functools.partial(load_changed, args.config, change, args.override)
    for name, override in growth.points(base).items() if args.grow else []:
        found[name] = functools.partial(load_config, args.config, [*args.override, *override])
    for name in args.only or ():
        if name not in found:
            raise UserError(f'--only {name!r} is not among {list(found)}{did_you_mean(name, found)}')
    return {name: found[name] for name in args.only or found}


def run(args, processes):
    from lib.io import check_outputs
    from lib.run.log import device_name

    check_outputs(args.json, args.profile)
    stored = read_rows(args.against) if args.against else []  # first, should it not be there
    about = dict(device=device_name(processes.device), precision=args.amp or 'fp32', config=args.config)
    record = Record(args.json if processes.is_main else None, about)
    for name, load in configs_by_name(args).items():
        sizes = [1] if args.grow and name != AS_IT_IS else args.batch_sizes
        own = argparse.Namespace(**dict(vars(args), batch_sizes=sizes))
        measure_settings(own, processes, load(), record, name)
    for path in filter(None, (args.json, args.profile)) if processes.is_main else ():
        print(f'wrote {path}')
    if args.against and processes.is_main:
        tell_difference(record.rows, stored, args)


def tell_difference(rows, stored, args):
    """Print how the rows compare with those stored; UserError if one is worse."""
    lines, worse = compare(rows, stored, args.tolerance)
    print('\n'.join([f'compared with {args.against}:', *lines]))
    if not lines:
        raise UserError(f'{args.against} has none of the rows that were timed; give a run of the same settings')
    if worse:
        raise UserError(
            f'{len(worse)} of {len(lines)} rows are worse than in {args.against} by more than '
            f'{100 * args.tolerance:g} %: {"; ".join(worse)}'
        )


def measure_settings(args, processes, cfg, record, name):
    """Time a config in every setting that is asked for and that the device can compute in; a model serves several."""
    settings = SETTINGS if args.table else growth.SETTINGS if args.grow else [Setting('', {})]
    model = None
    for setting in settings:
        own = argparse.Namespace(**dict(vars(args), **setting.options))
        own.what = [part for part in own.what if part in args.what]
        labels = dict(change=name if name != AS_IT_IS else '', setting=setting.name)
        record.labels = {key: value for key, value in labels.items() if value}
        try:
            with kept_switches():
                model = measure(own, processes, cfg, record, ', '.join(record.labels.values()) or name, model)
        except ConfigError as error:
            if not setting.name:
                raise
            print(f'{setting.name}: left out, {error}')


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


def measure(args, processes, cfg, record, name, model=None):
    """Time one config in one setting; of several, one that fails is told. Returns the model if its weights are float32.

    Args:
        model: of this config, to be used again.
    """
    import torch

    from lib.run.log import device_name

    bench = Bench(args, processes, cfg, record, model)
    parameters = sum(p.numel() for p in bench.model.parameters())
    if processes.is_main:
        about = f'{device_name(bench.device)}, torch {torch.__version__}, {args.amp or "fp32"}'
        print(f'{name}: {about}, {parameters / 1e6:.1f} M parameters', flush=True)
    try:
        for part in args.what:
            getattr(bench, part)()
    except (RuntimeError, ConfigError) as error:  # the latter where graphs cannot be captured
        if not (args.changes or args.table or args.grow):
            raise
        no_room = 'out of memory' in str(error)
        why = 'needs more memory than the GPU has' if no_room else f'failed: {reason(error)}'
        record.end(bench.doing, why)
        print(f'{name}: the next step {why}', flush=True)
    bench.forget()
    return None if bench.is_converted else bench.model


if __name__ == '__main__':
    run_main(main)
