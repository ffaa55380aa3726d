"""From the arguments of ``timing.py`` to latencies."""

import time
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import torch

from ..config import load_config
from ..io import check_outputs, write_json
from . import Components, open_dataset, read_task
from .evaluation import load_for_inference, predict, predict_in_order
from .loading import count_workers, read_in_order, to_device
from .log import device_name, peak_memory_mib
from .numerics import describe_precision
from .processes import pick_device


def run_timing(args, components: Callable[[], Components]) -> List[Dict]:
    """Time as the arguments of ``timing.py`` say; prints a table and returns its rows.

    Raises:
        UserError: bad input.
    """
    check_outputs(args.out)
    graph = ['model.test_cfg.cuda_graph=True'] if args.cuda_graph else []
    cfg = load_config(args.config, list(args.override) + graph)
    torch.backends.cudnn.benchmark = True  # all samples have one size
    clock = _make_clock(args, cfg, components(), pick_device(args.device))
    _print_setting(args, clock)
    rows = []
    for history in ('cached', 'full') if args.history == 'both' else (args.history,):
        rows.append(clock.time_model(history))
        rows.append(clock.time_with_loading(history))
        rows.append(clock.time_throughput(history))
    _print_rows(rows, clock.device)
    if args.out:
        about = dict(config=args.config, weights=args.weights, device=device_name(clock.device))
        about.update(precision=describe_precision(args.amp, clock.device), speed=clock.model.describe_speed())
        write_json(args.out, dict(about, rows=rows))
        print(f'wrote {args.out}')
    return rows


def _make_clock(args, cfg, components, device) -> 'Clock':
    task = read_task(cfg)
    model, _ = load_for_inference(components.build_model, cfg, task, args, device)
    changes = dict(test_mode=True, max_samples=args.warmup + args.samples)
    dataset = open_dataset(components, cfg, args.split, task, changes, check_files=False)
    workers = count_workers(cfg, args.workers)
    return Clock(model, dataset, components.collate, device, args.amp, args.warmup, args.samples, workers)


def _print_setting(args, clock: 'Clock') -> None:
    if not args.weights:
        print('NOTE: random weights (no --weights): the speed of a trained model differs where its masks do')
    if clock.count < args.warmup + args.samples:
        print(f'NOTE: the data set has {clock.count} samples only; they are gone over again')
    parameters = sum(p.numel() for p in clock.model.parameters()) / 1e6
    print(
        f'{device_name(clock.device)}, {describe_precision(args.amp, clock.device)}, batch 1, {parameters:.2f} million '
        f'parameters, {args.warmup} warm-up and {args.samples} timed samples, {clock.workers} loading processes'
    )
    print(clock.model.describe_speed(), flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU is still doing."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def time_steps(step: Callable, warmup: int, steps: int, device: torch.device, prepare: Optional[Callable] = None):
    """Seconds of each timed ``step(prepare(i))``, and the peak memory in MiB; the device is idle before and after each.

    Args:
        step: what is timed.
        warmup, steps: calls before and while the clock runs.
        prepare: makes the step's argument of the call's number, before the clock starts; None passes the number.
    """
    seconds = []
    for i in range(warmup + steps):
        if i == warmup and device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        prepared = prepare(i) if prepare else i
        synchronize(device)
        start = time.perf_counter()
        step(prepared)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:], peak_memory_mib(device)


class Clock:
    """Times a model over the samples of a data set, one at a time and in order.

    Args:
        model: in evaluation mode, on its device.
        dataset, collate: give batches of one sample.
        device, amp: where and in which precision the model runs.
        warmup, samples: samples before and while the clock runs; the data set is gone over again if short.
        workers: processes that load samples where throughput is timed.
    """

    def __init__(self, model, dataset, collate, device, amp, warmup: int, samples: int, workers: int):
        self.workers = workers
        self.model, self.dataset, self.collate = model, dataset, collate
        self.device, self.amp, self.warmup, self.samples = device, amp, warmup, samples
        self.count = len(dataset)

    def time_model(self, history: str) -> Dict:
        """From a batch on the device to predictions on the CPU."""
        return self._time('model', history, lambda position: to_device(self._load(position), self.device), self._run)

    def time_with_loading(self, history: str) -> Dict:
        """From the names of a sample's files to predictions on the CPU."""
        return self._time('with loading', history, None, lambda i: self._run(self._load(i)))

    def time_throughput(self, history: str) -> Dict:
        """From one prediction on the CPU to the next, with loading in other processes; a GPU begins with the next one
        before this one is waited for. Frames per second are means."""
        self._start(history)
        order = [i % self.count for i in range(self.warmup + self.samples)]
        keeps_frames = getattr(self.model, 'keeps_frames', False)
        ends = [time.perf_counter()]
        batches = read_in_order(self.dataset, order, self.collate, self.workers, self.device, keeps_frames)
        for _ in predict_in_order(self.model, batches, self.device, self.amp):
            ends.append(time.perf_counter())
        ends = ends[self.warmup :]
        seconds = [end - before for before, end in zip(ends, ends[1:])]
        return self._row('throughput', history, seconds, self.samples / sum(seconds), peak_memory_mib(self.device))

    def _start(self, history: str) -> None:
        self.model.history = history
        self.model.reset_history()
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)

    def _time(self, what: str, history: str, prepare: Optional[Callable], action: Callable) -> Dict:
        """A row of the table: ``action`` is timed (see ``time_steps``)."""
        self._start(history)
        seconds, memory = time_steps(action, self.warmup, self.samples, self.device, prepare)
        return self._row(what, history, seconds, 1 / float(np.median(seconds)), memory)

    def _row(self, what: str, history: str, seconds: Sequence[float], fps: float, memory_mib: float) -> Dict:
        median, p90 = (float(value) for value in np.quantile(seconds, (0.5, 0.9)))
        figures = dict(median_ms=1e3 * median, p90_ms=1e3 * p90, fps=fps)
        return dict(what=what, history=history, **figures, memory_mib=memory_mib)

    def _load(self, position: int) -> Dict:
        """A batch of one sample, without what the model holds of the one before."""
        index = position % self.count
        if position and getattr(self.model, 'keeps_frames', False) and hasattr(self.dataset, 'following'):
            return self.collate([self.dataset.following(index, (position - 1) % self.count)])
        return self.collate([self.dataset[index]])

    def _run(self, batch: Dict) -> None:
        predict(self.model, batch, self.device, self.amp)


def _print_rows(rows, device) -> None:
    print(f'{"":14} {"history":9} {"median ms":>12} {"p90 ms":>12} {"FPS":>9} {"memory MiB":>12}')
    line = '{what:14} {history:9} {median_ms:12.1f} {p90_ms:12.1f} {fps:9.2f} {memory_mib:12.0f}'
    for row in rows:
        print(line.format(**row))
    on_gpu = device.type == 'cuda'
    print(
        f'memory: {"peak that PyTorch allocated on the GPU" if on_gpu else "peak of this process so far"}', flush=True
    )
