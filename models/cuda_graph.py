"""Replay a fixed sequence of GPU work as one CUDA graph: no launch overhead from Python.

The steps of the heads are many short kernels on tensors whose shapes do not depend on the data, so at
batch 1 the time to launch them exceeds the time they run; a graph removes it. The numbers are the same.

In training a ``GraphedPass`` does so with a forward pass and its backward pass.
"""

import contextlib
import functools
import inspect
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Tuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor

from lib.errors import ConfigError, reason
from models.csrc import autocast_dtype

_WARM_UP_RUNS = 3  # lets libraries pick algorithms and allocate workspaces before the capture

MaybeTensors = Sequence[Optional[Tensor]]


class _Captured:
    """One graph with the tensors it reads and writes.

    Args:
        run: the work, given the inputs.
        inputs: copied into memory of the graph's own.
    """

    def __init__(self, run: Callable[..., MaybeTensors], inputs: MaybeTensors):
        with torch.inference_mode(False):  # later calls may write to them outside that mode
            self.inputs = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in inputs]
        device = self.inputs[0].device
        stream = _stream_on(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                run(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with _recording(self.graph, stream=stream):
            self.outputs = list(run(*self.inputs))

    def replay(self, inputs: MaybeTensors) -> List[Optional[Tensor]]:
        for static, tensor in zip(self.inputs, inputs):
            if static is not None:
                static.copy_(tensor)
        self.graph.replay()
        return [None if tensor is None else tensor.clone() for tensor in self.outputs]


def _recording(graph: torch.cuda.CUDAGraph, **options):
    """``torch.cuda.graph`` while which other threads, which move the next batch or score the last one, use the GPU."""
    if 'capture_error_mode' in inspect.signature(torch.cuda.graph).parameters:  # not in PyTorch before 2.1
        options['capture_error_mode'] = 'thread_local'
    return torch.cuda.graph(graph, **options)


@functools.lru_cache(maxsize=None)
def _stream_on(device: torch.device) -> torch.cuda.Stream:
    """The same for all captures: cuBLAS keeps a workspace, some 32 MiB, for every stream that it was used on."""
    return torch.cuda.Stream(device)


class GraphedFunction:
    """A function of CUDA tensors, captured once for everything that a call says its result depends on.

    Args:
        function: takes plain values, then tensors (or None), and gives tensors (or None); no gradients, no
            synchronisation with the host, shapes that depend on the inputs' shapes alone. Module weights may
            change in place between calls, but their storage may not: call :meth:`clear` after ``module.to(...)``.
        max_graphs: graphs kept; the oldest is dropped.
        state: tells what else the result depends on, such as a version of weights that the function prepares
            outside the graph. Graphs are dropped where it gives another value than before.
        last_state: what ``state`` told when it last looked, or since then is sure to be no longer so; looks at nothing.
            With it the GPU is at work while ``state`` looks, and does it again where that tells another.
    """

    def __init__(
        self,
        function: Callable[..., MaybeTensors],
        max_graphs: int = 4,
        state: Optional[Callable[[], Hashable]] = None,
        last_state: Optional[Callable[[], Hashable]] = None,
    ):
        self.function, self.max_graphs, self.state, self.last_state = function, max_graphs, state, last_state
        self._captured_in: Hashable = None
        self._graphs: Dict[Hashable, Tuple[_Captured, Sequence[Tensor]]] = {}

    def clear(self):
        """Drop every graph."""
        self._graphs.clear()

    def __getstate__(self):
        return dict(self.__dict__, _graphs={})  # graphs cannot be copied or stored

    def __call__(
        self, *inputs: Optional[Tensor], fixed: Tuple[Hashable, ...] = (), in_place: Sequence[Tensor] = ()
    ) -> List[Optional[Tensor]]:
        """``function(*fixed, *inputs, *in_place)``, in fresh tensors. The key of its graph holds all three.

        Args:
            inputs: copied into the graph's own memory; the first is a tensor, others may be None.
            fixed: plain values.
            in_place: tensors that stay at one address, read where they are. At another address the function is
                captured anew.
        """
        if not inputs[0].is_cuda:
            return list(self.function(*fixed, *inputs, *in_place))
        addresses = tuple(tensor.data_ptr() for tensor in in_place)
        key = (autocast_dtype('cuda'), fixed, _describe(inputs), _describe(in_place), addresses)
        looks_later = self.last_state is not None and self.last_state() == self._captured_in
        if looks_later and key in self._graphs:
            results = self._graphs[key][0].replay(inputs)
            if self.state() == self._captured_in:
                return results
        state = None if self.state is None else self.state()
        if state != self._captured_in:
            self.clear()
            self._captured_in = state
        if key not in self._graphs:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.pop(next(iter(self._graphs)))
            # the tensors in place are kept, so that their memory is not given to others
            self._graphs[key] = self._capture(inputs, fixed, in_place), list(in_place)
        return self._graphs[key][0].replay(inputs)

    def _capture(self, inputs: MaybeTensors, fixed: Tuple, in_place: Sequence[Tensor]) -> _Captured:
        """Capture with autocast as outside, but without its weight cache: replays must see new weights."""

        def run(*tensors: Optional[Tensor]) -> MaybeTensors:
            return self.function(*fixed, *tensors, *in_place)

        with _autocast_without_cache('cuda'):
            return _Captured(run, inputs)


def _autocast_without_cache(device_type: str):
    """Autocast as it is outside, but weights are cast where they are used, so that replays see new ones."""
    dtype = autocast_dtype(device_type)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype, cache_enabled=False)


class _Recorded:
    """Work recorded as a graph, which records it without doing it.

    Attributes:
        results: what ``run`` gave; a replay writes to these tensors.
    """

    def __init__(self, run: Callable[[], MaybeTensors], pool):
        self._graph = torch.cuda.CUDAGraph()
        with _recording(self._graph, pool=pool):
            self.results = list(run())

    def replay(self):
        self._graph.replay()

    @staticmethod
    def pool():
        """Memory that the graphs of a pass share."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    @contextlib.contextmanager
    def apart(device: torch.device):
        """Where to run what is only to warm up: on another stream, giving back its memory and random numbers."""
        torch.cuda.synchronize(device)
        with torch.random.fork_rng(devices=[device]):
            with torch.cuda.stream(_stream_on(device)):
                yield
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


class _CapturedPass:
    """Forward and backward pass of one call's shapes, with the tensors that they read and write.

    Args:
        function: the work, given the inputs.
        inputs: copied into memory of its own.
        weights: what else has gradients.
        record: ``_Recorded``, or what takes its place in tests.
    """

    def __init__(self, function: Callable[..., MaybeTensors], inputs: MaybeTensors, weights: Sequence[Tensor], record):
        self._function, self.replays = function, 0
        self.inputs = [None if t is None else _copy_of(t) for t in inputs]
        given = [*self.inputs, *weights]
        self._wanted = [i for i, t in enumerate(given) if t is not None and t.requires_grad]
        self._given, self._live = given, []
        pool, device = record.pool(), self.inputs[0].device
        with record.apart(device):
            for _ in range(_WARM_UP_RUNS):
                self._grad_outputs = _zeros_for(self._run())
                self._run_back()
        self._live = []
        self._forward = record(self._run, pool)
        self._grad_outputs = _zeros_for(self._live)
        self._backward = record(self._run_back, pool)
        self._live = []
        self._forward.results = [None if t is None else t.detach() for t in self._forward.results]

    def _run(self) -> List[Optional[Tensor]]:
        self._live = list(self._function(*self.inputs))
        return self._live

    def _run_back(self) -> List[Optional[Tensor]]:
        outputs = [t for t in self._live if t is not None and t.requires_grad]
        grads = [t for t in self._grad_outputs if t is not None]
        wanted = [self._given[i] for i in self._wanted]
        return list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))

    def replay(self, inputs: MaybeTensors) -> List[Optional[Tensor]]:
        for own, tensor in zip(self.inputs, inputs):
            if own is not None:
                own.detach().copy_(tensor)
        self.replays += 1
        self._forward.replay()
        return [None if t is None else t.detach() for t in self._forward.results]

    def without_gradient(self, results: MaybeTensors) -> List[Tensor]:
        """Those of the results that no gradient comes from."""
        return [t for t, own in zip(results, self._grad_outputs) if t is not None and own is None]

    def replay_back(self, grads: MaybeTensors) -> List[Optional[Tensor]]:
        """Gradients of inputs and weights; those of the weights in memory that the next replay leaves alone."""
        for own, grad in zip(self._grad_outputs, grads):
            if own is not None:
                own.zero_() if grad is None else own.copy_(grad)
        self._backward.replay()
        found: List[Optional[Tensor]] = [None] * len(self._given)
        for i, grad in zip(self._wanted, self._backward.results):
            found[i] = grad
        of_weights = [i for i, grad in enumerate(found) if grad is not None and i >= len(self.inputs)]
        copies = torch._foreach_mul([found[i] for i in of_weights], 1.0) if of_weights else []
        for i, copy in zip(of_weights, copies):
            found[i] = copy
        return found


def _zeros_for(results: MaybeTensors) -> List[Optional[Tensor]]:
    """Where gradients of results are put."""
    return [torch.zeros_like(t) if t is not None and t.requires_grad else None for t in results]


def _copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)


class _Replay(torch.autograd.Function):
    """A captured pass as autograd sees it."""

    @staticmethod
    def forward(ctx, captured: _CapturedPass, *tensors: Optional[Tensor]):
        results = captured.replay(tensors[: len(captured.inputs)])
        ctx.captured, ctx.number = captured, captured.replays
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*captured.without_gradient(results))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Optional[Tensor]):
        if ctx.number != ctx.captured.replays:
            raise RuntimeError('a forward pass was replayed before the backward pass of the one before it')
        return (None, *ctx.captured.replay_back(grads))


class GraphedPass:
    """A function of CUDA tensors and its backward pass, captured for the shapes of the first call.

    Its results are overwritten by the next call, so the backward pass of the call before must have come. With other
    shapes, and on devices without graphs, the function is called as it is.

    Args:
        function: takes tensors (or None) and gives tensors; no synchronisation with the host, shapes that depend on
            the inputs' shapes alone, random numbers from PyTorch's default generator only.
        weights: gives what else has gradients. They may change in place, but their storage may not: call
            :meth:`clear` after ``module.to(...)``.
        buffers: gives tensors that the function changes, which warming up must not.
        keeps: gives whatever else the function reads, to be kept as long as the graphs.
    """

    def __init__(
        self,
        function: Callable[..., MaybeTensors],
        weights: Callable[[], Sequence[Tensor]] = tuple,
        buffers: Callable[[], Sequence[Tensor]] = tuple,
        keeps: Callable[[], object] = tuple,
    ):
        self.function, self.weights, self.buffers, self.keeps = function, weights, buffers, keeps
        self.clear()

    def clear(self):
        """Drop the graphs and their memory."""
        self._captured: Optional[_CapturedPass] = None
        self._key: Hashable = None
        self._kept: object = None

    def __getstate__(self):
        return dict(self.__dict__, _captured=None, _key=None, _kept=None)

    def __call__(self, *inputs: Optional[Tensor]) -> List[Optional[Tensor]]:
        """``function(*inputs)``, with gradients; the first is a tensor.

        Raises:
            ConfigError: the function cannot be captured. After that PyTorch draws no random numbers on the device.
        """
        if not can_capture(inputs[0].device):
            return list(self.function(*inputs))
        weights = list(self.weights())
        learning = tuple((t.data_ptr(), t.requires_grad) for t in weights)
        wanted = tuple(t is not None and t.requires_grad for t in inputs)
        key = (autocast_dtype(inputs[0].device.type), _describe(inputs), wanted, learning)
        if self._captured is None:
            self._capture(key, inputs, weights)
        if self._captured is None or key != self._key:
            return list(self.function(*inputs))
        return list(_Replay.apply(self._captured, *inputs, *weights))

    def _capture(self, key: Hashable, inputs: MaybeTensors, weights: Sequence[Tensor]) -> None:
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            with _autocast_without_cache(inputs[0].device.type):
                self._captured = _CapturedPass(self.function, inputs, weights, _Recorded)
        except RuntimeError as error:
            raise ConfigError(
                f'train.cuda_graph: a training step cannot be captured ({reason(error)}); set train.cuda_graph=False'
            ) from error
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        self._key, self._kept = key, self.keeps()


def can_capture(device: torch.device) -> bool:
    """Whether passes can be captured: on NVIDIA GPUs, from PyTorch 2.1, unless they must repeat to the bit."""
    is_recent = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 1)
    repeats = torch.are_deterministic_algorithms_enabled()
    return device.type == 'cuda' and torch.version.hip is None and is_recent and not repeats


def later(action: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``action`` to be called later, which on a GPU then waits for the work begun so far, and not for what was begun
    in between. It reads tensors of now, which it holds, and leaves nothing behind on the GPU."""
    if device.type != 'cuda':
        return action
    begun = torch.cuda.current_stream(device).record_event()

    def act():
        stream = _stream_for_results(device)
        stream.wait_event(begun)
        with torch.cuda.stream(stream):
            return action()

    return act


@functools.lru_cache(maxsize=None)
def _stream_for_results(device: torch.device) -> torch.cuda.Stream:
    """The same for all; what little is done there goes before other work."""
    return torch.cuda.Stream(device, priority=-1)


class MadeOfWeights(BaseModule):
    """A module that keeps what it made from its weights: graphs, folded layers, features.

    It forgets that when weights are loaded, moved or converted, and when training begins or ends.
    """

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self._forget_on_load)

    def forget_weights(self):
        """Drop everything that was made from the weights as they were."""
        raise NotImplementedError

    def _forget_on_load(self, *_):
        self.forget_weights()

    def train(self, mode: bool = True):
        if mode != self.training:
            self.forget_weights()
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.forget_weights()
        return super()._apply(fn, *args, **kwargs)


def _describe(tensors: MaybeTensors) -> Tuple:
    return tuple(None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)
