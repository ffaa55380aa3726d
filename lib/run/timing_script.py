"""From the arguments of ``timing.py`` to latencies."""

import time
from typing import Callable, Dict, List, Sequence

import torch

from ..batch import to_device
from ..checkpoint import load_model_weights
from ..config import load_config
from ..errors import ConfigError
from ..io import write_json
from . import Components, open_dataset, read_task
from .evaluation import without_labels
from .log import device_name, peak_memory_mib
from .numerics import autocast, check_precision, convert_weights, describe_precision, set_tf32
from .processes import pick_device


def run_timing(args, components: Callable[[], Components]) -> List[Dict]:
    """Time as the arguments of ``timing.py`` say; prints a table and returns its rows.

    Raises:
        UserError: bad input.
    """
    if args.samples < 1 or args.warmup < 0:
        raise ConfigError(
            '--samples must be at least 1 and --warmup at least 0, got %d and %d' % (args.samples, args.warmup)
        )
    graph = ['model.test_cfg.cuda_graph=True'] if args.cuda_graph else []
    cfg = load_config(args.config, list(args.override) + graph)
    device = pick_device(args.device)
    check_precision(args.amp, device)
    set_tf32(args.tf32)
    torch.backends.cudnn.benchmark = True  # all samples have one size
    clock = _make_clock(args, cfg, components(), device)
    _print_setting(args, clock)
    rows = []
    for history in ('cached', 'full') if args.history == 'both' else (args.history,):
        rows.append(clock.time_model(history))
        rows.append(clock.time_with_loading(history))
    _print_rows(rows, device)
    if args.out:
        write_json(
            args.out,
            dict(
                config=args.config,
                weights=args.weights,
                device=device_name(device),
                precision=describe_precision(args.amp, device),
                speed=clock.model.describe_speed(),
                rows=rows,
            ),
        )
    return rows


def _make_clock(args, cfg, components, device):
    task = read_task(cfg)
    model = components.build_model(cfg.model, task)
    if args.weights:
        load_model_weights(model, args.weights, trust=args.trust_weights)
    changes = dict(test_mode=True, max_samples=args.warmup + args.samples)
    dataset = open_dataset(components, cfg, args.split, task, changes, check_files=False)
    model = convert_weights(model.to(device).eval(), args.amp)
    return Clock(model, dataset, components.collate, device, args.amp, args.warmup, args.samples)


def _print_setting(args, clock) -> None:
    if not args.weights:
        print('NOTE: random weights (no --weights): the speed of a trained model differs where its masks do')
    if clock.count < args.warmup + args.samples:
        print('NOTE: the data set has %d samples only; they are gone over again' % clock.count)
    print(
        '%s, %s, batch 1, %.2f million parameters, %d warm-up and %d timed samples'
        % (
            device_name(clock.device),
            describe_precision(args.amp, clock.device),
            sum(p.numel() for p in clock.model.parameters()) / 1e6,
            args.warmup,
            args.samples,
        )
    )
    print(clock.model.describe_speed(), flush=True)


class Clock:
    """Times a model over the samples of a data set, one at a time and in order.

    Args:
        model: in evaluation mode, on its device.
        dataset, collate: give batches of one sample.
        device, amp: where and in which precision the model runs.
        warmup, samples: samples before and while the clock runs; the data set is gone over again if short.
    """

    def __init__(self, model, dataset, collate, device, amp, warmup: int, samples: int):
        self.model, self.dataset, self.collate = model, dataset, collate
        self.device, self.amp, self.warmup, self.samples = device, amp, warmup, samples
        self.count = len(dataset)

    def time_model(self, history: str) -> Dict:
        """From a batch on the device to predictions on the CPU."""
        self._begin(history)
        seconds = []
        for position in range(self.warmup + self.samples):
            batch = to_device(self._load(position), self.device)
            self._synchronize()
            start = time.perf_counter()
            self._predict(batch)
            seconds.append(time.perf_counter() - start)
        return self._row('model', history, seconds[self.warmup :])

    def time_with_loading(self, history: str) -> Dict:
        """From the names of a sample's files to predictions on the CPU."""
        self._begin(history)
        seconds = []
        for position in range(self.warmup + self.samples):
            self._synchronize()
            start = time.perf_counter()
            self._predict(to_device(self._load(position), self.device))
            seconds.append(time.perf_counter() - start)
        return self._row('with loading', history, seconds[self.warmup :])

    def _begin(self, history):
        self.model.history = history
        self.model.reset_history()
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)

    def _load(self, position):
        return without_labels(self.collate([self.dataset[position % self.count]]))

    def _predict(self, batch):
        with torch.no_grad(), autocast(self.amp, self.device):
            self.model(return_loss=False, **batch)
        self._synchronize()

    def _synchronize(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def _row(self, what: str, history: str, seconds: Sequence[float]) -> Dict:
        return dict(
            what=what,
            history=history,
            median_ms=1e3 * quantile(seconds, 0.5),
            p90_ms=1e3 * quantile(seconds, 0.9),
            fps=1 / quantile(seconds, 0.5),
            memory_mib=peak_memory_mib(self.device),
        )


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _print_rows(rows, device) -> None:
    print('%-14s %-9s %12s %12s %9s %12s' % ('', 'history', 'median ms', 'p90 ms', 'FPS', 'memory MiB'))
    for row in rows:
        print(
            '%-14s %-9s %12.1f %12.1f %9.2f %12.0f'
            % (row['what'], row['history'], row['median_ms'], row['p90_ms'], row['fps'], row['memory_mib'])
        )
    print(
        'memory: %s'
        % ('peak that PyTorch allocated on the GPU' if device.type == 'cuda' else 'peak of this process so far'),
        flush=True,
    )
