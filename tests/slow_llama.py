# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""An independent LLaMA with exits in plain torch: one row, one token at a time, keys and values in Python lists.

It shares nothing with the package but the weights. `SlowModel` puts it behind transformers' own search loops, without
any cache: every step asks for the whole sequence from its first token, as if it had never been seen.
"""

from __future__ import annotations

import math

import reference
import text_reference
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


SCORES = {
    "max_probability": lambda logits: reference.confidence(logits, "single_label_classification")[0],
    "margin": lambda logits: reference.confidence(logits, "single_label_classification")[1],
    "entropy": lambda logits: -reference.confidence(logits, "single_label_classification")[2],
}


class SlowRow:
    """One sequence. `feed` takes its next token and returns logits and exit layer.

    Args:
        model: weights and config.
        threshold: a number, one per exit, or a function of the number of new tokens that gives either; a token leaves
            at the first exit whose score is greater. None switches exits off.
        skipped_kv: `"copy"` or `"deferred"` (then a token's keys and values are those of the full model).
        min_exit_layer: first layer to leave at.
        criterion: `"policy"`, or a key of `SCORES`.
    """

    def __init__(self, model, threshold=None, skipped_kv="copy", min_exit_layer=None, criterion="policy"):
        self.model, self.config, self.exits = model, model.config, reference.exit_layers(model.config)
        self.options = {
            "threshold": threshold,
            "skipped_kv": skipped_kv,
            "min_exit_layer": min_exit_layer,
            "criterion": criterion,
        }
        self.keys = [[] for _ in range(self.config.num_hidden_layers)]
        self.values = [[] for _ in range(self.config.num_hidden_layers)]

    def copy(self) -> SlowRow:
        """A row that goes on from here on its own."""
        row = SlowRow(self.model, **self.options)
        row.keys, row.values = [list(one) for one in self.keys], [list(one) for one in self.values]
        return row

    def feed(self, token: int, may_exit: bool, new_tokens: int = 1, forced: int | None = None) -> tuple[Tensor, int]:
        """Logits (vocabulary,) and exit layer of the next token, which leaves at `forced` if that is given."""
        position = len(self.keys[0])
        state = self.model.model.embed_tokens.weight[token]
        exit_layer, exit_logits, history = None, None, []
        for number in range(1, self.config.num_hidden_layers + 1):
            left = exit_layer is not None
            state = self._layer(number - 1, state, position, left and self.options["skipped_kv"] == "copy")
            if left or number not in self.exits:
                continue
            index = self.exits.index(number)
            normed = self._exit_state(state, index)
            history.append(text_reference.head(self.model, normed, index))
            late = number >= (self.options["min_exit_layer"] or self.config.min_exit_layer or 1)
            last = number == (forced or self.config.num_hidden_layers)
            if last or (may_exit and late and self._leaves(normed, history, index, new_tokens)):
                exit_layer, exit_logits = number, history[-1]
        return exit_logits, exit_layer

    def _exit_state(self, state, index):
        if index == len(self.exits) - 1:
            return self._norm(state, self.model.model.norm.weight)
        return text_reference.normed(self.model, state, index)

    def _leaves(self, state, history, index, new_tokens) -> bool:
        threshold = self.options["threshold"]
        if callable(threshold):
            threshold = threshold(new_tokens)
        if isinstance(threshold, list):
            threshold = threshold[index]
        if threshold is None:
            return False
        if self.options["criterion"] == "policy":
            return reference.policy_score(self.model, state, history, "single_label_classification", index) > threshold
        if self.options["criterion"] == "entropy":
            threshold = -threshold
        return SCORES[self.options["criterion"]](history[-1]) > threshold

    def _layer(self, index, state, position, keys_only):
        layer, config = self.model.model.layers[index], self.config
        size, heads = layer.self_attn.head_dim, config.num_attention_heads
        normed = self._norm(state, layer.input_layernorm.weight)
        keys = (layer.self_attn.k_proj.weight @ normed).view(-1, size)
        values = (layer.self_attn.v_proj.weight @ normed).view(-1, size)
        self.keys[index].append(self._rotate(keys, position))
        self.values[index].append(values)
        if keys_only:
            return state
        queries = self._rotate((layer.self_attn.q_proj.weight @ normed).view(-1, size), position)
        past_keys, past_values = torch.stack(self.keys[index]), torch.stack(self.values[index])
        outputs = []
        for head in range(heads):
            group = head * len(keys) // heads
            weights = (past_keys[:, group] @ queries[head] / math.sqrt(size)).softmax(0)
            outputs.append(weights @ past_values[:, group])
        state = state + layer.self_attn.o_proj.weight @ torch.cat(outputs)
        normed = self._norm(state, layer.post_attention_layernorm.weight)
        gate = layer.mlp.gate_proj.weight @ normed
        return state + layer.mlp.down_proj.weight @ (gate * gate.sigmoid() * (layer.mlp.up_proj.weight @ normed))

    def _norm(self, state, weight):
        return weight * state / torch.sqrt(state.pow(2).mean() + self.config.rms_norm_eps)

    def _rotate(self, heads, position):
        half = heads.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = position * theta ** (-torch.arange(half).float() / half)
        first, second = heads[:, :half], heads[:, half:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), 1
        )


class SlowModel(LlamaForCausalLM):
    """transformers' search loops around `SlowRow`.

    Args:
        model: weights and config.
        prompt_length: columns of the prompt, padding included; they run at full depth.
        full_depth: further columns that do, such as those of another turn.
        options: those of `SlowRow`.
    """

    def __init__(self, model, prompt_length, full_depth=(), **options):
        super().__init__(model.config)
        self.source, self.prompt_length, self.full_depth, self.options = [model], prompt_length, full_depth, options
        self.known = {}
        self.eval()

    @torch.no_grad()
    def walk(self, tokens: list[int], padding: int) -> tuple[SlowRow, Tensor | None, list[int]]:
        """The row after all its tokens, logits of the last one, and every token's exit layer, padding left out."""
        if len(tokens) == padding:
            return SlowRow(self.source[0], **self.options), None, []
        key = (padding, *tokens)
        if key not in self.known:
            # Only saves time: what comes before the last token does not depend on it.
            row, _, layers = self.walk(tokens[:-1], padding)
            row, new = row.copy(), len(tokens) - self.prompt_length
            may_exit = new > 0 and len(tokens) - 1 not in self.full_depth
            logits, layer = row.feed(tokens[-1], may_exit, new_tokens=new)
            self.known[key] = row, logits, [*layers, layer]
        return self.known[key]

    def forward(self, input_ids, attention_mask=None, **kwargs):
        padding = [0] * len(input_ids) if attention_mask is None else (attention_mask == 0).sum(1).tolist()
        logits = [self.walk(tokens, pad)[1] for tokens, pad in zip(input_ids.tolist(), padding, strict=True)]
        return CausalLMOutputWithPast(logits=torch.stack(logits).unsqueeze(1))


def prompts(lengths, seed: int = 0, vocabulary: int = 60) -> dict[str, Tensor]:
    """Random prompts, padded on the left with an id that must not count."""
    generator = torch.Generator().manual_seed(seed)
    time = max(lengths)
    ids, mask = torch.full((len(lengths), time), 7), torch.zeros(len(lengths), time, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, time - length :] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[row, time - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def spreading(model, criterion: str = "policy", share: float = 0.35, seed: int = 5) -> list[float]:
    """One threshold per exit at which about `share` of the tokens of random texts that reach it leave."""
    ids = torch.randint(3, model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(seed))
    never = 0.0 if criterion == "entropy" else 1.0
    scores = model(ids, exit_criterion=criterion, exit_threshold=never).exit_probabilities.flatten(0, 1)
    remaining, thresholds = torch.ones(len(scores), dtype=torch.bool), []
    for index in range(scores.shape[1] - 1):
        here = scores[remaining, index].double()
        threshold = float(here.quantile(share if criterion == "entropy" else 1 - share))
        thresholds.append(threshold)
        stays = scores[:, index] >= threshold if criterion == "entropy" else scores[:, index] <= threshold
        remaining &= stays
    return [*thresholds, never]


def check_against_slow(model, batch, slow, output, beams: bool = False) -> None:
    """Tokens' exit layers and, without beams, the cache, row by row and column by column."""
    time = batch["input_ids"].shape[1]
    for number, pad in enumerate((batch["attention_mask"] == 0).sum(1).tolist()):
        tokens, layers = output.sequences[number].tolist(), output.exit_layers[number].tolist()
        count = sum(layer > 0 for layer in layers)
        row, _, expected = slow.walk(tokens[: time + count - 1], pad)
        assert layers == expected[time - pad - 1 :] + [0] * (len(layers) - count), number
        if beams:
            continue
        for keys, values, layer in zip(row.keys, row.values, output.past_key_values.layers, strict=True):
            stop = time + count - 1
            for ours, theirs in ((layer.keys, keys), (layer.values, values)):
                torch.testing.assert_close(ours[number, :, pad:stop], torch.stack(theirs, dim=1), rtol=1e-4, atol=1e-4)


def stock(model):
    """The stock model of transformers with a model's weights and defaults of `generate`."""
    other = LlamaForCausalLM(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    other.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return other
