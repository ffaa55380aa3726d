"""ONNX files on ONNX Runtime, with the sampling node of this project, and the operators that a file needs."""

from collections import Counter
from typing import Dict, List, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from .operators import DOMAIN, run_sampling_node


def run_file(path: str, inputs: Mapping[str, np.ndarray], threads: int = 1) -> List[np.ndarray]:
    """Outputs of an ONNX file on ONNX Runtime's CPU; sampling nodes are computed by PyTorch's reference.

    ONNX Runtime knows no Python operators of other domains, so the graph is cut at those nodes.
    """
    model = onnx.load(path)
    pieces = cut_graph(model.graph.node)
    if len(pieces) == 1:
        return _session(path, threads).run(None, dict(inputs))
    outputs = [output.name for output in model.graph.output]
    values: Dict[str, np.ndarray] = dict(inputs)
    needed_later = [set(outputs) for _ in pieces]
    for number in range(len(pieces) - 2, -1, -1):
        later = {name for node in pieces[number + 1] for name in _inputs_of(node)}
        needed_later[number] |= needed_later[number + 1] | later
    for piece, needed in zip(pieces, needed_later):
        if piece[0].domain == DOMAIN:
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in piece[0].attribute}
            given = [values[name] for name in piece[0].input]
            values[piece[0].output[0]] = run_sampling_node(given, attributes)
        else:
            values.update(_run_piece(model, piece, needed, values, threads))
        values = {name: value for name, value in values.items() if name in needed}
    return [values[name] for name in outputs]


def cut_graph(nodes: Sequence[onnx.NodeProto]) -> List[List[onnx.NodeProto]]:
    """Runs of standard nodes, and each sampling node by itself, in order."""
    pieces: List[List[onnx.NodeProto]] = []
    for node in nodes:
        if node.domain == DOMAIN or not pieces or pieces[-1][0].domain == DOMAIN:
            pieces.append([])
        pieces[-1].append(node)
    return pieces


def _inputs_of(node) -> List[str]:
    """Names that a node reads, those of its branches included."""
    names = list(node.input)
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            names += [name for inner in entry.g.node for name in _inputs_of(inner)]
    return names


def _run_piece(model, nodes, needed, values, threads) -> Dict[str, np.ndarray]:
    read, made = [name for node in nodes for name in _inputs_of(node)], [n for node in nodes for n in node.output]
    given = [name for name in dict.fromkeys(read) if name in values]
    constants = [constant for constant in model.graph.initializer if constant.name in set(read)]
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape)
        for name in given
    ]
    wanted = [name for name in made if name in needed]
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    graph = helper.make_graph(nodes, 'piece', described, outputs, constants)
    imports = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    piece = helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version, functions=model.functions)
    found = _session(piece.SerializeToString(), threads).run(wanted, {name: values[name] for name in given})
    return dict(zip(wanted, found))


def _session(source, threads) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=['CPUExecutionProvider'])


def list_operators(path: str) -> Dict[str, int]:
    """How often each operator is used, by name, most frequent first; functions of the file are opened."""
    model = onnx.load(path, load_external_data=False)
    bodies = {(function.domain, function.name): function.node for function in model.functions}
    counts: Counter = Counter()

    def count(nodes):
        for node in nodes:
            if (node.domain, node.op_type) in bodies:
                count(bodies[node.domain, node.op_type])
            else:
                counts[f'{node.domain}::{node.op_type}' if node.domain else node.op_type] += 1
            for entry in node.attribute:
                if entry.type == onnx.AttributeProto.GRAPH:
                    count(entry.g.node)

    count(model.graph.node)
    return dict(counts.most_common())
