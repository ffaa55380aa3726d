"""Time the model on made-up images: inference, training step and image encoder; no data set needed.

    python tools/benchmark.py --config configs/r50_nuimg_704x256_8f_v1.1.py
    python tools/benchmark.py --config CONFIG --what inference --amp fp16
    torchrun --nproc_per_node 2 tools/benchmark.py --config CONFIG --what training --batch-sizes 4

Times are medians over device-synchronised steps after warm-up; memory is the peak that PyTorch allocated.
Weights are random and images are noise, so scores mean nothing; timing.py times a trained model on a data set.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, run_main  # noqa: E402

PARTS = ('inference', 'encoder', 'training')


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'amp', 'tf32', 'device')
    add = parser.add_argument
    add('--what', nargs='+', default=list(PARTS), choices=PARTS)
    add('--no-cudnn-benchmark', action='store_true', help='let cuDNN guess its algorithms')
    add('--cuda-graph', action='store_true', help='inference: replay encoder and head as CUDA graphs')
    add('--batch-sizes', nargs='+', type=int, default=[1], help='training batch sizes per GPU')
    add('--steps', type=int, default=30, help='timed steps')
    add('--warmup', type=int, default=10, help='steps before timing')
    add('--json', help='write the figures to this file as well')
    add('--profile', help='write a PyTorch profiler table of one inference step to this file')
    return parser.parse_args(argv)


class Bench:
    """One model on one device, and the loop that times it."""

    def __init__(self, args, processes):
        import torch

        from lib.config import load_config
        from lib.run import read_task
        from lib.run.numerics import check_precision, set_tf32
        from models import build_model

        self.torch, self.args, self.processes, self.device = torch, args, processes, processes.device
        check_precision(args.amp, self.device)
        set_tf32(args.tf32)
        torch.backends.cudnn.benchmark = not args.no_cudnn_benchmark
        cfg = load_config(args.config, args.override)
        self.task = read_task(cfg)
        self.build_model = lambda: build_model(cfg.model, self.task).to(self.device)
        torch.manual_seed(0)
        self.model = self.build_model()

    def autocast(self):
        from lib.run.numerics import autocast

        return autocast(self.args.amp, self.device)

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
        """Figures of ``step(i)``, printed by the main process."""
        from lib.run.timing_script import quantile, time_steps

        seconds, peak_mib = time_steps(step, self.args.warmup, self.args.steps, self.device)
        median, p90 = quantile(seconds, 0.5), quantile(seconds, 0.9)
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
        return row

    def inference(self):
        """One step at batch 1: with cached history every step sees one new frame, as along a drive."""
        from tools.synthetic import synthetic_meta

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
        if self.args.profile and self.processes.is_main:
            self._profile(lambda: step(0))
        return rows

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
            with torch.no_grad(), self.autocast():
                model.encoder.encode(images, graphed=model.cuda_graph)

        return [self.row(f'encoder, one frame of {self.task.num_cameras} images', step)]

    def training(self):
        """Forward, backward and AdamW step."""
        from lib.run.numerics import make_scaler

        torch = self.torch
        if self.args.amp:  # inference has converted the weights
            self.model = self.build_model()
        model = self.model.train()
        if self.processes.world_size > 1:
            ids = [self.device.index] if self.device.type == 'cuda' else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        scaler = make_scaler(self.args.amp)
        rows = []
        for size in self.args.batch_sizes:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            data = self.batch(size, with_labels=True, first_index=size * self.processes.rank)

            def step(_):
                optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = sum(model(**data).values())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

            rows.append(self.row(f'training, batch {size} on each of {self.processes.world_size}', step, size))
        return rows


def main():
    args = parse_args()
    check_files(args.config)
    from lib.run.processes import start_processes

    with start_processes(args.device) as processes:
        run(Bench(args, processes), args)


def run(bench, args):
    from lib.io import write_json
    from lib.run.log import device_name

    about = dict(device=device_name(bench.device), torch=bench.torch.__version__, precision=args.amp or 'fp32')
    about.update(config=args.config, parameters=sum(p.numel() for p in bench.model.parameters()))
    if bench.processes.is_main:
        print(
            '{device}, torch {torch}, {precision}'.format(**about),
            f'{about["parameters"] / 1e6:.1f} M parameters',
            sep=', ',
        )
    rows = [row for part in args.what for row in getattr(bench, part)()]
    if args.json and bench.processes.is_main:
        write_json(args.json, dict(about, rows=rows))


if __name__ == '__main__':
    run_main(main)
