# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluation of decoders on known text, and what trains at all."""

from __future__ import annotations

import pytest
import torch
from text_reference import row_tokens, text_tokens
from text_steps import is_policy, layer_weighted
from tiny import changed, instructions, tiny_llama, tiny_model, tiny_text_trainer, tiny_trainer, weights
from torch.nn import functional as F
from transformers import TrainerCallback


class TestWhatTrains:
    def names(self, model, *parts):
        return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}

    @pytest.mark.parametrize("kind", ["norm", "low_rank", "untied", "layernorm_linear"])
    @pytest.mark.parametrize("phase", ["heads", "consistent"])
    def test_exits_only(self, tmp_path, kind, phase):
        model = tiny_llama(exit_head=kind)
        before = weights(model)
        trainer = tiny_text_trainer(tmp_path, model, trainable="exits", weight_decay=0.1, exit_learning_rate=0.01)
        if phase == "heads":
            trainer.train_heads()
        else:
            trainer._consistent_model(str(tmp_path / "one"), None)
        assert changed(before, model.state_dict()) == self.names(model, "exit_heads", "exit_norms")
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_exits_of_an_encoder(self, tmp_path):
        model = tiny_model(num_hidden_layers=4)
        before = weights(model)
        tiny_trainer(tmp_path, model, rows=16, trainable="exits").train_heads()
        assert changed(before, model.state_dict()) == self.names(model, "exit_heads")

    def test_all_phases(self, tmp_path):
        model = tiny_llama(policy_inputs="both", exit_head="low_rank")
        before = weights(model)
        results = tiny_text_trainer(tmp_path, model, trainable="exits", eval_strategy="epoch").train()
        assert list(results.phases) == ["heads", "hardness", "policy", "consistent-1-model", "consistent-1-policy"]
        parts = ("exit_heads", "exit_norms", "exit_policies")
        assert changed(before, model.state_dict()) == self.names(model, *parts)

    @pytest.mark.parametrize("phases", [["heads"], ["hardness", "policy", "consistent"]])
    def test_nothing_to_train(self, tmp_path, phases):
        """Said before any work."""
        trainer = tiny_text_trainer(tmp_path, tiny_llama(exit_head="shared"), trainable="exits", phases=phases)
        with pytest.raises(ValueError, match=r"trainable.*exits.*exit_head"):
            trainer.train()
        assert not (tmp_path / "phases").exists()
        with pytest.raises(ValueError, match=r"trainable.*exits.*exit_head"):
            trainer.train_heads()
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    def test_policies_of_shared_exits(self, tmp_path):
        model = tiny_llama(exit_head="shared")
        before = weights(model)
        tiny_text_trainer(tmp_path, model, trainable="exits", phases=["hardness", "policy"]).train()
        assert all(map(is_policy, changed(before, model.state_dict())))

    def test_frozen_stays_frozen(self, tmp_path):
        model = tiny_llama()
        model.model.embed_tokens.requires_grad_(False)
        model.exit_norms.norms[1].requires_grad_(False)
        model.exit_policies.networks[2].requires_grad_(False)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        before = weights(model)
        tiny_text_trainer(tmp_path, model).train()
        assert changed(before, model.state_dict()) == set(before) - frozen
        assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen

    def test_all_frozen(self, tmp_path):
        model = tiny_llama().requires_grad_(False)
        with pytest.raises(ValueError, match=r"no parameter to train"):
            tiny_text_trainer(tmp_path, model).train()
        with pytest.raises(ValueError, match=r"policies are frozen.*modules_to_save"):
            tiny_text_trainer(tmp_path, model).train_policy()


class TestEvaluate:
    def expected(self, model, rows, threshold):
        """Figures of one threshold, row by row, unpadded, from the logits at the exits taken."""
        losses, right, agree, layers = [], [], [], []
        with torch.no_grad():
            for row in rows:
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
                output = model(input_ids=ids, labels=labels, exit_threshold=threshold, exit_criterion="policy")
                full = model(input_ids=ids).logits[0]
                for position in range(ids.shape[1] - 1):
                    label = int(labels[0, position + 1])
                    if label == -100:
                        continue
                    logits = output.logits[0, position]
                    losses.append(float(F.cross_entropy(logits[None], torch.tensor([label]))))
                    right.append(int(logits.argmax()) == label)
                    if position > 0 and int(labels[0, position]) != -100:
                        agree.append(int(logits.argmax()) == int(full[position].argmax()))
                        layers.append(int(output.exit_layers[0, position]))
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        loss = mean(losses)
        figures = {"loss": loss, "perplexity": float(torch.tensor(loss).exp()), "token_accuracy": mean(right)}
        return {**figures, "agreement": mean(agree)}, layers

    @pytest.mark.parametrize("batch_size", [4, 5])
    def test_points(self, tmp_path, batch_size):
        model = tiny_llama(exit_threshold=0.4)
        fields = {"eval_exit_thresholds": [0.5, 0.6], "per_device_eval_batch_size": batch_size}
        trainer = tiny_text_trainer(tmp_path, model, **fields)
        metrics = trainer.evaluate()
        assert "eval_wall_clock_speedup" not in metrics
        own, *others, full = (point.to_dict() for point in trainer.operating_points["eval"])
        first = {
            "exit_threshold": 0.4,
            "metrics": {name: metrics[f"eval_{name}"] for name in self.expected(model, trainer.eval_dataset, 0.4)[0]},
            **{name: metrics[f"eval_{name}"] for name in ("depth", "saved_layers", "layer_speedup")},
            "exit_histogram": own["exit_histogram"],
        }
        assert full["criterion"] == "full depth"
        points = [full, first, *others]
        assert [point["exit_threshold"] for point in points] == [1.0, 0.4, 0.5, 0.6]
        depths = []
        for point in points:
            figures, layers = self.expected(model, trainer.eval_dataset, point["exit_threshold"])
            assert point["metrics"] == pytest.approx(figures, rel=1e-4)
            assert point["depth"] == pytest.approx(sum(layers) / len(layers))
            assert point["saved_layers"] == pytest.approx(1 - point["depth"] / 4)
            assert point["layer_speedup"] == pytest.approx(4 / point["depth"])
            assert point["exit_histogram"] == {str(layer): layers.count(layer) for layer in (1, 2, 3, 4)}
            assert point.get("wall_clock_speedup") is None
            depths.append(point["depth"])
        assert depths[0] == 4.0 and len(set(depths)) > 2
        assert points[0]["metrics"]["agreement"] == 1.0 and points[-1]["metrics"]["agreement"] < 1.0

    def test_off_by_default(self, tmp_path):
        """Exits of a decoder are off in a fresh config; the loss is then that of the stock model."""
        trainer = tiny_text_trainer(tmp_path, eval_exit_thresholds=[])
        metrics = trainer.evaluate()
        assert metrics["eval_depth"] == 4.0 and metrics["eval_agreement"] == 1.0
        total = count = 0
        for row in trainer.eval_dataset:
            for token in row_tokens(trainer.model, row):
                total, count = total + float(token.losses[-1].detach()), count + 1
        assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-4)

    def test_metrics_get_tokens_beside_labels(self, tmp_path):
        seen = []

        def metrics(prediction):
            seen.append((prediction.predictions, prediction.label_ids))
            counted = prediction.predictions != -100
            return {"right": float((prediction.predictions == prediction.label_ids)[counted].mean())}

        trainer = tiny_text_trainer(tmp_path, eval_exit_thresholds=[], trainer={"compute_metrics": metrics})
        values = trainer.evaluate()
        assert values["eval_right"] == pytest.approx(values["eval_token_accuracy"])
        predictions, labels = seen[0]
        assert predictions.shape == labels.shape == (12, max(map(len, trainer.eval_dataset["input_ids"])))
        with torch.no_grad():
            for number, row in enumerate(trainer.eval_dataset):
                tokens = [token.predictions[-1] for token in row_tokens(trainer.model, row)]
                assert predictions[number][labels[number] != -100].tolist() == tokens

    def test_other_criterion_and_plain_text(self, tmp_path):
        model = tiny_llama(exit_criterion="max_probability", exit_threshold=0.1)
        trainer = tiny_text_trainer(tmp_path, model, eval_exit_thresholds=[])
        metrics = trainer.evaluate(instructions(5, seed=3, plain=True))
        rows = instructions(5, seed=3, plain=True)["input_ids"]
        assert sum(trainer.operating_points["eval"][0].exit_histogram.values()) == sum(len(ids) - 2 for ids in rows)
        assert 1.0 <= metrics["eval_depth"] < 4.0

    def test_within_phases(self, tmp_path):
        """`heads` tells of all exits, `consistent` of the exits that the config takes, `policy` of stored tokens."""
        logs = {}

        class Keep(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                logs[args.output_dir.rsplit("/", 1)[-1]] = metrics

        model = tiny_llama(exit_threshold=0.5)
        trainer = tiny_text_trainer(tmp_path, model, eval_strategy="epoch", trainer={"callbacks": [Keep()]})
        trainer.train_heads()
        with torch.no_grad():
            tokens = text_tokens(model, trainer.eval_dataset)
        assert logs["heads"]["eval_exit_loss"] == pytest.approx(float(layer_weighted(model, tokens)), rel=1e-4)
        full = sum(float(token.losses[-1]) for token in tokens) / len(tokens)
        assert logs["heads"]["eval_loss"] == pytest.approx(full, rel=1e-4) and logs["heads"]["eval_depth"] == 4.0
        trainer.train_policy()
        policy = logs["policy"]
        assert policy["eval_reward"] == -policy["eval_loss"] and 1.0 <= policy["eval_depth"] < 4.0
        assert 0.0 <= policy["eval_agreement"] <= 1.0
        trainer._consistent_model(str(tmp_path / "one"), None)
        expected, layers = self.expected(model, trainer.eval_dataset, 0.5)
        assert logs["one"]["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert logs["one"]["eval_depth"] == pytest.approx(sum(layers) / len(layers))

    def test_best_exits(self, tmp_path):
        """Phases are judged by what they change, also where exits are off in the config and full depth stays."""
        logs = []

        class Keep(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                logs.append((args.output_dir.rsplit("/", 1)[-1], metrics))

        options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
        options |= {"metric_for_best_model": "exit_loss", "num_train_epochs": 2, "consistent_num_train_epochs": 2}
        callbacks = {"callbacks": [Keep()]}
        tiny_text_trainer(tmp_path, trainable="exits", learning_rate=1e-2, trainer=callbacks, **options).train()
        heads = [metrics for phase, metrics in logs if phase == "heads"]
        assert (
            heads[0]["eval_loss"] == heads[1]["eval_loss"] and heads[1]["eval_exit_loss"] < heads[0]["eval_exit_loss"]
        )
        model_step = [metrics for phase, metrics in logs if phase == "consistent-1-model"]
        assert all(one["eval_exit_loss"] == pytest.approx(one["eval_loss"]) for one in model_step)
        assert all(one["eval_depth"] < 4.0 for one in model_step)

    def test_card(self, tmp_path):
        trainer = tiny_text_trainer(tmp_path, eval_exit_thresholds=[0.4, 0.6])
        trainer.evaluate()
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        for point in trainer.operating_points["eval"]:
            assert f"{point.depth:.2f}" in card
        assert "perplexity" in card and "token_loss" in card

    def test_bfloat16_autocast(self, tmp_path):
        trainer = tiny_text_trainer(tmp_path, bf16=True, eval_strategy="epoch", eval_exit_thresholds=[0.5])
        trainer.train()
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
        assert trainer.evaluate()["eval_depth"] == 4.0
