# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is trained is what was asked for: all exits in training mode, every argument of losses honoured or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import (
    collate,
    collate_text,
    instructions,
    pad,
    random_rows,
    task,
    tiny_llama,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    weights,
)
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from transformers_cee.exits import losses


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = random_rows(8, 3)
PROBLEMS = {
    "single_label_classification": (torch.arange(8) % 3, 3),
    "multi_label_classification": (torch.arange(24).reshape(8, 3) % 2 * 1.0, 3),
    "regression": (torch.linspace(-1, 1, 8), 1),
}


def stock_arguments(folder, **fields):
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    options |= {"logging_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8}
    return TrainingArguments(str(folder), **{**options, **fields})


def stock_trainer(folder, model, rows=8, **fields):
    """🤗 Trainer as it is, on the tiny tasks."""
    text = model.item == "token"
    data = instructions(rows, seed=1) if text else task(rows, seed=1)
    arguments = stock_arguments(folder, **fields)
    return Trainer(model, arguments, data_collator=collate_text if text else collate, train_dataset=data)


def learnt(trainer):
    before = weights(trainer.model)
    trainer.train()
    return {name: after - before[name] for name, after in weights(trainer.model).items()}


@pytest.fixture(params=[tiny_model, tiny_llama], ids=["encoder", "decoder"])
def make(request):
    return request.param


class TestTrainingMode:
    @pytest.mark.parametrize("fields", [{}, {"exit_threshold": 0.0}, {"exit_criterion": "max_probability"}])
    def test_no_row_leaves_unless_asked(self, fields):
        """A loss by hand finds all exits."""
        model = tiny_model(**fields).train()
        batch = pad(ROWS)
        output = model(**batch)
        expected = tiny_model().train()(**batch, output_all_exits=True)
        assert output.exit_layers.unique().tolist() == [6]
        assert torch.equal(output.all_exit_logits, expected.all_exit_logits)
        assert torch.equal(output.logits, output.all_exit_logits[:, -1])
        F.cross_entropy(output.all_exit_logits.flatten(0, 1), torch.zeros(48, dtype=torch.long)).backward()
        assert all(head.weight.grad.any() for head in (*model.exit_heads.heads, model.classifier))

    @pytest.mark.parametrize("labels", [None, torch.arange(8) % 3])
    def test_asked_in_so_many_words(self, labels):
        batch = pad(ROWS)
        for options in ({"exit_threshold": 0.0}, {"exit_criterion": "max_probability", "exit_threshold": 0.0}):
            output = tiny_model().train()(**batch, labels=labels, **options)
            assert output.exit_layers.unique().tolist() == [1] and output.all_exit_logits is None
            if labels is not None:
                torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))

    def test_says_once_what_learns(self, make, monkeypatch):
        # Transformers remembers for good what was said.
        said = []
        monkeypatch.setattr(losses.logger, "warning_once", said.append)
        ids = pad(ROWS)["input_ids"]
        for grad, options in ((False, {}), (True, {"exit_threshold": 1.0}), (True, {"labels": None})):
            with torch.set_grad_enabled(grad):
                make().train()(ids, **options)
                make().eval()(ids, **options)
        assert len(said) == 1 and "trains the last exit alone" in said[0] and "`output_all_exits`=True" in said[0]

    @pytest.mark.parametrize("criterion", ["policy", "max_probability"])
    def test_says_once_that_policies_do_not(self, make, monkeypatch, tmp_path, criterion):
        """A stock Trainer is told; our own phases, and other criteria, have no reason to be."""
        said = []
        monkeypatch.setattr(losses.logger, "warning_once", said.append)
        model = make(exit_criterion=criterion)
        stock_trainer(tmp_path / "stock", model).train()
        assert len({*said}) == (criterion == "policy") and all("train_policy" in one for one in said)
        said.clear()
        ours = tiny_text_trainer if make is tiny_llama else tiny_trainer
        ours(tmp_path / "own", model, rows=8, trainer={"compute_metrics": None}).train()
        assert said == []

    def test_label_smoothing_of_trainer(self, make, tmp_path):
        """It takes the labels away."""
        trainer = stock_trainer(tmp_path, make(), label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match=r"`labels` is None.*`label_smoothing_factor`.*`output_all_exits`=True"):
            trainer.train()

    def test_stock_trainer_trains_all_exits(self, make, tmp_path):
        model = make(**({"exit_head": "untied"} if make is tiny_llama else {}))
        change = learnt(stock_trainer(tmp_path, model))
        heads = [name for name in change if "heads" in name or name.startswith(("classifier", "lm_head"))]
        assert len(heads) >= 4 and all(change[name].any() for name in heads)


class TestItemsInBatch:
    @pytest.mark.parametrize("problem", PROBLEMS)
    @pytest.mark.parametrize("training", [True, False])
    def test_divides_sums(self, problem, training):
        labels, num_labels = PROBLEMS[problem]
        model = tiny_model(problem_type=problem, num_labels=num_labels).train(training)
        batch = pad(ROWS)
        whole = model(**batch, labels=labels).loss
        items = labels.numel()
        parts = [
            model(
                **{name: values[rows] for name, values in batch.items()},
                labels=labels[rows],
                num_items_in_batch=given,
            ).loss
            for rows, given in ((slice(0, 3), items), (slice(3, 8), torch.tensor(items)))
        ]
        torch.testing.assert_close(sum(parts), whole, **CLOSE)

    @pytest.mark.parametrize("steps", [2, 4])
    def test_accumulation(self, make, steps, tmp_path):
        """Micro-batches of any sizes learn what one batch does."""
        expected = learnt(stock_trainer(tmp_path, make()))
        fields = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        change = learnt(stock_trainer(tmp_path, make(), **fields))
        assert any(one.any() for one in expected.values())
        for name, one in expected.items():
            torch.testing.assert_close(change[name], one, rtol=1e-3, atol=1e-6, msg=name)


def text_batch(rows=5, seed=1):
    return collate_text(list(instructions(rows, seed)))


def stock_twin(model):
    twin = LlamaForCausalLM._from_config(model.config, attn_implementation=model.config._attn_implementation)
    twin.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    return twin.eval()


class TestDecoder:
    @pytest.mark.parametrize("options", [{}, {"exit_threshold": 0.5}, {"output_all_exits": True}])
    def test_labels_that_are_shifted_already(self, options):
        """As context parallelism gives them: the last position has a target, too."""
        model, batch = tiny_llama(), text_batch()
        whole = model(**batch, **options)
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(model(**batch, shift_labels=shifted, **options).loss, whole.loss)
        shifted[:, -1] = 11
        output = model(**batch, shift_labels=shifted, **options)
        longer = {name: F.pad(values, (0, 1), value=1) for name, values in batch.items()}
        longer["labels"][:, -1] = 11
        torch.testing.assert_close(output.loss, model(**longer, **options).loss, **CLOSE)
        if not options:
            torch.testing.assert_close(output.loss, stock_twin(model)(**batch, shift_labels=shifted).loss)
        del batch["labels"]
        torch.testing.assert_close(model(**batch, shift_labels=shifted, **options).loss, output.loss, **CLOSE)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("options", [{}, {"exit_threshold": 0.5}])
    def test_ignore_index(self, training, options):
        model, batch = tiny_llama().train(training), text_batch()
        expected = model(**batch, **options).loss
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 59)
        assert not torch.isclose(model(**batch, **options).loss, expected)
        torch.testing.assert_close(model(**batch, ignore_index=59, **options).loss, expected)
        if not training and not options:
            torch.testing.assert_close(stock_twin(model)(**batch, ignore_index=59).loss, expected)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32, torch.bool])
    @pytest.mark.parametrize("training", [True, False])
    def test_dtypes_of_labels(self, training, dtype):
        model, batch = tiny_llama().train(training), text_batch()
        expected = model(**batch).loss
        batch["labels"] = batch["labels"].to(dtype)
        if dtype.is_floating_point or dtype == torch.bool:
            with pytest.raises(ValueError, match=rf"`labels` of dtype {dtype} must be .*integers"):
                model(**batch)
        else:
            assert torch.equal(model(**batch).loss, expected)

    def test_logits_in_training(self):
        """Those of the last exit, as the stock model has them; `logits_to_keep` saves their memory."""
        model, batch = tiny_llama().train(), text_batch()
        expected = stock_twin(model)(**batch).logits
        output = model(**batch)
        torch.testing.assert_close(output.logits, expected, **CLOSE)
        some = model(**batch, logits_to_keep=1)
        torch.testing.assert_close(some.logits, expected[:, -1:], **CLOSE)
        torch.testing.assert_close(some.loss, output.loss)
        assert model(**batch, output_all_exits=True).logits is None
        output.logits.sum().backward()
        assert model.model.embed_tokens.weight.grad.any()

    @pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 2])])
    @torch.no_grad()
    def test_kept_logits_do_not_change_the_loss(self, kept):
        model, batch = tiny_llama(), text_batch()
        whole, some = model(**batch), model(**batch, logits_to_keep=kept)
        torch.testing.assert_close(some.loss, whole.loss, **CLOSE)
        columns = whole.logits[:, -kept:] if isinstance(kept, int) else whole.logits[:, kept]
        torch.testing.assert_close(some.logits, columns, **CLOSE)

    @torch.no_grad()
    def test_as_many_kept_logits_in_another_order_do_not_change_the_loss(self):
        model, batch = tiny_llama(), text_batch()
        time = batch["input_ids"].shape[1]
        whole = model(**batch)
        for kept in (torch.arange(time).flip(0), torch.zeros(time, dtype=torch.long)):
            some = model(**batch, logits_to_keep=kept)
            torch.testing.assert_close(some.loss, whole.loss, **CLOSE)
            torch.testing.assert_close(some.logits, whole.logits[:, kept], **CLOSE)

    def test_context_aware_prompt_tuning(self):
        """PEFT makes its own loss of the logits in training mode."""
        peft = pytest.importorskip("peft")
        config = peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
        )
        with warnings.catch_warnings():
            # PEFT asks for what newer versions of transformers call something else.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(tiny_llama(), config).train()
        batch = text_batch()
        output = model(**batch, input_type_mask=torch.where(batch["labels"] == -100, 0, 4))
        output.loss.backward()
        assert output.loss.isfinite()
        assert any(one.grad is not None and one.grad.any() for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_dtypes_of_an_encoders_labels(dtype):
    labels, batch = torch.arange(8) % 3, pad(ROWS)
    for training in (True, False):
        model = tiny_model().train(training)
        assert torch.equal(model(**batch, labels=labels.to(dtype)).loss, model(**batch, labels=labels).loss)


def test_indicators_may_be_truth_values():
    labels, batch = PROBLEMS["multi_label_classification"][0], pad(ROWS)
    expected = tiny_model(problem_type="multi_label_classification")(**batch, labels=labels).loss
    model = tiny_model()
    assert torch.equal(model(**batch, labels=labels.bool()).loss, expected)
    assert model.config.problem_type == "multi_label_classification"


def test_another_loss_function_is_refused(make):
    model = make()
    with pytest.raises(ValueError, match=r"`loss_function`=.*all exits learn.*`output_all_exits`=True"):
        model.loss_function = F.cross_entropy
    assert callable(model.loss_function)


@pytest.mark.parametrize("name,value", [("shift_labels", torch.zeros(8, dtype=torch.long)), ("ignore_index", 0)])
def test_losses_of_tokens_are_not_those_of_rows(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is for language models"):
        tiny_model()(**pad(ROWS), labels=torch.arange(8) % 3, **{name: value})
