"""Inference and evaluation: every sample once, whatever the number of processes, and the same figures to the bit.

Each process takes a contiguous block of the data set, so that the features of earlier frames can be reused
from one keyframe to the next. Counts travel to the main process; they are integers, so their sums do not depend
on the order. ``run_validation`` goes from the arguments of ``val.py`` to a table of scores.
"""

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..checkpoint import load_model_weights
from ..config import load_config
from ..dataset import ScoredDataset
from ..io import check_outputs, make_folder, path_inside, read_json, write_json
from ..prediction import save_prediction, to_dense, write_record
from ..settings import EvaluationSettings
from ..task import Task
from . import Components, default_metrics, open_dataset, read_task
from .loading import count_workers, read_in_order, to_device
from .log import Countdown, RunLog, duration
from .numerics import autocast, check_precision, convert_weights, describe_precision, seed_everything, set_tf32
from .processes import Processes, start_processes, wake

INPUTS = ('img', 'lidar2img', 'ego2lidar', 'img_metas')  # what inference takes of a batch
_WAITING = 4  # predictions that may wait for the evaluator
_SECONDS_BETWEEN_LINES = 10.0


def load_for_inference(build_model: Callable, cfg, task: Task, args, device: torch.device) -> Tuple[nn.Module, Dict]:
    """The config's model on its device, as a script's arguments say, and the ``meta`` of its checkpoint.

    Args:
        build_model: see ``Components``.
        args: with weights (None: random ones), trust_weights, amp and tf32.

    Raises:
        UserError: the checkpoint is of another model, or the device cannot compute in that precision.
    """
    check_precision(args.amp, device)
    set_tf32(args.tf32)
    model, meta = build_model(cfg.model, task), {}
    if args.weights:
        meta = load_model_weights(model, args.weights, trust=args.trust_weights)
    return convert_weights(model.to(device).eval(), args.amp), meta


def predict(model: nn.Module, batch: Dict, device: torch.device, amp: Optional[str]) -> List[Dict]:
    """Predictions of a batch's samples, as NumPy arrays (see ``lib.prediction``); labels are not looked at."""
    with torch.no_grad(), autocast(amp, device):
        return model(return_loss=False, **_inputs(batch, device))


def begin(model: nn.Module, batch: Dict, device: torch.device, amp: Optional[str]) -> Callable[[], List[Dict]]:
    """What gives that of :func:`predict` when it is called; until then a model that can begin has begun, others are
    done."""
    if not can_begin(model):
        predictions = predict(model, batch, device, amp)
        return lambda: predictions
    with autocast(amp, device):
        return model.begin_prediction(**_inputs(batch, device))


def can_begin(model: nn.Module) -> bool:
    """Whether a model has a ``begin_prediction`` that gives what the model itself does: no class derived from the one
    that has it predicts otherwise."""
    for kind in type(model).__mro__:
        if 'begin_prediction' in vars(kind):
            return True
        if {'forward', 'predict'} & set(vars(kind)):
            return False
    return False


def finish_in_order(begun: Iterable[Callable[[], Any]], device: torch.device) -> Iterator[Any]:
    """What each gives when it is called: on a GPU when the next one has begun, so that the GPU need not wait."""
    if device.type != 'cuda':
        yield from (finish() for finish in begun)
        return
    begun = iter(begun)
    last = next(begun, None)
    while last is not None:
        try:
            coming = next(begun, None)
        except Exception:  # what is ready is given before an error of the next one
            yield last()
            raise
        yield last()
        last = coming


def predict_in_order(
    model: nn.Module, batches: Iterable[Dict], device: torch.device, amp: Optional[str]
) -> Iterator[List[Dict]]:
    """Predictions of batch after batch, see :func:`finish_in_order`."""
    return finish_in_order((begin(model, batch, device, amp) for batch in batches), device)


def _inputs(batch: Dict, device: torch.device) -> Dict:
    return to_device({name: batch[name] for name in INPUTS}, device)


@dataclass
class Evaluation:
    """Predicts and scores a data set.

    Attributes:
        components: collates, and builds the evaluator.
        task: makes predictions dense.
        dataset: with labels.
        processes: this process among the others.
        say: takes progress lines.
        metrics: names that the evaluator knows; None takes what suits the task.
        workers: data-loading processes.
        amp: precision of the forward pass.
        predictions_folder: where to save predictions, or None.
    """

    components: Components
    task: Task
    dataset: ScoredDataset
    processes: Processes
    say: Callable[[str], None]
    metrics: Optional[Sequence[str]] = None
    workers: int = 0
    amp: Optional[str] = None
    predictions_folder: Optional[Path] = None

    def __post_init__(self):
        metrics = self.metrics or default_metrics(self.task)
        self.evaluator = self.components.build_evaluator(self.task, metrics=metrics, device=self.processes.device)

    def run(self, model: nn.Module):
        """Evaluate a model, which is put into evaluation mode and back.

        Returns:
            The evaluator's result in the main process, None in the others.

        Raises:
            DataError: a sample cannot be read.
        """
        was_training = model.training
        model.eval()
        model.reset_history()
        self.evaluator.reset()
        self._evaluate_block(model, block_of(len(self.dataset), self.processes))
        model.train(was_training)
        everyone = self.processes.gather(self.evaluator)
        if everyone is None:
            return None
        everyone[0].merge(*everyone[1:])
        result = everyone[0].compute()
        if result.num_samples != len(self.dataset):
            raise AssertionError(f'{result.num_samples} of {len(self.dataset)} samples were evaluated')
        return result

    def run_in_training(self, model: nn.Module, iteration: int, folder: Path) -> Optional[Dict[str, float]]:
        """Scores in the main process, None in the others; kept in the run folder as ``evaluation_iter_N.json``.

        A continued run finds the scores that it has already written into its folder.
        """
        path = folder / f'evaluation_iter_{iteration}.json'
        if self.processes.broadcast(path.exists()):
            return _totals(read_json(path)) if self.processes.is_main else None
        # What batch norm gathered differs from process to process; that of the main one is in the checkpoint.
        self.processes.share([buffer for buffer in model.buffers() if buffer.is_floating_point()])
        result = self.run(model)
        if result is None:
            return None
        for line in result.as_table().splitlines():
            self.say(line)
        write_json(path, dict(result.as_dict(), iteration=iteration))
        return _totals(result.as_dict())

    def _evaluate_block(self, model, indices: Sequence[int]) -> None:
        """Predict the samples of this process; scoring overlaps with the next prediction."""
        device = self.processes.device
        keeps_frames = getattr(model, 'keeps_frames', False)
        batches = read_in_order(self.dataset, indices, self.components.collate, self.workers, device, keeps_frames)
        progress = _Progress(len(indices), self.say)
        waiting: Deque[Future] = deque()
        with ThreadPoolExecutor(max_workers=1) as scorer:
            for index, predictions in zip(indices, predict_in_order(model, batches, device, self.amp)):
                waiting.append(scorer.submit(self._score, index, predictions[0]))
                while len(waiting) > _WAITING:
                    waiting.popleft().result()
                progress.step()
            while waiting:
                waiting.popleft().result()
        progress.finish()

    def _score(self, index: int, prediction: Dict) -> None:
        """Save and score one prediction (in the scoring thread); a token that is no plain name is refused."""
        token = self.dataset.sample_token(index)
        if self.predictions_folder is not None:
            save_prediction(path_inside(self.predictions_folder, f'{token}.npz'), prediction)
        truth, origins = self.dataset.ground_truth(index), self.dataset.ray_origins(index)
        scene = self.dataset.scene_name(index)
        self.evaluator.update(to_dense(prediction, self.task), truth, origins, token=token, scene=scene)


def score_text(name: str, value: float) -> str:
    """A score for people: percent, but for velocity errors (m/s)."""
    return f'{value:.3f} m/s' if name.startswith('mAVE') else f'{100 * value:.2f} %'


def scores_of_run(folder: Path, name: str) -> Dict[int, float]:
    """A score by iteration, from the evaluations in a run folder; those without it are left out."""
    scores = {}
    for path in folder.glob('evaluation_iter_*.json'):
        content = read_json(path)
        if isinstance(content.get(name), float):
            scores[int(content['iteration'])] = content[name]
    return scores


def block_of(count: int, processes: Processes) -> range:
    """Indices that this process evaluates."""
    return range(count * processes.rank // processes.world_size, count * (processes.rank + 1) // processes.world_size)


def _totals(scores) -> Dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


class _Progress:
    """Lines with the pace and the remaining time."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._countdown, self._say = Countdown(total), say
        self._begin = self._last = time.monotonic()

    def step(self) -> None:
        countdown = self._countdown
        countdown.step()
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            pace = f'{self._rate():.2f} samples/s  left {countdown.text()}'
            self._say(f'evaluated {countdown.done} of {countdown.total} samples  {pace}')

    def finish(self) -> None:
        self._say(f'evaluated {self._countdown.done} samples at {self._rate():.2f} samples/s')

    def _rate(self):
        return self._countdown.done / max(time.monotonic() - self._begin, 1e-9)


def run_validation(args, components: Callable[[], Components]) -> int:
    """Evaluate as the arguments of ``val.py`` say; returns the exit status.

    Raises:
        UserError: bad input.
    """
    cfg = load_config(args.config, args.override)
    if args.seed is not None:
        seed_everything(args.seed)
    with start_processes(args.device) as processes, ThreadPoolExecutor(max_workers=1) as side:
        waking = side.submit(wake, processes.device)
        parts = components()
        waking.result()
        _validate(args, cfg, parts, processes, side)
    return 0


def _validate(args, cfg, components, processes: Processes, side: ThreadPoolExecutor) -> None:
    log = RunLog(is_main=processes.is_main)
    out = args.out or os.path.splitext(os.path.realpath(args.weights))[0] + '.eval.json'
    check_outputs(out)
    task = read_task(cfg)
    changes = dict(test_mode=True)
    if args.max_samples is not None:
        changes['max_samples'] = args.max_samples
    checks_files = processes.is_main and not args.no_preflight
    opening = side.submit(open_dataset, components, cfg, args.split, task, changes, checks_files)
    model, meta = load_for_inference(components.build_model, cfg, task, args, processes.device)
    folder = make_folder(args.save_predictions, '--save-predictions') if args.save_predictions else None
    if folder is not None and processes.is_main:
        limit = [] if args.max_samples is None else [f'data.{args.split}.max_samples={args.max_samples}']
        write_record(folder, task, args.config, args.weights, args.split, [*args.override, *limit])
    dataset = opening.result()
    metrics = args.metrics or EvaluationSettings.from_config(cfg.get('evaluation')).metrics
    workers = count_workers(cfg, args.workers)
    evaluation = Evaluation(components, task, dataset, processes, log.say, metrics, workers, args.amp, folder)
    iteration = meta.get('iteration', meta.get('iter', '?'))
    log.say(
        f'{args.weights}, iteration {iteration}, on {len(dataset)} samples of data.{args.split}, '
        f'{processes.world_size} processes; {describe_precision(args.amp, processes.device)}'
    )
    begin = time.monotonic()
    result = evaluation.run(model)
    if result is not None:
        _report(result, out, args, meta, time.monotonic() - begin, folder)


def _report(result, out, args, meta: Dict, seconds: float, folder: Optional[Path]) -> None:
    print(result.as_table())
    about = {name: getattr(args, name) for name in ('config', 'override', 'weights', 'split', 'seed', 'amp', 'tf32')}
    about.update(iteration=meta.get('iteration'), seconds=round(seconds, 1))
    write_json(out, dict(result.as_dict(details=True), run=about))
    saved = f'; predictions in {folder}' if folder else ''
    print(f'evaluated in {duration(seconds)}; figures in {out}{saved}', flush=True)
