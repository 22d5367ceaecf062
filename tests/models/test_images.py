# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What models of images have that texts have not: stages of other widths, maps, norms over batches, positions that are
interpolated."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from clocks import layer_clock
from peft import PeftModel, get_peft_model
from tiny import training_arguments
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextForImageClassification,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTModel,
)

from transformers_cee import (
    ConsistentEETrainer,
    ConvNextCeeConfig,
    ConvNextForConsistentEE,
    ResNetCeeConfig,
    ResNetForConsistentEE,
    ViTCeeConfig,
    ViTCeeModel,
    ViTForConsistentEE,
    exit_costs,
    exit_lora_config,
    load_exits,
    measured_exit_costs,
)
from transformers_cee.evaluation.timing import Timer
from transformers_cee.training.parameters import freeze_for_model_step


WIDTHS, DEPTHS = [8, 24, 16], [1, 2, 1]
# Width of each block.
BLOCKS = [8, 24, 24, 16]
RESNET = {"hidden_sizes": WIDTHS, "depths": DEPTHS, "embedding_size": 8, "layer_type": "basic", "num_labels": 3}
CONVNEXT = {
    "hidden_sizes": WIDTHS, "depths": DEPTHS, "num_stages": 3, "patch_size": 4, "layer_scale_init_value": 1.0,
    "initializer_range": 0.15, "num_labels": 3,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "num_labels": 3, "initializer_range": 0.15,
}  # fmt: skip
CONFIGS = {ResNetForConsistentEE: (ResNetCeeConfig, RESNET), ConvNextForConsistentEE: (ConvNextCeeConfig, CONVNEXT)}
STAGED = pytest.mark.parametrize("model_class", list(CONFIGS))


def staged(model_class, **fields):
    torch.manual_seed(0)
    config_class, own = CONFIGS[model_class]
    return model_class(config_class(**{**own, **fields})).eval()


def pixels(count=6, side=32, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@STAGED
class TestStages:
    def test_layers_are_blocks(self, model_class, tmp_path):
        model = staged(model_class, exit_layers=[1, 3])
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (4, 24)
        assert model.layer_numbers == [1, 3, 4] and len(model.layers) == 4
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert "num_hidden_layers" not in saved and "hidden_size" not in saved
        again = type(model.config).from_pretrained(tmp_path)
        assert again.exit_layer_numbers == [1, 3, 4] and again.depths == DEPTHS

    def test_unequal_lists_are_refused(self, model_class):
        config_class, own = CONFIGS[model_class]
        with pytest.raises(ValueError, match=r"`depths`=\[1, 2\] and `hidden_sizes`=\[8, 24, 16\]"):
            config_class(**{**own, "depths": [1, 2], "num_stages": 3, "out_features": None})

    def test_exits_stay_with_their_blocks(self, model_class, tmp_path):
        """With fewer blocks in a stage, deeper ones would have other numbers."""
        staged(model_class).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"`depths`=\[1, 1, 1\] has no place for .*stages\.1\.layers\.1"):
            model_class.from_pretrained(tmp_path, depths=[1, 1, 1])
        with pytest.raises(ValueError, match=r"lacks \d+ weights of the layers"):
            model_class.from_pretrained(tmp_path, depths=[1, 3, 1])
        fewer = model_class.from_pretrained(tmp_path, exit_layers=[2])
        assert fewer.layer_numbers == [2, 4]
        assert torch.equal(fewer.exit_heads.heads[0].weight, staged(model_class).exit_heads.heads[1].weight)

    @torch.no_grad()
    def test_everything_is_as_wide_as_its_stage(self, model_class):
        model = staged(model_class, exit_norm="layer_norm", policy_inputs="both")
        assert [head.in_features for head in model.exit_heads.heads] == BLOCKS[:-1]
        assert [norm.normalized_shape[0] for norm in model.exit_norms.norms] == BLOCKS
        assert [network[0].in_features for network in model.exit_policies.networks] == [9 + 4, 24 + 5, 24 + 5]
        states = model(pixels(), output_all_exits=True).all_exit_states
        assert states.shape == (6, 4, 24)
        for index, width in enumerate(BLOCKS):
            assert states[:, index, :width].ne(0).all() and not states[:, index, width:].any()
            # Each norm is over the channels of its stage.
            assert states[:, index, :width].mean(-1).abs().max() < 1e-5

    @torch.no_grad()
    def test_what_fills_states_up_is_not_looked_at(self, model_class):
        model = staged(model_class)
        states = model(pixels(), output_all_exits=True).all_exit_states
        spoilt = states.clone()
        for index, width in enumerate(BLOCKS):
            spoilt[:, index, width:] = 7.0
            assert torch.equal(model.logits(states[:, index], index), model.logits(spoilt[:, index], index))
        assert torch.equal(model.exit_policies(states), model.exit_policies(spoilt))

    @torch.no_grad()
    def test_maps_are_recorded_in_the_places_of_their_images(self, model_class):
        model, images, seen = staged(model_class), pixels(), []
        for layer in model.layers:
            layer.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
        full = model(images, output_hidden_states=True).hidden_states
        assert [one.shape[1] for one in full] == [8, *BLOCKS]
        for ours, theirs in zip(full[1:], seen, strict=True):
            assert torch.equal(ours, theirs)
        first = model(images, exit_criterion="max_probability", exit_threshold=0.0, output_hidden_states=True)
        assert first.exit_layers.tolist() == [1] * 6
        assert torch.equal(first.hidden_states[1], full[1]) and first.hidden_states[2:] == (None,) * 3
        scores = model(images, exit_criterion="max_probability", exit_threshold=1.0, output_all_exits=True)
        middle = scores.all_exit_logits[:, 0].softmax(-1).amax(-1).median()
        some = model(images, exit_criterion="max_probability", exit_threshold=[float(middle), 1, 1, 1],
                     output_hidden_states=True)  # fmt: skip
        left = some.exit_layers == 1
        assert 0 < int(left.sum()) < 6
        for layer in (2, 3, 4):
            assert some.hidden_states[layer][left].isnan().all()
            torch.testing.assert_close(some.hidden_states[layer][~left], full[layer][~left], rtol=1e-4, atol=1e-5)

    def test_images_of_another_shape_are_refused(self, model_class):
        model = staged(model_class)
        for wrong, shape in ((None, "None"), (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"), (pixels(0), r"\(0, ")):
            with pytest.raises(ValueError, match=rf"`pixel_values` of shape {shape}"):
                model(wrong)
        with pytest.raises(TypeError, match=r"`exit_treshold`=0\.5 is no argument: did you mean `exit_threshold`"):
            model(pixels(), exit_treshold=0.5)


STOCK = {
    ResNetForConsistentEE: (ResNetForImageClassification, RESNET),
    ConvNextForConsistentEE: (ConvNextForImageClassification, CONVNEXT),
    ViTForConsistentEE: (ViTForImageClassification, VIT),
}


def saved_base(model_class, folder):
    """A stock model, whose lists of sizes are tuples, as the defaults of transformers are."""
    torch.manual_seed(0)
    stock_class, fields = STOCK[model_class]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    stock = stock_class(stock_class.config_class(**fields)).eval()
    stock.save_pretrained(folder)
    return stock


@torch.no_grad()
def every_exit(model):
    return model.eval()(pixels(), output_all_exits=True).all_exit_logits


@pytest.mark.parametrize("model_class", list(STOCK))
class TestExitsWithoutTheirBase:
    def test_exits_alone_come_back_on_their_base(self, model_class, tmp_path):
        stock = saved_base(model_class, tmp_path / "base")
        model = model_class.from_pretrained(tmp_path / "base", exit_layers=[1, 3])
        model.save_exits(tmp_path / "exits")
        expected = every_exit(model)
        torch.testing.assert_close(
            every_exit(AutoModelForImageClassification.from_pretrained(tmp_path / "exits")), expected
        )
        torch.testing.assert_close(every_exit(load_exits(stock, tmp_path / "exits")), expected)

    def test_a_base_of_other_sizes_is_refused(self, model_class, tmp_path):
        saved_base(model_class, tmp_path / "base")
        model_class.from_pretrained(tmp_path / "base").save_exits(tmp_path / "exits")
        stock_class, fields = STOCK[model_class]
        name = "num_hidden_layers" if model_class is ViTForConsistentEE else "depths"
        other = stock_class(stock_class.config_class(**{**fields, name: 5 if name != "depths" else [1, 3, 1]}))
        with pytest.raises(ValueError, match=f"`{name}`="):
            load_exits(other, tmp_path / "exits")

    def test_adapters_bring_their_exits_to_a_stock_model(self, model_class, tmp_path):
        """PEFT has no task for images, and writes another note of such adapters."""
        saved_base(model_class, tmp_path / "base")
        model = model_class.from_pretrained(tmp_path / "base", exit_layers=[1, 3], policy_hidden_size=5)
        adapted = get_peft_model(model, exit_lora_config(None, r=2))
        with torch.no_grad():
            adapted.get_base_model().classifier.apply(
                lambda module: module.weight.normal_() if isinstance(module, nn.Linear) else None
            )
        expected = every_exit(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(
            STOCK[model_class][0].from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert type(again.get_base_model()) is model_class
        assert again.get_base_model().config.policy_hidden_size == 5
        torch.testing.assert_close(every_exit(again), expected, rtol=1e-5, atol=1e-5)
        config = pickle.loads(pickle.dumps(adapted.peft_config["default"]))
        assert config.auto_mapping == adapted.peft_config["default"].auto_mapping


class TestCosts:
    def test_blocks_are_counted_as_they_shrink_maps(self):
        """32 pixels are 8 behind the stem, and 4 and 2 behind the next stages."""
        model = staged(ResNetForConsistentEE)
        convolutions = [
            [(8, 8, 9, 64), (8, 8, 9, 64)],
            [(8, 24, 9, 16), (24, 24, 9, 16), (8, 24, 1, 16)],
            [(24, 24, 9, 16), (24, 24, 9, 16)],
            [(24, 16, 9, 4), (16, 16, 9, 4), (24, 16, 1, 4)],
        ]
        found = model.train().item_flops(32)
        assert found.layers == [sum(2 * a * b * c * d for a, b, c, d in block) for block in convolutions]
        assert found.heads == [2 * 3 * width for width in BLOCKS] and model.training
        costs = exit_costs(model, 32, criterion="max_probability")
        heads = [sum(found.heads[: index + 1]) for index in range(4)]
        assert costs == [sum(found.layers[: index + 1]) + heads[index] for index in range(4)]

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_attention_counts(self, attention):
        model = ViTForConsistentEE(ViTCeeConfig(**VIT, attn_implementation=attention))
        tokens, hidden, wide = 17, 32, 48
        layer = 2 * tokens * (4 * hidden**2 + 2 * hidden * wide) + 4 * tokens**2 * hidden
        assert model.item_flops(32).layers == [layer] * 4

    def test_costs_are_measured(self):
        model = staged(ResNetForConsistentEE)
        timer = Timer(clock=layer_clock(model.layers))
        times = measured_exit_costs(model, [{"pixel_values": pixels(2)}], timer, disable_tqdm=True)
        assert times == [500.0, 1000.0, 1500.0, 2000.0]


class TestNormsOverBatches:
    def test_training_the_exits_alone_leaves_the_last_exit_as_it_was(self):
        model = staged(ResNetForConsistentEE)
        with torch.no_grad():
            before = model(pixels()).logits
        freeze_for_model_step(model, "internal_exits")
        model.train()
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        model(pixels(seed=2), labels=torch.arange(6) % 3).loss.backward()
        optimizer.step()
        with torch.no_grad():
            output = model.eval()(pixels(), output_all_exits=True)
        assert torch.equal(output.logits, before)

    def test_training_all_of_it_moves_their_statistics(self):
        model = staged(ResNetForConsistentEE).train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        model(pixels(), labels=torch.arange(6) % 3)
        assert all(not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
        assert not any(norm.training for norm in model.eval().modules())


class TestViT:
    @torch.no_grad()
    def test_positions_are_interpolated_as_in_the_stock_model(self, tmp_path):
        torch.manual_seed(0)
        model = ViTForConsistentEE(ViTCeeConfig(**VIT)).eval()
        model.save_pretrained(tmp_path)
        stock = ViTForImageClassification.from_pretrained(
            tmp_path, config=ViTForImageClassification.config_class(**VIT)
        ).eval()
        large = pixels(side=48)
        ours = model(large, interpolate_pos_encoding=True, exit_threshold=1.0).logits
        torch.testing.assert_close(ours, stock(large, interpolate_pos_encoding=True).logits, rtol=0, atol=1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_exits_share_the_final_norm(self, pooling):
        torch.manual_seed(0)
        model = ViTForConsistentEE(ViTCeeConfig(**VIT, exit_pooling=pooling)).eval()
        model.vit.layernorm.weight.normal_()
        output = model(pixels(), output_all_exits=True, output_hidden_states=True)
        for index, hidden in enumerate(output.hidden_states[1:]):
            normed = nn.functional.layer_norm(
                hidden, (32,), model.vit.layernorm.weight, model.vit.layernorm.bias, model.config.layer_norm_eps
            )
            expected = normed[:, 0] if pooling == "cls" else normed.mean(1)
            torch.testing.assert_close(output.all_exit_states[:, index], expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_the_body_alone_is_loaded_from_either_names(self, tmp_path):
        """Names in files are not those of the model in every release."""
        torch.manual_seed(0)
        model = ViTForConsistentEE(ViTCeeConfig(**VIT)).eval()
        model.save_pretrained(tmp_path / "whole")
        body, info = ViTCeeModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values())
        expected = model.vit(pixels()).last_hidden_state
        assert torch.equal(body.eval()(pixels()).last_hidden_state, expected)
        body.save_pretrained(tmp_path / "body")
        stock, info = ViTModel.from_pretrained(
            tmp_path / "body", config=ViTModel.config_class(**VIT), add_pooling_layer=False, output_loading_info=True
        )
        assert not any(info.values())
        assert torch.equal(stock.eval()(pixels()).last_hidden_state, expected)


class TestTrainer:
    def test_evaluated_and_published(self, tmp_path, capsys):
        """The figures are those of a walk by hand, and the card's snippet runs as it stands."""
        model, images, labels = staged(ResNetForConsistentEE), pixels(8), torch.arange(8) % 3
        rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
        args = training_arguments(tmp_path, eval_exit_thresholds=[0.5], policy_num_train_epochs=1)
        trainer = ConsistentEETrainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        metrics = trainer.evaluate()
        with torch.no_grad():
            output = model.eval()(images, exit_threshold=0.5)
        points = trainer.operating_points["eval"]
        assert any(point.depth == pytest.approx(float(output.exit_layers.float().mean())) for point in points)
        assert metrics["eval_loss"] > 0
        trainer.save_model()
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert "pipeline_tag: image-classification" in text and "A model of images with early exits." in text
        snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
        exec(compile(snippet, "card", "exec"), {})
        assert "second image" in capsys.readouterr().out
