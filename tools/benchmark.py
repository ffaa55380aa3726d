"""Time the model on made-up images: inference, training step and image encoder; no data set needed.

    python tools/benchmark.py --config configs/r50_nuimg_704x256_8f_v1.1.py
    python tools/benchmark.py --config CONFIG --what inference --amp fp16
    torchrun --nproc_per_node 2 tools/benchmark.py --config CONFIG --what training --batch-sizes 4

Times are medians over device-synchronised steps after warm-up; memory is the peak that PyTorch allocated.
Weights are random and images are noise, so scores mean nothing; timing.py times a trained model on a data set.
"""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402

PARTS = ('inference', 'encoder', 'training')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--override', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--what', nargs='+', default=list(PARTS), choices=PARTS)
    parser.add_argument('--amp', choices=('fp16', 'bf16'), help='mixed precision (default: fp32)')
    parser.add_argument(
        '--tf32', choices=('on', 'off'), help='TF32 in convolutions and matrix products (default: in convolutions)'
    )
    parser.add_argument('--no-cudnn-benchmark', action='store_true', help='let cuDNN guess its algorithms')
    parser.add_argument('--cuda-graph', action='store_true', help='inference: replay encoder and head as CUDA graphs')
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1], help='training batch sizes per GPU')
    parser.add_argument('--steps', type=int, default=30, help='timed steps')
    parser.add_argument('--warmup', type=int, default=10, help='steps before timing')
    parser.add_argument('--device', help='cpu or cuda (default: cuda if there is one)')
    parser.add_argument('--json', help='write the figures to this file as well')
    parser.add_argument('--profile', help='write a PyTorch profiler table of one inference step to this file')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def median_and_p90(seconds):
    """Median and 90th percentile of a list of seconds, in milliseconds."""
    ordered = sorted(seconds)
    return 1e3 * ordered[len(ordered) // 2], 1e3 * ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


class Bench:
    """One model on one device, and the loop that times it."""

    def __init__(self, args):
        import torch

        from lib.config import load_config
        from lib.run.numerics import set_tf32
        from lib.task import Task
        from models import build_model

        self.torch, self.args = torch, args
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.device = self._pick_device()
        torch.backends.cudnn.benchmark = not args.no_cudnn_benchmark
        set_tf32(args.tf32)
        self.cfg = load_config(args.config, args.override)
        self.task = Task.from_config(self.cfg.task)
        self.build_model = lambda: build_model(self.cfg.model, self.task).to(self.device)
        torch.manual_seed(0)
        self.model = self.build_model()
        if self.world_size > 1:
            torch.distributed.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo')

    def _pick_device(self):
        cuda = self.torch.cuda.is_available()
        device = self.torch.device(self.args.device or ('cuda' if cuda else 'cpu'))
        if device.type == 'cuda':
            device = self.torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
            self.torch.cuda.set_device(device)
        return device

    def synchronize(self):
        if self.device.type == 'cuda':
            self.torch.cuda.synchronize(self.device)

    @contextmanager
    def autocast(self):
        if self.args.amp is None:
            yield
        else:
            dtype = {'fp16': self.torch.float16, 'bf16': self.torch.bfloat16}[self.args.amp]
            with self.torch.autocast(self.device.type, dtype=dtype):
                yield

    def model_for_inference(self):
        from lib.run.numerics import convert_weights

        model = convert_weights(self.model.eval(), self.args.amp)
        model.cuda_graph = self.args.cuda_graph
        return model

    def batch(self, size, with_labels=False, first_index=0):
        from lib.synthetic import synthetic_batch

        data = synthetic_batch(self.task, size, with_labels=with_labels, first_index=first_index)

        def move(value):
            if isinstance(value, list) and value and hasattr(value[0], 'to'):
                return [v.to(self.device) for v in value]
            return value.to(self.device) if hasattr(value, 'to') else value

        return {key: move(value) for key, value in data.items()}

    def time(self, step):
        """Seconds of each timed call of ``step(i)``, and the peak memory in GiB."""
        for i in range(self.args.warmup):
            step(i)
        self.synchronize()
        if self.device.type == 'cuda':
            self.torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        for i in range(self.args.warmup, self.args.warmup + self.args.steps):
            self.synchronize()
            start = time.perf_counter()
            step(i)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = self.torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == 'cuda' else 0.0
        return seconds, peak

    def row(self, name, step, samples=1):
        seconds, peak = self.time(step)
        median, p90 = median_and_p90(seconds)
        row = dict(
            name=name,
            median_ms=round(median, 3),
            p90_ms=round(p90, 3),
            samples_per_second=round(1e3 * samples * self.world_size / median, 2),
            peak_gib=round(peak, 2),
        )
        if self.rank == 0:
            print(
                '{name:44s} {median_ms:10.2f} ms  p90 {p90_ms:10.2f} ms  {samples_per_second:8.2f} /s  '
                '{peak_gib:6.2f} GiB'.format(**row),
                flush=True,
            )
        return row

    def inference(self):
        """One step at batch 1: with cached history every step sees one new frame, as along a drive."""
        from lib.synthetic import synthetic_meta

        model, torch = self.model_for_inference(), self.torch
        data = self.batch(1)
        rows = []
        for history in ('cached', 'full'):
            model.history = history
            model.reset_history()

            def step(i):
                data['img_metas'] = [synthetic_meta(self.task, i)]
                with torch.no_grad(), self.autocast():
                    model(return_loss=False, **data)

            rows.append(self.row(f'inference, batch 1, history {history}', step))
        if self.args.profile and self.rank == 0:
            self._profile(lambda: step(0))
        return rows

    def _profile(self, step):
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == 'cuda' else [])
        with profile(activities=activities) as profiler:
            step()
            self.synchronize()
        key = 'cuda_time_total' if self.device.type == 'cuda' else 'self_cpu_time_total'
        Path(self.args.profile).write_text(profiler.key_averages().table(sort_by=key, row_limit=60))

    def encoder(self):
        """ResNet and FPN on the six images of one frame."""
        model, torch = self.model_for_inference(), self.torch
        images = self.batch(1)['img'][:, : self.task.num_cameras]

        def step(_):
            with torch.no_grad(), self.autocast():
                model.encoder.encode(images, graphed=model.cuda_graph)

        return [self.row('encoder, one frame of %d images' % self.task.num_cameras, step)]

    def training(self):
        """Forward, backward and AdamW step."""
        from lib.run.numerics import make_scaler

        torch = self.torch
        if self.args.amp:  # inference has converted the weights
            self.model = self.build_model()
        model = self.model.train()
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == 'cuda' else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        scaler = make_scaler(self.args.amp)
        rows = []
        for size in self.args.batch_sizes:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            data = self.batch(size, with_labels=True, first_index=size * self.rank)

            def step(_):
                optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = sum(model(**data).values())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

            rows.append(self.row('training, batch %d on each of %d' % (size, self.world_size), step, size))
        return rows


def main():
    args = parse_args()
    bench = Bench(args)
    torch = bench.torch
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == 'cuda' else 'CPU'
    parameters = sum(p.numel() for p in bench.model.parameters())
    if bench.rank == 0:
        print(
            '{}, torch {}, {}, {:.1f} M parameters'.format(
                name, torch.__version__, args.amp or 'fp32', parameters / 1e6
            )
        )
    rows = [row for part in args.what for row in getattr(bench, part)()]
    if args.json and bench.rank == 0:
        from lib.io import write_json

        write_json(
            args.json,
            dict(
                device=name,
                torch=torch.__version__,
                precision=args.amp or 'fp32',
                config=args.config,
                parameters=parameters,
                rows=rows,
            ),
        )


if __name__ == '__main__':
    run_main(main)
