# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""OpenVINO on the CPU: float32, bfloat16, and int8 with static scales (NNCF, post-training)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_cee.engines.engine import Engine, Run, Written, register_engine
from transformers_cee.engines.graphs import (
    HIDDEN,
    MASK,
    SCORE,
    Cut,
    Graph,
    example,
    exit_graphs,
    exit_name,
    layer_graphs,
    token_inputs,
)


LAYERS = "layers.xml"


@cache
def _core() -> Any:
    """OpenVINO's runtime, one for the process and for ever.

    With its plugin for CPUs each gives signal handlers another stack and, when it goes, frees that and puts back the
    one before, which is gone if an older one went first: the next signal kills the process.
    """
    import openvino

    return openvino.Core()


@register_engine
class OpenVINOEngine(Engine):
    """OpenVINO on the CPU. Static int8 has one scale per tensor, taken from texts: no row has an influence on another.
    bfloat16 is fast where the processor computes in it (AVX-512 BF16, AMX)."""

    name = "openvino"
    modules = ("openvino", "nncf")
    extra = "openvino"
    precisions = ("float32", "bfloat16", "int8")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers = _core().read_model(self.folder / LAYERS)

    @classmethod
    def require(cls) -> None:
        with _without_statistics():
            super().require()

    @classmethod
    def write(cls, written: Written, folder: Path) -> None:
        with _without_statistics():
            cls._write(written, folder)

    @classmethod
    def _write(cls, written: Written, folder: Path) -> None:
        import openvino

        model = written.model
        parts = [_converted(graph, model.config) for graph in layer_graphs(model)]
        layers = _chained(parts, token_inputs(model.config))
        if written.precision == "int8":
            layers = _quantized(layers, written.samples)
        openvino.save_model(layers, folder / LAYERS, compress_to_fp16=False)
        for name, graph in exit_graphs(model, written.criterion).items():
            openvino.save_model(_converted(graph, model.config), folder / f"{name}.xml", compress_to_fp16=False)

    def block(self, cut: Cut) -> Run:
        import openvino

        model = self.layers.clone()
        inputs = _inputs(model)
        hidden = _behind(model, cut.stop)
        taken = dict(inputs)
        if cut.start:
            taken = {HIDDEN: _cut(model, cut.start), MASK: inputs[MASK]}
        found: dict[str, Any] = {HIDDEN: hidden}
        names = [name for name in sorted(cut.gives) if name != HIDDEN]
        if names:
            exit_model = _core().read_model(self.folder / f"{exit_name(cut)}.xml")
            of_exit = _inputs(exit_model)
            of_exit.pop(HIDDEN).output(0).replace(hidden)
            mask = of_exit.pop(MASK, None)
            if mask is not None:
                mask.output(0).replace(taken[MASK].output(0))
            if SCORE in cut.gives:
                # What is left of the exit's inputs has to do with the score alone.
                taken |= of_exit
            found |= {name: _behind(exit_model, name) for name in names}
        results = [openvino.opset13.result(found[name]) for name in sorted(cut.gives)]
        block = openvino.Model(results, list(taken.values()), f"layers_{cut.start + 1}_{cut.stop}")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bfloat16" else "f32",
        }
        return _Block(_core().compile_model(block, "CPU", options), list(taken), sorted(cut.gives))


@contextmanager
def _without_statistics() -> Iterator[None]:
    """OpenVINO's tools send statistics of their use to their makers, from a process of their own at every step, unless
    they find themselves in continuous integration. Whoever exports a model here has not been asked."""
    names = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Block:
    """A compiled block. Each thread has a request of its own, since a request runs one call at a time."""

    def __init__(self, compiled: Any, takes: Sequence[str], gives: Sequence[str]) -> None:
        self.compiled, self.takes, self.gives = compiled, takes, gives
        self.requests = threading.local()

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        request = getattr(self.requests, "own", None)
        if request is None:
            request = self.requests.own = self.compiled.create_infer_request()
        inputs = {place: given[name].contiguous().numpy() for place, name in enumerate(self.takes)}
        # Outputs are copied: the request's own memory is that of its next call.
        found = request.infer(inputs, share_inputs=True)
        return {name: torch.from_numpy(found[place]) for place, name in enumerate(self.gives)}


def _converted(graph: Graph, config: Any) -> Any:
    """A graph as an OpenVINO model whose inputs and outputs have its names."""
    import openvino

    given = tuple(example(graph.inputs, config).values())
    with torch.no_grad():
        model = openvino.convert_model(graph, example_input=given)
    for ends, names in ((model.inputs, graph.inputs), (model.outputs, graph.outputs)):
        for end, name in zip(ends, names, strict=True):
            end.get_tensor().set_names({name})
    for place, name in enumerate(graph.inputs):
        model.inputs[place].get_node().set_friendly_name(name)
    for place, name in enumerate(graph.outputs):
        model.outputs[place].get_node().set_friendly_name(name)
    return model


def _inputs(model: Any) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in model.get_parameters()}


def _behind(model: Any, name: str | int) -> Any:
    """What a result of a model is given: of a name, or behind a layer (1-based)."""
    wanted = f"{HIDDEN}_{name}" if isinstance(name, int) else name
    return next(node for node in model.get_results() if node.get_friendly_name() == wanted).input_value(0)


def _chained(parts: Sequence[Any], tokens: Sequence[str]) -> Any:
    """Embeddings and layers in a row as one model, with a result behind each layer."""
    import openvino

    first, results = parts[0], []
    taken = _inputs(first)
    hidden = _behind(first, HIDDEN)
    for layer, part in enumerate(parts[1:], start=1):
        own, behind = _inputs(part), _behind(part, HIDDEN)
        # Quantisation tells operations apart by their names.
        for operation in part.get_ops():
            operation.set_friendly_name(f"layer_{layer}/{operation.get_friendly_name()}")
        own[HIDDEN].output(0).replace(hidden)
        if MASK in own:
            own[MASK].output(0).replace(taken[MASK].output(0))
        hidden = behind
        results.append(openvino.opset13.result(hidden))
        results[-1].set_friendly_name(f"{HIDDEN}_{layer}")
    return openvino.Model(results, [taken[name] for name in tokens], "layers")


def _cut(model: Any, layer: int) -> Any:
    """Makes what is behind a layer (1-based) depend on a new input in its place, which is returned."""
    import openvino

    source = _behind(model, layer)
    given = openvino.opset13.parameter(source.get_partial_shape(), source.get_element_type())
    given.set_friendly_name(HIDDEN)
    for target in list(source.get_target_inputs()):
        if target.get_node().get_type_name() != "Result":
            target.replace_source_output(given.output(0))
    return given


def _quantized(model: Any, samples: Sequence[Mapping[str, Tensor]]) -> Any:
    import nncf

    dataset = nncf.Dataset(list(samples), lambda batch: {name: value.numpy() for name, value in batch.items()})
    return nncf.quantize(model, dataset, subset_size=len(samples), model_type=nncf.ModelType.TRANSFORMER)
