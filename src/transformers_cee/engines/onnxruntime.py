# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ONNX Runtime on the CPU: float32, and int8 with one scale per token."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_cee.engines.engine import Engine, Run, Written, register_engine
from transformers_cee.engines.graphs import (
    HIDDEN,
    Cut,
    Graph,
    example,
    exit_graphs,
    exit_name,
    free_axes,
    layer_graphs,
)
from transformers_cee.engines.onnx_int8 import quantize


# Version of the operators.
OPSET = 20
# A graph may take and give the same name, which a file may not.
OUT = "_out"
# A model of one piece is at most 2 GB large; beyond, weights lie beside it.
LARGE = 2**31 - 2**24


@register_engine
class ONNXRuntimeEngine(Engine):
    """ONNX Runtime on the CPU. int8 has one scale per output of a weight, and one per token, found while it runs: no
    row has an influence on another, and no texts are needed. Heads and scores stay float32."""

    name = "onnxruntime"
    modules = ("onnxruntime", "onnx")
    extra = "onnxruntime"
    precisions = ("float32", "int8")
    calibrated = ()

    @classmethod
    def write(cls, written: Written, folder: Path) -> None:
        config = written.model.config
        for number, graph in enumerate(layer_graphs(written.model)):
            layer = _converted(graph, config)
            if written.precision == "int8":
                quantize(layer)
            _save(layer, folder / f"layer_{number}.onnx")
        for name, graph in exit_graphs(written.model, written.criterion).items():
            _save(_converted(graph, config), folder / f"{name}.onnx")

    def block(self, cut: Cut) -> Run:
        whole = _Whole()
        # Number 0 are the embeddings.
        for number in range(cut.start + 1 if cut.start else 0, cut.stop + 1):
            whole.add(_load(self.folder / f"layer_{number}.onnx"), f"layer_{number}/")
        if cut.gives != {HIDDEN}:
            whole.add(_load(self.folder / f"{exit_name(cut)}.onnx"), "exit/")
        return _Block(whole.model(sorted(cut.gives)), self.threads)


class _Block:
    """A session that runs a block; threads may share it."""

    def __init__(self, model: Any, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Each session has threads of its own, which would wait at full speed for its next run while those of the next
        # block need the processor.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Errors alone.
        options.log_severity_level = 3
        self.takes = [given.name for given in model.graph.input]
        self.gives = [found.name for found in model.graph.output]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            source: Any = Path(folder) / "block.onnx"
            if _is_large(model):
                _save(model, source)
            else:
                source = model.SerializeToString()
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.session.run(self.gives, {name: given[name].contiguous().numpy() for name in self.takes})
        return {name.removesuffix(OUT): torch.from_numpy(value) for name, value in zip(self.gives, found, strict=True)}


class _Whole:
    """Graphs put together, one behind the other: what one takes is what those before it have given under that name,
    or else an input of the whole."""

    def __init__(self) -> None:
        import onnx

        self.proto = onnx.ModelProto()
        self.proto.graph.name = "block"
        # The values that names stand for by now, and their types.
        self.values: dict[str, str] = {}
        self.types: dict[str, Any] = {}

    def add(self, part: Any, prefix: str) -> None:
        """Adds a model, whose names get the prefix."""
        from onnx import compose, helper

        mine, graph = self.proto.graph, compose.add_prefix_graph(part.graph, prefix, inplace=True)
        self.proto.ir_version = part.ir_version
        del self.proto.opset_import[:]
        self.proto.opset_import.extend(part.opset_import)
        for given in graph.input:
            name = given.name.removeprefix(prefix)
            if name not in self.values:
                self.values[name] = name
                mine.input.append(helper.make_value_info(name, given.type))
            # Sessions remove identities.
            mine.node.append(helper.make_node("Identity", [self.values[name]], [given.name]))
        mine.node.extend(graph.node)
        mine.initializer.extend(graph.initializer)
        for found in graph.output:
            name = found.name.removeprefix(prefix).removesuffix(OUT)
            self.values[name], self.types[name] = found.name, found.type

    def model(self, gives: Sequence[str]) -> Any:
        """The whole, without what the given names do not need. Ends the putting together."""
        from onnx import helper

        graph = self.proto.graph
        for name in gives:
            graph.output.append(helper.make_value_info(name + OUT, self.types[name]))
            graph.node.append(helper.make_node("Identity", [self.values[name]], [name + OUT]))
        needed = {name + OUT for name in gives}
        for place in reversed(range(len(graph.node))):
            if needed.isdisjoint(graph.node[place].output):
                del graph.node[place]
            else:
                needed |= _reads(graph.node[place])
        for things in (graph.initializer, graph.input):
            for place in reversed(range(len(things))):
                if things[place].name not in needed:
                    del things[place]
        return self.proto


def _reads(node: Any) -> set[str]:
    """Names that an operation reads, in its branches, too."""
    inner = (_reads(one) for attribute in node.attribute for one in attribute.g.node)
    return set(node.input).union(*inner)


def _converted(graph: Graph, config: Any) -> Any:
    """A graph as an ONNX model. Outputs have its names and `OUT`, and all constants are initializers."""
    import onnx

    outputs = [name + OUT for name in graph.outputs]
    ends = [*graph.inputs, *outputs]
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The tracer tells what it takes for constant, and that there is a newer one.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            tuple(example(graph.inputs, config).values()),
            file,
            input_names=list(graph.inputs),
            output_names=outputs,
            dynamic_axes={name: free_axes(name.removesuffix(OUT)) for name in ends},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(file.getvalue())
    nodes = model.graph.node
    for place in reversed(range(len(nodes))):
        node = nodes[place]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            model.graph.initializer.append(node.attribute[0].t)
            model.graph.initializer[-1].name = node.output[0]
            del nodes[place]
    return model


def _is_large(model: Any) -> bool:
    return sum(len(weight.raw_data) for weight in model.graph.initializer) > LARGE


def _save(model: Any, path: Path) -> None:
    import onnx

    onnx.save(model, path, save_as_external_data=_is_large(model), location=f"{path.name}.data")


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)
