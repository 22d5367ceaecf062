# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Engines: the same walk over blocks of layers on torch, ONNX Runtime or OpenVINO, in float32, bfloat16 or int8."""

from transformers_cee.engines.engine import ENGINES, Engine, register_engine
from transformers_cee.engines.onnxruntime import ONNXRuntimeEngine
from transformers_cee.engines.openvino import OpenVINOEngine
from transformers_cee.engines.torch_engine import TorchEngine


__all__ = ["ENGINES", "Engine", "ONNXRuntimeEngine", "OpenVINOEngine", "TorchEngine", "register_engine"]
