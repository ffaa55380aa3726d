"""Replay a fixed sequence of GPU work as one CUDA graph: no launch overhead from Python.

The steps of the heads are many short kernels on tensors whose shapes do not depend on the data, so at
batch 1 the time to launch them exceeds the time they run; a graph removes it. The numbers are the same.

In training a ``GraphedPass`` does so with a forward pass and its backward pass.
"""

import contextlib
import functools
import gc
import inspect
import weakref
from typing import Any, Callable, Dict, Hashable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from lib.errors import ConfigError, reason
from models.csrc import autocast_dtype

_WARM_UP_RUNS = 3  # lets libraries pick algorithms and allocate workspaces before the capture

MaybeTensors = Sequence[Optional[Tensor]]


class _Captured:
    """One graph with the tensors it reads and writes.

    Args:
        run: the work, given the inputs.
        inputs: copied into memory of the graph's own.
        memory: where results and what is between lie.
    """

    def __init__(self, run: Callable[..., MaybeTensors], inputs: MaybeTensors, memory: 'GraphMemory'):
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
        with _recording(self.graph, stream=stream, pool=memory.pool()):
            self.outputs = list(run(*self.inputs))
        memory.graphs.add(self)

    def replay(self, inputs: MaybeTensors) -> List[Optional[Tensor]]:
        _copy_all(*zip(*[pair for pair in zip(self.inputs, inputs) if pair[0] is not None]))
        self.graph.replay()
        return self.outputs


def _captures_on(device: torch.device) -> bool:
    return device.type == 'cuda'


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if hasattr(torch, '_foreach_copy_'):  # PyTorch 2.1 and later: one call
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)


class GraphMemory:
    """Memory that graphs share which are replayed one after the other: each may overwrite what another left but for
    its results."""

    def __init__(self):
        self.graphs: weakref.WeakSet = weakref.WeakSet()

    def __reduce__(self):
        return GraphMemory, ()  # graphs cannot be copied or stored

    def pool(self):
        """That of a graph that is still there, None for new memory: PyTorch does not take up what all have left."""
        return next((captured.graph.pool() for captured in self.graphs), None)


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
        memory: shared with other graphs that are never replayed at the same time; None: its own.
        clones: False gives the graph's own results, which are those of this call until the next one.
    """

    def __init__(
        self,
        function: Callable[..., MaybeTensors],
        max_graphs: int = 4,
        state: Optional[Callable[[], Hashable]] = None,
        last_state: Optional[Callable[[], Hashable]] = None,
        memory: Optional[GraphMemory] = None,
        clones: bool = True,
    ):
        self.function, self.max_graphs, self.state, self.last_state = function, max_graphs, state, last_state
        self.memory, self.clones = GraphMemory() if memory is None else memory, clones
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
        """``function(*fixed, *inputs, *in_place)``, in fresh tensors unless told otherwise. The key of its graph holds
        all three.

        Args:
            inputs: copied into the graph's own memory; the first is a tensor, others may be None.
            fixed: plain values.
            in_place: tensors that stay at one address, read where they are. At another address the function is
                captured anew.
        """
        if not _captures_on(inputs[0].device):
            return list(self.function(*fixed, *inputs, *in_place))
        addresses = tuple(tensor.data_ptr() for tensor in in_place)
        key = (autocast_dtype('cuda'), fixed, _describe(inputs), _describe(in_place), addresses)
        known = self._graphs.get(key)
        if known is not None and self.last_state is not None and self.last_state() == self._captured_in:
            results = self._replay(known[0], inputs)
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
        return self._replay(self._graphs[key][0], inputs)

    def _replay(self, captured: _Captured, inputs: MaybeTensors) -> List[Optional[Tensor]]:
        results = captured.replay(inputs)
        return [None if tensor is None else tensor.clone() for tensor in results] if self.clones else results

    def _capture(self, inputs: MaybeTensors, fixed: Tuple, in_place: Sequence[Tensor]) -> _Captured:
        """Capture with autocast as outside, but without its weight cache: replays must see new weights."""

        def run(*tensors: Optional[Tensor]) -> MaybeTensors:
            return self.function(*fixed, *tensors, *in_place)

        with _autocast_without_cache('cuda'):
            return _Captured(run, inputs, self.memory)


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


class Stage(NamedTuple):
    """A part of a pass, whose gradients arrive as soon as it has been gone back through.

    function  takes what the stage before gave, or inputs, and gives tensors (or None); no synchronisation with the
              host, shapes that depend on those given alone, random numbers from PyTorch's default generator only
    parts     modules that it computes with, whose parameters learn and whose buffers it may change, which warming up
              must not. Both may change in place, but their storage may not
    """

    function: Callable[..., MaybeTensors]
    parts: Sequence[nn.Module] = ()

    def learning(self) -> List[Tuple[Dict[str, nn.Parameter], str, nn.Parameter]]:
        """Parameters that learn, with the table and the name that each stands under."""
        tables = [module._parameters for part in self.parts for module in part.modules()]
        return [(table, name, p) for table in tables for name, p in table.items() if p is not None and p.requires_grad]


class _StandIns:
    """Others for the parameters that learn, in their memory.

    DDP keeps the nodes at which gradients of its parameters arrive. These belong to the stream on which it was made,
    which a capture must not wait for. The stand-ins' nodes are made anew in every pass.
    """

    def __init__(self, stage: Stage):
        self._places = stage.learning()
        self.tensors = [nn.Parameter(parameter.detach()) for _, _, parameter in self._places]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, modules compute with them."""
        try:
            for (table, name, _), own in zip(self._places, self.tensors):
                table[name] = own
            yield
        finally:
            for table, name, parameter in self._places:
                table[name] = parameter


class _CapturedStage:
    """One stage while it is recorded, and the graph of its backward pass.

    Attributes:
        weights: stand-ins for its parameters.
        begins: what it is given.
        end: where its backward pass begins if another stage follows; None: it has none.
        passed_back: gradients that the next stage found of what this one gave, if it has a backward pass.
        backward: its recorded backward pass.
    """

    def __init__(self, stage: Stage):
        self._function, self.weights = stage.function, _StandIns(stage)
        self.begins: List[Optional[Tensor]] = []
        self.end: Optional[Tensor] = None
        self.passed_back: List[Optional[Tensor]] = []
        self.backward: Optional[_Recorded] = None

    def run(self, given: MaybeTensors) -> List[Optional[Tensor]]:
        self.begins = list(given)
        with self.weights.in_place():
            return list(self._function(*given))

    def cut(self, results: MaybeTensors) -> List[Optional[Tensor]]:
        """What the next stage is given, through which no gradient flows by itself."""
        wanted = [t for t in results if t is not None and t.requires_grad]
        self.end = _End.apply(self.passed_back, *wanted) if wanted else None
        return [t if t is None or not t.requires_grad else t.detach().requires_grad_() for t in results]

    def run_back(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> List[Optional[Tensor]]:
        """Gradients of what it was given, where these have any, and of its weights."""
        wanted = [t for t in self.begins if t is not None and t.requires_grad] + self.weights.tensors
        with self.weights.in_place():  # some of the forward pass may be done again
            return list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))


class _End(torch.autograd.Function):
    """Ends a stage in a number without meaning, and keeps none of its tensors; backward hands on their gradients."""

    @staticmethod
    def forward(ctx, grads: List[Optional[Tensor]], *tensors: Tensor):
        ctx.grads = grads
        return tensors[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        grads = tuple(ctx.grads)
        ctx.grads.clear()
        return (None, *grads)


class _CapturedPass:
    """Forward and backward pass of one call's shapes, with the tensors that they read and write.

    Args:
        stages: the work.
        inputs: of the first; copied into memory of its own.
        record: ``_Recorded``, or what takes its place in tests.
    """

    def __init__(self, stages: Sequence[Stage], inputs: MaybeTensors, record):
        self.stages, self.replays = [_CapturedStage(stage) for stage in stages], 0
        self.inputs = [None if t is None else _copy_of(t) for t in inputs]
        self._results: List[Optional[Tensor]] = []
        self._grad_outputs: List[Optional[Tensor]] = []
        self.latest: List[Optional[Tensor]] = []  # results of a replay on their way to autograd
        pool, device = record.pool(), self.inputs[0].device
        with record.apart(device):
            for _ in range(_WARM_UP_RUNS):
                self._grad_outputs = _zeros_for(self._run())
                for i in self._backwards():
                    self._run_back(i)
            self._grad_outputs = []
            self._forget()
        self._forward = record(self._run, pool)
        self._grad_outputs = _zeros_for(self._results)
        for i in self._backwards():
            self.stages[i].backward = record(functools.partial(self._run_back, i), pool)
        self._forget()
        self._forward.results = [None if t is None else t.detach() for t in self._forward.results]

    def _forget(self) -> None:
        """Let go of what autograd recorded, its nodes and its tensors, also of what only the collector finds: the first
        use of PyTorch's checkpointing leaves its inputs, gigabytes, to it."""
        self._results = []
        for stage in self.stages:
            stage.begins, stage.end = [], None
        gc.collect()

    def _run(self) -> List[Optional[Tensor]]:
        tensors = self.inputs
        for stage in self.stages[:-1]:
            tensors = stage.cut(stage.run(tensors))
        self._results = self.stages[-1].run(tensors)
        return self._results

    def _backwards(self) -> List[int]:
        """Stages that gradients flow through, the last one first."""
        last = len(self.stages) - 1
        return [i for i in reversed(range(last + 1)) if i == last or self.stages[i].end is not None]

    def _run_back(self, i: int) -> List[Optional[Tensor]]:
        """Gradients of a stage's weights and, of the first, of the inputs that have any before them."""
        stage = self.stages[i]
        if i == len(self.stages) - 1:
            outputs = [t for t in self._results if t is not None and t.requires_grad]
            grads = [t for t in self._grad_outputs if t is not None]
        else:
            outputs, grads = [stage.end], [torch.zeros_like(stage.end)]
        found = stage.run_back(outputs, grads)
        if i:
            count = len(found) - len(stage.weights.tensors)
            self.stages[i - 1].passed_back[:] = found[:count]
            stage.begins = []  # nobody needs them any more
            return found[count:]
        return found

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

    def replay_back(self, i: int, grads: MaybeTensors) -> List[Optional[Tensor]]:
        """Gradients of a stage's weights, before them of the first those of all inputs.

        Weights' gradients are in memory that the next replay leaves alone.

        Args:
            grads: of the results, for the last stage.
        """
        stage = self.stages[i]
        if i == len(self.stages) - 1:
            for own, grad in zip(self._grad_outputs, grads):
                if own is not None:
                    own.zero_() if grad is None else own.copy_(grad)
        inputs: List[Optional[Tensor]] = [None] * (0 if i else len(self.inputs))
        if stage.backward is None:
            return inputs + [None] * len(stage.weights.tensors)
        stage.backward.replay()
        found = list(stage.backward.results)
        for k, own in enumerate(self.inputs if i == 0 else ()):
            if own is not None and own.requires_grad:
                inputs[k] = found.pop(0)
        given = [grad for grad in found if grad is not None]
        copies = iter(torch._foreach_mul(given, 1.0) if given else ())
        return inputs + [None if grad is None else next(copies) for grad in found]


def _zeros_for(results: MaybeTensors) -> List[Optional[Tensor]]:
    """Where gradients of results are put."""
    return [torch.zeros_like(t) if t is not None and t.requires_grad else None for t in results]


def _copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)


class _Replay(torch.autograd.Function):
    """A stage of a captured pass as autograd sees it; all but the last give a number without meaning to the next."""

    @staticmethod
    def forward(ctx, captured: _CapturedPass, i: int, before: Optional[Tensor], *tensors: Optional[Tensor]):
        """tensors: inputs for the first stage, and the weights of stage i."""
        if i == 0:
            captured.latest = captured.replay(tensors[: len(captured.inputs)])
        ctx.captured, ctx.i, ctx.number = captured, i, captured.replays
        ctx.set_materialize_grads(False)
        if i < len(captured.stages) - 1:
            return captured.inputs[0].new_zeros((), dtype=torch.float32)
        results, captured.latest = captured.latest, []
        ctx.mark_non_differentiable(*captured.without_gradient(results))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Optional[Tensor]):
        captured = ctx.captured
        if ctx.number != captured.replays:
            raise RuntimeError('a forward pass was replayed before the backward pass of the one before it')
        of_before = captured.inputs[0].new_zeros((), dtype=torch.float32) if ctx.i else None
        return (None, None, of_before, *captured.replay_back(ctx.i, grads))


class GraphedPass:
    """Stages that work on CUDA tensors, and their backward passes, captured for the shapes of the first call.

    The results are overwritten by the next call, so the backward pass of the call before must have come. With other
    shapes, and on devices without graphs, the stages are called as they are.

    Args:
        stages: one after the other. Call :meth:`clear` when their modules were moved or converted.
        keeps: gives whatever else they read, to be kept as long as the graphs.
    """

    def __init__(self, *stages: Stage, keeps: Callable[[], object] = tuple):
        self.stages, self.keeps = stages, keeps
        self.clear()

    def clear(self):
        """Drop the graphs and their memory."""
        self._captured: Optional[_CapturedPass] = None
        self._key: Hashable = None
        self._kept: object = None

    def __getstate__(self):
        return dict(self.__dict__, _captured=None, _key=None, _kept=None)

    def __call__(self, *inputs: Optional[Tensor]) -> List[Optional[Tensor]]:
        """What the last stage gives, with gradients; the first input is a tensor.

        Raises:
            ConfigError: it cannot be captured. After that PyTorch draws no random numbers on the device.
        """
        if not can_capture(inputs[0].device):
            return self._run(inputs)
        weights = [[parameter for _, _, parameter in stage.learning()] for stage in self.stages]
        learning = tuple(t.data_ptr() for of_stage in weights for t in of_stage)
        wanted = tuple(t is not None and t.requires_grad for t in inputs)
        key = (autocast_dtype(inputs[0].device.type), _describe(inputs), wanted, learning)
        if self._captured is None:
            self._capture(key, inputs)
        if self._captured is None or key != self._key:
            return self._run(inputs)
        given: Any = None
        for i, of_stage in enumerate(weights):
            given = _Replay.apply(self._captured, i, given, *(() if i else inputs), *of_stage)
        return list(given)

    def _run(self, tensors: MaybeTensors) -> List[Optional[Tensor]]:
        for stage in self.stages:
            tensors = stage.function(*tensors)
        return list(tensors)

    def _capture(self, key: Hashable, inputs: MaybeTensors) -> None:
        parts = [part for stage in self.stages for part in stage.parts]
        before = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
        try:
            with _autocast_without_cache(inputs[0].device.type):
                self._captured = _CapturedPass(self.stages, inputs, _Recorded)
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
