# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from transformers_cee.engines import onnxruntime as ours
from transformers_cee.engines.onnx_int8 import quantize


@torch.no_grad()
def test_weights_beyond_one_file_lie_beside_it(make_model, tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "LARGE", 0)
    model, folder = make_model(), tmp_path / "out"
    exported = model.export(folder, engine="onnxruntime", precision="float32")
    assert "engine/layer_1.onnx.data" in exported.config.exit_engine["files"]
    batch = tokenizer(texts[:4], padding=True, return_tensors="pt")
    torch.testing.assert_close(exported(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="'bfloat16' is none of the engine 'onnxruntime'; accepted are 'float32', "):
        make_model().export(tmp_path / "out", engine="onnxruntime", precision="bfloat16")


def test_int8_takes_no_texts(make_model, tmp_path):
    exported = make_model().export(tmp_path / "out", engine="onnxruntime", precision="int8")
    graph = onnx.load(tmp_path / "out" / "engine" / "layer_2.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 6 and len([node for node in graph.node if node.op_type == "QuantizeLinear"]) == 4
    assert exported(torch.ones(2, 3, dtype=torch.long)).logits.isfinite().all()


def test_products_have_a_scale_per_token_and_per_output():
    """Against a loop over tokens and outputs."""
    generator = np.random.default_rng(0)
    states = generator.normal(size=(2, 3, 8)).astype(np.float32) * np.float32([[[1], [50], [0]]])
    weight = generator.normal(size=(8, 5)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["r", "t", None]) for name in ("x", "y")]
    product = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph([product], "one", ends[:1], ends[1:], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ours.OPSET)], ir_version=9)
    quantize(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": states})
    for row in range(2):
        for token in range(3):
            state = states[row, token]
            step = max(float(np.abs(state).max()) / 127, 1e-12)
            for output in range(5):
                scale = float(np.abs(weight[:, output]).max()) / 64
                total = sum(
                    round(float(one) / step) * round(float(other) / scale)
                    for one, other in zip(state, weight[:, output], strict=True)
                )
                assert found[row, token, output] == pytest.approx(total * step * scale, rel=1e-4, abs=1e-6)


def test_threads_of_one_block_do_not_hold_up_the_next(make_model, tmp_path):
    """Every session has threads of its own, and they stop waiting when a run ends."""
    model = make_model().export(tmp_path / "out", engine="onnxruntime", precision="float32")
    model(torch.tensor([[5, 6, 7]]), exit_threshold=0.5)
    blocks = [run for run in model.blocks.values() if hasattr(run, "session")]
    asked = "session.force_spinning_stop"
    assert len(blocks) > 1
    assert {run.session.get_session_options().get_session_config_entry(asked) for run in blocks} == {"1"}
