"""Replay a fixed sequence of GPU work as one CUDA graph: no launch overhead from Python.

The steps of the heads are many short kernels on tensors whose shapes do not depend on the data, so at
batch 1 the time to launch them exceeds the time they run; a graph removes it. The numbers are the same.
"""

import functools
from typing import Callable, Dict, Hashable, List, Optional, Sequence, Tuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor

from models.torch_compat import autocast_dtype

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
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = list(run(*self.inputs))

    def replay(self, inputs: MaybeTensors) -> List[Optional[Tensor]]:
        for static, tensor in zip(self.inputs, inputs):
            if static is not None:
                static.copy_(tensor)
        self.graph.replay()
        return [None if tensor is None else tensor.clone() for tensor in self.outputs]


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
    """

    def __init__(
        self, function: Callable[..., MaybeTensors], max_graphs: int = 4, state: Optional[Callable[[], Hashable]] = None
    ):
        self.function, self.max_graphs, self.state = function, max_graphs, state
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
        state = None if self.state is None else self.state()
        if state != self._captured_in:
            self.clear()
            self._captured_in = state
        addresses = tuple(tensor.data_ptr() for tensor in in_place)
        key = (autocast_dtype('cuda'), fixed, _describe(inputs), _describe(in_place), addresses)
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

        dtype = autocast_dtype('cuda')
        if dtype is None:
            return _Captured(run, inputs)
        with torch.autocast('cuda', dtype=dtype, cache_enabled=False):
            return _Captured(run, inputs)


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
