# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The ways to run a LLaMA with exits, each against loops over single tokens of unpadded rows."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from slow_llama import SlowRow, prompts, spreading
from text_reference import text_tokens
from tiny import collate_text, instructions, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM

from transformers_cee.exits.token_losses import CHUNK_ROWS, CrossEntropy, FinalArgmax, FinalDistributionKL
from transformers_cee.exits.training_options import ExitTraining


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def texts(rows=5, seed=1, side="right", **extra):
    """Rows of prompts and answers, and the batch that they make."""
    rows = list(instructions(rows, seed))
    batch = collate_text(rows)
    if side == "left":
        turned = {}
        for name, values in batch.items():
            count = batch["attention_mask"].sum(1).tolist()
            turned[name] = torch.stack([v.roll(len(v) - n) for v, n in zip(values, count, strict=True)])
        batch = turned
    return rows, {**batch, **extra}


def weighted(losses):
    """`Σ i·l_i / Σ i`."""
    return sum(number * loss for number, loss in enumerate(losses, 1)) / sum(range(1, len(losses) + 1))


def stock_twin(model):
    twin = LlamaForCausalLM._from_config(model.config, attn_implementation=model.config._attn_implementation)
    twin.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    return twin.eval()


class TestAllExits:
    """All exits of all counted tokens."""

    def compare(self, model, side="right", token_loss=None, seed=1):
        rows, batch = texts(seed=seed, side=side)
        tokens = text_tokens(model, rows)
        output = model(**batch, output_all_exits=True, exit_training=ExitTraining(token_loss=token_loss))
        assert output.token_labels.tolist() == [token.label for token in tokens]
        assert output.token_rows.tolist() == [token.row for token in tokens]
        assert output.may_exit.tolist() == [token.may_exit for token in tokens]
        assert output.all_exit_predictions.tolist() == [token.predictions for token in tokens]
        torch.testing.assert_close(
            output.all_exit_states, torch.stack([torch.stack(token.states) for token in tokens]), **CLOSE
        )
        assert output.logits is None and output.exit_layers.unique().tolist() == [model.config.num_hidden_layers]
        return tokens, output

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_losses(self, kind, side):
        tokens, output = self.compare(tiny_llama(exit_head=kind, exit_head_rank=3), side)
        expected = torch.stack([torch.stack(token.losses) for token in tokens])
        torch.testing.assert_close(output.all_exit_losses, expected, **CLOSE)
        expected = sum(weighted(token.losses) for token in tokens) / len(tokens)
        torch.testing.assert_close(output.loss, expected, **CLOSE)
        assert output.all_exit_losses.dtype == torch.float32 and output.all_exit_features is None

    @pytest.mark.parametrize("mask", [True, False])
    def test_plain_text(self, mask):
        """Without a prompt all but a row's first token may leave: it has nothing before it."""
        model, rows = tiny_llama(), list(instructions(5, 1, plain=True))
        if not mask:
            rows = [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])]
        for row in rows:
            row["labels"] = row["input_ids"]
        batch = collate_text(rows)
        if not mask:
            del batch["attention_mask"]
        tokens, output = text_tokens(model, rows), model(**batch, output_all_exits=True)
        assert output.may_exit.tolist() == [token.may_exit for token in tokens]
        assert 0 < sum(output.may_exit.tolist()) < len(tokens)
        torch.testing.assert_close(
            output.all_exit_losses, torch.stack([torch.stack(token.losses) for token in tokens]), **CLOSE
        )
        known = model(**batch, exit_threshold=0.0)
        for row, layers in zip(rows, known.exit_layers.tolist(), strict=True):
            assert layers[: len(row["input_ids"])] == [4] + [1] * (len(row["input_ids"]) - 1)

    def test_first_token_behind_padding(self):
        ids = torch.tensor([[7, 7, 5, 9, 11], [3, 4, 5, 6, 8]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        labels = ids.where(mask.bool(), torch.tensor(-100))
        output = tiny_llama()(ids, attention_mask=mask, labels=labels, exit_threshold=0.0)
        assert output.exit_layers.tolist() == [[4, 4, 4, 1, 1], [4, 1, 1, 1, 1]]
        assert output.token_labels.tolist() == [5, 9, 11, 4, 5, 6, 8]
        assert output.may_exit.tolist() == [False, False, True, False, True, True, True]

    @pytest.mark.parametrize("exit_layers", [2, [1], [2, 3]])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_exit_layers(self, exit_layers, implementation):
        model = tiny_llama(exit_layers=exit_layers)
        model.set_attn_implementation(implementation)
        tokens, output = self.compare(model)
        expected = torch.stack([torch.stack(token.losses) for token in tokens])
        torch.testing.assert_close(output.all_exit_losses, expected, **CLOSE)

    @pytest.mark.parametrize("inputs", ["confidence", "both"])
    def test_features(self, inputs):
        tokens, output = self.compare(tiny_llama(policy_inputs=inputs))
        assert output.all_exit_features.shape == (len(tokens), 3, 5)
        for token, features in zip(tokens, output.all_exit_features.tolist(), strict=True):
            scores = [reference.confidence(logits, "single_label_classification") for logits in token.logits]
            for index in range(3):
                same = [one == token.predictions[index] for one in token.predictions[:index]]
                before = scores[index - 1][1] if index else 0.0
                expected = [*scores[index], before, sum(same) / len(same) if same else 0.0]
                assert features[index] == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (2.0, 0), (0.5, 7), (1.0, 99)])
    def test_divergence_from_the_final_exit(self, temperature, top_k):
        tokens, output = self.compare(tiny_llama(), token_loss=FinalDistributionKL(temperature, top_k))
        for token, losses in zip(tokens, output.all_exit_losses.tolist(), strict=True):
            chosen = token.logits[-1].argsort(descending=True)[: top_k or None]
            final = (token.logits[-1][chosen].double() / temperature).softmax(0)
            for logits, loss in zip(token.logits, losses, strict=True):
                ours = (logits[chosen].double() / temperature).log_softmax(0)
                divergence = sum(p * (math.log(p) - q) for p, q in zip(final.tolist(), ours.tolist(), strict=True))
                assert loss == pytest.approx(temperature**2 * divergence, abs=1e-4)

    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_argmax_of_the_final_exit(self, weight):
        tokens, output = self.compare(tiny_llama(), token_loss=FinalArgmax(weight))
        for token, losses in zip(tokens, output.all_exit_losses.tolist(), strict=True):
            target = int(token.logits[-1].argmax())
            for logits, loss in zip(token.logits, losses, strict=True):
                shares = logits.double().softmax(0).tolist()
                entropy = -sum(share * math.log(share) for share in shares)
                assert loss == pytest.approx(-(1 - weight) * math.log(shares[target]) - weight * entropy, abs=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("token_loss", [CrossEntropy(), FinalDistributionKL(2.0), FinalArgmax(0.3)])
    def test_gradients(self, kind, token_loss):
        """Logits are computed again for the gradient, which is that of the plain sum."""
        model = tiny_llama(exit_head=kind, tie_word_embeddings=True)
        rows, batch = texts()
        tokens = text_tokens(model, rows)
        losses = [
            torch.stack(
                [
                    token_loss(logits[None], token.logits[-1][None].detach(), torch.tensor([token.label]))[0]
                    for logits in token.logits
                ]
            )
            for token in tokens
        ]
        (sum(weighted(one) for one in losses) / len(tokens)).backward()
        expected = {name: one.grad for name, one in model.named_parameters()}
        model.zero_grad()
        model(**batch, output_all_exits=True, exit_training=ExitTraining(token_loss=token_loss)).loss.backward()
        for name, parameter in model.named_parameters():
            if expected[name] is None:
                assert parameter.grad is None or not parameter.grad.any(), name
            else:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)

    def test_training_mode_with_labels(self):
        """As Trainer calls it."""
        model, (_, batch) = tiny_llama(), texts()
        expected = model(**batch, output_all_exits=True).loss
        model.train()
        torch.testing.assert_close(model(**batch).loss, expected)
        items = torch.tensor(7)
        count = int((batch["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, expected * count / 7)

    def test_embedded(self):
        model, (_, batch) = tiny_llama(), texts()
        expected = model(**batch, output_all_exits=True)
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))
        output = model(inputs_embeds=embedded, **batch, output_all_exits=True)
        assert torch.equal(output.all_exit_losses, expected.all_exit_losses)

    @pytest.mark.parametrize("time", [1, 4])
    @pytest.mark.parametrize("training", [False, True])
    def test_nothing_counts(self, time, training):
        """A part of a batch may hold no label; its share of the sum is 0."""
        model = tiny_llama(policy_inputs="both").train(training)
        ids = torch.full((2, time), 5)
        labels = ids.clone() if time == 1 else torch.full_like(ids, -100)
        output = model(ids, labels=labels, output_all_exits=True, num_items_in_batch=3)
        assert output.all_exit_losses.shape == (0, 4) and output.all_exit_states.shape == (0, 4, 32)
        assert output.all_exit_predictions.shape == (0, 4) and output.all_exit_features.shape == (0, 3, 5)
        assert float(output.loss.detach()) == 0.0
        output.loss.backward()
        assert model(ids, labels=labels, output_all_exits=True).loss.isnan()
        assert (
            float(
                model(
                    ids, labels=labels, exit_training=ExitTraining(sample_exits=True), num_items_in_batch=3
                ).loss.detach()
            )
            == 0.0
        )
        known = model(ids, labels=labels, exit_threshold=0.5, num_items_in_batch=3)
        assert float(known.loss.detach()) == 0.0 and known.exit_layers.unique().tolist() == [4]

    def test_one_exit_only(self):
        model, (_, batch) = tiny_llama(exit_layers=[4], policy_inputs="both"), texts()
        output = model(**batch, output_all_exits=True)
        assert output.all_exit_losses.shape[1] == 1 and output.all_exit_features.shape == (
            len(output.token_labels),
            0,
            5,
        )
        torch.testing.assert_close(output.loss, stock_twin(model)(**batch).loss)
        assert model(**batch, exit_threshold=0.0).exit_layers.unique().tolist() == [4]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that ends with the vocabulary, weights left out."""

    def __init__(self, vocabulary, shapes):
        super().__init__()
        self.vocabulary, self.weights, self.most = vocabulary, shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.dim() and one.shape[-1] == self.vocabulary:
                if tuple(one.shape) not in self.weights:
                    self.most = max(self.most, one.numel())
        return result


@pytest.mark.parametrize("kind", ["norm", "untied", "layernorm_linear"])
@pytest.mark.parametrize("mode", ["all", "sampled", "known"])
def test_logits_of_all_tokens_never_exist_together(kind, mode):
    """Neither in the forward pass nor in the backward pass."""
    vocabulary = 61
    model = tiny_llama(exit_head=kind, vocab_size=vocabulary, policy_inputs="both" if mode == "all" else "state")
    ids = torch.randint(3, 60, (CHUNK_ROWS // 8, 24))
    options = {"all": {"output_all_exits": True}, "sampled": {"exit_training": ExitTraining(sample_exits=True)}}.get(
        mode, {"exit_threshold": 0.5}
    )
    if mode == "known":
        # Its logits are an output; without labels it is up to `logits_to_keep`.
        options["logits_to_keep"] = 1
    assert ids.numel() >= 3 * CHUNK_ROWS
    rows = []
    hook = lambda _, inputs, output: rows.append(output.numel() // vocabulary)  # noqa: E731
    for head in (model.lm_head, *model.exit_heads.heads):
        head.register_forward_hook(hook)
    weights = {(vocabulary, 32), (32, vocabulary), (vocabulary,)}
    with Largest(vocabulary, weights) as seen:
        model(ids, labels=ids, **options).loss.backward()
    assert max(rows) <= CHUNK_ROWS
    assert 0 < seen.most <= CHUNK_ROWS * vocabulary


class TestKnownText:
    """Exits on text that is known: as token by token, in one pass."""

    def compare(self, model, lengths=(4, 2, 5), spread=3, **options):
        batch = prompts(lengths)
        options.setdefault("exit_threshold", spreading(model, options.get("exit_criterion", "policy")))
        made = model.generate(
            **batch,
            **options,
            max_new_tokens=7,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert len(made.exit_layers.unique()) >= spread
        time = batch["input_ids"].shape[1]
        labels = made.sequences.clone()
        labels[:, :time] = -100
        mask = torch.cat((batch["attention_mask"], torch.ones(len(labels), 7, dtype=torch.long)), dim=1)
        with torch.no_grad():
            output = model(made.sequences, attention_mask=mask, labels=labels, **options)
        assert torch.equal(output.exit_layers[:, time - 1 : -1], made.exit_layers)
        assert (output.exit_layers[:, : time - 1] == model.config.num_hidden_layers).all()
        expected = torch.stack(made.logits, dim=1)
        torch.testing.assert_close(output.logits[:, time - 1 : -1], expected, **CLOSE)
        losses = nn.functional.cross_entropy(expected.flatten(0, 1), labels[:, time:].flatten(), reduction="none")
        torch.testing.assert_close(output.token_losses, losses, **CLOSE)
        torch.testing.assert_close(output.loss, losses.mean(), **CLOSE)
        assert torch.equal(output.token_predictions, expected.argmax(-1).flatten())
        assert torch.equal(output.token_labels, labels[:, time:].flatten())
        assert output.token_rows.tolist() == [row for row in range(len(labels)) for _ in range(7)]
        assert output.may_exit.tolist() == [step > 0 for _ in labels for step in range(7)]
        return made, output, labels, mask

    @pytest.mark.parametrize("kind", KINDS)
    def test_heads(self, kind):
        self.compare(tiny_llama(exit_head=kind, exit_head_rank=3))

    @pytest.mark.parametrize("criterion", ["policy", "max_probability", "margin", "entropy"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_criteria(self, criterion, implementation):
        model = tiny_llama(3)
        model.set_attn_implementation(implementation)
        self.compare(model, exit_criterion=criterion)

    @pytest.mark.parametrize("options", [{"policy_inputs": "both"}, {"exit_layers": [1, 3]}])
    @pytest.mark.parametrize("first", [None, 2])
    def test_policies_and_layers(self, options, first):
        self.compare(tiny_llama(4, num_hidden_layers=5, **options), min_exit_layer=first, spread=2)

    def test_patience(self):
        self.compare(tiny_llama(5, num_hidden_layers=6), exit_criterion="patience", exit_threshold=1)

    def test_scores(self):
        model = tiny_llama()
        _, output, *_ = self.compare(model)
        thresholds = spreading(model)
        for layers, scores in zip(output.exit_layers.tolist(), output.exit_probabilities, strict=True):
            for column, layer in enumerate(layers):
                asked = scores[column, : layer if layer < 4 else 3]
                if not asked.isnan().all():
                    assert (asked[layer:] == 0).all() or asked.isfinite().all()
                    assert [bool(p > t) for p, t in zip(asked, thresholds, strict=False)] == [
                        number == layer for number in range(1, len(asked) + 1)
                    ]

    def test_all_tokens_may_leave_without_labels(self):
        model = tiny_llama()
        thresholds = spreading(model)
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            output = model(ids, exit_threshold=thresholds)
            for row in range(2):
                slow = SlowRow(model, thresholds)
                for column in range(9):
                    logits, layer = slow.feed(int(ids[row, column]), may_exit=True)
                    assert int(output.exit_layers[row, column]) == layer
                    torch.testing.assert_close(output.logits[row, column], logits, **CLOSE)
        assert len(output.exit_layers.unique()) >= 3 and output.loss is None

    @torch.no_grad()
    def test_kept_logits(self):
        model, thresholds = tiny_llama(), spreading(tiny_llama())
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
        whole = model(ids, exit_threshold=thresholds)
        some = model(ids, exit_threshold=thresholds, logits_to_keep=2)
        torch.testing.assert_close(some.logits, whole.logits[:, -2:])
        assert torch.equal(some.exit_layers, whole.exit_layers)
        some = model(ids, exit_threshold=thresholds, logits_to_keep=torch.tensor([1, 5]))
        torch.testing.assert_close(some.logits, whole.logits[:, [1, 5]])

    @torch.no_grad()
    def test_in_parts(self):
        """A cache carries the text before, with the exits that were taken there."""
        model, thresholds = tiny_llama(), spreading(tiny_llama())
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
        whole, cache = model(ids, exit_threshold=thresholds), DynamicCache(config=model.config)
        parts = [
            model(part, past_key_values=cache, exit_threshold=thresholds, logits_to_keep=0)
            for part in (ids[:, :4], ids[:, 4:])
        ]
        assert parts[1].past_key_values is cache and cache.get_seq_length() == 9
        assert torch.equal(torch.cat([part.exit_layers for part in parts], 1), whole.exit_layers)
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits, **CLOSE)

    @torch.no_grad()
    def test_extremes(self):
        model, (_, batch) = tiny_llama(), texts()
        off = model(**batch, exit_threshold=1.0)
        torch.testing.assert_close(off.loss, stock_twin(model)(**batch).loss)
        assert off.exit_layers.unique().tolist() == [4]
        on = model(**batch, exit_threshold=0.0, min_exit_layer=2)
        assert sorted(on.exit_layers.unique().tolist()) == [2, 4]
        counted = batch["labels"][:, 1:] != -100
        torch.testing.assert_close(
            on.loss, nn.functional.cross_entropy(on.logits[:, :-1][counted], batch["labels"][:, 1:][counted])
        )
