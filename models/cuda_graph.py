"""Replay a fixed sequence of GPU work as one CUDA graph: no launch overhead from Python.

The steps of the heads are many short kernels on tensors whose shapes do not depend on the data, so at
batch 1 the time to launch them exceeds the time they run; a graph removes it. The numbers are the same.
"""

from typing import Callable, Dict, Hashable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from models.autocast_state import autocast_dtype

_WARM_UP_RUNS = 3  # lets libraries pick algorithms and allocate workspaces before the capture


class _Captured:
    """One graph with the tensors it reads and writes."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], in_place: Sequence[Tensor]):
        self.in_place = list(in_place)  # kept, so that their memory is not given to other tensors
        with torch.inference_mode(False):  # later calls may write to them outside that mode
            self.inputs = [tensor.clone(memory_format=torch.preserve_format) for tensor in inputs]
        stream = torch.cuda.Stream(self.inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(self.inputs[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                function(*self.inputs, *self.in_place)
        torch.cuda.current_stream(self.inputs[0].device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = list(function(*self.inputs, *self.in_place))

    def replay(self, inputs: Sequence[Tensor]) -> List[Tensor]:
        for static, tensor in zip(self.inputs, inputs):
            static.copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]


class GraphedFunction:
    """A function of CUDA tensors, captured once per combination of shapes, dtypes and autocast state.

    Args:
        function: takes and returns tensors only; no gradients, no synchronisation with the host, shapes
            that depend on the inputs' shapes alone. Module weights may change in place between calls, but
            their storage may not: call :meth:`clear` after ``module.to(...)``.
        max_graphs: graphs kept; the oldest is dropped.
        state: tells what else the result depends on, such as a version of weights that the function prepares
            outside the graph. Graphs are dropped where it gives another value than before.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        max_graphs: int = 4,
        state: Optional[Callable[[], Hashable]] = None,
    ):
        self.function, self.max_graphs, self.state = function, max_graphs, state
        self._captured_in: Hashable = None
        self._graphs: Dict[Hashable, _Captured] = {}

    def clear(self):
        """Drop every graph."""
        self._graphs.clear()

    def __getstate__(self):
        return dict(self.__dict__, _graphs={})  # graphs cannot be copied or stored

    def __call__(self, *inputs: Tensor, in_place: Sequence[Tensor] = ()) -> List[Tensor]:
        """The function's result, in fresh tensors.

        Args:
            inputs: copied into the graph's own memory.
            in_place: further arguments, after the inputs, that the graph reads where they are: for tensors that
                stay at one address. At another address the function is captured anew.
        """
        if not inputs[0].is_cuda:
            return list(self.function(*inputs, *in_place))
        state = None if self.state is None else self.state()
        if state != self._captured_in:
            self.clear()
            self._captured_in = state
        key = self._signature(list(inputs) + list(in_place)), tuple(t.data_ptr() for t in in_place)
        if key not in self._graphs:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._capture(inputs, in_place)
        return self._graphs[key].replay(inputs)

    def _capture(self, inputs: Sequence[Tensor], in_place: Sequence[Tensor]) -> _Captured:
        """Capture with autocast as outside, but without its weight cache: replays must see new weights."""
        dtype = autocast_dtype('cuda')
        if dtype is None:
            return _Captured(self.function, inputs, in_place)
        with torch.autocast('cuda', dtype=dtype, cache_enabled=False):
            return _Captured(self.function, inputs, in_place)

    @staticmethod
    def _signature(inputs: Sequence[Tensor]) -> Tuple:
        return (autocast_dtype('cuda'),) + tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs)
