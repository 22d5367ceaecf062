# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""torch itself as an engine: blocks of the model's own layers, on the CPU or a GPU."""

from __future__ import annotations

import copy
import importlib
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transformers_cee.engines.buckets import Buckets, CudaGraphs
from transformers_cee.engines.engine import Engine, Run, Written, register_engine
from transformers_cee.engines.graphs import HIDDEN, MASK, BlockGraph, Cut, exit_graphs
from transformers_cee.engines.serving import is_of
from transformers_cee.engines.torch_int8 import check_int8, place_int8, quantized_weights, shapes_of_scales
from transformers_cee.families import MODELS


WEIGHTS = "weights.safetensors"


@register_engine
class TorchEngine(Engine):
    """torch, without another package, on the CPU or on a GPU. In bfloat16 the layers' weights and states are; exits
    compute in float32 whatever the precision.

    Args:
        compile (`bool`): compile blocks (`torch.compile`); each compiles when it first runs, which takes a while.
        cuda_graphs (`bool`, *optional*):
            Run blocks as CUDA graphs, for batches padded to few shapes; by default on a GPU.
    """

    name = "torch"
    precisions = ("float32", "bfloat16", "int8")
    devices = ("cpu", "cuda")
    options: ClassVar[tuple[str, ...]] = ("compile", "cuda_graphs")

    def __init__(self, *args: Any, compile: bool = False, cuda_graphs: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        on_gpu = torch.device(self.device).type == "cuda"
        if cuda_graphs and not on_gpu:
            raise ValueError(f"`cuda_graphs`=True, but `device`={self.device!r}; accepted is a GPU.")
        if self.precision == "int8":
            check_int8(self.device, compile)
        self.compile = compile
        # Graphs share scratch memory: one runs at a time, of whichever block.
        self.lock = threading.Lock()
        self.capture = CudaGraphs() if on_gpu and cuda_graphs is not False else None
        self.model = load_model(self.config, self.folder / WEIGHTS, self.precision, self.device)

    @classmethod
    def write(cls, written: Written, folder: Path) -> None:
        tensors = named_tensors(written.model)
        if written.precision == "bfloat16":
            tensors |= {name: tensors[name].to(torch.bfloat16) for name in _names_of_layers(written.model)}
        if written.precision == "int8":
            every = BlockGraph(written.model, Cut(0, len(written.model.layers), frozenset({HIDDEN})))
            with torch.no_grad():
                tensors |= quantized_weights(
                    written.model, lambda sample: every(*(sample[name] for name in every.inputs)), written.samples
                )
        # Copies: a file takes no two names of one memory.
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    def block(self, cut: Cut) -> Run:
        graph = BlockGraph(self.model, cut, self.config.exit_engine["criterion"])
        block: Callable[..., tuple[Tensor, ...]] = _compiled(graph) if self.compile else graph
        buckets = None
        if self.capture is not None:
            most = self.model.most_tokens
            buckets = Buckets(block, graph.inputs, graph.outputs, self.capture, most, self.lock)

        # No inference mode: whoever trains on states may keep what it got.
        @torch.no_grad()
        def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if buckets is not None:
                return buckets(given)
            with _threads(self.threads):
                return dict(zip(graph.outputs, block(*(given[name] for name in graph.inputs)), strict=True))

        return run


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a model computes with, by name, buffers included that checkpoints do without."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def load_model(config: Any, file: Path, precision: str, device: str = "cpu") -> Any:
    """The model of a config with the weights of a file, each in its own precision there, in evaluation mode.

    Raises:
        ValueError: the file is damaged, lacks a weight, has one that the model does not know, or one of another shape.
    """
    module, _, name = MODELS[config.model_type].model.rpartition(".")
    with torch.device("meta"):
        model = getattr(importlib.import_module(module), name)(copy.deepcopy(config))
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}). Export the model again.") from error
    # The folder may have more exits than are asked for.
    tensors = {name: value for name, value in found.items() if is_of(name, model.config)}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    if precision == "int8":
        shapes |= shapes_of_scales(model)
    _check_names(file, tensors, shapes)
    if precision == "int8":
        place_int8(model, tensors)
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        holder = model.get_submodule(path)
        if own in holder._parameters:
            holder._parameters[own] = nn.Parameter(tensor.to(device), requires_grad=False)
        else:
            holder._buffers[own] = tensor.to(device)
    return model.eval()


def _check_names(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += sorted(name for name in found.keys() & expected.keys() if tuple(found[name].shape) != expected[name])
    if wrong:
        raise ValueError(
            f"{file} does not fit its config: {len(wrong)} weights are missing, unknown or of another shape, among "
            f"them {wrong[0]!r}. Export the model anew."
        )


@torch.no_grad()
def _names_of_layers(model: Any) -> set[str]:
    """Names of the parameters that embeddings and layers alone compute with: those of the stock model without its
    head which no exit calls for."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.body.modules()]
    size = model.config.hidden_size
    known = {HIDDEN: torch.zeros(1, 1, size), MASK: torch.ones(1, 1, dtype=torch.bool)}
    for graph in exit_graphs(model, None).values():
        graph(*(known[name] for name in graph.inputs))
    for hook in hooks:
        hook.remove()
    of_exits = {id(weight) for module in called for weight in module.parameters()}
    body = {id(weight) for weight in model.body.parameters()} - of_exits
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in body}


def _compiled(graph: BlockGraph) -> Callable[..., tuple[Tensor, ...]]:
    """A block, compiled for any number of rows and columns."""

    def block(*given: Tensor) -> tuple[Tensor, ...]:
        return graph(*given)

    # Recompilations are counted by code: blocks of one code would run out of them together.
    code = block.__code__.replace(co_name=f"layers_{graph.cut.start + 1}_{graph.cut.stop}")
    own = types.FunctionType(code, block.__globals__, code.co_name, block.__defaults__, block.__closure__)
    return torch.compile(own, dynamic=True)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Lets torch use some threads: it has one number for all that runs."""
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
