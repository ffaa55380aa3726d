"""One optimizer step: forward and backward over its micro-batches, checks, clipping, update; and what is written down
where its numbers are not finite."""

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import save_checkpoint
from ..dist import Counted, all_reduce_sum, counting_shares, share_of_batch, shared_draws
from ..errors import UserError
from ..io import write_json
from .batch_plan import BatchPlan
from .loading import to_device
from .log import shares
from .numerics import autocast, mix, seed_step
from .processes import Processes, RunStopped

_MOST_SKIPPED_STEPS = 50  # in a row, by the fp16 loss scaler


class NonFinite(Exception):
    """A loss or the gradient is NaN or infinite; the weights have not been touched.

    Args:
        what: a sentence without its end.
        values: losses, and the gradient norm as far as it is known.
    """

    def __init__(self, what: str, values: Mapping[str, float]):
        super().__init__(what)
        self.values = dict(values)

    def bad_names(self) -> str:
        """Names of the values that are not finite."""
        return ', '.join(name for name, value in self.values.items() if not math.isfinite(value))


class StepResult(NamedTuple):
    """What a step gave.

    losses     means over the total batch; ``loss`` is their sum
    grad_norm  before clipping; not finite where the fp16 scaler skipped the step
    shares     what the losses counted, see ``count_share``; empty where nobody asked
    seconds    of ``forward_backward`` (with the exchange between processes) and of ``update``
    """

    losses: Dict[str, float]
    grad_norm: float
    shares: Dict[str, float]
    seconds: Dict[str, float]


def exchanging_gradients(model: nn.Module, find_unused_parameters: bool = False) -> nn.Module:
    """A model in training mode, in DDP; it is given batches on its device.

    Before every step DDP sends the first process's buffers to all others. Those that no step changes stay out of it:
    tables, which are no part of checkpoints or boolean (gloo of PyTorch 1.10 cannot send these), and statistics of
    norms that do not learn them.
    """
    fixed = [
        f'{name}.{own}' if name else own
        for name, module in model.named_modules()
        for own, buffer in module._buffers.items()
        if own in module._non_persistent_buffers_set
        or isinstance(module, _BatchNorm)
        and not module.training
        or buffer is not None
        and buffer.dtype == torch.bool
    ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, fixed)
    return nn.parallel.DistributedDataParallel(
        model,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


class Stepper:
    """Runs optimizer steps.

    Args:
        model: as DDP or bare; ``model(**batch, return_loss=True)`` gives named scalar losses.
        optimizer, scaler: see ``build_optimizer``, ``make_scaler``.
        plan: sizes of the forward passes.
        processes: this process among the others.
        seed: of the run.
        amp: precision of the forward pass.
        max_norm: of the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        scaler,
        plan: BatchPlan,
        processes: Processes,
        seed: int,
        amp,
        max_norm: float,
    ):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.plan, self.processes, self.seed = plan, processes, seed
        self.amp, self.max_norm = amp, max_norm
        self._parameters = [p for group in optimizer.param_groups for p in group['params']]
        self._skipped_in_a_row = 0

    def run(self, iteration: int, batches: Sequence[Dict], count: bool = False) -> StepResult:
        """One step on this process's micro-batches.

        Args:
            iteration: 0-based; seeds the draws.
            batches: one per accumulation step, on the CPU.
            count: let the losses count shares.

        Raises:
            NonFinite: before any weight is changed.
        """
        begin = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        terms: List[Dict[str, Tensor]] = []
        counted: List[Dict[str, Counted]] = []
        for micro_step, batch in enumerate(batches):
            with counting_shares(count) as of_pass:
                terms.append(self._backward(iteration, micro_step, batch))
            counted.append(of_pass)
        losses = self._reduce(terms)
        if not all(math.isfinite(value) for value in losses.values()):
            raise NonFinite('the loss is not finite', losses)
        middle = time.monotonic()  # the losses have arrived, so a GPU has done its part
        norm = self._update(losses)
        seconds = dict(forward_backward=middle - begin, update=time.monotonic() - middle)
        return StepResult(losses, norm, shares(counted), seconds)

    def _backward(self, iteration, micro_step, batch) -> Dict[str, Tensor]:
        """Backward of one micro-batch; its losses, weighted for the mean over the total batch."""
        rank, device = self.processes.rank, self.processes.device
        batch = to_device(batch, device)
        seed_step(self.seed, iteration, rank, micro_step)
        with self._communicates(micro_step):
            with self._forward_context(iteration, micro_step):
                losses = self.model(return_loss=True, **batch)
            total = sum(value.float() for value in losses.values())
            self.scaler.scale(total * self.plan.loss_factor(micro_step, rank)).backward()
        part = self.plan.sizes[micro_step][rank] / self.plan.total
        return {name: value.detach().float() * part for name, value in losses.items()}

    @contextlib.contextmanager
    def _forward_context(self, iteration, micro_step):
        """Precision, this pass's share of the batch, and draws that do not depend on how it is dealt."""
        rank, device = self.processes.rank, self.processes.device
        begin, end = self.plan.part(micro_step, rank)
        with share_of_batch(self.plan.share(micro_step, rank)), autocast(self.amp, device), shared_draws(
            mix(self.seed, iteration), begin, end, self.plan.total, device
        ):
            yield

    def _communicates(self, micro_step):
        """DDP exchanges gradients in the last backward pass of the step only."""
        is_last = micro_step == self.plan.accumulate - 1
        if is_last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _reduce(self, terms) -> Dict[str, float]:
        """Losses over the total batch: one exchange, one wait for the device."""
        names = list(terms[0])
        values = torch.stack([sum(term[name] for term in terms).reshape(()) for name in names])
        values = all_reduce_sum(values).tolist()
        return dict(loss=sum(values), **dict(zip(names, values)))

    def _update(self, losses) -> float:
        """Clip and step; norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self.max_norm))
        if self.amp == 'fp16':
            self._count_skips(norm, losses)
        elif not math.isfinite(norm):
            raise NonFinite('the gradient is not finite', dict(losses, grad_norm=norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _count_skips(self, norm, losses):
        """The scaler skips steps whose scaled gradient overflowed; a long row of them means it never fits."""
        self._skipped_in_a_row = 0 if math.isfinite(norm) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= _MOST_SKIPPED_STEPS:
            raise NonFinite(
                f'the gradient was not finite in {_MOST_SKIPPED_STEPS} steps in a row, at loss scale '
                f'{self.scaler.get_scale():g}',
                dict(losses, grad_norm=norm),
            )


def report_non_finite(
    error: NonFinite, iteration: int, tokens: List, facts: Dict, state: Mapping, folder: Path
) -> RunStopped:
    """Write the state before a bad step and what is known about it; the error to raise.

    Args:
        error: what was not finite.
        iteration: 1-based number of the bad step.
        tokens: sample tokens by process and forward pass.
        facts: learning rate and the like; plain values.
        state: checkpoint of the state before the step.
        folder: run folder; ``nonfinite_iter_N.json`` and ``.pth`` go there. Resuming does not look at them.
    """
    stem = folder / f'nonfinite_iter_{iteration}'
    evidence = dict(
        facts,
        what=str(error),
        iteration=iteration,
        sample_tokens_by_process_and_pass=tokens,
        values={name: repr(value) for name, value in error.values.items()},
    )
    try:
        write_json(f'{stem}.json', evidence)
        save_checkpoint(f'{stem}.pth', state)
        saved = f'the state before it is in {stem}.pth, the facts in {os.path.basename(str(stem))}.json'
    except UserError as failure:
        saved = str(failure)
    flat = [str(token) for of_process in tokens for of_pass in of_process for token in of_pass]
    return RunStopped(
        f'{error} at iteration {iteration} ({error.bad_names()}), samples {", ".join(flat)}; {saved}; '
        'lower optimizer.lr, check those samples, or use no --amp'
    )
