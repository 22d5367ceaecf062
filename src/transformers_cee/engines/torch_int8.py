# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 for the engine `torch`, on the CPU: the linear maps of the layers, by torch's own fused kernel (FBGEMM).

Weights have a scale per output, activations one per linear map, taken from texts: no row has an influence on another.
Before that, inputs with outliers give a part of their size to the weights (SmoothQuant, Xiao et al. 2023). Weights
take 7 of 8 bits: without VNNI, processors add pairs of products in 16 bits, which more would overflow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


LEVELS, WEIGHT_LEVELS = 255, 63
# Share of the orders of magnitude of an input that its weights take.
SMOOTHING = 0.7
WEIGHT, SCALE, FACTOR, RANGE = "weight", "weight_scale", "input_factor", "input_range"


class QuantizedLinear(nn.Module):
    """A linear map in int8: float32 in and out.

    Args:
        weight (`Tensor` of shape `(out, in)`): in int8, of inputs that have been multiplied by `factor`.
        scale (`Tensor` of shape `(out,)`): of the weight.
        bias (`Tensor` of shape `(out,)`, *optional*): in float32.
        factor (`Tensor` of shape `(in,)`): of each input.
        input_range (`Tensor` of shape `(2,)`): least and greatest product; numbers beyond are cut off.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, factor: Tensor, input_range: Tensor
    ) -> None:
        super().__init__()
        self.factor = factor
        least, greatest = min(0.0, float(input_range[0])), max(0.0, float(input_range[1]))
        self.scale = max((greatest - least) / LEVELS, torch.finfo(torch.float32).eps)
        # The level of 0.
        self.zero_point = round(-least / self.scale)
        self.packed = _packed(weight, scale, bias)

    def forward(self, given: Tensor) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            given * self.factor, self.scale, self.zero_point, self.packed
        )


def _packed(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """A weight as FBGEMM takes it, which alone has the fused kernel."""
    before = torch.backends.quantized.engine
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        # torch means to give up tensors of this kind, but has no other way into the kernel.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        quantized = torch.quantize_per_channel(weight * scale.unsqueeze(1), scale, zeros, 0, torch.qint8)
    torch.backends.quantized.engine = "fbgemm"
    try:
        return torch.ops.quantized.linear_prepack(quantized, bias)
    finally:
        torch.backends.quantized.engine = before


def check_int8(device: str, compile: bool) -> None:
    """Raises `ValueError` where int8 does not run."""
    if device != "cpu":
        raise ValueError(f"`device`={device!r}: int8 of the engine 'torch' runs on the CPU; export another precision.")
    if compile:
        raise ValueError("`compile`=True: int8 of the engine 'torch' is not compiled; export another precision.")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("`precision`='int8' of the engine 'torch' needs FBGEMM, which this build of torch lacks.")


def linear_maps(model: Any) -> dict[str, nn.Linear]:
    """The linear maps of a model's layers, by name."""
    inside = {id(module) for layer in model.layers for module in layer.modules() if type(module) is nn.Linear}
    return {name: module for name, module in model.named_modules() if id(module) in inside}  # type: ignore[misc]


def shapes_of_scales(model: Any) -> dict[str, tuple[int, ...]]:
    """What a file in int8 has beside the weights, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in linear_maps(model).items():
        shapes |= {
            f"{name}.{SCALE}": (linear.out_features,),
            f"{name}.{FACTOR}": (linear.in_features,),
            f"{name}.{RANGE}": (2,),
        }
    return shapes


def quantized_weights(
    model: Any, run: Callable[..., Any], samples: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Weights, scales and ranges of the linear maps, by their names in the file.

    Args:
        model: the classifier.
        run: runs all layers on a sample.
        samples (sequence of mappings): batches of tokens, with their masks.
    """
    maps = linear_maps(model)
    found: dict[str, Tensor] = {}
    for name, (least, greatest) in _input_ranges(maps, run, samples).items():
        weight, small = maps[name].weight, torch.finfo(torch.float32).eps
        size = torch.maximum(-least, greatest).clamp_min(small)
        factor = weight.abs().amax(0).clamp_min(small) ** (1 - SMOOTHING) / size**SMOOTHING
        weight = weight / factor
        scale = (weight.abs().amax(1) / WEIGHT_LEVELS).clamp_min(small)
        found[f"{name}.{WEIGHT}"] = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        found[f"{name}.{SCALE}"], found[f"{name}.{FACTOR}"] = scale, factor
        found[f"{name}.{RANGE}"] = torch.stack(((least * factor).min(), (greatest * factor).max()))
    return found


def _input_ranges(
    maps: Mapping[str, nn.Linear], run: Callable[..., Any], samples: Sequence[Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and greatest number of each input (in,) of the linear maps, padding left out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    mask: list[Tensor] = []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            values = given[0]
            values = values[mask[0]] if values.shape[:2] == mask[0].shape else values.flatten(0, -2)
            least, greatest = values.aminmax(dim=0)
            before = found.get(name, (least, greatest))
            found[name] = torch.minimum(least, before[0]), torch.maximum(greatest, before[1])

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in maps.items()]
    try:
        for sample in samples:
            mask[:] = [sample["attention_mask"]]
            run(sample)
    finally:
        for one in hooks:
            one.remove()
    return found


def place_int8(model: Any, tensors: dict[str, Tensor]) -> None:
    """Puts linear maps in int8 in the place of those of the layers, and takes out of `tensors` what they are made
    of."""
    for name, linear in linear_maps(model).items():
        weight, scale, factor, seen = (tensors.pop(f"{name}.{part}") for part in (WEIGHT, SCALE, FACTOR, RANGE))
        bias = None if linear.bias is None else tensors.pop(f"{name}.bias")
        holder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(holder), attribute, QuantizedLinear(weight, scale, bias, factor, seen))
