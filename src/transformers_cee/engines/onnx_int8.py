# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 products in ONNX graphs, with a scale per token that is found while they run (LLM.int8(), Dettmers et al. 2022,
section 2.2, without its part in 16 bits).

One scale over all states of a batch, as dynamic quantisation takes it, makes a row's result depend on the rows beside
it; one that is fixed beforehand is coarse where few units are large, as in BERT. A scale per token has neither fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np


# Steps of a weight to each side of zero. Processors without VNNI add two products of bytes in 16 bits, which 64 steps
# never exceed: 2 · 255 · 64 < 2^15. With 127, results would depend on the processor.
STEPS = 64
# Steps of a token's values to each side of the middle of a byte.
TOKEN_STEPS, MIDDLE = 127, 128
LEAST = np.float32(1e-12)
# Operators of ONNX Runtime beside the standard: products of int8 that give floats.
OWN = "com.microsoft"
CONSTANTS = {
    "int8/step": np.float32(1 / TOKEN_STEPS),
    "int8/least": LEAST,
    "int8/middle": np.uint8(MIDDLE),
    "int8/zero": np.int8(0),
    "int8/one": np.float32(1),
    "int8/last": np.array([-1]),
    "int8/column": np.array([-1, 1]),
}


def quantize(model: Any) -> None:
    """Makes the products of states (…, units) with constant weights (units, outputs) int8, in place; biases and all
    else stay as they are.

    Args:
        model (`onnx.ModelProto`): its constants are initializers.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer if len(weight.dims) == 2}
    constants, nodes = dict(CONSTANTS), []
    quantized: set[str] = set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        states, name = node.input
        weight = numpy_helper.to_array(weights[name])
        # Queries, keys and values are products of the same states.
        if states not in quantized:
            quantized.add(states)
            constants[f"{states}/table"] = np.array([-1, weight.shape[0]])
            nodes += _tokens(states)
        scale = np.maximum(np.abs(weight).max(0) / STEPS, LEAST).astype(np.float32)
        constants[f"{name}/int8"] = np.rint(weight / scale).astype(np.int8)
        constants[f"{name}/scale"], constants[f"{name}/size"] = scale, np.array([weight.shape[1]])
        nodes += _product(states, name, node.output[0])
    used = {name for node in nodes for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name not in weights or weight.name in used]
    kept += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used]
    made = helper.make_graph(nodes, graph.name, graph.input, graph.output, kept)
    graph.CopyFrom(made)
    model.opset_import.append(helper.make_opsetid(OWN, 1))


def _tokens(states: str) -> list[Any]:
    """States (…, units) become bytes (tokens, units) around `MIDDLE`, with a scale (tokens,)."""
    from onnx import TensorProto, helper

    middle = helper.make_tensor("middle", TensorProto.UINT8, [1], [MIDDLE])
    given = [
        ("Reshape", [states, f"{states}/table"], "rows", {}),
        ("Abs", [f"{states}/rows"], "sizes", {}),
        ("ReduceMax", [f"{states}/sizes", "int8/last"], "largest", {"keepdims": 0}),
        ("Mul", [f"{states}/largest", "int8/step"], "step", {}),
        ("Max", [f"{states}/step", "int8/least"], "scale", {}),
        ("Shape", [f"{states}/scale"], "tokens", {}),
        ("ConstantOfShape", [f"{states}/tokens"], "middle", {"value": middle}),
        ("QuantizeLinear", [f"{states}/rows", f"{states}/scale", f"{states}/middle"], "int8", {"axis": 0}),
        ("Reshape", [f"{states}/scale", "int8/column"], "scales", {}),
        ("Shape", [states], "shape", {"end": -1}),
    ]
    return [helper.make_node(kind, takes, [f"{states}/{name}"], **more) for kind, takes, name, more in given]


def _product(states: str, weight: str, product: str) -> list[Any]:
    """States times a weight, of the bytes of both. Its operator takes a scale per output, but none per token."""
    from onnx import helper

    takes = [f"{states}/int8", f"{weight}/int8", "int8/one", f"{weight}/scale", "int8/middle", "int8/zero"]
    return [
        helper.make_node("MatMulIntegerToFloat", takes, [f"{product}/sums"], domain=OWN),
        helper.make_node("Mul", [f"{product}/sums", f"{states}/scales"], [f"{product}/rows"]),
        helper.make_node("Concat", [f"{states}/shape", f"{weight}/size"], [f"{product}/shape"], axis=0),
        helper.make_node("Reshape", [f"{product}/rows", f"{product}/shape"], [product]),
    ]
